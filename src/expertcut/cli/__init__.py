"""The command line: parses, prints and sets up logging; heavy imports wait for the command."""

import errno
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated

import typer
from typer.exceptions import TyperException

from expertcut import __version__, recipes
from expertcut.cli.options import PanelGroup, add_command
from expertcut.cli.progress import (
    ENDED,
    Stopped,
    TerminalUI,
    is_first,
    is_heard,
    is_left_alone,
    lasting_output,
    terminable,
)
from expertcut.commands import (
    audit,
    compress,
    demo,
    dispatch,
    eval,
    heal,
    merge,
    place,
    profile,
    prune,
    publish,
    report,
    reweight,
    route,
    show,
    sweep,
    tracing,
)
from expertcut.errors import ExpertcutError
from expertcut.files import without_secrets
from expertcut.reporting.tables import printable, wrapped
from expertcut.settings import Settings

_INTERRUPTED = 130
_MENDABLE = {  # faults of a disk, its file system or its permissions
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE, errno.ENOENT, errno.EMFILE, errno.ENOMEM),
    errno.ENAMETOOLONG,
}
_IS_MISSING = re.compile(
    "no such |no profile in|no trace in|nothing to show in|is not there|No such file"
)
_MAX_LINE = 1000  # characters; a name in a file may have millions

app = typer.Typer(
    cls=PanelGroup,
    help="Find the experts of a MoE language model that matter for a quiz, edit and evaluate them.",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "terminal_width": min(get_terminal_size().columns, 80) - 2,
    },
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS: tuple[tuple[str, str, type[Settings], Callable[..., object]], ...] = (
    ("Start", "demo", demo.DemoSettings, demo.run),
    ("Measure", "profile", profile.ProfileSettings, profile.run),
    ("Measure", "trace", tracing.TraceSettings, tracing.run),
    ("Measure", "show", show.ShowSettings, show.run),
    ("Measure", "audit", audit.AuditSettings, audit.run),
    ("Change", "prune", prune.PruneSettings, prune.run),
    ("Change", "merge", merge.MergeSettings, merge.run),
    ("Change", "compress", compress.CompressSettings, compress.run),
    ("Change", "reweight", reweight.ReweightSettings, reweight.run),
    ("Change", "route", route.RouteSettings, route.run),
    ("Change", "heal", heal.HealSettings, heal.run),
    ("Change", "place", place.PlaceSettings, place.run),
    ("Judge", "sweep", sweep.SweepSettings, sweep.run),
    ("Judge", "eval", eval.EvalSettings, eval.run),
    ("Judge", "dispatch", dispatch.DispatchSettings, dispatch.run),
    ("Share", "report", report.ReportSettings, report.run),
    ("Share", "publish", publish.PublishSettings, publish.run),
    ("Share", "run", recipes.RunSettings, recipes.run),
)


def _shown(name: str, run: Callable[..., object], settings: Settings) -> None:
    with TerminalUI().running(name) as ui:
        run(settings, ui)


for _panel, _name, _settings, _run in COMMANDS:
    add_command(app, _name, _settings, partial(_shown, _name, _run), _panel)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Errors that a user can fix become one line and exit status 2; others keep their traceback."""
    try:
        yield
    except ExpertcutError as error:
        text = " ".join(str(error).split())
        nearest = None if "did you mean" in text else _nearest_path(text)
        text = f"{text.rstrip('.')}; did you mean {nearest}?" if nearest else text
        _stop(text, 2, is_printed=is_heard())
    except TyperException as error:
        text = error.format_message().replace("Input should be", "must be")  # pydantic's
        if text.startswith("Missing argument"):
            text = f"{text.rstrip('.')}: {vars(error)['param'].help}"
        _stop(" ".join(text.split()), 2, is_printed=is_heard())
    except Stopped as stopped:
        _stop(*stopped.args, is_printed=is_heard(otherwise=is_first()))
    except (typer.Abort, KeyboardInterrupt):
        text = "interrupted: run the same command again to go on"
        _stop(text, _INTERRUPTED, is_printed=is_heard(otherwise=is_first()))
    except (OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno in _MENDABLE:
            place = f"{error.filename}: " if error.filename else ""
            _stop(f"{place}{error.strerror}: mend that and run the same command again", 2)
        if isinstance(error, RuntimeError) and is_left_alone(error):
            _stop(f"{ENDED}: run the same command again", 2, is_printed=is_heard())
        is_memory_full = isinstance(error, MemoryError)
        if "torch" in sys.modules:
            from expertcut.models.devices import is_out_of_memory

            is_memory_full = is_out_of_memory(error)
        if is_memory_full:
            what = str(error).splitlines()[0][:200] if str(error) else "nothing more is known"
            _stop(f"not enough memory ({what}): free some, or give a smaller --batch-tokens", 2)
        raise


def _nearest_path(text: str) -> Path | None:
    """The existing path nearest to a missing one that was typed and that the text names."""
    if not _IS_MISSING.search(text):
        return None
    words = (arg.partition("=")[2] if arg.startswith("-") else arg for arg in sys.argv[1:])
    for path in (Path(word) for word in words if word and word in text):
        with suppress(OSError, ValueError, StopIteration):  # it exists, or no name can be like it
            gone = next(p for p in (*reversed(path.parents), path) if not p.exists())
            names = [entry.name for entry in gone.parent.iterdir()]
            (name,) = get_close_matches(gone.name, names, n=1)
            if (nearest := gone.parent / name / path.relative_to(gone)).exists():
                return nearest
    return None


def _stop(text: str, status: int, *, is_printed: bool = True) -> None:
    if is_printed:
        text = without_secrets(text)
        text = text if len(text) <= _MAX_LINE else f"{text[:_MAX_LINE]}…"
        line = f"expertcut: {printable(text)}"
        if sys.stderr.isatty():
            line = wrapped(line, get_terminal_size().columns)
        print(line, file=sys.stderr)
    raise SystemExit(status)


class HarmlessFormatter(logging.Formatter):
    """Hides secrets, and control characters from names in a quiz or a model."""

    def format(self, record: logging.LogRecord) -> str:
        """The formatted record."""
        text = without_secrets(super().format(record))
        return "\n".join(map(printable, text.splitlines()))


def main() -> None:
    """The console script."""
    with lasting_output() as out:
        # Other processes would only repeat the warnings of the first.
        level = logging.WARNING if is_first() else logging.ERROR
        handler = logging.StreamHandler()
        handler.setFormatter(HarmlessFormatter("%(levelname)s: %(message)s"))
        logging.basicConfig(level=level, handlers=[handler])
        with _errors_in_one_line(), terminable():
            status = app(prog_name="expertcut", standalone_mode=False)
            if status == _INTERRUPTED:  # typer has caught it
                raise KeyboardInterrupt
            out.check()
    raise SystemExit(status or 0)
