"""Keeps scored questions out of the training, and chooses the questions that score the result."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from expertcut.data import Question, Quiz, Selection, load_quiz, round_robin, without
from expertcut.data.questions import hashes_in, normalised
from expertcut.data.sources import hash_lines
from expertcut.edits.splits import UNUSED
from expertcut.errors import QuizError, SplitError
from expertcut.healing.heal_settings import HealSettings
from expertcut.healing.rows import Text

USED_BEFORE = "an earlier step used and this one did not train on"
CHOSE_STEP = "chose the best step of this training but were not trained on"
_MAX_SCORED = 256
_MAX_DROPPED_SHARE = 0.05
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredQuiz:
    """Questions that score the result, and how they were `used`: UNUSED or a sentence above."""

    quiz: Quiz
    used: str


def choose_scored(
    scored: Quiz | None, held_out: Quiz | None, used: frozenset[str]
) -> ScoredQuiz | None:
    """Unused questions of the evaluation split, else all of it, else the held-out questions.

    `used` are hash lines of the questions that this run and earlier steps read. None without a
    quiz.
    """
    if scored is not None:
        unused = without(scored, used)
        quiz, how = (unused, UNUSED) if len(unused) else (scored, USED_BEFORE)
    elif held_out is not None:
        quiz, how = held_out, CHOSE_STEP
    else:
        return None
    return ScoredQuiz(round_robin(quiz, _MAX_SCORED), how)


@dataclass(frozen=True)
class Dropped:
    """Questions or texts of a source that are left out, by name, and the size of the source.

    They are in the evaluation `split`, or have more tokens than `longest`.
    """

    source: str
    split: str | None
    total: int
    names: tuple[str, ...]
    longest: int | None = None


def quizzes_kept_out(settings: HealSettings) -> list[Quiz]:
    """The evaluation split of `eval_quiz`, else of every quiz that is trained on."""
    if settings.eval_quiz is not None:
        return [_as_scored(settings.eval_quiz, settings, settings.eval_revision)]
    named = {quiz.name: quiz.revision for quiz in settings.quizzes}
    quizzes = [_evaluation_split(name, settings, revision) for name, revision in named.items()]
    found = [quiz for quiz in quizzes if quiz is not None]
    if not found:
        logger.warning("nothing is kept out of the training: name the scored quiz by --eval-quiz")
    return found


def _evaluation_split(name: str, settings: HealSettings, revision: str | None) -> Quiz | None:
    """None if a quiz has no such split, or is one file for all splits."""
    if Path(name).is_file():
        logger.warning("%s is one file: name the scored quiz by --eval-quiz", name)
        return None
    try:
        return _as_scored(name, settings, revision)
    except SplitError as error:
        logger.warning("no evaluation split to keep out: %s", error)
        return None


def _as_scored(name: str, settings: HealSettings, revision: str | None) -> Quiz:
    """The quiz with shots, or without if it has too few."""
    selection = Selection(
        name,
        settings.kept_out_split,
        settings.n_shots,
        revision=revision,
        truncate=settings.truncate,
    )
    try:
        return load_quiz(selection)
    except SplitError:
        raise
    except QuizError as error:
        quiz = load_quiz(replace(selection, shots=0))  # raises again unless shots were the reason
        logger.warning("%s is scored without shots: %s", name, error)
        return quiz


def without_scored(quiz: Quiz, scored: Sequence[Quiz]) -> tuple[Quiz, Dropped | None]:
    """The quiz without questions whose content is in a scored quiz."""
    lines = frozenset[str]().union(*map(hash_lines, scored))
    known = hashes_in(lines)
    names = tuple(f"{q.subject}:{q.row}" for q in quiz if q.is_among(known))
    if not names:
        return quiz, None
    dropped = Dropped(quiz.id, scored[0].split, len(quiz), names)
    _check_share(dropped, "questions")
    return without(quiz, lines), dropped


class QuestionFinder:
    """Finds questions in texts: the first line, the text and all choices must be there.

    White space, invisible characters and the Unicode form are ignored.
    """

    def __init__(self, questions: Iterable[Question]) -> None:
        self.by_line: dict[str, list[Question]] = {}
        for question in questions:
            if line := next(filter(None, map(normalised, question.text.splitlines())), ""):
                self.by_line.setdefault(line, []).append(question)

    def questions_in(self, text: str) -> Iterator[Question]:
        """Questions that a text contains on lines of their own."""
        lines = [normalised(line) for line in text.splitlines()]
        candidates = [q for line in lines for q in self.by_line.get(line, ())]
        if not candidates:
            return
        whole = normalised(text)
        for question in candidates:
            if all(normalised(part) in whole for part in (question.text, *question.choices)):
                yield question


def texts_without_scored(
    name: str, texts: Sequence[Text], scored: Iterable[Question], split: str
) -> tuple[list[Text], Dropped | None]:
    """The texts that contain no scored question."""
    finder = QuestionFinder(scored)
    clean, lines = list[Text](), list[str]()
    for number, text in enumerate(texts, 1):
        if any(finder.questions_in(text.said)):
            lines.append(f"line {number}")
        else:
            clean.append(text)
    if not lines:
        return clean, None
    dropped = Dropped(name, split, len(texts), tuple(lines))
    _check_share(dropped, "texts")
    return clean, dropped


def _check_share(dropped: Dropped, what: str) -> None:
    if len(dropped.names) > _MAX_DROPPED_SHARE * dropped.total:
        raise QuizError(
            f"{len(dropped.names)} of {dropped.total} {what} of {dropped.source} stand in split "
            f"{dropped.split}, which is scored later, first {dropped.names[0]}; at most 5 % may: "
            "train on others, or name what is scored with --eval-quiz and --eval-split"
        )
