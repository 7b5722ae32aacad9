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
    """One multiple-choice question; `row` counts the questions of its subject's split from 0.

    Where the choices were shuffled, `order` tells which one of the original stands at each place.
    """

    subject: str
    text: str
    choices: tuple[str, ...]
    answer: int
    row: int
    order: tuple[int, ...] = ()

    @property
    def content_hash(self) -> str:
        """16 hex digits over text and choices, so a repeat is found in any subject or split."""
        return _sha256([self.text.strip(), *self.choices])[:16]

    @cached_property
    def overlap_hash(self) -> str:
        """16 hex digits that trivial changes leave as they are, to tell whether sets overlap.

        White space, invisible characters, the Unicode form and the order of choices do not count.
        """
        choices = sorted(map(normalised, self.choices))
        return _sha256({"text": normalised(self.text), "choices": choices})[:16]

    @property
    def hash_line(self) -> str:
        """Both hashes, as a line of `chosen_on.txt` has them."""
        return f"{self.content_hash} {self.overlap_hash}"

    def is_among(self, known: Collection[str]) -> bool:
        """Whether either of its hashes is in a set that `hashes_in` gave."""
        return self.content_hash in known or self.overlap_hash in known


@dataclass(frozen=True)
class Quiz:
    """The questions of one split with the shots that stand before them, subjects in name order.

    `shots_by_subject` holds as many dev questions as `shots`, per subject. `truncate` says where a
    prompt that is longer than the model's context loses tokens; None refuses it.
    """

    id: str
    revision: str | None
    split: str
    shots: int
    questions: Mapping[str, tuple[Question, ...]]
    shots_by_subject: Mapping[str, tuple[Question, ...]]
    truncate: Truncate | None = None

    def __len__(self) -> int:
        return sum(map(len, self.questions.values()))

    def __iter__(self) -> Iterator[Question]:
        return chain.from_iterable(self.questions.values())

    def content_hash(self, subject: str) -> str:
        """SHA-256 over everything asked in a subject: questions, answers and shots."""
        asked = (*self.shots_by_subject[subject], *self.questions[subject])
        return _sha256([[q.text, list(q.choices), q.answer] for q in asked])


def normalised(text: str) -> str:
    """The text in Unicode form NFC, without invisible characters, each run of white space a space.

    Invisible are those of category Cf: byte order marks, soft hyphens, zero-width characters.
    """
    if not text.isascii():
        text = "".join(char for char in text if unicodedata.category(char) != "Cf")
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def hashes_in(lines: Iterable[str]) -> frozenset[str]:
    """All hashes of lines that hold one or two of them."""
    return frozenset(chain.from_iterable(line.split() for line in lines))


def without(quiz: Quiz, lines: Iterable[str]) -> Quiz:
    """The quiz less the questions of which a hash is given; subjects left empty go too."""
    known = hashes_in(lines)
    kept = {
        subject: tuple(q for q in questions if not q.is_among(known))
        for subject, questions in quiz.questions.items()
    }
    return replace_questions(quiz, {subject: qs for subject, qs in kept.items() if qs})


def round_robin(quiz: Quiz, n: int) -> Quiz:
    """At most `n` questions, the first of every subject, then the second, and so on."""
    turns = zip_longest(*quiz.questions.values())
    taken = [q for turn in turns for q in turn if q is not None][:n]
    return replace_questions(quiz, group_by_subject(taken))


def replace_questions(quiz: Quiz, questions: Mapping[str, tuple[Question, ...]]) -> Quiz:
    """The same quiz, shots and all, asking other questions."""
    shots = {subject: quiz.shots_by_subject[subject] for subject in questions}
    return replace(quiz, questions=questions, shots_by_subject=shots)


def group_by_subject(questions: Sequence[Question]) -> dict[str, tuple[Question, ...]]:
    """Questions per subject, subjects in name order, questions in the order given."""
    subjects = sorted({q.subject for q in questions})
    return {s: tuple(q for q in questions if q.subject == s) for s in subjects}


def _sha256(content: object) -> str:
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def answer_letter(question: Question) -> str:
    """`A` for the first choice, and so on."""
    return LETTERS[question.answer]


def prompt(question: Question, shots: Sequence[Question] = ()) -> str:
    """Everything the model reads before it writes ` A`, ` B`, …; no trailing space."""
    solved = (f"{_ask(shot)} {answer_letter(shot)}\n\n" for shot in shots)
    return header(question.subject) + "".join(solved) + _ask(question)


def header(subject: str) -> str:
    """What stands before the first question."""
    about = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {about}.\n\n"


def _ask(question: Question) -> str:
    choices = "".join(f"{LETTERS[i]}. {text}\n" for i, text in enumerate(question.choices))
    return f"{question.text.strip()}\n{choices}Answer:"


def shuffle_choices(quiz: Quiz) -> Quiz:
    """Every question with its choices in another order, the same each time; shots stay."""
    shuffled = {s: tuple(map(_shuffle, questions)) for s, questions in quiz.questions.items()}
    return replace_questions(quiz, shuffled)


def _shuffle(question: Question) -> Question:
    places = range(len(question.choices))
    order = list(places)
    chance = Random(int(question.content_hash, 16))
    while order == list(places):
        chance.shuffle(order)
    return reordered(question, order)


def reordered(question: Question, order: Sequence[int]) -> Question:
    """Its choices as `order` says: which of the original stands at each place."""
    return replace(
        question,
        choices=tuple(question.choices[i] for i in order),
        answer=order.index(question.answer),
        order=tuple(order),
    )
