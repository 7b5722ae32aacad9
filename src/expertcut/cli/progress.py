"""The terminal: output that stops no work, progress on stderr, how to resume after a stop.

A closed terminal or a full disk never stops a run: output is dropped, and the command fails at its
end. Characters that an encoding lacks are spelt in others. Launchers name the process in the
environment; no process group is set up, and no process waits for another's message.
"""

import codecs
import errno
import gc
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from functools import partial
from importlib import import_module
from io import StringIO
from itertools import accumulate, compress
from pathlib import Path
from shutil import get_terminal_size
from types import FrameType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from expertcut.commands import UI, OnPart, Watched
from expertcut.errors import OutputError
from expertcut.files import on_progress
from expertcut.reporting.tables import Table, as_rich, wrapped

if TYPE_CHECKING:
    from expertcut.scoring.packing import Pass

T = TypeVar("T")
_OTHERS = "... - - x * <- -> +- delta alpha rho sum ^2 | inf <= >="
FIRST_LINE_S = 1.5  # of work, until a line without a terminal; then once a minute
_SPELT = dict(zip("…−–×·←→±ΔαρΣ²‖∞≤≥", _OTHERS.split(), strict=True))


def _spell(error: Any) -> tuple[str, int]:
    lacking = error.object[error.start : error.end]
    return "".join(_SPELT.get(char, "?") for char in lacking), error.end


codecs.register_error("expertcut", _spell)


def spelt(text: str, stream: Any) -> str:
    """The text with others in place of characters that the stream's encoding lacks."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "expertcut").decode(encoding)


class LastingStream:
    """A text stream that never raises: after the first error, writing does nothing."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.fault: OSError | None = None
        if hasattr(stream, "reconfigure") and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="expertcut")

    def write(self, text: str) -> int:
        """Writes the text."""
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        self._try(self.stream.flush)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes the lines."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, call: Callable[..., object], *args: str) -> None:
        if self.fault is not None:
            return
        try:
            call(*args)
        except OSError as error:
            self.fault = error
            # Python writes the buffer once more when it ends: that must not fail again.
            with suppress(OSError, ValueError):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, self.stream.fileno())
                os.close(nothing)

    def check(self) -> None:
        """OutputError for lost output, unless the reader closed its end of a pipe."""
        self.flush()
        if self.fault is not None and self.fault.errno != errno.EPIPE:
            raise OutputError(
                f"stdout cannot be written: {self.fault.strerror}: what was printed is lost, what "
                "was written to files is whole"
            )


