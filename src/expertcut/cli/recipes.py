"""The command `run`."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from expertcut.cli.options import Format, TrustRemoteCode, option
from expertcut.cli.output import print_tables, quiet
from expertcut.cli.running import bar, watched
from expertcut.errors import SettingsError

if TYPE_CHECKING:
    from expertcut.commands.run_recipe import Outcome
    from expertcut.recipes.stages import Stage
    from expertcut.reporting.tables import Table
    from expertcut.scoring.passes import OnPass

T = TypeVar("T")


def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, as in recipes/.")],
    out: Annotated[
        Path | None, option("The run's folder; as the recipe says, else results/<its name>.")
    ] = None,
    dry_run: Annotated[bool, option("Only say what would run, and why.", "--dry-run")] = False,
    start: Annotated[
        str | None, option("Run this stage and all after it, whatever is there.", "--from")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Run a recipe: all stages, each only where it is due."""
    from expertcut.commands.run_recipe import RunOptions
    from expertcut.commands.run_recipe import run as run_recipe

    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise SettingsError(
            "a recipe runs in one process: let several fill its profile with `expertcut profile "
            "--out RUN/profile` first, then run the recipe, which goes on from there"
        )
    outcome = run_recipe(recipe, RunOptions(out, start, dry_run, trust_remote_code), _Reader())
    print(_summary(outcome, is_dry=dry_run))
    if outcome.ran and not dry_run and "eval" in outcome.stages:
        _print_results(outcome.folder)
    for name in outcome.left_over:
        print(f"{name} is no longer in the recipe; what it made stays")


def _summary(outcome: "Outcome", *, is_dry: bool) -> str:
    n_ran, n_stages = len(outcome.ran), len(outcome.stages)
    if not n_ran:
        again = f"--from {outcome.stages[0]} runs them again"
        return f"{outcome.folder}: nothing to do, all {n_stages} stages are current ({again})"
    verb = "would run" if is_dry else "ran"
    return f"{outcome.folder}: {n_ran} of {n_stages} stages {verb}"


def _print_results(folder: Path) -> None:
    """Prints a sentence for each evaluated model."""
    from expertcut.evaluation.results import load_results
    from expertcut.recipes.stages import RESULTS
    from expertcut.reporting.eval_tables import result_sentences

    print()
    for sentence in result_sentences(load_results(folder / RESULTS)):
        print(sentence)


class _Reader:
    """Someone at a terminal, or at what it is piped to."""

    def say(self, tables: "Sequence[Table]", sentences: Sequence[str]) -> None:
        """Tables and sentences, as the commands print them."""
        if tables:
            print_tables(tables, Format.table)
        for sentence in sentences:
            print(sentence, flush=True)

    def watch(
        self, run: "Callable[[OnPass], Iterator[T]]", what: str, total: int, where: Path
    ) -> list[T]:
        """A line of progress on stderr."""
        return watched(run, what, total, where)

    def parts(self, what: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """A bar on stderr."""
        return bar(what)

    def plan(self, stage: "Stage", why: str, *, is_dry: bool) -> None:
        """One line per stage."""
        if not why:
            print(f"[{stage.name}] is current", flush=True)
        elif is_dry:
            print(f"[{stage.name}] would run: {why}", flush=True)
        else:
            print(f"\n[{stage.name}] runs: {why}", flush=True)
            quiet()

    def done(self, stage: "Stage", elapsed_s: float) -> None:
        """How long it took."""
        print(f"[{stage.name}] took {elapsed_s:,.1f} s", flush=True)
