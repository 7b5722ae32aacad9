"""Runs a recipe's stages in order: each is a command, its section completed by the recipe."""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from expertcut import commands
from expertcut.commands import (
    compress,
    dispatch,
    eval,
    heal,
    merge,
    place,
    profile,
    prune,
    publish,
    report,
    reweight,
    route,
    show,
    tracing,
)
from expertcut.errors import ExpertcutError, OutputError, RecipeError
from expertcut.files import write_atomically
from expertcut.recipes.manifest import RECIPE_FILE, Inputs, Ledger, StageRecord, reason
from expertcut.recipes.recipe_schema import KINDS, HealSection, Recipe
from expertcut.recipes.stages import (
    DISPATCH,
    PLACEMENT,
    PROFILE,
    REPORT,
    RESULTS,
    TRACE,
    Stage,
    stages_of,
    variant_folder,
)
from expertcut.settings import Settings

_RESUMED = ("profile", "trace")  # by their commands, which refuse the folder of another run


@dataclass(frozen=True)
class Outcome:
    """The stages, those that ran (or would), and stages of earlier recipes in the folder."""

    stages: tuple[str, ...]
    ran: tuple[str, ...]
    left_over: tuple[str, ...]


class RecipeRun:
    """One run of a recipe."""

    def __init__(
        self, recipe: Recipe, ledger: Ledger, ui: commands.UI, *, start: str | None, is_dry: bool
    ) -> None:
        self.recipe, self.ledger, self.ui = recipe, ledger, ui
        self.folder, self.is_dry = ledger.folder, is_dry
        self.stages = stages_of(recipe)
        self.first = len(self.stages) if start is None else _find_stage(start, self.stages)
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
        why = "--from asks for it" if is_forced else reason(self.folder, record, inputs)
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
        if record is None and stage.kind not in _RESUMED:
            for place in (self.folder / name for name in stage.makes):
                if place.exists():
                    raise OutputError(
                        f"{place} exists and was not made by this recipe: remove it or name "
                        "another --out"
                    )
        inputs = self.inputs
        if stage.reads_model and inputs.commit is None and not Path(self.recipe.model).is_dir():
            from expertcut.models.load import find_source

            inputs.commit = find_source(self.recipe.model, self.recipe.revision).revision
        before = inputs.of(stage, self.outputs)
        is_anew = record is not None and (is_forced or record.inputs != before)
        # What must not be resumed goes; a checkpoint stays until the new one is complete.
        stale = stage.makes if is_anew and stage.kind in _RESUMED else ()
        if is_anew and (is_forced or stage.kind == "heal"):
            stale += stage.keeps
        for name in stale:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.ledger.records[stage.name] = StageRecord(inputs=before)
        self.ledger.save(inputs)
        started = time.monotonic()
        _RUNS[stage.kind](self, stage)
        elapsed_s = time.monotonic() - started
        self.outputs[stage.name] = self.ledger.finish(stage, elapsed_s)
        self.ledger.save(inputs)
        self.ui.say([], [f"[{stage.name}] took {elapsed_s:,.1f} s"])

    def _lock(self) -> None:
        """Keeps other runs out of the folder until this one is done."""
        if self.is_locked:
            return
        from expertcut.profiling.locks import alone  # not needed if all is current

        self.until_done.enter_context(alone(self.folder, "recipe"))
        self.is_locked = True
        self.ledger.check_unchanged()

    def values_of(self, *settings: type[Settings]) -> dict[str, Any]:
        """The recipe's own values of all fields of these settings."""
        return {name: getattr(self.recipe, name) for kind in settings for name in kind.model_fields}

    def scored(self, *, has_quiz: bool) -> dict[str, Any]:
        """The recipe's model, how it is loaded, and its quiz if that is asked."""
        quiz = [commands.QuizSettings] if has_quiz else []
        own = self.values_of(commands.ModelSettings, *quiz)
        return own | {"revision": self.inputs.commit or self.recipe.revision}

    def checkpoints(self) -> dict[str, Path]:
        """Folders of the variants with a checkpoint, by name; a search may find no edit."""
        folders = {v.name: self.folder / variant_folder(v.name) for v in self.recipe.variants}
        return {name: path for name, path in folders.items() if (path / "config.json").is_file()}


def _find_stage(name: str, stages: list[Stage]) -> int:
    """The place of the stage of that name, else of the first of that kind, else RecipeError."""
    names, kinds = [stage.name for stage in stages], [str(stage.kind) for stage in stages]
    for found in (names, kinds):
        if name in found:
            return found.index(name)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
    raise RecipeError(f"--from {name[:80]!a}: the recipe has no such stage: {hint}")


def _profile(run: RecipeRun, _: Stage) -> None:
    recipe = run.recipe
    own = {"model": recipe.model, "batch_tokens": recipe.batch_tokens, "out": run.folder / PROFILE}
    given = run.scored(has_quiz=not recipe.profile.text)
    profile.run(recipe.profile.updated(**given, **own), run.ui)


