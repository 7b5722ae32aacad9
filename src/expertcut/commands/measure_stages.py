"""Stages that measure, show and publish: profile, show, eval, report, publish."""

import json
from functools import partial

from expertcut.checkpoints.output_dir import atomic_dir
from expertcut.commands.ui import Job
from expertcut.data import load_quiz
from expertcut.evaluation.evaluate import save, score
from expertcut.evaluation.results import Scored, Scoring
from expertcut.files import write_atomically
from expertcut.hub.upload import Published, PublishOptions
from expertcut.hub.upload import publish as upload
from expertcut.models.load import Source, find_source
from expertcut.profiling.measure import MeasureOptions, check_kinds, measure, perturb, resumed
from expertcut.profiling.statistics import answers
from expertcut.profiling.storage import load_profile
from expertcut.recipes.recipe_schema import PublishSection
from expertcut.recipes.stages import REPORT, RESULTS
from expertcut.reporting.eval_tables import results_table
from expertcut.reporting.page import write
from expertcut.reporting.profile_tables import answered_sentence
from expertcut.reporting.tables import as_csv, as_markdown
from expertcut.reporting.views import find_shown


def profile(job: Job) -> None:
    """Measures the model, going on where an earlier try was stopped."""
    recipe, section, folder = job.recipe, job.recipe.profile, job.profile_folder
    given = MeasureOptions(section.stats, recipe.batch_tokens, recipe.threads)
    load_as, options = resumed(folder, job.load_as(), given)
    (asking,) = job.stage.asks
    quiz = load_quiz(asking.selection(recipe))
    measurement = measure(job.source(), quiz, section.limit, load_as, options)
    kinds = check_kinds(measurement, section.perturb)
    name, total = measurement.moe.source.name, len(quiz)
    job.audience.watch(partial(measurement.run, folder), f"profiling {name}", total, folder)
    for kind in kinds:
        steps = partial(perturb, measurement, kind, folder, load_as)
        job.audience.watch(steps, f"again with {kind}", total, folder)
    found = answers(load_profile(folder))
    job.audience.say([], [answered_sentence(folder, found)])


def show(job: Job) -> None:
    """Prints the profile's tables, and writes them as Markdown, JSON and CSV."""
    assert job.recipe.show is not None
    found = find_shown(job.profile_folder, job.recipe.show.subjects)
    tables = found.tables()
    written = {
        "tables.md": "\n".join(map(as_markdown, tables)),
        "findings.json": json.dumps(found.json(), indent=1, allow_nan=False) + "\n",
        "experts.csv": as_csv(found.flat()),
    }
    with atomic_dir(job.run / "show", is_forced=True) as folder:
        for name, text in written.items():
            write_atomically(folder / name, text.encode())
    job.audience.say(tables, [])


def evaluate(job: Job) -> None:
    """Asks the model and every checkpoint the same questions, run as the profile was."""
    (asking,) = job.stage.asks
    quiz = load_quiz(asking.selection(job.recipe))
    settings = job.profile().info.settings
    options = MeasureOptions("none", settings.batch_tokens, settings.threads)
    scoring = Scoring(quiz, asking.limit, job.load_as(), options)
    folder = (job.run / RESULTS).with_suffix(".chunks")
    scored: list[Scored] = []
    for source in _sources(job):
        steps = partial(score, source, scoring, folder)
        found = job.audience.watch(steps, f"scoring {source.name}", len(quiz), folder)
        scored += [step for step in found if isinstance(step, Scored)]
    outcome = save(scoring, scored, job.run / RESULTS)
    job.audience.say([results_table(outcome)], [])


def _sources(job: Job) -> list[Source]:
    made = job.checkpoints()
    missing = [variant.name for variant in job.recipe.variants if variant.name not in made]
    if missing:
        job.audience.say([], [f"{name} made no checkpoint, so none is asked" for name in missing])
    return [job.source(), *(find_source(str(path)) for path in made.values())]


def report(job: Job) -> None:
    """The page of the run folder."""
    job.audience.say([], [f"written to {write(job.run)}"])


def publish(job: Job) -> None:
    """A variant's checkpoint, card and page to the hub; of a variant without one, nothing."""
    asked = next(p for p in job.recipe.publish if p.variant == job.stage.settings["variant"])
    checkpoint = job.checkpoints().get(asked.variant)
    outcome: dict[str, object] = {"repo": asked.repo, "url": None, "commit": None}
    if checkpoint is None:
        job.audience.say([], [f"{asked.variant} made no checkpoint, so there is none to publish"])
    else:
        if job.recipe.report:
            write_atomically(checkpoint / REPORT, (job.run / REPORT).read_bytes())
        done = upload(checkpoint, asked.repo, _options(job, asked))
        outcome |= {"url": done.url, "commit": done.commit}
        job.audience.say([], [_sentence(done)])
    (place,) = job.stage.makes
    write_atomically(job.run / place, (json.dumps(outcome, indent=1) + "\n").encode())


def _options(job: Job, asked: PublishSection) -> PublishOptions:
    return PublishOptions(
        is_private=asked.private,
        is_dry=asked.dry_run,
        is_forced=asked.force,
        revision=asked.revision,
        results=(job.run / RESULTS,) if job.recipe.eval else (),
    )


def _sentence(done: Published) -> str:
    if done.commit is None:
        return f"the card is written to {done.card}; nothing is uploaded, it would go to {done.url}"
    return f"published to {done.url} (commit {done.commit[:8]})"
