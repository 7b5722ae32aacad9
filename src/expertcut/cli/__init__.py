"""argv in, text out: the one place that parses, prints and sets up logging.

Stages are imported where they are used, so that `--help` and wrong arguments answer at once.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from typer.exceptions import TyperException

from expertcut import __version__
from expertcut.cli import changing, measuring
from expertcut.cli.options import option
from expertcut.errors import ExpertcutError

app = typer.Typer(
    help="Which experts of a MoE language model matter for a quiz; cut or tilt them, and measure.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    measuring.profile,
    measuring.show,
    changing.prune,
    changing.reweight,
    measuring.eval,
):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, option("Print the version.", "--version")] = False,
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@contextmanager
def _faults_in_one_line() -> Iterator[None]:
    """What a user can mend becomes one line and exit status 2; the rest keeps its traceback."""
    try:
        yield
    except ExpertcutError as error:
        _stop(" ".join(str(error).split()), 2)
    except TyperException as error:
        _stop(" ".join(error.format_message().split()), 2)
    except (typer.Abort, KeyboardInterrupt):
        _stop("interrupted: run the same command again to go on from the last finished chunk", 130)


def _stop(text: str, status: int) -> None:
    print(f"expertcut: {text}", file=sys.stderr)
    raise SystemExit(status)


def main() -> None:
    """The console script."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with _faults_in_one_line():
        status = app(standalone_mode=False)
    raise SystemExit(status or 0)
