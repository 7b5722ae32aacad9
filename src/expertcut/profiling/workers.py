"""A folder of chunks shared by processes: opening, dealing chunks out, progress, completion."""

import json
import logging
import os
import platform
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from expertcut import __version__
from expertcut.data import Question, Quiz
from expertcut.data.corpus import Row
from expertcut.errors import OutputError, ProfileError
from expertcut.files import write_atomically
from expertcut.profiling.locks import CLAIMS, POLL_S, Claims
from expertcut.profiling.schema import (
    MeasuredInfo,
    ProfileInfo,
    TextInfo,
)
from expertcut.profiling.storage import (
    Arrays,
    MeasuredFolder,
    chunk_or_fault,
    write_chunk,
)

_SCAFFOLD, _HEADER = 30, 85  # characters around a question and of the header, approximately
T = TypeVar("T")
logger = logging.getLogger(__name__)

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Work:
    """One chunk to measure: questions of a subject, at a cost in characters of prompts.

    Or rows of a source of texts, or numbers of given sequences, at a cost in tokens.
    """

    subject: str
    questions: Sequence[Question] | Sequence[Row] | Sequence[int]
    cost: int


@dataclass(frozen=True)
class Progress:
    """Progress in questions."""

    done: int
    total: int
    measured: int  # by this process in this run
    tokens: int = field(default=0, compare=False)  # of all processes in this run, estimated
    elapsed_s: float = field(default=0.0, compare=False)
    left_s: float | None = field(default=None, compare=False)  # None while unknown


def chunks_of_work(info: ProfileInfo, quiz: Quiz) -> dict[str, Work]:
    """Chunks by file name: at most 256 questions of a subject each, in file order."""
    work, most = {}, info.questions_of_chunk
    for name, subject, n in info.chunks():
        k = int(name.removesuffix(".safetensors").rsplit("-", 1)[1])
        questions = quiz.questions[subject][k * most : k * most + n]
        shared = _HEADER + sum(map(n_chars, quiz.shots_by_subject[subject]))
        n_shared = 1 if info.settings.way == "shared" else n
        work[name] = Work(subject, questions, shared * n_shared + sum(map(n_chars, questions)))
    return work


def n_chars(question: Question) -> int:
    """Characters of a question in a prompt, approximately."""
    return len(question.text) + sum(map(len, question.choices)) + _SCAFFOLD


class Tally:
    """Counts finished chunks of this process and of others."""

    def __init__(self, work: Mapping[str, Work]) -> None:
        self.work = work
        self.started = time.monotonic()
        self.tokens_by_mine: dict[str, int] = {}  # of the chunks measured by this process
        self.done: set[str] = set()
        self.was_there: set[str] = set()  # finished before this run

    def note_done(self, chunk: str) -> Progress:
        """Counts a finished chunk."""
        self.done.add(chunk)
        elapsed_s = time.monotonic() - self.started
        fresh, mine = self._cost(self.done - self.was_there), self._cost(self.tokens_by_mine)
        tokens = sum(self.tokens_by_mine.values()) * fresh // mine if mine else 0
        left_s = elapsed_s * self._cost(set(self.work) - self.done) / fresh if fresh else None
        total, done = self._questions(self.work), self._questions(self.done)
        return Progress(done, total, self.mine, tokens, elapsed_s, left_s)

    @property
    def mine(self) -> int:
        """Questions measured by this process."""
        return self._questions(self.tokens_by_mine)

    @property
    def others(self) -> int:
        """Questions measured by other processes in this run."""
        return self._questions(self.done - self.was_there - set(self.tokens_by_mine))

    def _cost(self, chunks: Iterable[str]) -> int:
        return sum(self.work[name].cost for name in chunks)

    def _questions(self, chunks: Iterable[str]) -> int:
        return sum(len(self.work[name].questions) for name in chunks)


