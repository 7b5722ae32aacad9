"""A recipe's stages in order: each skipped where what it made is there and current, else run."""

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from expertcut.commands.common import UI, SilentUI
from expertcut.errors import ExpertcutError, OutputError, RecipeError, SettingsError
from expertcut.recipes.loader import read_bytes, read_recipe
from expertcut.recipes.manifest import Inputs, Ledger, StageRecord, reason
from expertcut.recipes.recipe_schema import Recipe
from expertcut.recipes.stage_runs import Job, run_stage
from expertcut.recipes.stages import RESULTS, Stage, find_stage, stages_of
from expertcut.settings import FilePath, Settings, option


class RunSettings(Settings):
    """Run a recipe: all stages, each only where it is due."""

    examples: ClassVar = (
        "expertcut run recipes/quickstart.yaml",
        "expertcut run recipes/quickstart.yaml --dry-run",
        "expertcut run recipes/quickstart.yaml --from eval",
    )

    recipe: FilePath = option(..., "YAML file, as in recipes/.", is_argument=True)
    out: FilePath | None = option(
        None, "Folder of the run.  [default: as the recipe says, else results/NAME]"
    )
    dry_run: bool = option(False, "Print what would run, and why.")
    start: str | None = option(
        None, "Run this stage and all after it, current or not.",
        flags=("--from",), metavar="STAGE",
    )  # fmt: skip
    trust_remote_code: bool = option(False, "Run code that comes with a checkpoint.")


@dataclass(frozen=True)
class Outcome:
    """Where the run lies, its stages, those that ran (or would), and what earlier recipes left."""

    folder: Path
    stages: tuple[str, ...]
    ran: tuple[str, ...]
    left_over: tuple[str, ...]


def run(settings: RunSettings, ui: UI | None = None) -> Outcome:
    """Runs what is to be run.

    Raises:
        ExpertcutError: the recipe, or what a stage met, with the stage's name before it.
    """
    ui, file = ui or SilentUI(), settings.recipe
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise SettingsError(
            "a recipe runs in one process: let several fill its profile with `expertcut profile "
            "--out RUN/profile` first, then run the recipe, which goes on from there"
        )
    recipe = read_recipe(file)
    if recipe.trust_remote_code and not settings.trust_remote_code:
        raise RecipeError(
            f"{file} asks to run code that comes with {recipe.model}: read it, and if you trust it "
            "add --trust-remote-code"
        )
    folder = settings.out or Path(recipe.out or Path("results") / file.stem)
    outcome = _Running(recipe, Ledger(folder, read_bytes(file)), settings, ui).all()
    _say(outcome, ui, is_dry=settings.dry_run)
    return outcome


def _say(outcome: Outcome, ui: UI, *, is_dry: bool) -> None:
    """What ran, and how well each evaluated model did."""
    n_ran, n_stages = len(outcome.ran), len(outcome.stages)
    if n_ran:
        verb = "would run" if is_dry else "ran"
        ui.say([], [f"{outcome.folder}: {n_ran} of {n_stages} stages {verb}"])
    else:
        again = f"--from {outcome.stages[0]} runs them again"
        current = f"nothing to do, all {n_stages} stages are current ({again})"
        ui.say([], [f"{outcome.folder}: {current}"])
    if n_ran and not is_dry and "eval" in outcome.stages:
        from expertcut.evaluation.results import load_results
        from expertcut.reporting.eval_tables import result_sentences

        ui.say([], ["", *result_sentences(load_results(outcome.folder / RESULTS))])
    left_over = [
        f"{name} is no longer in the recipe; what it made stays" for name in outcome.left_over
    ]
    ui.say([], left_over)


class _Running:
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
