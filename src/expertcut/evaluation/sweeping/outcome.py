"""`sweep.json`: what each cut of a grid would answer, and how large it would be. No torch here."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, FiniteFloat

from expertcut.documents import Format1, Record
from expertcut.edits.budget import Budget
from expertcut.edits.plan import Expert, Fold, Layout, Positions, Removed
from expertcut.evaluation.folders import load_outcome, save_outcome
from expertcut.evaluation.proving.outcome import Change
from expertcut.evaluation.results import ChosenOnResult
from expertcut.profiling.schema import ProfileInfo

SWEEP_FILE = "sweep.json"


class SweepAsked(Record):
    """All that a sweep depends on: another one is never mixed in.

    `scored` says of which questions and how; `profile` is the hash of what chose the experts.
    """

    scored: ProfileInfo
    profile: str
    by: tuple[str, ...] = Field(min_length=1)
    fractions: tuple[FiniteFloat, ...] = Field(min_length=1)
    budget: Budget
    min_keep: int | None
    positions: Positions | None
    layout: Layout
    removed: Removed | None
    fold: Fold | None
    protect: tuple[str, ...]
    seed: int
    chosen_by: int | None = None  # how many questions, where some of the profile's are held out


class SweptModel(Record):
    """The unedited model; a cut is described by the same, `bytes` as its weights would be.

    `cut` of the prompts lost tokens on their left; None where none may (`--truncate`).
    """

    accuracy: FiniteFloat
    ci95: tuple[FiniteFloat, FiniteFloat]
    questions: Annotated[int, Field(ge=0)]
    cut: Annotated[int, Field(ge=0)] | None = None
    right_logprob: FiniteFloat
    parameters: int
    active_parameters: int
    bytes: int


class SweepCell(SweptModel):
    """One cut: who ranked, which share stays, and what that does against the unedited model.

    `keep` names experts by block, as a plan does.
    """

    by: str
    fraction: FiniteFloat
    keep: dict[str, tuple[Expert, ...]] = Field(min_length=1)
    change: Change
    max_abs_logprob_diff: FiniteFloat
    median_abs_logprob_diff: FiniteFloat

    @property
    def kept(self) -> str:
        """How many experts stay: in each layer, or from the fewest to the most."""
        counts = sorted({len(experts) for experts in self.keep.values()})
        return str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"


class Sweep(Record):
    """`sweep.json`; `cells` are those that are finished, in the order of the grid."""

    format: Format1 = 1
    asked: SweepAsked
    chosen_on: ChosenOnResult
    base: SweptModel | None = None
    cells: tuple[SweepCell, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether every cell is there."""
        return len(self.cells) == len(self.asked.by) * len(self.asked.fractions)

    def cell(self, by: str, fraction: float) -> SweepCell | None:
        """The cell, if it is finished."""
        return next((c for c in self.cells if (c.by, c.fraction) == (by, fraction)), None)


def save_sweep(folder: Path, found: Sweep) -> None:
    """Writes `sweep.json`, whole or not at all."""
    save_outcome(folder / SWEEP_FILE, found)


def load_sweep(path: Path) -> Sweep:
    """A sweep from its folder or file.

    Raises:
        OutputError: none there, or one that does not hold together.
    """
    return load_outcome(path / SWEEP_FILE if path.is_dir() else path, Sweep)
