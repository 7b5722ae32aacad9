"""argv in, text out: the one place that parses, prints and sets up logging.

A command imports what is heavy when it runs, so that `--help` and wrong arguments answer at once.
"""

import errno
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from typer.exceptions import TyperException

from expertcut import __version__, recipes
from expertcut.cli.options import add_command
from expertcut.cli.progress import (
    GO_ON,
    Stopped,
    TerminalUI,
    is_first,
    lasting_output,
    terminable,
)
from expertcut.commands import (
    audit,
    eval,
    heal,
    merge,
    profile,
    prune,
    publish,
    report,
    reweight,
    show,
)
from expertcut.errors import ExpertcutError
from expertcut.files import without_secrets
from expertcut.reporting.tables import printable
from expertcut.settings import Settings

INTERRUPTED = 130
# What a disk, its file system or its owner can do to any command at any time.
_MENDABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE, errno.ENOENT, errno.EMFILE, errno.ENOMEM),
    errno.ENAMETOOLONG,
}
_LONGEST = 1000  # characters of a line; a name in a file may have millions

app = typer.Typer(
    help="Find the experts of a MoE language model that matter for a quiz; edit them, and measure.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS: tuple[tuple[str, type[Settings], Callable[..., object]], ...] = (
    ("profile", profile.ProfileSettings, profile.run),
    ("show", show.ShowSettings, show.run),
    ("prune", prune.PruneSettings, prune.run),
    ("merge", merge.MergeSettings, merge.run),
    ("reweight", reweight.ReweightSettings, reweight.run),
    ("heal", heal.HealSettings, heal.run),
    ("audit", audit.AuditSettings, audit.run),
    ("eval", eval.EvalSettings, eval.run),
    ("report", report.ReportSettings, report.run),
    ("publish", publish.PublishSettings, publish.run),
    ("run", recipes.RunSettings, recipes.run),
)


def _with_terminal(run: Callable[..., object]) -> Callable[[Settings], object]:
    return lambda settings: run(settings, TerminalUI())


for _name, _settings, _run in COMMANDS:
    add_command(app, _name, _settings, _with_terminal(_run))


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def _is_out_of_memory(error: Exception) -> bool:
    from expertcut.models.devices import is_out_of_memory

    return is_out_of_memory(error)


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
    except (OSError, RuntimeError, MemoryError) as error:
        fault = _outer_fault(error)
        if fault is None:
            raise
        _stop(fault, 2)


def _outer_fault(error: Exception) -> str | None:
    """What went wrong outside of us, in one line; None for a fault of ours."""
    again = "mend that and run the same command again"
    if isinstance(error, OSError) and error.errno in _MENDABLE:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}: {again}"
    if isinstance(error, MemoryError) or ("torch" in sys.modules and _is_out_of_memory(error)):
        what = str(error).splitlines()[0][:200] if str(error) else "nothing more is known"
        return f"not enough memory ({what}): free some, or give a smaller --batch-tokens"
    return None


def _stop(text: str, status: int, *, is_said: bool = True) -> None:
    if is_said:
        print(f"expertcut: {printable(_shortened(without_secrets(text)))}", file=sys.stderr)
    raise SystemExit(status)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


class HarmlessFormatter(logging.Formatter):
    """A name from a quiz or a model must not steer the terminal that a warning goes to."""

    def format(self, record: logging.LogRecord) -> str:
        """Each line of it, printable."""
        text = without_secrets(super().format(record))
        return "\n".join(map(printable, text.splitlines()))


def main() -> None:
    """The console script."""
    with lasting_output() as out:
        # What the first of several processes warns of, the others would only repeat.
        level = logging.WARNING if is_first() else logging.ERROR
        handler = logging.StreamHandler()
        handler.setFormatter(HarmlessFormatter("%(levelname)s: %(message)s"))
        logging.basicConfig(level=level, handlers=[handler])
        with _faults_in_one_line(), terminable():
            status = app(standalone_mode=False)
            if status == INTERRUPTED:  # typer has caught it
                raise KeyboardInterrupt
            out.check()
    raise SystemExit(status or 0)
