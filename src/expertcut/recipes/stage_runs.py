"""Runs a recipe's stages in order: each is a command, its section completed by the recipe."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Job:
    """A stage to run: its recipe (`text` is the file), the run folder, the model's commit."""

    recipe: Recipe
    text: bytes
    stage: Stage
    run: Path
    commit: str | None
    ui: UI

    @property
    def variant(self) -> Variant:
        """The variant of the stage."""
        return next(v for v in self.recipe.variants if v.name == self.stage.name)

    @property
    def loaded(self) -> dict[str, Any]:
        """How the recipe loads models."""
        return {name: getattr(self.recipe, name) for name in ModelSettings.model_fields}

    @property
    def scored(self) -> dict[str, Any]:
        """The recipe's quiz, its model, and how it is loaded."""
        quiz = {name: getattr(self.recipe, name) for name in QuizSettings.model_fields}
        return {**self.loaded, **quiz, "revision": self.commit or self.recipe.revision}

    @property
    def folder(self) -> Path:
        """The folder of the stage's variant."""
        return self.run / variant_folder(self.stage.name)

    def checkpoints(self) -> dict[str, Path]:
        """Folders of the variants with a checkpoint, by name; a search may find no edit."""
        folders = {v.name: self.run / variant_folder(v.name) for v in self.recipe.variants}
        return {name: path for name, path in folders.items() if (path / "config.json").is_file()}


def _profile(job: Job) -> None:
    recipe = job.recipe
    own = {"model": recipe.model, "batch_tokens": recipe.batch_tokens, "out": job.run / PROFILE}
    profile.run(recipe.profile.completed(**job.scored, **own), job.ui)


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


def _edit(job: Job) -> None:
    variant = job.variant
    runs: dict[str, Any] = {"prune": prune.run, "merge": merge.run, "reweight": reweight.run}
    given = {**job.loaded, "threads": None, "profile": job.run / PROFILE}
    given |= {"out": job.folder, "force": True}  # an existing folder was made by this recipe
    given |= {"prove": True, **dict(variant.prove)} if variant.prove else {}
    settings = getattr(variant, variant.kind).completed(**given)
    runs[variant.kind](settings, job.ui, {RECIPE_FILE: job.text})


def _heal(job: Job) -> None:
    assert job.variant.heal is not None
    settings = heal_settings(job.recipe, job.variant.heal)
    checkpoint = str(job.run / variant_folder(job.variant.heal.of))
    places = {"checkpoint": checkpoint, "out": job.folder, "force": True}
    heal.run(settings.completed(**job.loaded, **places), job.ui, {RECIPE_FILE: job.text})


def heal_settings(recipe: Recipe, section: HealSection) -> HealSection:
    """The section's settings, completed by the recipe's."""
    eval_quiz, split = section.scored(recipe)
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
    job.ui.say([], [f"{name} made no checkpoint, so none is scored" for name in missing])
    measured = load_profile(job.run / PROFILE).info.settings
    given = {**job.scored, "batch_tokens": measured.batch_tokens, "threads": measured.threads}
    models = [recipe.model, *map(str, made.values())]
    settings = recipe.eval.completed(**given, models=models, out=job.run / RESULTS)
    eval.run(settings, job.ui)


def _publish(job: Job) -> None:
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
        done = publish.run(settings, job.ui)
        outcome |= {"url": done.url, "commit": done.commit}
    (place,) = job.stage.makes
    write_atomically(job.run / place, (json.dumps(outcome, indent=1) + "\n").encode())


_RUNS: dict[str, Callable[[Job], object]] = {
    "profile": _profile,
    "show": _show,
    **dict.fromkeys(("prune", "merge", "reweight"), _edit),
    "heal": _heal,
    "eval": _eval,
    "report": lambda job: report.run(report.ReportSettings(run=job.run), job.ui),
    "publish": _publish,
}


@dataclass(frozen=True)
class Outcome:
    """The stages, those that ran (or would), and stages of earlier recipes in the folder."""

    stages: tuple[str, ...]
    ran: tuple[str, ...]
    left_over: tuple[str, ...]


