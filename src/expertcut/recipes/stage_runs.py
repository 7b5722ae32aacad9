"""A recipe's stages in order, each run where it is due.

A stage runs its command, with the settings of its section completed by the recipe.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertcut.commands import (
    UI,
    ModelSettings,
    QuizSettings,
    eval,
    heal,
    merge,
    profile,
    prune,
    publish,
    report,
    reweight,
)
from expertcut.errors import ExpertcutError, OutputError
from expertcut.recipes import RunSettings
from expertcut.recipes.manifest import RECIPE_FILE, Inputs, Ledger, StageRecord, reason
from expertcut.recipes.recipe_schema import HealSection, Recipe, Variant
from expertcut.recipes.stages import (
    PROFILE,
    REPORT,
    RESULTS,
    Stage,
    find_stage,
    stages_of,
    variant_folder,
)

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


@dataclass(frozen=True)
class Outcome:
    """Where the run lies, its stages, those that ran (or would), and what earlier recipes left."""

    folder: Path
    stages: tuple[str, ...]
    ran: tuple[str, ...]
    left_over: tuple[str, ...]


class RecipeRun:
    """One run of a recipe."""

    def __init__(self, recipe: Recipe, ledger: Ledger, settings: RunSettings, ui: UI) -> None:
        self.recipe, self.ledger, self.ui = recipe, ledger, ui
        self.is_dry = settings.dry_run
        self.stages = stages_of(recipe)
        self.first = len(self.stages)  # of those that are run whatever is there
        if settings.start is not None:
            self.first = find_stage(settings.start, self.stages)
        self.inputs = Inputs(recipe, ledger.before, is_anew=self.first == 0)
        self.outputs: dict[str, str | None] = {}
        self.ran: list[str] = []
        self.is_held = False

    def all(self) -> Outcome:
        """Every stage in its turn."""
        with ExitStack() as self.until_done:
            for index, stage in enumerate(self.stages):
                with _named(stage):
                    self._turn(stage, is_asked=index >= self.first)
            if not self.is_dry and not self.ledger.is_saved(self.inputs):
                self._hold()
                self.ledger.save(self.inputs)
        names = tuple(stage.name for stage in self.stages)
        left_over = tuple(name for name in self.ledger.records if name not in names)
        return Outcome(self.ledger.folder, names, tuple(self.ran), left_over)

    def _turn(self, stage: Stage, *, is_asked: bool) -> None:
        record = self.ledger.records.get(stage.name)
        inputs = self.inputs.of(stage, self.outputs)
        why = reason(self.ledger.folder, stage, record, inputs)
        why = "--from asks for it" if is_asked else why
        self.ui.stage(stage.name, why, is_dry=self.is_dry)
        if not why and record is not None:
            self.outputs[stage.name] = record.output
            self.ledger.keep(stage)
            return
        self.ran.append(stage.name)
        self.outputs[stage.name] = None
        if not self.is_dry:
            self._act(stage, record, is_asked=is_asked)

    def _act(self, stage: Stage, record: StageRecord | None, *, is_asked: bool) -> None:
        self._hold()
        self._refuse_what_is_there(stage, record)
        if stage.reads_model:
            self._find_commit()
        inputs = self.inputs.of(stage, self.outputs)
        if record is not None:
            self._clear(stage, record, inputs, is_asked=is_asked)
        self.ledger.begin(stage, inputs)
        self.ledger.save(self.inputs)
        about = (self.recipe, self.ledger.text, stage, self.ledger.folder, self.inputs.commit)
        started = time.monotonic()
        run_stage(Job(*about, self.ui))
        elapsed_s = time.monotonic() - started
        self.outputs[stage.name] = self.ledger.finish(stage, elapsed_s)
        self.ledger.save(self.inputs)
        self.ui.stage_done(stage.name, elapsed_s)

    def _hold(self) -> None:
        """From now on until it is done this run alone changes the folder."""
        if self.is_held:
            return
        from expertcut.profiling.locks import alone  # with numpy, else not needed

        self.until_done.enter_context(alone(self.ledger.folder, "recipe"))
        self.is_held = True
        self.ledger.check_unchanged()

    def _refuse_what_is_there(self, stage: Stage, record: StageRecord | None) -> None:
        if record is not None or stage.kind == "profile":  # which is resumed, or refused there
            return
        for place in (self.ledger.folder / name for name in stage.makes):
            if place.exists():
                raise OutputError(
                    f"{place} is there and was not made by this recipe: remove it or name another "
                    "--out"
                )

    def _find_commit(self) -> None:
        """What a branch of the hub means from now on, in this run folder."""
        if self.inputs.commit is None and not Path(self.recipe.model).is_dir():
            from expertcut.models.load import find_source

            self.inputs.commit = find_source(self.recipe.model, self.recipe.revision).revision

    def _clear(
        self, stage: Stage, record: StageRecord, inputs: Mapping[str, Any], *, is_asked: bool
    ) -> None:
        """What must not be gone on from; a checkpoint stays until the new one is complete."""
        stale: list[str] = []
        if stage.kind == "profile" and (is_asked or record.inputs != inputs):
            stale += stage.makes
        if is_asked or (stage.kind == "heal" and record.inputs != inputs):
            stale += stage.keeps
        for name in stale:
            shutil.rmtree(self.ledger.folder / name, ignore_errors=True)


@contextmanager
def _named(stage: Stage) -> Iterator[None]:
    """Errors say at which stage they came."""
    try:
        yield
    except ExpertcutError as error:
        raise type(error)(f"{stage.name}: {error}") from error
