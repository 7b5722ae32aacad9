"""The chunks of a run: what each costs, and how far the whole of it is."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from expertcut.data import Question, Quiz
from expertcut.profiling.info import CHUNK_QUESTIONS, ProfileInfo

_SCAFFOLD, _HEADER = 30, 85  # characters around a question and at the start of a prompt, about


@dataclass(frozen=True)
class Work:
    """One chunk to be measured; `cost` is in characters of prompt, each run once."""

    subject: str
    questions: tuple[Question, ...]
    cost: int


@dataclass(frozen=True)
class Progress:
    """How far a run is, in questions; `measured` counts those that this process ran this time.

    `tokens` were run by all processes since this run began, where its own chunks tell how many a
    chunk has; `left_s` is the time that is left, None while that is unknown.
    """

    done: int
    total: int
    measured: int
    tokens: int = field(default=0, compare=False)
    elapsed_s: float = field(default=0.0, compare=False)
    left_s: float | None = field(default=None, compare=False)


def chunks_of_work(info: ProfileInfo, quiz: Quiz) -> dict[str, Work]:
    """Chunks by file name: a subject's questions in file order, at most 256 each."""
    is_shared = info.settings.way == "shared"
    found = {}
    for name, subject, n in info.chunks():
        k = int(name.removesuffix(".safetensors").rsplit("-", 1)[1])
        questions = quiz.questions[subject][k * CHUNK_QUESTIONS : k * CHUNK_QUESTIONS + n]
        shared = _HEADER + _characters(quiz.shots_by_subject[subject])
        cost = shared * (1 if is_shared else n) + _characters(questions)
        found[name] = Work(subject, questions, cost)
    return found


def _characters(questions: tuple[Question, ...]) -> int:
    return sum(len(q.text) + sum(map(len, q.choices)) + _SCAFFOLD for q in questions)


class Tally:
    """Counts chunks as they are done, by this process and by others."""

    def __init__(self, work: Mapping[str, Work]) -> None:
        self.work = work
        self.started = time.monotonic()
        self.tokens_by_mine: dict[str, int] = {}
        self.done: set[str] = set()
        self.was_there: set[str] = set()

    def note_mine(self, chunk: str, n_tokens: int) -> None:
        """This process has measured a chunk."""
        self.tokens_by_mine[chunk] = n_tokens

    def note_done(self, chunk: str, *, was_there: bool) -> Progress:
        """A chunk is there, whoever measured it, or was there when the run began."""
        self.done.add(chunk)
        if was_there:
            self.was_there.add(chunk)
        elapsed_s = time.monotonic() - self.started
        fresh = self._cost(self.done - self.was_there)
        mine = self._cost(set(self.tokens_by_mine))
        tokens = sum(self.tokens_by_mine.values()) * fresh // mine if mine else 0
        left = self._cost(set(self.work) - self.done)
        left_s = elapsed_s * left / fresh if fresh else None
        total, done = self._questions(set(self.work)), self._questions(self.done)
        return Progress(done, total, self.mine, tokens, elapsed_s, left_s)

    @property
    def is_complete(self) -> bool:
        """Whether every chunk is there."""
        return len(self.done) == len(self.work)

    @property
    def mine(self) -> int:
        """Questions that this process measured."""
        return self._questions(set(self.tokens_by_mine))

    @property
    def others(self) -> int:
        """Questions that other processes measured since this run began."""
        return self._questions(self.done - self.was_there - set(self.tokens_by_mine))

    def _cost(self, chunks: set[str]) -> int:
        return sum(self.work[name].cost for name in chunks)

    def _questions(self, chunks: set[str]) -> int:
        return sum(len(self.work[name].questions) for name in chunks)