class RecipeRun:
    """One run of a recipe."""

    def __init__(
        self, recipe: Recipe, ledger: Ledger, ui: UI, *, start: str | None, is_dry: bool
    ) -> None:
        self.recipe, self.ledger, self.ui = recipe, ledger, ui
        self.is_dry = is_dry
        self.stages = stages_of(recipe)
        self.first = len(self.stages) if start is None else find_stage(start, self.stages)
        self.inputs = Inputs(recipe, ledger.before, is_anew=self.first == 0)
        self.outputs: dict[str, str | None] = {}
        self.ran: list[str] = []
        self.is_locked = False

    def all(self) -> Outcome:
        """Runs every stage that is not current, and those from `first` on."""
        with ExitStack() as self.until_done:
            for index, stage in enumerate(self.stages):
                try:
                    self._run_if_due(stage, is_forced=index >= self.first)
                except ExpertcutError as error:
                    raise type(error)(f"{stage.name}: {error}") from error
            if not self.is_dry and not self.ledger.is_saved(self.inputs):
                self._lock()
                self.ledger.save(self.inputs)
        names = tuple(stage.name for stage in self.stages)
        left_over = tuple(name for name in self.ledger.records if name not in names)
        return Outcome(names, tuple(self.ran), left_over)

    def _run_if_due(self, stage: Stage, *, is_forced: bool) -> None:
        record = self.ledger.records.get(stage.name)
        inputs = self.inputs.of(stage, self.outputs)
        why = reason(self.ledger.folder, record, inputs)
        why = "--from asks for it" if is_forced else why
        runs = f"[{stage.name}] would run" if self.is_dry else f"\n[{stage.name}] runs"
        self.ui.say([], [f"{runs}: {why}" if why else f"[{stage.name}] is current"])
        if not why and record is not None:
            self.outputs[stage.name] = record.output
            self.ledger.keep(stage)
            return
        self.ran.append(stage.name)
        self.outputs[stage.name] = None
        if not self.is_dry:
            self._run(stage, record, is_forced=is_forced)

    def _run(self, stage: Stage, record: StageRecord | None, *, is_forced: bool) -> None:
        self._lock()
        folder, inputs = self.ledger.folder, self.inputs
        if record is None and stage.kind != "profile":  # which resumes, or refuses the folder
            for place in (folder / name for name in stage.makes):
                if place.exists():
                    raise OutputError(
                        f"{place} exists and was not made by this recipe: remove it or name "
                        "another --out"
                    )
        if stage.reads_model and inputs.commit is None and not Path(self.recipe.model).is_dir():
            from expertcut.models.load import find_source

            inputs.commit = find_source(self.recipe.model, self.recipe.revision).revision
        before = inputs.of(stage, self.outputs)
        if record is not None:
            self._remove_stale(stage, record, before, is_forced=is_forced)
        self.ledger.records[stage.name] = StageRecord(inputs=before)
        self.ledger.save(inputs)
        started = time.monotonic()
        job = Job(self.recipe, self.ledger.text, stage, folder, inputs.commit, self.ui)
        _RUNS[stage.kind](job)
        elapsed_s = time.monotonic() - started
        self.outputs[stage.name] = self.ledger.finish(stage, elapsed_s)
        self.ledger.save(self.inputs)
        self.ui.say([], [f"[{stage.name}] took {elapsed_s:,.1f} s"])

    def _lock(self) -> None:
        """Keeps other runs out of the folder until this one is done."""
        if self.is_locked:
            return
        from expertcut.profiling.locks import alone  # with numpy, else not needed

        self.until_done.enter_context(alone(self.ledger.folder, "recipe"))
        self.is_locked = True
        self.ledger.check_unchanged()

    def _remove_stale(
        self, stage: Stage, record: StageRecord, inputs: Mapping[str, Any], *, is_forced: bool
    ) -> None:
        """Removes what must not be resumed; a checkpoint stays until the new one is complete."""
        stale: list[str] = []
        if stage.kind == "profile" and (is_forced or record.inputs != inputs):
            stale += stage.makes
        if is_forced or (stage.kind == "heal" and record.inputs != inputs):
            stale += stage.keeps
        for name in stale:
            shutil.rmtree(self.ledger.folder / name, ignore_errors=True)
