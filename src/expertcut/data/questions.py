"""Questions, quizzes and their prompts, and the same questions with shuffled choices."""

import hashlib
import json
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, zip_longest
from random import Random
from typing import Literal

Truncate = Literal["left"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """One multiple-choice question; `row` counts within its subject and split, from 0."""

    subject: str
    text: str
    choices: tuple[str, ...]
    answer: int
    row: int
    order: tuple[int, ...] = ()  # maps the places of shuffled choices to the original ones

    @property
    def content_hash(self) -> str:
        """16 hex digits over text and choices, to find repeats in any subject or split."""
        return _sha256([self.text.strip(), *self.choices])[:16]

    @cached_property
    def overlap_hash(self) -> str:
        """16 hex digits that ignore white space, invisible characters and the order of choices."""
        choices = sorted(map(normalised, self.choices))
        return _sha256({"text": normalised(self.text), "choices": choices})[:16]

    @property
    def hash_line(self) -> str:
        """Both hashes, as a line of `chosen_on.txt`."""
        return f"{self.content_hash} {self.overlap_hash}"

    def is_among(self, known: Collection[str]) -> bool:
        """Whether either hash is in a set from `hashes_in`."""
        return self.content_hash in known or self.overlap_hash in known


@dataclass(frozen=True)
class Quiz:
    """The questions of one split, subjects in name order, with their few-shot examples."""

    id: str
    revision: str | None
    split: str
    shots: int
    questions: Mapping[str, tuple[Question, ...]]
    shots_by_subject: Mapping[str, tuple[Question, ...]]  # `shots` dev questions each
    truncate: Truncate | None = None  # side on which too long a prompt is cut; None refuses it

    def __len__(self) -> int:
        return sum(map(len, self.questions.values()))

    def __iter__(self) -> Iterator[Question]:
        return chain.from_iterable(self.questions.values())

    def content_hash(self, subject: str) -> str:
        """SHA-256 over questions, answers and shots of a subject."""
        asked = (*self.shots_by_subject[subject], *self.questions[subject])
        return _sha256([[q.text, list(q.choices), q.answer] for q in asked])


def normalised(text: str) -> str:
    """The text in Unicode form NFC, with single spaces, without invisible characters."""
    if not text.isascii():  # of category Cf: byte order marks, soft hyphens, zero-width characters
        text = "".join(char for char in text if unicodedata.category(char) != "Cf")
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def hashes_in(lines: Iterable[str]) -> frozenset[str]:
    """All hashes of lines with one or two each."""
    return frozenset(chain.from_iterable(line.split() for line in lines))


def without(quiz: Quiz, lines: Iterable[str]) -> Quiz:
    """The quiz without questions whose hash is given, and without subjects left empty."""
    known = hashes_in(lines)
    return replace_questions(quiz, [q for q in quiz if not q.is_among(known)])


def round_robin(quiz: Quiz, n: int) -> Quiz:
    """The first question of every subject, then the second, and so on, up to `n`."""
    taken = [q for turn in zip_longest(*quiz.questions.values()) for q in turn if q is not None][:n]
    return replace_questions(quiz, taken)


def replace_questions(quiz: Quiz, questions: Sequence[Question]) -> Quiz:
    """The same quiz and shots with other questions of its subjects."""
    by_subject = group_by_subject(questions)
    shots = {subject: quiz.shots_by_subject[subject] for subject in by_subject}
    return replace(quiz, questions=by_subject, shots_by_subject=shots)


def group_by_subject(questions: Sequence[Question]) -> dict[str, tuple[Question, ...]]:
    """Questions by subject, subjects in name order."""
    subjects = sorted({q.subject for q in questions})
    return {s: tuple(q for q in questions if q.subject == s) for s in subjects}


def _sha256(content: object) -> str:
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def prompt(question: Question, shots: Sequence[Question] = ()) -> str:
    """The prompt before the answer ` A`, ` B`, …; without trailing space."""
    solved = (f"{_format(shot)} {LETTERS[shot.answer]}\n\n" for shot in shots)
    return header(question.subject) + "".join(solved) + _format(question)


def header(subject: str) -> str:
    """The line before the first question."""
    about = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {about}.\n\n"


def _format(question: Question) -> str:
    choices = "".join(f"{LETTERS[i]}. {text}\n" for i, text in enumerate(question.choices))
    return f"{question.text.strip()}\n{choices}Answer:"


def shuffle_choices(quiz: Quiz) -> Quiz:
    """Shuffles the choices of every question, with a seed from its content; shots are unchanged."""
    return replace_questions(quiz, list(map(_shuffle, quiz)))


def _shuffle(question: Question) -> Question:
    order = sorted(range(len(question.choices)))
    chance = Random(int(question.content_hash, 16))
    while order == sorted(order):
        chance.shuffle(order)
    return reordered(question, order)


def reordered(question: Question, order: Sequence[int]) -> Question:
    """The question with its choices in another order."""
    return replace(
        question,
        choices=tuple(question.choices[i] for i in order),
        answer=order.index(question.answer),
        order=tuple(order),
    )
