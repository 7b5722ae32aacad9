"""The command that makes a page of what the others wrote: `report`."""

from pathlib import Path
from typing import Annotated

import typer

from expertcut.cli.options import option


def report(
    run: Annotated[
        Path, typer.Argument(help="A run's folder, a profile, a checkpoint or results.")
    ],
    out: Annotated[
        Path | None, option("The page; figures go into a folder beside it.", metavar="FILE.html")
    ] = None,
) -> None:
    """Write report.html, a page with every table and figure."""
    from expertcut.reporting.page import write

    page = write(run, out)
    print(f"written to {page}, its figures to {page.with_suffix('')}/")