@contextmanager
def lasting_output() -> Iterator[LastingStream]:
    """Replaces stdout (which it yields) and stderr by lasting streams."""
    for descriptor in range(3):  # opens closed ones, so that no file that is written gets one
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free one, which is this
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    out: Any = LastingStream(sys.stdout)
    err: Any = LastingStream(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield out
        finally:
            out.flush()
            err.flush()


ENDED = "another process of --parallel has ended"


class Stopped(Exception):
    """Ctrl-C or SIGTERM during a resumable run: a message and the exit status."""


def is_first() -> bool:
    """Whether this is the only process, or the first of several, which prints for all."""
    rank = next((r for name in ("RANK", "SLURM_PROCID") if (r := os.environ.get(name))), "0")
    return rank == "0"


def is_together() -> bool:
    """Whether this process and others hold one model together."""
    return any(argument.startswith("--parallel") for argument in sys.argv[1:])


def is_heard(*, otherwise: bool = True) -> bool:
    """Whether this process says how the run ended: one of those that hold one model together."""
    if not is_together():
        return otherwise
    if (group := _group()) is not None:
        return bool(group.is_heard())
    # Before they have met, the first of each host: a fault may be that of one host.
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _group() -> Any:
    module = sys.modules.get("expertcut.models.parallel")
    return None if module is None else module.joined()


def is_left_alone(error: RuntimeError) -> bool:
    """Whether the error means that another process of the group has ended."""
    module = sys.modules.get("expertcut.models.parallel")
    return module is not None and bool(module.has_ended(error))


@contextmanager
def terminable() -> Iterator[None]:
    """Handles SIGTERM, which torchrun and Slurm send, as Ctrl-C."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Bars:
    """Progress on stderr by the first process: bars in a terminal, elsewhere a line a minute."""

    def __init__(self, terminal: Any = None) -> None:
        self.terminal, self.lock = terminal, threading.RLock()
        if terminal is None and sys.stderr.isatty():
            # A stream of its own, because `translate_errors` keeps what others write to stderr.
            own = os.dup(sys.stderr.fileno())
            self.terminal = LastingStream(open(own, "w", encoding=sys.stderr.encoding))  # noqa: PTH123, SIM115
        self.bars: dict[str, Any] = {}
        self.kept: str | None = None

    def advance(
        self, what: str, done: float, total: float, unit: str, pace: str | None = None
    ) -> None:
        """Shows a part of the work instead of the one before, but for the kept one."""
        if not is_first():
            return
        with self.lock:
            if what not in self.bars:
                from tqdm import tqdm

                self.close({self.kept} if self.kept else set())
                n_most = get_terminal_size().columns // 2 if self.terminal else len(what)
                more = spelt("…", self.terminal) if self.terminal else ""
                self.bars[what] = tqdm(
                    desc=what if len(what) <= n_most else what[: n_most - len(more)] + more,
                    initial=int(done),
                    unit="B" if unit == "B" else f" {unit}",
                    unit_scale=unit == "B",
                    bar_format="{desc}",
                    smoothing=0,  # the time left by the mean pace
                    leave=what == self.kept,
                    file=self.terminal or StringIO(),
                    mininterval=0.1 if self.terminal else 1e9,
                )
            bar, speed = self.bars[what], "{rate_fmt}" if pace is None else pace
            parts = ("{n_fmt}/{total_fmt}", "{unit}", ", {remaining} left", f", {speed}")
            # As many parts as surely fit beside a bar: tqdm cuts them anywhere.
            room = get_terminal_size().columns - len(bar.desc) - 9 if self.terminal else 1000
            sizes = (2 * len(f"{total:.0f}") + 1, len(bar.unit), 12, len(pace or "rate") + 12)
            fits = [size <= room for size in accumulate(sizes)]
            amount = "".join(compress(parts, fits))
            drawn = "" if self.terminal is None else "|{bar}| "
            elapsed = "{n_fmt}{unit} {elapsed}" if done else "{elapsed}"
            bar.bar_format = f"{{desc}} {f'{drawn}{amount}' if total else elapsed}"
            bar.total, bar.ncols = total or None, get_terminal_size().columns if drawn else None
            bar.update(done - bar.n)
            if total and done == total and what != self.kept:
                self.bars.pop(what).close()

    @contextmanager
    def ticking(self, name: str) -> Iterator[None]:
        """Shows the name at once in a terminal, and from then on how the time passes."""
        stopped = threading.Event()
        said_s, first_s = time.monotonic(), FIRST_LINE_S

        def tick() -> None:
            nonlocal said_s, first_s
            while not stopped.wait(1):
                with self.lock:
                    if not self.bars:
                        self.advance(name, 0, 0, "")
                    for bar in self.bars.values():
                        # While inputs are read they may yet be refused, in one line.
                        is_work = bool(bar.total) and bar.unit != "B"
                        has_begun = is_work and bar.format_dict["elapsed"] >= first_s
                        if self.terminal is not None:
                            bar.refresh()
                        elif has_begun or time.monotonic() - said_s >= 60:
                            said_s, first_s = time.monotonic(), math.inf
                            print(" ".join(str(bar).split()), file=sys.stderr, flush=True)

        thread = threading.Thread(target=tick, daemon=True)
        try:
            if self.terminal is not None:
                self.advance(name, 0, 0, "")
            thread.start()
            yield
        finally:
            stopped.set()
            thread.join()
            self.close()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Takes the bars away while something is printed."""
        with self.lock:
            from tqdm import tqdm

            with tqdm.external_write_mode(file=self.terminal) if self.terminal else nullcontext():
                yield

    def close(self, but: Set[str] = frozenset()) -> None:
        """Takes bars away."""
        with self.lock:
            for name in self.bars.keys() - but:
                self.bars.pop(name).close()


class Line:
    """The bar of a run: questions or rows, tokens per second, time left."""

    def __init__(self, what: str, total: int, bars: Bars, unit: str = "questions") -> None:
        self.what, self.total, self.bars, self.unit = what, total, bars, unit
        self.started = time.monotonic()
        self.done = self.tokens = self.n_running = 0

    def see(self, step: "Pass") -> None:
        """Counts a forward pass that begins, and the questions of the one before."""
        self.done += self.n_running
        self.n_running = len(step.questions)
        self._show()
        self.tokens += step.n_tokens

    def follow(self, steps: Iterator[T]) -> Iterator[T]:
        """Yields the steps, showing the progress of those that report it."""
        for step in steps:
            progress: Any = step
            if hasattr(step, "left_s"):
                self.done, self.n_running = progress.done, 0
                self.tokens = max(self.tokens, progress.tokens)
                self._show()
                bar = self.bars.bars.get(self.what)
                if bar is not None and not progress.measured:  # done before: not to count as speed
                    bar.initial = progress.done
            yield step

    def _show(self) -> None:
        elapsed_s = max(time.monotonic() - self.started, 1e-9)
        pace = f"{self.tokens / elapsed_s:,.0f} tokens/s"
        self.bars.advance(self.what, self.done, self.total, self.unit, pace)


class TerminalUI(UI):
    """Prints to stdout, and shows progress on stderr."""

    def __init__(self) -> None:
        self.is_first, self.bars = is_first(), Bars()

    @contextmanager
    def running(self, name: str) -> Iterator[Self]:
        """Shows that the command runs, and what the library reports."""
        on_progress.append(self.bars.advance)
        try:
            with self.bars.ticking(f"expertcut {name}"):
                yield self
        finally:
            on_progress.remove(self.bars.advance)

    def quiet(self) -> None:
        """Silences progress bars and reports of other libraries."""
        # Read when datasets is imported, which takes seconds and is done only for its own quizzes.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # errors reach us as exceptions
        if "transformers.modeling_utils" not in sys.modules:
            self.bars.advance("importing libraries", 0, 0, "")
            gc.disable()  # collecting garbage would walk all objects each time
            try:
                for name in ("generation.utils", "modeling_utils", "integrations.moe"):
                    import_module(f"transformers.{name}")
            finally:
                gc.enable()
                gc.freeze()
                self.bars.close()
        import transformers
        from huggingface_hub.utils import logging as hub_logging

        hub_logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()

    def say(self, tables: Sequence[Table], sentences: Sequence[str]) -> None:
        """Prints tables, then sentences: within the width of a terminal, but for a word."""
        if is_together() and not self.is_first:
            return
        width = get_terminal_size().columns if sys.stdout.isatty() else None

        spell = partial(spelt, stream=sys.stdout)
        with self.bars.hidden():
            if tables:
                from rich.console import Console

                console = Console(width=width or 200, highlight=False)
                for table in tables:
                    console.print(as_rich(table, console.width, spell))
            for sentence in sentences:
                print(wrapped(spell(sentence), width) if width else sentence, flush=True)

    def text(self, text: str) -> None:
        """Prints the text."""
        if is_together() and not self.is_first:
            return
        with self.bars.hidden():
            print(text, end="")

    def watch(
        self, run: Watched[T], what: str, total: int, where: Path, unit: str = "questions"
    ) -> list[T]:
        """Shows a line of progress; a stop says what is kept."""
        with self._kept(what, "finished chunks are", where):
            line = Line(what, total, self.bars, unit)
            return list(line.follow(run(line.see)))

    @contextmanager
    def parts(self, what: str, kept_in: Path) -> Iterator[OnPart]:
        """Shows a bar; a stop says what is kept."""
        with self._kept(what, "the last state is", kept_in):
            yield lambda done, total: self.bars.advance(what, done, total, "steps")

    @contextmanager
    def _kept(self, what: str, result: str, where: Path) -> Iterator[None]:
        """Keeps the bar; turns Ctrl-C and SIGTERM into `Stopped`, which names what is on disk."""
        self.bars.kept = what
        try:
            yield
        except KeyboardInterrupt as error:
            number = error.args[0] if error.args else signal.SIGINT
            text = f"interrupted: {result} kept in {where}: run the same command again to go on"
            raise Stopped(text, 128 + number) from None
        except RuntimeError as error:
            if not is_left_alone(error):
                raise
            text = f"{ENDED}: {result} kept in {where}: run the same command again to go on"
            raise Stopped(text, 2) from None
        finally:
            self.bars.kept = None
            self.bars.close()
