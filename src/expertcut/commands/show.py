"""`expertcut show`: print what another command wrote."""

import json
from typing import TYPE_CHECKING, ClassVar, Literal

from expertcut.commands import SILENT, UI, JudgedSettings, argument
from expertcut.errors import OutputError
from expertcut.reporting.tables import as_csv, as_markdown
from expertcut.settings import FilePath, option

if TYPE_CHECKING:
    from expertcut.reporting.views import Shown


class ShowSettings(JudgedSettings):
    """Print what another command wrote."""

    examples: ClassVar = (
        "expertcut show profiles/mine",
        "expertcut show profiles/mine --tables",
        "expertcut show results.json --format csv",
    )

    path: FilePath = argument(
        ..., "Profile, plan, checkpoint, results, sweep, audit or folder of a run."
    )
    format: Literal["table", "json", "csv", "md"] = option(
        "table", "Output format.", in_recipe=False
    )
    tables: bool = option(
        False, "Print the paper's tables of a profile too; json, csv and md ignore this.",
        in_recipe=False,
    )  # fmt: skip
    subjects: bool = option(False, "Show each subject of a profile too; json always does.")
    criteria: bool = option(
        False, "Show how each criterion ranks a profile's experts, and how far they agree.",
        in_recipe=False,
    )  # fmt: skip


def run(settings: ShowSettings, ui: UI = SILENT) -> "Shown":
    """Prints the headline and tables of the file or folder."""
    if not settings.path.exists():  # refused before anything heavy is imported
        raise OutputError(f"nothing to show in {settings.path}: it does not exist")
    others = dict.fromkeys((".html", ".htm"), "a page of report: open it in a browser")
    others[".jsonl"] = "a file of questions (JSON lines): show prints profiles, plans and results"
    if kind := others.get(settings.path.suffix.lower()):
        raise OutputError(f"{settings.path} is {kind}")
    from expertcut.reporting.views import find_shown

    shown = find_shown(settings.path, settings.subjects, settings.criteria, settings.margin / 100)
    if settings.format == "table":
        ui.say([], headline := shown.headline())
        is_whole = settings.tables or settings.subjects or not headline
        tables = [t.narrow(unless=settings.wide) for t in (shown.tables() if is_whole else ())]
        ui.say([table for table in tables if table.columns], shown.sentences())
    else:
        ui.text(text_of(shown, settings.format))
    return shown


def text_of(shown: "Shown", form: str) -> str:
    """The tables as `json`, `csv` or `md`."""
    if form == "json":
        return json.dumps(shown.json(), indent=1, allow_nan=False) + "\n"
    return as_csv(shown.flat()) if form == "csv" else "\n".join(map(as_markdown, shown.tables()))
