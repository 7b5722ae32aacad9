"""`expertcut publish`: a checkpoint's model card, and both to the Hugging Face Hub."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BeforeValidator

from expertcut.commands import SILENT, UI, argument
from expertcut.errors import SettingsError
from expertcut.reporting.tables import Cell, Column, Table, one_line
from expertcut.settings import FilePath, Settings, as_list, like, option

if TYPE_CHECKING:
    from expertcut.hub.upload import Published

_LIKE = like(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", "is not a repository: write OWNER/NAME of the Hub")
Repo = Annotated[str, _LIKE]


class PublishSettings(Settings):
    """Write a checkpoint's model card and upload both to the Hub."""

    examples: ClassVar = (
        "expertcut publish models/half --dry-run",
        "expertcut publish models/half OWNER/NAME --private --results results.json",
        "expertcut publish models/half OWNER/NAME --revision v2",
    )

    checkpoint: FilePath = argument(..., "Checkpoint that prune, merge, reweight or heal wrote.")
    repo: Repo | None = option(
        None, "Repository on the Hub; a dry run needs none.", is_argument=True, metavar="OWNER/NAME"
    )
    results: Annotated[list[FilePath], BeforeValidator(as_list)] = option(
        [],
        "Results file of `eval`; repeatable.  "
        "[default: results.json in or beside the folder, in its run's, and here]",
        metavar="FILE",
        in_recipe=False,
    )
    private: bool = option(False, "Make a new repository private.")
    revision: str | None = option(None, "Branch to upload to; created if absent.")
    force: bool = option(False, "Replace everything in the repository, even another model.")
    dry_run: bool = option(False, "Write only the card, and list the files to upload.")


def run(settings: PublishSettings, ui: UI = SILENT) -> "Published":
    """Writes the card and uploads the folder."""
    if settings.repo is None and not settings.dry_run:
        raise SettingsError("name the repository, as OWNER/NAME, or write only the card: --dry-run")
    ui.quiet()
    from expertcut.hub.upload import publish

    name = re.sub(r"\W+", "-", settings.checkpoint.resolve().name, flags=re.ASCII)
    done = publish(
        settings.checkpoint,
        settings.repo or f"OWNER/{name[:80].strip('-') or 'NAME'}",
        results=settings.results,
        revision=settings.revision,
        is_private=settings.private,
        is_forced=settings.force,
        is_dry=settings.dry_run,
    )
    sizes = {**dict(sorted(done.files.items())), "all": sum(done.files.values())}
    rows: list[list[Cell]] = [[name, size / 1e6] for name, size in sizes.items()]
    table = Table(f"What goes to {done.repo}", (Column("file"), Column("MB", ",.3f")), rows)
    ui.say([table] if done.commit is None else [], [])
    again = ["publish", str(settings.checkpoint), done.repo]
    ui.end(list(_facts(done)), _card(done), *([again] if done.commit is None else []))
    return done


def _facts(done: "Published") -> Iterator[tuple[str, str]]:
    if done.left_out:
        yield "left out", one_line(", ".join(done.left_out))
    if done.gone:
        yield "removed", f"from the repository: {one_line(', '.join(done.gone))}"
    if done.commit is None:
        what = f"{len(done.files)} files of {sum(done.files.values()) / 1e6:,.1f} MB"
        yield "uploaded", f"nothing; without --dry-run {what} would go to {done.url}"
    elif done.is_changed:
        yield "uploaded", f"to {done.url} (commit {done.commit[:8]})"
    else:
        yield "uploaded", f"nothing: {done.url} holds all of this already ({done.commit[:8]})"


def _card(done: "Published") -> str:
    if done.is_card_kept:
        return f"nothing: {done.card} was edited by hand and stays; remove it for a new one"
    here = Path.cwd()
    found = [r.relative_to(here) if r.is_relative_to(here) else r for r in done.results]
    if not found:
        return f"{done.card}, without an evaluation: no results.json of these weights is found"
    return one_line(f"{done.card}, with the evaluation in {' and in '.join(map(str, found))}")
