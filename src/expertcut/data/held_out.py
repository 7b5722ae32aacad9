"""Which questions can judge what others chose: another split, or a fifth that is held out."""

import logging
from pathlib import Path

from expertcut.data.questions import (
    Question,
    Quiz,
    group_by_subject,
    hashes_in,
    replace_questions,
    without,
)
from expertcut.data.sources import Selection, load_quiz
from expertcut.errors import QuizError

logger = logging.getLogger(__name__)

JUDGING = ("val", "test")  # splits that judge, where the quiz has them
HELD_OUT_SHARE = 0.2
_ONE_IN = 5
_MOST_OVERLAP = 0.05


def hash_lines(quiz: Quiz) -> frozenset[str]:
    """Both hashes of every question of a quiz, as lines of `chosen_on.txt`."""
    return frozenset(question.hash_line for question in quiz)


def is_one_set(quiz: Quiz) -> bool:
    """Whether no question of another split can judge what these choose; nothing is logged.

    Raises:
        QuizError: more than 5 % of another split stand in this one.
    """
    others = (s for s in JUDGING if s != quiz.split)
    return all(other_split(quiz, split, quiz, is_quiet=True) is None for split in others)


def is_held_out(question: Question) -> bool:
    """Whether a question is of the fifth that judges where a quiz has one set of questions.

    A question that was changed trivially is on the same side. Profiles keep sums by it.
    """
    return int(question.overlap_hash, 16) % _ONE_IN == 0


def fifth_of(quiz: Quiz) -> Quiz:
    """A fifth by content, where another split chose; repeats of a question are all in it or none.

    Of questions that differ trivially the least content hash decides.
    """
    least: dict[str, str] = {}
    for q in quiz:
        least[q.overlap_hash] = min(least.get(q.overlap_hash, q.content_hash), q.content_hash)
    fifth = [q for q in quiz if int(least[q.overlap_hash], 16) % _ONE_IN == 0]
    return replace_questions(quiz, group_by_subject(fifth))


def other_split(quiz: Quiz, split: str, *used: Quiz, is_quiet: bool = False) -> Quiz | None:
    """The same subjects' questions of another split, less those that stand in a used one.

    None where there are none.

    Raises:
        QuizError: more than 5 % of them stand in a used one.
    """
    if Path(quiz.id).is_file():
        return None  # one file is whichever split is asked for
    selection = Selection(
        *(quiz.id, split, quiz.shots), revision=quiz.revision, truncate=quiz.truncate
    )
    try:
        other = load_quiz(selection)
    except QuizError as error:
        if not is_quiet:
            logger.warning("split %s is not used to judge: %s", split, error)
        return None
    same = {s: qs for s, qs in other.questions.items() if s in quiz.questions}
    other = replace_questions(other, same)
    lines = frozenset[str]().union(*map(hash_lines, used))
    known = hashes_in(lines)
    repeated = [q for q in other if q.is_among(known)]
    if len(repeated) == len(other):
        return None
    if repeated and not is_quiet:
        logger.warning(
            "%d of %d %s questions stand in %s too and are left out, first %s:%d",
            *(len(repeated), len(other), split, " and ".join(sorted({q.split for q in used}))),
            *(repeated[0].subject, repeated[0].row),
        )
    if len(repeated) > _MOST_OVERLAP * len(other):
        raise QuizError(
            f"{len(repeated)} of {len(other)} {split} questions of {other.id} stand in "
            f"{used[0].split} too, at most 5 % may: they cannot judge anything"
        )
    return without(other, lines)
