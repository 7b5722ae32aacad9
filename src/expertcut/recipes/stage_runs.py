"""What each stage runs: its command, with the settings of its section completed by the recipe."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertcut.commands import eval, heal, merge, profile, prune, publish, report, reweight
from expertcut.commands.common import UI, ModelSettings, QuizSettings
from expertcut.recipes.manifest import RECIPE_FILE
from expertcut.recipes.recipe_schema import HealSection, Recipe, Variant
from expertcut.recipes.stages import PROFILE, REPORT, RESULTS, Stage, variant_folder

if TYPE_CHECKING:
    from expertcut.hub.upload import Published


@dataclass(frozen=True)
class Job:
    """A stage to be run: of which recipe (`text` is its file), in which folder, for whom."""

    recipe: Recipe
    text: bytes
    stage: Stage
    run: Path
    commit: str | None
    ui: UI

    @property
    def variant(self) -> Variant:
        """The variant that the stage makes."""
        return next(v for v in self.recipe.variants if v.name == self.stage.name)

    @property
    def loaded(self) -> dict[str, Any]:
        """How the recipe loads models."""
        return {name: getattr(self.recipe, name) for name in ModelSettings.model_fields}

    @property
    def asked(self) -> dict[str, Any]:
        """The recipe's quiz, its model, and how it is loaded."""
        quiz = {name: getattr(self.recipe, name) for name in QuizSettings.model_fields}
        return {**self.loaded, **quiz, "revision": self.commit or self.recipe.revision}

    @property
    def edited(self) -> dict[str, Any]:
        """What an edit works from and where it goes.

        What is there was made by this recipe, or the run would have stopped before.
        """
        places = {"profile": self.run / PROFILE, "out": self.folder, "force": True}
        return {**self.loaded, "threads": None, **places}

    @property
    def folder(self) -> Path:
        """Where the stage's variant lies."""
        return self.run / variant_folder(self.stage.name)

    @property
    def beside(self) -> dict[str, bytes]:
        """The recipe's copy, to lie beside what was made by it."""
        return {RECIPE_FILE: self.text}

    def checkpoints(self) -> dict[str, Path]:
        """The variants that became a checkpoint, by name; a search may have found nothing."""
        folders = {v.name: self.run / variant_folder(v.name) for v in self.recipe.variants}
        return {name: path for name, path in folders.items() if (path / "config.json").is_file()}


def run_stage(job: Job) -> None:
    """Runs the stage's command."""
    _RUNS[job.stage.kind](job)


def _profile(job: Job) -> None:
    recipe = job.recipe
    own = {"model": recipe.model, "batch_tokens": recipe.batch_tokens, "out": job.run / PROFILE}
    profile.run(recipe.profile.completed(**job.asked, **own), job.ui)


def _show(job: Job) -> None:
    """Prints the profile's tables, and writes them as Markdown, JSON and CSV."""
    from expertcut.checkpoints.output_dir import atomic_dir
    from expertcut.files import write_atomically
    from expertcut.reporting.tables import as_csv, as_markdown
    from expertcut.reporting.views import find_shown

    assert job.recipe.show is not None
    found = find_shown(job.run / PROFILE, job.recipe.show.subjects)
    tables = found.tables()
    written = {
        "tables.md": "\n".join(map(as_markdown, tables)),
        "findings.json": json.dumps(found.json(), indent=1, allow_nan=False) + "\n",
        "experts.csv": as_csv(found.flat()),
    }
    with atomic_dir(job.run / "show", is_forced=True) as folder:
        for name, text in written.items():
            write_atomically(folder / name, text.encode())
    job.ui.say(tables, [])


def _prune(job: Job) -> None:
    assert job.variant.prune is not None
    prune.run(job.variant.prune.completed(**job.edited), job.ui, job.beside)


def _merge(job: Job) -> None:
    assert job.variant.merge is not None
    merge.run(job.variant.merge.completed(**job.edited), job.ui, job.beside)


def _reweight(job: Job) -> None:
    variant = job.variant
    assert variant.reweight is not None
    proof = {"prove": True, **dict(variant.prove)} if variant.prove else {}
    reweight.run(variant.reweight.completed(**job.edited, **proof), job.ui, job.beside)


def _heal(job: Job) -> None:
    """Trains the variant's checkpoint, or goes on where an earlier run was stopped."""
    assert job.variant.heal is not None
    settings = heal_settings(job.recipe, job.variant.heal)
    checkpoint = str(job.run / variant_folder(job.variant.heal.of))
    places = {"checkpoint": checkpoint, "out": job.folder, "force": True}
    heal.run(settings.completed(**job.loaded, **places), job.ui, job.beside)


def heal_settings(recipe: Recipe, section: HealSection) -> HealSection:
    """The section's settings; what it leaves out is the recipe's."""
    eval_quiz, split = section.scored(recipe.quiz, recipe.eval.split if recipe.eval else None)
    given: dict[str, Any] = {
        "shots": recipe.shots if section.shots is None else section.shots,
        "subjects": tuple(section.subjects or ([] if section.quiz else recipe.subjects)),
        "eval_quiz": eval_quiz,
        "eval_split": split,
        "eval_revision": None if section.eval_quiz else recipe.quiz_revision,
        "truncate": recipe.truncate,
    }
    if not section.quiz and not section.text:
        given |= {"quiz": (f"{recipe.quiz}=1",), "quiz_revision": recipe.quiz_revision}
    return section.completed(**given)


def _eval(job: Job) -> None:
    """Scores the model and every checkpoint, run as the profile was."""
    from expertcut.profiling.storage import load_profile

    recipe, made = job.recipe, job.checkpoints()
    assert recipe.eval is not None
    missing = [variant.name for variant in recipe.variants if variant.name not in made]
    job.ui.say([], [f"{name} made no checkpoint, so none is asked" for name in missing])
    measured = load_profile(job.run / PROFILE).info.settings
    given = {**job.asked, "batch_tokens": measured.batch_tokens, "threads": measured.threads}
    models = [recipe.model, *map(str, made.values())]
    settings = recipe.eval.completed(**given, models=models, out=job.run / RESULTS)
    eval.run(settings, job.ui)


def _report(job: Job) -> None:
    report.run(report.ReportSettings(run=job.run), job.ui)


def _publish(job: Job) -> None:
    """A variant's checkpoint, card and page to the Hub; of a variant without one, nothing."""
    from expertcut.files import write_atomically

    recipe, name = job.recipe, job.stage.settings["variant"]
    section = next(p for p in recipe.publish if p.variant == name)
    checkpoint = job.checkpoints().get(name)
    outcome: dict[str, object] = {"repo": section.repo, "url": None, "commit": None}
    if checkpoint is None:
        job.ui.say([], [f"{name} made no checkpoint, so there is none to publish"])
    else:
        if recipe.report:
            write_atomically(checkpoint / REPORT, (job.run / REPORT).read_bytes())
        results = [job.run / RESULTS] if recipe.eval else []
        settings = section.completed(checkpoint=checkpoint, results=results)
        done: Published = publish.run(settings, job.ui)
        outcome |= {"url": done.url, "commit": done.commit}
    (place,) = job.stage.makes
    write_atomically(job.run / place, (json.dumps(outcome, indent=1) + "\n").encode())


_RUNS: dict[str, Callable[[Job], None]] = {
    "profile": _profile,
    "show": _show,
    "prune": _prune,
    "merge": _merge,
    "reweight": _reweight,
    "heal": _heal,
    "eval": _eval,
    "report": _report,
    "publish": _publish,
}
