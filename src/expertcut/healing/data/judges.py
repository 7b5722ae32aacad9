"""The questions that judge a healed model, and what they were used for before."""

from dataclasses import dataclass

from expertcut.data import Quiz, round_robin, without
from expertcut.edits.splits import UNUSED

_MOST = 256
USED_BEFORE = "an earlier step used and this one did not train on"
CHOSE_STEP = "chose the best step of this training but were not trained on"


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
    return Judges(round_robin(found, _MOST), how)
