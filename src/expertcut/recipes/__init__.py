"""`expertcut run`: runs the stages of a recipe that are not current."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expertcut.commands import SILENT, UI
from expertcut.errors import RecipeError, SettingsError
from expertcut.settings import FilePath, Settings, option

if TYPE_CHECKING:
    from expertcut.recipes.recipe_schema import Recipe
    from expertcut.recipes.stage_runs import Outcome


class RunSettings(Settings):
    """Run the stages of a recipe that are not current."""

    examples: ClassVar = (
        "expertcut run recipes/quickstart.yaml",
        "expertcut run recipes/quickstart.yaml --dry-run",
        "expertcut run recipes/quickstart.yaml --from eval",
    )

    recipe: FilePath = option(..., "Recipe: a YAML file, as those in recipes/.", is_argument=True)
    out: FilePath | None = option(
        None, "Folder of the run.  [default: out of the recipe, else results/NAME]"
    )
    dry_run: bool = option(False, "Print which stages would run, and why.")
    start: str | None = option(
        None, "Run this stage and all after it, even if current.",
        flags=("--from",), metavar="STAGE",
    )  # fmt: skip
    trust_remote_code: bool = option(False, "Run code that comes with a checkpoint.")
    confirm_run_unsafe_code: bool = option(
        False, "Run tasks that execute what a model writes, and code beside their YAMLs."
    )


def run(settings: RunSettings, ui: UI = SILENT) -> "Outcome":
    """Runs the stages that are not current; errors of a stage begin with its name."""
    from expertcut.recipes.manifest import Ledger
    from expertcut.recipes.recipe_schema import read_bytes, read_recipe
    from expertcut.recipes.stage_runs import RecipeRun

    file = settings.recipe
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
    if (why := _runs_code(recipe)) and not settings.confirm_run_unsafe_code:
        raise RecipeError(
            f"{file} {why}: read it, and if you trust it add --confirm-run-unsafe-code, in a "
            "sandbox"
        )
    folder = settings.out or Path(recipe.out or Path("results") / file.stem)
    ledger, start = Ledger(folder, read_bytes(file)), settings.start
    outcome = RecipeRun(recipe, ledger, ui, start=start, is_dry=settings.dry_run).all()
    n_ran, n_stages = len(outcome.ran), len(outcome.stages)
    if n_ran:
        text = f"{n_ran} of {n_stages} stages {'would run' if settings.dry_run else 'ran'}"
    else:
        again = f"--from {outcome.stages[0]} runs them again"
        text = f"nothing to do, all {n_stages} stages are current ({again})"
    ui.say([], [f"{folder}: {text}"])
    if n_ran and not settings.dry_run and "eval" in outcome.stages:
        from expertcut.evaluation.results import QuizResults, load_results
        from expertcut.recipes.stages import RESULTS
        from expertcut.reporting.eval_tables import part_facts, result_sentences
        from expertcut.reporting.tables import labelled

        results = load_results(folder / RESULTS)
        said = result_sentences(results) if isinstance(results, QuizResults) else []
        ui.say([], ["", *said, *(labelled(*fact) for fact in part_facts(results))])
    ui.say([], [f"{name} is no longer in the recipe; its files stay" for name in outcome.left_over])
    return outcome


def _runs_code(recipe: "Recipe") -> str:
    """Which code other than a model's the recipe asks to run; empty if none."""
    if recipe.eval is None:
        return ""
    if recipe.eval.confirm_run_unsafe_code:
        return "asks to run what the models write"
    folder = recipe.eval.include_path
    code = next(iter(sorted(folder.rglob("*.py"))), None) if folder else None
    return f"asks to run {code}" if code else ""
