"""A profile without the questions that are held out of it, all-token sums included."""

from collections.abc import Collection
from functools import cached_property

import numpy as np

from expertcut.data import Question, Quiz
from expertcut.data.held_out import is_held_out
from expertcut.profiling.chunks import Arrays
from expertcut.profiling.store import Profile

CALIBRATION = "calibration"  # sums over the questions that are not held out
IN_CALIBRATION = "calibration_N"


class ProfilePart(Profile):
    """What a profile says of its other questions; `held_out` are subjects and rows."""

    def __init__(self, whole: Profile, held_out: Collection[tuple[str, int]]) -> None:
        super().__init__(whole.path, whole.info, whole.truncate)
        self.whole = whole
        self.held_out = frozenset(held_out)

    @cached_property
    def chunks(self) -> list[Arrays]:
        """All chunks in order, each with the questions that are left; without any it is no chunk.

        Raises:
            ProfileError: one is missing or damaged.
        """
        named = zip(self.info.chunks(), self.whole.chunks, strict=True)
        parts = (self._part(chunk, subject) for (_, subject, _), chunk in named)
        return [part for part in parts if len(part["row_N"])]

    def subjects(self) -> list[str]:
        """The subject of each question that is left."""
        names = zip(self.whole.subjects(), self.whole.array("row_N").tolist(), strict=True)
        return [subject for subject, row in names if (subject, row) not in self.held_out]

    def _part(self, chunk: Arrays, subject: str) -> Arrays:
        rows = chunk["row_N"].tolist()
        is_left_N = np.array([(subject, row) not in self.held_out for row in rows])
        part = {}
        for name, array in chunk.items():
            kind, _, rest = name.partition("_")
            if kind == "question" and name.endswith("_LE"):
                part[name] = chunk[f"{CALIBRATION}_{rest}"]
            elif kind != CALIBRATION:
                is_by_question = name.rpartition("_")[2].startswith("N")
                part[name] = array[is_left_N] if is_by_question else array
        return part


def can_hold_out(profile: Profile, quiz: Quiz) -> bool:
    """Whether a profile tells the fifth that is held out from the rest, sums over tokens too."""
    if profile.info.settings.stats == "answer":
        return True
    of_subject = zip(profile.info.chunks(), profile.chunks, strict=True)
    asked = {(q.subject, q.row): q for q in quiz}
    return all(
        IN_CALIBRATION in chunk
        and chunk[IN_CALIBRATION].astype(bool).tolist()
        == in_calibration([asked[subject, row] for row in chunk["row_N"].tolist()])
        for (_, subject, _), chunk in of_subject
    )


def in_calibration(questions: Collection[Question]) -> list[bool]:
    """Which of them choose where a fifth is held out."""
    return [not is_held_out(question) for question in questions]
