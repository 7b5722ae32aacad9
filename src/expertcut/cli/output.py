"""What commands print on stdout, what other libraries must not, and output that cannot be written.

A terminal that closes, a full disk or an encoding that lacks a character stops no work: printing
goes on into nothing, or with `?` in place of the character, and the command says so at its end.
"""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from expertcut.cli.options import Format
from expertcut.errors import OutputError

if TYPE_CHECKING:
    from expertcut.reporting.tables import Table


_STANDARD = 3  # descriptors: stdin, stdout, stderr


class LastingStream:
    """A text stream that never raises: after the first fault, writing to it does nothing."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.fault = stream, None
        if hasattr(stream, "reconfigure") and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")

    fault: OSError | None

    def write(self, text: str) -> int:
        """As that of a text stream."""
        if self.fault is None:
            try:
                self.stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """As that of a text stream."""
        if self.fault is None:
            try:
                self.stream.flush()
            except OSError as error:
                self._give_up(error)

    def writelines(self, lines: Iterable[str]) -> None:
        """As that of a text stream."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Everything else is that of the stream itself."""
        return getattr(self.stream, name)

    def _give_up(self, error: OSError) -> None:
        self.fault = error
        # What is buffered is written once more when Python ends: there it must not fail again.
        with suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.stream.fileno())
            os.close(nothing)

    def check(self) -> None:
        """That all was written; a reader that closed its end of a pipe wanted no more.

        Raises:
            OutputError: something was not.
        """
        self.flush()
        if self.fault is not None and self.fault.errno != errno.EPIPE:
            raise OutputError(
                f"stdout cannot be written: {self.fault.strerror}: what was printed is lost, what "
                "was written to files is whole"
            )


@contextmanager
def lasting_output() -> Iterator[LastingStream]:
    """Makes stdout, which it gives, and stderr such that they stop no work while the block runs."""
    _open_missing()
    own: tuple[Any, Any] = (sys.stdout, sys.stderr)
    out, err = (LastingStream(stream) for stream in own)
    streams: tuple[Any, Any] = (out, err)
    sys.stdout, sys.stderr = streams
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = own


def _open_missing() -> None:
    """Opens standard descriptors that are closed, or the next file that is written gets one."""
    for descriptor in range(_STANDARD):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest that is free, which is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nothing = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, nothing)


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