def _trace(run: RecipeRun, _: Stage) -> None:
    """Runs the model once more, for the experts of every token."""
    recipe = run.recipe
    assert recipe.trace is not None
    texts = recipe.trace.texts_of(recipe)
    own = {"model": recipe.model, "batch_tokens": recipe.batch_tokens, "out": run.folder / TRACE}
    given = run.scored(has_quiz=not texts) | own | {"text": texts}
    tracing.run(recipe.trace.updated(**given), run.ui)


def _place(run: RecipeRun, _: Stage) -> None:
    """Places the experts by the run's trace; an existing folder was made by this recipe."""
    assert run.recipe.place is not None
    given = {"trace": run.folder / TRACE, "out": run.folder / PLACEMENT, "force": True}
    place.run(run.recipe.place.updated(**given), run.ui)


def _show(run: RecipeRun, _: Stage) -> None:
    """Prints the profile's tables, and writes them as Markdown, JSON and CSV."""
    from expertcut.checkpoints.output_dir import atomic_dir

    assert run.recipe.show is not None
    shown = show.run(run.recipe.show.updated(path=run.folder / PROFILE), run.ui)
    with atomic_dir(run.folder / "show", is_forced=True) as folder:
        for name in ("tables.md", "findings.json", "experts.csv"):
            write_atomically(folder / name, show.text_of(shown, name.rpartition(".")[2]).encode())


def _edit(run: RecipeRun, stage: Stage) -> None:
    """Makes the checkpoint of a variant; an existing folder was made by this recipe."""
    variant = next(v for v in run.recipe.variants if v.name == stage.name)
    loaded = run.values_of(commands.ModelSettings)
    given = {**loaded, "out": run.folder / variant_folder(variant.name)}
    section: Any = getattr(variant, variant.kind)
    if variant.heal:
        section = heal_settings(run.recipe, variant.heal)
        given["checkpoint"] = str(run.folder / variant_folder(variant.heal.of))
    elif variant.is_balancing:
        given |= {"trace": run.folder / TRACE}
    else:
        given |= {"threads": None, "profile": [str(run.folder / PROFILE)]}
    if variant.prove:  # `eval` and the page then compare it with the others, helpful or not
        given |= {"prove": True, "force_write": True, **dict(variant.prove)}
    runs: dict[str, Any] = {"prune": prune, "merge": merge, "reweight": reweight}
    runs |= {"route": route, "compress": compress, "heal": heal}
    settings = section.updated(**given, force=True)
    runs[variant.kind].run(settings, run.ui, {RECIPE_FILE: run.ledger.text})


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
    if texts := section.texts_of(recipe):
        given["text"] = texts
    elif not section.quiz:
        given |= {"quiz": (f"{recipe.quiz}=1",), "quiz_revision": recipe.quiz_revision}
    return section.updated(**given)


def _eval(run: RecipeRun, _: Stage) -> None:
    """Scores the model and every checkpoint, run as the profile was."""
    from expertcut.profiling.storage import load_profile

    recipe, made = run.recipe, run.checkpoints()
    assert recipe.eval is not None
    missing = [variant.name for variant in recipe.variants if variant.name not in made]
    run.ui.say([], [f"{name} made no checkpoint, so none is scored" for name in missing])
    measured = load_profile(run.folder / PROFILE).info.settings
    given = run.scored(has_quiz=recipe.has_quiz)
    given |= {"batch_tokens": measured.batch_tokens, "threads": measured.threads}
    models = [recipe.model, *map(str, made.values())]
    eval.run(recipe.eval.updated(**given, models=models, out=run.folder / RESULTS), run.ui)


def _dispatch(run: RecipeRun, _: Stage) -> None:
    """Chooses between the models of eval, and those of other results."""
    assert run.recipe.dispatch is not None
    results = [str(run.folder / RESULTS), *run.recipe.dispatch.results]
    settings = run.recipe.dispatch.updated(results=results, out=run.folder / DISPATCH)
    dispatch.run(settings, run.ui)


def _publish(run: RecipeRun, stage: Stage) -> None:
    recipe, name = run.recipe, stage.settings["variant"]
    section = next(p for p in recipe.publish if p.variant == name)
    checkpoint = run.checkpoints().get(name)
    outcome: dict[str, object] = {"repo": section.repo, "url": None, "commit": None}
    if checkpoint is None:
        run.ui.say([], [f"{name} made no checkpoint, so there is none to publish"])
    else:
        if recipe.report:
            write_atomically(checkpoint / REPORT, (run.folder / REPORT).read_bytes())
        results = [run.folder / RESULTS] if recipe.eval else []
        done = publish.run(section.updated(checkpoint=checkpoint, results=results), run.ui)
        outcome |= {"url": done.url, "commit": done.commit}
    (place,) = stage.makes
    write_atomically(run.folder / place, (json.dumps(outcome, indent=1) + "\n").encode())


_RUNS: dict[str, Callable[[RecipeRun, Stage], object]] = {
    **{"profile": _profile, "show": _show, "eval": _eval, "dispatch": _dispatch, "trace": _trace},
    **{"place": _place, "publish": _publish},
    "report": lambda run, _: report.run(report.ReportSettings(run=run.folder), run.ui),
    **dict.fromkeys(KINDS, _edit),
}
