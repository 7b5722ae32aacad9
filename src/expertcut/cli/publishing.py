"""The command `publish`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertcut.cli.options import Format, option
from expertcut.cli.output import print_tables, quiet

if TYPE_CHECKING:
    from expertcut.hub.upload import Published


def publish(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that prune or reweight made.")],
    repo: Annotated[str, typer.Argument(help="Where to on the Hub.", metavar="OWNER/NAME")],
    results: Annotated[
        list[Path] | None,
        option("What eval wrote; results.json in or beside the folder without.", "--results"),
    ] = None,
    private: Annotated[bool, option("Make a new repository private.", "--private")] = False,
    revision: Annotated[str | None, option("Branch; made if it is not there.")] = None,
    dry_run: Annotated[
        bool, option("Only write the card, and say what goes.", "--dry-run")
    ] = False,
    force: Annotated[
        bool, option("Replace all that the repository holds, another model too.", "--force")
    ] = False,
) -> None:
    """Write a checkpoint's model card and upload both to the Hub."""
    from huggingface_hub.utils import logging as hub_logging

    from expertcut.hub.upload import PublishOptions, publish

    quiet()
    hub_logging.set_verbosity_error()
    options = PublishOptions(private, dry_run, force, revision, tuple(results or ()))
    _say(publish(checkpoint, repo, options))


def _say(done: "Published") -> None:
    """What was done, or would be, in words."""
    from expertcut.reporting.tables import one_line

    if done.commit is None:
        _print_files(done)
    if done.is_card_kept:
        print(f"{done.card} was edited by hand and stays; remove it for a new one")
    else:
        counts = {0: "without an evaluation", 1: "with an evaluation"}
        what = counts.get(done.n_results, f"with {done.n_results} evaluations")
        print(f"the card is written to {done.card}, {what}")
    if done.left_out:
        print(f"left out: {one_line(', '.join(done.left_out))}")
    if done.gone:
        print(f"removed there: {one_line(', '.join(done.gone))}")
    if done.commit is None:
        print(f"nothing is uploaded; without --dry-run it would go to {done.url}")
    elif done.is_changed:
        print(f"published to {done.url} (commit {done.commit[:8]})")
    else:
        print(f"{done.url} holds all of this already (commit {done.commit[:8]})")


def _print_files(done: "Published") -> None:
    from expertcut.reporting.tables import Cell, Column, Table

    rows: list[list[Cell]] = [[name, size / 1e6] for name, size in sorted(done.files.items())]
    rows.append(["all", sum(done.files.values()) / 1e6])
    columns = (Column("file"), Column("MB", ",.3f"))
    print_tables([Table(f"What goes to {done.repo}", columns, rows)], Format.table)
