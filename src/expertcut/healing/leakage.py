"""Nothing that is later scored is trained on; and the questions that judge a healed model."""

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

_MOST_JUDGES = 256
USED_BEFORE = "an earlier step used and this one did not train on"
CHOSE_STEP = "chose the best step of this training but were not trained on"
logger = logging.getLogger(__name__)

_MOST_DROPPED_SHARE = 0.05


@dataclass(frozen=True)
class Judges:
    """Questions, and how they were `used`: one of the sentences above."""

    quiz: Quiz
    used: str


def find_judges(scored: Quiz | None, held_out: Quiz | None, used: frozenset[str]) -> Judges | None:
    """Of what is scored later, those that nothing was chosen on, else all; else those held out.

    `used` are hash lines of what this run and the steps before it looked at. None where there
    are only texts.
    """
    if scored is not None:
        unused = without(scored, used)
        found, how = (unused, UNUSED) if len(unused) else (scored, USED_BEFORE)
    elif held_out is not None:
        found, how = held_out, CHOSE_STEP
    else:
        return None
    return Judges(round_robin(found, _MOST_JUDGES), how)


@dataclass(frozen=True)
class Dropped:
    """What of a source was left out: how many of how many, and which.

    It stands in the evaluation `split`, or has more tokens than `longest`.
    """

    source: str
    split: str | None
    total: int
    names: tuple[str, ...]
    longest: int | None = None


def evaluation_quizzes(settings: HealSettings) -> list[Quiz]:
    """What is later scored, as it is asked then: `eval_quiz`, else every quiz that is trained on.

    Raises:
        QuizError: one of them cannot be read, or `eval_quiz` has no such split.
    """
    if settings.eval_quiz is not None:
        return [_as_scored(settings.eval_quiz, settings, settings.eval_revision)]
    named = {quiz.name: quiz.revision for quiz in settings.quizzes}
    quizzes = [_own(name, settings, revision) for name, revision in named.items()]
    found = [quiz for quiz in quizzes if quiz is not None]
    if not found:
        logger.warning("nothing is kept out of the training: name what is scored by --eval-quiz")
    return found


def _own(name: str, settings: HealSettings, revision: str | None) -> Quiz | None:
    """None where a quiz has no such split, or is one file for all splits."""
    if Path(name).is_file():
        logger.warning("%s is one file: give what is later scored by --eval-quiz", name)
        return None
    try:
        return _as_scored(name, settings, revision)
    except SplitError as error:
        logger.warning("no evaluation split to keep out: %s", error)
        return None


def _as_scored(name: str, settings: HealSettings, revision: str | None) -> Quiz:
    """Its prompts have shots, or none where the quiz has not so many."""
    asked = Selection(
        name,
        settings.kept_out_split,
        settings.n_shots,
        revision=revision,
        truncate=settings.truncate,
    )
    try:
        return load_quiz(asked)
    except SplitError:
        raise
    except QuizError as error:
        found = load_quiz(replace(asked, shots=0))  # fails again, if it was not for the shots
        logger.warning("%s is asked without shots: %s", name, error)
        return found


def without_scored(quiz: Quiz, scored: Sequence[Quiz]) -> tuple[Quiz, Dropped | None]:
    """The quiz less the questions, by content, that stand in what is scored.

    Raises:
        QuizError: more than 5 % of them do.
    """
    lines = frozenset[str]().union(*map(hash_lines, scored))
    known = hashes_in(lines)
    names = tuple(f"{q.subject}:{q.row}" for q in quiz if q.is_among(known))
    if not names:
        return quiz, None
    dropped = Dropped(quiz.id, scored[0].split, len(quiz), names)
    _refuse(dropped, "questions")
    return without(quiz, lines), dropped


class Asked:
    """Finds questions in texts: one whose first line, text and choices all stand in it.

    White space, invisible characters and the Unicode form do not count.
    """

    def __init__(self, scored: Iterable[Question]) -> None:
        self.by_line: dict[str, list[Question]] = {}
        for question in scored:
            if line := next(filter(None, map(normalised, question.text.splitlines())), ""):
                self.by_line.setdefault(line, []).append(question)

    def found_in(self, text: str) -> Iterator[Question]:
        """Those of them that are asked in a text, on lines of their own."""
        lines = [normalised(line) for line in text.splitlines()]
        asked = [q for line in lines for q in self.by_line.get(line, ())]
        if not asked:
            return
        whole = normalised(text)
        for question in asked:
            if all(normalised(part) in whole for part in (question.text, *question.choices)):
                yield question

    def stands_in(self, text: str) -> bool:
        """Whether any of them is asked in a text, on lines of its own."""
        return any(self.found_in(text))


def texts_without_scored(
    name: str, texts: Sequence[Text], scored: Iterable[Question], split: str
) -> tuple[list[int], Dropped | None]:
    """The places of the texts that ask no question of what is scored.

    Raises:
        QuizError: more than 5 % of them do.
    """
    asked = Asked(scored)
    clean, found = list[int](), list[str]()
    for at, text in enumerate(texts):
        if asked.stands_in(text.said):
            found.append(f"line {at + 1}")
        else:
            clean.append(at)
    if not found:
        return clean, None
    dropped = Dropped(name, split, len(texts), tuple(found))
    _refuse(dropped, "texts")
    return clean, dropped


def _refuse(dropped: Dropped, what: str) -> None:
    if len(dropped.names) > _MOST_DROPPED_SHARE * dropped.total:
        raise QuizError(
            f"{len(dropped.names)} of {dropped.total} {what} of {dropped.source} stand in split "
            f"{dropped.split}, which is scored later, first {dropped.names[0]}; at most 5 % may: "
            "train on others, or name what is scored with --eval-quiz and --eval-split"
        )
