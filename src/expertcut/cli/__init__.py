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
from expertcut.cli import (
    auditing,
    healing,
    measuring,
    merging,
    pruning,
    publishing,
    recipes,
    reporting,
    tilting,
)
from expertcut.cli.options import command, option
from expertcut.cli.running import GO_ON, Stopped, is_first, terminable
from expertcut.errors import ExpertcutError
from expertcut.reporting.tables import printable

INTERRUPTED = 130

app = typer.Typer(
    help="Which experts of a MoE language model matter for a quiz; cut or tilt them, and measure.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for run in (
    measuring.profile,
    measuring.show,
    command(pruning.Prune),
    merging.merge,
    tilting.reweight,
    command(healing.Heal),
    auditing.audit,
    measuring.eval,
    reporting.report,
    publishing.publish,
    recipes.run,
):
    app.command()(run)


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
        text = error.format_message().replace("Value error, ", "")  # pydantic's, inside typer
        _stop(" ".join(text.split()), 2)
    except Stopped as stopped:
        _stop(str(stopped), stopped.status, is_said=is_first())
    except (typer.Abort, KeyboardInterrupt):
        _stop(GO_ON, INTERRUPTED, is_said=is_first())


def _stop(text: str, status: int, *, is_said: bool = True) -> None:
    if is_said:
        print(f"expertcut: {printable(text)}", file=sys.stderr)
    raise SystemExit(status)


class HarmlessFormatter(logging.Formatter):
    """A name from a quiz or a model must not steer the terminal that a warning goes to."""

    def format(self, record: logging.LogRecord) -> str:
        """Each line of it, printable."""
        return "\n".join(map(printable, super().format(record).splitlines()))


def main() -> None:
    """The console script."""
    # What the first of several processes warns of, the others would only repeat.
    level = logging.WARNING if is_first() else logging.ERROR
    handler = logging.StreamHandler()
    handler.setFormatter(HarmlessFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    with _faults_in_one_line(), terminable():
        status = app(standalone_mode=False)
        if status == INTERRUPTED:  # typer has caught it
            raise KeyboardInterrupt
    raise SystemExit(status or 0)
