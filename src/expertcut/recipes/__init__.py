"""`expertcut run`: the stages of a recipe, each skipped where what it made is there and current."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expertcut.commands import UI, SilentUI
from expertcut.errors import RecipeError, SettingsError
from expertcut.settings import FilePath, Settings, option

if TYPE_CHECKING:
    from expertcut.recipes.stage_runs import Outcome


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


def run(settings: RunSettings, ui: UI | None = None) -> "Outcome":
    """Runs what is to be run.

    Raises:
        ExpertcutError: the recipe, or what a stage met, with the stage's name before it.
    """
    from expertcut.recipes.manifest import Ledger
    from expertcut.recipes.recipe_schema import read_bytes, read_recipe
    from expertcut.recipes.stage_runs import RecipeRun

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
    outcome = RecipeRun(recipe, Ledger(folder, read_bytes(file)), settings, ui).all()
    _say(outcome, ui, is_dry=settings.dry_run)
    return outcome


def _say(outcome: "Outcome", ui: UI, *, is_dry: bool) -> None:
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
        from expertcut.recipes.stages import RESULTS
        from expertcut.reporting.eval_tables import result_sentences

        ui.say([], ["", *result_sentences(load_results(outcome.folder / RESULTS))])
    left_over = [
        f"{name} is no longer in the recipe; what it made stays" for name in outcome.left_over
    ]
    ui.say([], left_over)
