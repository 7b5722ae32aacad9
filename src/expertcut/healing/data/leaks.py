"""Nothing that is later scored is trained on."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from expertcut.errors import QuizError
from expertcut.quiz import Question, Quiz, Selection, load_quiz, without

logger = logging.getLogger(__name__)

_MOST = 0.05


@dataclass(frozen=True)
class Dropped:
    """What of a source stands in the evaluation split: how many of how many, and which."""

    source: str
    split: str
    total: int
    names: tuple[str, ...]


def evaluation_questions(
    quiz: str, split: str, own: Selection | None = None, shots: int = 0
) -> Quiz | None:
    """What is later scored; None where a quiz has no such split, or is one file for all splits.

    Its prompts have `shots`, or none where the quiz has not so many.
    """
    is_own_file = own is not None and own.quiz == quiz and Path(quiz).is_file()
    if is_own_file:
        logger.warning("%s is one file: give what is later scored by --eval-quiz", quiz)
        return None
    revision = own.revision if own is not None and own.quiz == quiz else None
    try:
        found = load_quiz(Selection(quiz, split, shots=0, revision=revision))
    except QuizError as error:
        if own is None or own.quiz != quiz:
            raise
        logger.warning("no evaluation split to keep out: %s", error)
        return None
    try:
        return load_quiz(Selection(quiz, split, shots, revision=revision)) if shots else found
    except QuizError as error:
        logger.warning("%s is asked without shots: %s", quiz, error)
        return found


def without_scored(quiz: Quiz, scored: Quiz | None) -> tuple[Quiz, Dropped | None]:
    """The quiz less the questions, by content, that stand in what is scored.

    Raises:
        QuizError: more than 5 % of them do.
    """
    hashes = frozenset() if scored is None else frozenset(q.content_hash for q in scored)
    names = tuple(f"{q.subject}:{q.row}" for q in quiz if q.content_hash in hashes)
    if scored is None or not names:
        return quiz, None
    dropped = Dropped(quiz.id, scored.split, len(quiz), names)
    _refuse(dropped, "questions")
    return without(quiz, hashes), dropped


class Asked:
    """Finds questions in texts: one whose first line, text and choices all stand in it."""

    def __init__(self, scored: Iterable[Question]) -> None:
        self.by_line: dict[str, list[Question]] = {}
        for question in scored:
            line = question.text.strip().split("\n", 1)[0].strip()
            if line:
                self.by_line.setdefault(line, []).append(question)

    def stands_in(self, text: str) -> bool:
        """Whether any of them is asked in a text, on lines of its own."""
        return any(
            question.text.strip() in text and all(choice in text for choice in question.choices)
            for line in text.split("\n")
            for question in self.by_line.get(line.strip(), ())
        )


def texts_without_scored(
    name: str, texts: list[str], scored: Iterable[Question], split: str
) -> tuple[list[int], Dropped | None]:
    """The places of the texts that ask no question of what is scored.

    Raises:
        QuizError: more than 5 % of them do.
    """
    asked = Asked(scored)
    clean, found = list[int](), list[str]()
    for at, text in enumerate(texts):
        if asked.stands_in(text):
            found.append(f"line {at + 1}")
        else:
            clean.append(at)
    if not found:
        return clean, None
    dropped = Dropped(name, split, len(texts), tuple(found))
    _refuse(dropped, "texts")
    return clean, dropped


def _refuse(dropped: Dropped, what: str) -> None:
    if len(dropped.names) > _MOST * dropped.total:
        raise QuizError(
            f"{len(dropped.names)} of {dropped.total} {what} of {dropped.source} stand in split "
            f"{dropped.split}, which is scored later, first {dropped.names[0]}; at most 5 % may: "
            "train on others, or name what is scored with --eval-quiz and --eval-split"
        )
