"""What a terminal shows: output, one line of progress on stderr, how to go on after a stop.

What commands print on stdout, what other libraries must not, and output that cannot be written. A
terminal that closes, a full disk or an encoding that lacks a character stops no work: printing goes
on into nothing, or with `?` in place of the character, and the command says so at its end.

Long runs: one of several processes, a line of progress on stderr, and how to go on after a stop.
Launchers say in the environment which of their processes this is; nothing else is asked of them, no
process group is set up and no process ever waits for another's message.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from expertcut.commands import UI
from expertcut.errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console

    from expertcut.reporting.tables import Table
    from expertcut.scoring.packing import Pass
    from expertcut.scoring.passes import OnPass

_STANDARD = 3  # descriptors: stdin, stdout, stderr
T = TypeVar("T")

GO_ON = "interrupted: run the same command again to go on"


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


def print_tables(tables: Iterable["Table"]) -> None:
    """Prints to stdout as rich tables."""
    from rich.console import Console

    from expertcut.reporting.tables import as_rich

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for table in tables:
        console.print(as_rich(table))


def quiet() -> None:
    """No progress bars and reports of other libraries between our lines."""
    # Read when datasets is imported, which takes seconds and is done only for its own quizzes.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # errors reach us as exceptions
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


class Stopped(Exception):
    """Ctrl-C or SIGTERM; its text says how to go on, `status` is that of the shell."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Terminated(KeyboardInterrupt):
    """SIGTERM, as torchrun and Slurm send it; everything is left as after Ctrl-C."""


def is_first() -> bool:
    """Whether this is the only process, or the one that speaks for all that were started."""
    rank = next((r for name in ("RANK", "SLURM_PROCID") if (r := os.environ.get(name))), "0")
    return rank == "0"


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM is like Ctrl-C while the block runs."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def resumable(where: Path, what: str = "finished chunks are") -> Iterator[None]:
    """A stop says that what is done is kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        status = 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
        text = f"interrupted: {what} kept in {where}: run the same command again"
        raise Stopped(f"{text} to go on", status) from None


class Line:
    """One line on stderr while a person is watching: questions, tokens a second, time left."""

    def __init__(self, what: str, total: int, console: "Console | None" = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        # Said outright: FORCE_COLOR, as build servers set it, would make a terminal of any file.
        self.console = console or Console(stderr=True, force_terminal=sys.stderr.isatty())
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} questions"),
            TextColumn("{task.fields[pace]}"),
        )
        is_quiet = not (self.console.is_terminal and is_first())
        self.bar = Progress(*columns, console=self.console, disable=is_quiet)
        self.task = self.bar.add_task(what, total=total, pace="")
        self.started = time.monotonic()
        self.done = self.tokens = self.begun = 0

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def see(self, step: "Pass") -> None:
        """A forward pass begins: the questions of the one before are answered."""
        self.done += self.begun
        self.begun = len(step.questions)
        self._show(None)
        self.tokens += step.n_tokens

    def follow(self, steps: Iterator[T]) -> Iterator[T]:
        """The steps, each shown as it comes if it says how far the run is."""
        for step in steps:
            if hasattr(step, "left_s"):
                self._note(step)
            yield step

    def _note(self, progress: Any) -> None:
        self.done, self.begun = progress.done, 0
        self.tokens = max(self.tokens, progress.tokens)
        self._show(progress.left_s)

    def _show(self, left_s: float | None) -> None:
        if left_s is not None:
            self.end = time.monotonic() + left_s
        elapsed_s = time.monotonic() - self.started
        words = [f"{self.tokens / elapsed_s:,.0f} tokens/s"] if self.tokens and elapsed_s else []
        if hasattr(self, "end"):
            words.append(f"{_clock(self.end - time.monotonic())} left")
        self.bar.update(self.task, completed=self.done, pace=", ".join(words))


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Someone to tell how many parts of something are done, of how many: a bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn(what), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    is_quiet = not (console.is_terminal and is_first())
    with Progress(*columns, console=console, disable=is_quiet) as shown:
        task = shown.add_task("", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _clock(seconds: float) -> str:
    """`h:mm:ss`, not below zero."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class TerminalUI(UI):
    """A person at a terminal, or a file that the output goes to."""

    def __init__(self) -> None:
        self.is_first = is_first()

    def quiet(self) -> None:
        """Other libraries print nothing between our lines."""
        quiet()

    def say(self, tables: "Sequence[Table]", sentences: Sequence[str]) -> None:
        """Tables, then sentences."""
        if tables:
            print_tables(tables)
        for sentence in sentences:
            print(sentence, flush=True)

    def text(self, text: str) -> None:
        """The text alone."""
        print(text, end="")

    def watch(
        self, run: "Callable[[OnPass], Iterator[T]]", what: str, total: int, where: Path
    ) -> list[T]:
        """A line of progress on stderr; a stop says what is kept."""
        with resumable(where), Line(what, total) as line:
            return list(line.follow(run(line.see)))

    @contextmanager
    def parts(self, what: str, kept_in: Path | None = None) -> Iterator[Callable[[int, int], None]]:
        """A bar on stderr; a stop says what is kept."""
        kept = nullcontext() if kept_in is None else resumable(kept_in, "the last state is")
        with kept, bar(what) as report:
            yield report

    def stage(self, name: str, why: str, *, is_dry: bool) -> None:
        """One line per stage."""
        if not why:
            print(f"[{name}] is current", flush=True)
        elif is_dry:
            print(f"[{name}] would run: {why}", flush=True)
        else:
            print(f"\n[{name}] runs: {why}", flush=True)

    def stage_done(self, name: str, elapsed_s: float) -> None:
        """How long it took."""
        print(f"[{name}] took {elapsed_s:,.1f} s", flush=True)
