"""`expertcut report`: a page with every table and figure of a run."""

from pathlib import Path
from typing import ClassVar

from expertcut.commands import SILENT, UI, argument, output_option
from expertcut.errors import OutputError
from expertcut.settings import FilePath, Settings


class ReportSettings(Settings):
    """Write report.html, a page with every table and figure."""

    examples: ClassVar = (
        "expertcut report results/run",
        "expertcut report profiles/mine",
        "expertcut report . --out page.html",
    )

    run: FilePath = argument(..., "Folder of a run, profile, checkpoint or results file.")
    out: FilePath | None = output_option(
        None, "Page to write, with its figures beside it.  [default: report.html in RUN]",
        metavar="FILE.html",
    )  # fmt: skip


def run(settings: ReportSettings, ui: UI = SILENT) -> Path:
    """Writes the page and its figures; returns the page."""
    if not settings.run.exists():  # refused before anything heavy is imported
        raise OutputError(f"{settings.run} is not there: name the folder of a run")
    if settings.run.suffix == ".jsonl":
        raise OutputError(f"{settings.run} is a file of questions (JSON lines): name a run")
    from expertcut.reporting.page import write

    page = write(settings.run, settings.out)
    ui.end([], f"{page}, its figures in {page.with_suffix('')}/")
    return page
