"""What tests of shared folders need: quick processes, one profile run in each, deaths on cue."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace

import torch

from expertcut import files
from expertcut.data import Selection, load_quiz
from expertcut.profiling import workers as shared
from expertcut.profiling.locks import Claims
from expertcut.profiling.measure import ChunkedRun, Measurement, MeasureOptions
from expertcut.profiling.storage import load_profile
from expertcut.profiling.trace_recorder import QuizTracing, TraceOptions
from expertcut.profiling.workers import SharedFolder
from tests.conftest import open_model, write_quiz

# A server that has imported all this forks each process, in milliseconds. It is one for all tests,
# so whoever needs something there says so here.
PROCESSES = multiprocessing.get_context("forkserver")
_PARTS = ("checkpoints.build", "evaluation.sweep_run", "evaluation.text_eval", "healing.recovery")
_PARTS += ("recipes.stage_runs", "reporting.eval_tables", "reporting.views")
_EXPERTCUT = [f"expertcut.{name}" for name in _PARTS]
assert all(map(find_spec, _EXPERTCUT)), "the server passes over what is not there in silence"
PROCESSES.set_forkserver_preload(
    [
        *(__name__, "tests.support.prune_runs", "tests.soak.commands", *_EXPERTCUT),
        *("matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"),
        "transformers.models.olmoe.modeling_olmoe",
    ]
)
LONG, SHORT = "green_birds", ("green_bees", "old_clocks", "old_cups", "tall_trees")
N_QUESTIONS = 258 + 4 * 5
CHUNKS = sorted([f"{LONG}-1.safetensors", *(f"{name}-0.safetensors" for name in (LONG, *SHORT))])


def long_quiz(folder: Path) -> Path:
    """One subject of two chunks, four of one each; one shot."""
    write_quiz(folder, {"dev": 1, "test": 258}, seed=8)
    for split, n in (("dev", 1), ("test", 20)):
        for subject in ("old_clocks", "tall_trees"):
            (folder / split / f"{subject}_{split}.csv").unlink()
        rows = (folder / split / f"{LONG}_{split}.csv").read_text().splitlines(keepends=True)
        for i, subject in enumerate(SHORT):
            its = rows[:1] if n == 1 else rows[5 * i : 5 * i + 5]
            (folder / split / f"{subject}_{split}.csv").write_text("".join(its))
    return folder


def measurement(
    checkpoint: Path, quiz: Path, waits: bool = True, batch_tokens: int | None = None
) -> Measurement:
    torch.set_num_threads(1)
    questions = load_quiz(Selection(str(quiz), shots=1))
    options = MeasureOptions(threads=1, waits=waits, batch_tokens=batch_tokens)
    return Measurement(open_model(checkpoint), questions, None, options)


def tracing(checkpoint: Path, quiz: Path) -> QuizTracing:
    """All questions, with their gate weights."""
    torch.set_num_threads(1)
    questions, options = load_quiz(Selection(str(quiz), shots=1)), MeasureOptions(threads=1)
    kept = TraceOptions(weights=True, tokens=1 << 20)
    return QuizTracing(open_model(checkpoint), questions, None, options, kept)


@dataclass(frozen=True)
class Task:
    """One process's whole work; `die` names a moment of `DEATHS`, all start at the barrier.

    Finished chunks go into `<out>.<pid>.chunks`, a line each, and a line into `.runs` for every
    `run.json`.
    """

    model: Path
    quiz: Path
    out: Path
    die: str | None = None
    is_backwards: bool = False
    waits: bool = True
    batch_tokens: int | None = None
    barrier: Barrier | None = None
    traces: bool = False  # instead of profiling

    def __call__(self) -> None:
        measure: ChunkedRun = measurement(self.model, self.quiz, self.waits, self.batch_tokens)
        if self.traces:
            measure = tracing(self.model, self.quiz)
        if self.die is not None:
            DEATHS[self.die][0]()
        _note(SharedFolder, "write", self.out.with_name(f"{self.out.name}.{os.getpid()}.chunks"))
        _note(shared, "_run", self.out.with_name(f"{self.out.name}.{os.getpid()}.runs"))
        if self.is_backwards:
            deal = SharedFolder.deal
            SharedFolder.deal = lambda self, names, **how: deal(self, names[::-1], **how)  # type: ignore[method-assign]
        if self.barrier is not None:
            self.barrier.wait(60)
        for _ in measure.run(self.out):
            pass


def _note(owner: object, name: str, file: Path) -> None:
    act = getattr(owner, name)

    def noted(*args: object) -> object:
        found = act(*args)
        with file.open("a") as log:
            log.write(f"{next((a for a in args if isinstance(a, str)), name)}\n")
        return found

    setattr(owner, name, noted)


def kill_at(nth: int, act: Callable[..., object], *, is_after: bool) -> Callable[..., object]:
    """The function, but its nth call is the last thing that this process does."""
    calls = 0

    def until(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        found = act(*args, **kwargs) if calls < nth or is_after else None
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return until


def _patch(owner: object, name: str, nth: int, *, is_after: bool = False) -> Callable[[], None]:
    def patch() -> None:
        setattr(owner, name, kill_at(nth, getattr(owner, name), is_after=is_after))

    return patch


def _die_writing(nth: int) -> Callable[[], None]:
    """After half of the bytes of the nth file."""

    def patch() -> None:
        sync = kill_at(nth, os.fsync, is_after=False)
        files.os = SimpleNamespace(**{**vars(os), "fsync": sync})  # type: ignore[attr-defined]

    return patch


# The moment, and how many chunks are there then.
DEATHS: dict[str, tuple[Callable[[], None], int]] = {
    "with a claim and nothing else": (_patch(Claims, "take", 1, is_after=True), 0),
    "before the description has its name": (_die_writing(1), 0),
    "in the first chunk": (_patch(Measurement, "measure", 1), 0),
    "in the third chunk": (_patch(Measurement, "measure", 3), 2),
    "while the fourth chunk is written": (_die_writing(5), 3),
    "before a claim is given back": (_patch(Claims, "release", 3), 2),
    "before the last line": (_patch(shared, "_run", 1), 6),
}


def start(task: Callable[[], None]) -> BaseProcess:
    process = PROCESSES.Process(target=task)
    process.start()
    return process


def ended(process: BaseProcess) -> int | None:
    process.join(120)
    return process.exitcode


def logged(out: Path, what: str) -> list[str]:
    """What all processes of a folder finished, one line each time."""
    files = out.parent.glob(f"{out.name}.*.{what}")
    return sorted(line for file in files for line in file.read_text().splitlines())


def chunk_bytes(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((out / "chunks").iterdir())}


def is_whole(out: Path) -> bool:
    """Finished, and nothing else in it."""
    names = {path.name for path in out.iterdir()}
    return names == {"profile.json", "run.json", "chunks"} and not load_profile(out).missing
