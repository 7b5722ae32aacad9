"""What commands print on stdout, and what other libraries must not."""

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console

from expertcut.cli.options import Format

if TYPE_CHECKING:
    from expertcut.reporting.tables import Table


def print_tables(tables: Iterable["Table"], format: Format) -> None:
    """Prints to stdout, as rich tables or as Markdown."""
    from expertcut.reporting.tables import as_markdown, as_rich

    if format is Format.md:
        print("\n".join(map(as_markdown, tables)), end="")
        return
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for table in tables:
        console.print(as_rich(table))


def quiet() -> None:
    """No progress bars and reports of other libraries between our lines."""
    # Read when datasets is imported, which takes seconds and is done only for its own quizzes.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # errors reach us as exceptions
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