class Group(Protocol):
    """Processes that measure the same chunks together: `models.parallel.Group`."""

    @property
    def is_leader(self) -> bool:
        """Whether this process claims and writes for the others."""

    def lead(self, work: Callable[[], T]) -> T:
        """What the leader's work gives or raises, in every process."""


class SharedFolder:
    """A profile or trace that this and other processes fill, each while it has it `opened`.

    Of a `group` the leader alone claims and writes.
    """

    def __init__(self, path: Path, info: MeasuredInfo, group: Group | None = None) -> None:
        self.path = path
        self.info = info
        self.group = group
        self.claims = Claims(path / CLAIMS)
        self.hashes = {name: info.chunk_hash(name, subject) for name, subject, _ in info.chunks()}
        self._stats: dict[str, tuple[int, ...]] = {}  # of the files that were checked
        self._done: set[str] = set()

    @contextmanager
    def opened(self) -> Iterator[Self]:
        """Creates or checks it; claims are kept alive in the context."""
        follows = self.group is not None and not self.group.is_leader
        with nullcontext() if follows else self.claims:
            self._lead(self._open)
            yield self

    def _lead(self, work: Callable[[], T]) -> T:
        return work() if self.group is None else self.group.lead(work)

    def deal(self, chunks: Sequence[str], *, is_waiting: bool) -> Iterator[tuple[str, bool]]:
        """Every chunk once as (name, False) when finished; before, (name, True) to measure it here.

        Ends when all are finished; unless `is_waiting`, also if others measure all the rest.
        """
        with closing(self._deal(chunks, is_waiting=is_waiting)) as steps:
            while (step := self._lead(lambda: next(steps, None))) is not None:
                yield step

    def _deal(
        self, chunks: Sequence[str], *, is_waiting: bool
    ) -> Generator[tuple[str, bool], None, None]:
        left = list(chunks)
        while left:
            for name in [name for name in left if self._is_done(name)]:
                left.remove(name)
                yield name, False
            mine = next((name for name in left if self.claims.take(name)), None)
            if mine is not None:
                try:
                    if not self._is_done(mine):  # finished by another before the claim
                        (self.path / RUN_FILE).unlink(missing_ok=True)
                        yield mine, True
                finally:
                    self.claims.release(mine)
            elif left and is_waiting:
                time.sleep(POLL_S)
            else:
                return

    @contextmanager
    def taking(self, names: Iterable[str]) -> Iterator[list[str]]:
        """The chunks that are neither finished nor measured by others, claimed in the context."""
        left = [name for name in names if not self.is_done(name)]
        mine = [name for name in left if self.claims.take(name)]
        try:
            if mine:
                (self.path / RUN_FILE).unlink(missing_ok=True)
            yield mine
        finally:
            for name in mine:
                self.claims.release(name)

    def write(self, name: str, arrays: Arrays) -> None:
        """Writes a chunk of this process and reads it back."""
        self._lead(partial(self._write, name, arrays))

    def _write(self, name: str, arrays: Arrays) -> None:
        path = self.path / "chunks" / name
        try:
            write_chunk(path, arrays, self.hashes[name], self.claims.folder)
        except OutputError:
            if not self._is_done(name):  # else another process took over
                raise
        if not self._is_done(name):
            raise OutputError(f"{path} reads back damaged: is the disk sound and not full?")

    def is_done(self, name: str) -> bool:
        """Whether a chunk exists and is valid; warns once if it is damaged."""
        return self._lead(partial(self._is_done, name))

    def _is_done(self, name: str) -> bool:
        path = self.path / "chunks" / name
        try:
            stat = path.stat()
        except OSError:
            return False
        checked = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._stats.get(name) != checked:
            self._stats[name] = checked
            self._done.discard(name)
            chunk = chunk_or_fault(path, self.hashes[name])
            if isinstance(chunk, str):
                logger.warning("%s is damaged (%s): measuring it again", path, chunk)
            else:
                self._done.add(name)
        return name in self._done

    def finish(self, elapsed_s: float, measured: int, others: int) -> None:
        """Writes `run.json` once, with questions measured here and by others, if all are done."""
        self._lead(partial(self._finish, elapsed_s, measured, others))

    def _finish(self, elapsed_s: float, measured: int, others: int) -> None:
        folder = MeasuredFolder(self.path, self.info)
        while not folder.missing and folder.finished_at is None:
            with self._claimed(RUN_FILE) as is_mine:
                if is_mine and folder.finished_at is None:
                    content = _run(elapsed_s, measured, others)
                    write_atomically(self.path / RUN_FILE, content, self.claims.folder)
                    self.claims.clear()

    @contextmanager
    def _claimed(self, name: str) -> Iterator[bool]:
        """Whether this process has the claim in the context; waits a moment if not."""
        if not self.claims.take(name):
            time.sleep(POLL_S)
            yield False
            return
        try:
            yield True
        finally:
            self.claims.release(name)

    def _open(self) -> None:
        file, noun = self.info.file_in(self.path), self.info.noun
        while not file.is_file():
            names = set()
            if self.path.exists():
                is_folder = self.path.is_dir()
                names = {entry.name for entry in self.path.iterdir()} if is_folder else {"."}
            # Last, because another process may have created the file in between.
            if names - {CLAIMS} and not file.is_file():
                raise OutputError(
                    f"{self.path} is not empty and holds no {noun}: name another --out"
                )
            with self._claimed(file.name) as is_mine:
                if is_mine and not file.is_file():
                    self.info.save(file, self.claims.folder)
        ours: Any = self.info
        theirs = ours.load_from(self.path)
        if theirs.model.fingerprint != ours.model.fingerprint:
            their_hash, our_hash = theirs.model.fingerprint[:8], ours.model.fingerprint[:8]
            raise ProfileError(
                f"{self.path} is a {noun} of another model: {theirs.model.id} with weights "
                f"{their_hash}, not {our_hash}: name another --out"
            )
        if theirs.model.identity != ours.model.identity:
            their_hash, our_hash = (
                m.contract.sha256[:8] if m.contract else "none" for m in (theirs.model, ours.model)
            )
            raise ProfileError(
                f"{self.path} is a {noun} with another contract: its SHA-256 began with "
                f"{their_hash}, now it is {our_hash}: give that file, or name another --out"
            )
        if theirs.quiz != ours.quiz:
            what = "text" if "text" in (theirs.reads, ours.reads) else ours.reads
            what = "file of routes" if what == "routes" else what
            if ours.text is not None and theirs.text is not None:
                _check_text_options(self.path, theirs.text, ours.text)
            raise ProfileError(
                f"{self.path} is a {noun} of another {what}: {theirs.content}, not "
                f"{ours.content}: name another --out"
            )
        for key in type(ours.settings).model_fields:
            recorded, given = getattr(theirs.settings, key), getattr(ours.settings, key)
            if given != recorded:
                raise ProfileError(
                    f"{self.path} was begun with {key} {recorded}, now it is {given}: "
                    "give the recorded value or name another --out"
                )


def _check_text_options(path: Path, theirs: TextInfo, ours: TextInfo) -> None:
    """Refuses another option of the texts by its name."""
    for key in ("max_tokens", "tokens", "seed", "assistant_only", "has_loss"):
        recorded, given = getattr(theirs, key), getattr(ours, key)
        if given != recorded:
            raise ProfileError(
                f"{path} was begun with {key} {recorded}, now it is {given}: give the recorded "
                "value or name another --out"
            )


def _run(elapsed_s: float, measured: int, others: int) -> bytes:
    finished = time.time()  # durations are by a monotonic clock
    run = {
        "started": finished - elapsed_s,
        "finished": finished,
        "elapsed_s": elapsed_s,
        "questions_measured": measured,
        "questions_by_others": others,
        "questions_per_s": (measured + others) / elapsed_s if elapsed_s else 0.0,
        "host": platform.node(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "expertcut": __version__,
    }
    return (json.dumps(run, indent=1) + "\n").encode()
