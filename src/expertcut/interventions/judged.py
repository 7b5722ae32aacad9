"""Which questions judged an edit, and whether they had been used before: told by their hashes."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertcut.data.questions import hashes_in
from expertcut.errors import PlanError
from expertcut.interventions.plan import PLAN_FILE, Plan, load_hashes

HASHES, USED, SPLIT = "held_out_hashes", "held_out_used", "held_out_split"
UNUSED = "were not used"


@dataclass(frozen=True)
class Judged:
    """Questions of a split that judged; `used` of them had a part in the edit, None is not known.

    `how` says in words how used ones were used, where that was recorded.
    """

    split: str
    questions: int
    used: int | None
    how: str = ""

    @property
    def title(self) -> str:
        """A heading: they are held out only where none of them was used."""
        if self.used == 0:
            return f"Held-out questions ({self.split})"
        if self.how:
            return f"Questions that {self.how} ({self.split})"
        if self.used is None:
            return f"Questions that were asked ({self.split})"
        return (
            f"Questions ({self.split}), {self.used:,} of {self.questions:,} used to choose or fit"
        )

    @property
    def noun(self) -> str:
        """The questions within a sentence."""
        return "held-out questions" if self.used == 0 else "the questions that were asked"

    @property
    def clause(self) -> str:
        """The questions, and how they were used."""
        if self.used == 0:
            return f"{self.split} questions that were not used to choose or fit anything"
        if self.how:
            return f"{self.split} questions that {self.how}"
        if self.used is None:
            return f"{self.split} questions, of which it is not recorded whether they were used"
        which = f"{self.questions:,} {self.split} questions"
        return f"{which}, {self.used:,} of them used to choose or fit"


def judged_by(lines: Iterable[str], used: Iterable[str], split: str, how: str = "") -> Judged:
    """Of hash lines of questions that judge, those that are among the used ones."""
    judges, known = tuple(lines), hashes_in(used)
    n_used = sum(not known.isdisjoint(line.split()) for line in judges)
    return Judged(split, len(judges), n_used, how)


def read_judged(plan: Plan, folder: Path) -> Judged:
    """What a plan says of the questions that judged it, held against its list of used questions.

    Nothing is known of plans from before the hashes were recorded, or without their list.

    Raises:
        PlanError: what is recorded is of another form.
    """
    proof: dict[str, Any] = plan.proof
    lines, how, split = proof.get(HASHES), proof.get(USED, ""), str(proof.get(SPLIT, ""))
    is_of_hashes = isinstance(lines, list) and all(isinstance(line, str) for line in lines)
    if not isinstance(how, str) or not (lines is None or is_of_hashes):
        raise PlanError(f"{PLAN_FILE}: proof.{HASHES} must be a list of hashes, {USED} a text")
    how = "" if how == UNUSED else how
    if not lines:
        return Judged(split, 0, None, how)
    try:
        used = load_hashes(folder, plan)
    except PlanError:
        return Judged(split, len(lines), None, how)
    return judged_by(lines, used, split, how)
