"""`sweep.json` and `audit.json`: cuts and single ablations that were tried. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, FiniteFloat, model_validator

from expertcut.data import Truncate
from expertcut.documents import Format1, Record
from expertcut.edits.budget import counts, wanted_count
from expertcut.edits.criteria import CRITERIA, criterion_name
from expertcut.edits.edit_settings import Budget, CutSettings
from expertcut.edits.layouts import Layout
from expertcut.edits.plan import Expert, Fold, PlanModel, Positions, Removed
from expertcut.errors import PlanError, SettingsError
from expertcut.evaluation.cross_fit import Change
from expertcut.evaluation.results import ChosenOnResult, load_outcome, save_outcome
from expertcut.profiling.schema import BlockInfo, ProfileInfo, Settings

SWEEP_FILE = "sweep.json"
ALL = "all"
AUDIT_FILE = "audit.json"
Interval = tuple[FiniteFloat, FiniteFloat]


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


@dataclass(frozen=True)
class Grid:
    """Every criterion with every fraction, and how a fraction becomes numbers of experts."""

    by: tuple[str, ...]
    fractions: tuple[float, ...]

    @classmethod
    def of(cls, by: str, fractions: str) -> Self:
        """As on the command line.

        Raises:
            SettingsError: a criterion that is none, a share that is none, or one of them twice.
        """
        return cls(read_criteria(by), read_fractions(fractions, "--sweep"))

    def check(self, blocks: Sequence[BlockInfo], settings: CutSettings) -> None:
        """That the model and the layout allow every cell.

        Raises:
            PlanError: one that keeps too few.
            SettingsError: a budget that the layout cannot carry.
        """
        settings.check_layout()
        allowed = counts(settings, blocks)
        for fraction in self.fractions:
            n_keep = self.n_keep(fraction, blocks, settings)
            if n_keep not in allowed:
                place = "in all" if settings.budget == "global" else "a layer"
                raise PlanError(
                    f"{fraction:g} of the experts are {n_keep} {place}: keep {allowed[0]} to "
                    f"{allowed[-1]}"
                )

    def n_keep(self, fraction: float, blocks: Sequence[BlockInfo], settings: CutSettings) -> int:
        """How many experts a fraction keeps."""
        return wanted_count(settings.completed(keep_fraction=fraction, sparsity=None), blocks)

    def with_cell(self, found: Sweep, cell: SweepCell) -> Sweep:
        """The sweep with a cell more, in the grid's order."""
        cells = sorted(
            (*found.cells, cell),
            key=lambda c: (self.by.index(c.by), self.fractions.index(c.fraction)),
        )
        return found.model_copy(update={"cells": tuple(cells)})


def read_criteria(text: str) -> tuple[str, ...]:
    """`reap,activations`, or `all` of them.

    Raises:
        SettingsError: one that is not a criterion, or is named twice.
    """
    if text == ALL:
        return tuple(CRITERIA)
    names = tuple(criterion_name(name.strip()) for name in text.split(","))
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"--by names {name} twice")
    return names


def read_fractions(text: str, option: str) -> tuple[float, ...]:
    """`0.75,0.5,0.25` as numbers.

    Raises:
        SettingsError: one that is no share above 0 and at most 1, or twice there.
    """
    shares = []
    for part in text.split(","):
        try:
            share = float(part)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise SettingsError(
                f"{option} {text}: {part.strip()!r} must be a share above 0, at most 1"
            )
        if share in shares:
            raise SettingsError(f"{option} {text} has {share:g} twice")
        shares.append(share)
    return tuple(shares)


class AuditAsked(Record):
    """All that an audit depends on: another one is never mixed in.

    `profile` is the hash of what scored the experts, `asked` that of the held-out questions.
    """

    model: PlanModel
    settings: Settings
    profile: str
    quiz: str
    split: str
    shots: int
    questions: int
    asked: str
    by: tuple[str, ...] = Field(min_length=1)
    positions: Positions | None
    layout: Layout
    fractions: tuple[FiniteFloat, ...] = Field(min_length=1)
    sample: int
    seed: int
    truncate: Truncate | None = None


class CriterionRank(Record):
    """What a criterion says of the sampled experts, in their order.

    `share` is the score over its layer's sum, `place` the number of experts of its layer that the
    criterion would keep before it.
    """

    score: tuple[FiniteFloat, ...]
    share: tuple[FiniteFloat, ...]
    place: tuple[int, ...]


class Sampled(Record):
    """An expert to be removed: its router's row in the profiled model, and what it is called."""

    layer: int
    row: int
    expert: int


class AblationEffect(Record):
    """What removing one expert did to the held-out questions, paired with the unedited model.

    `logprob` is the mean loss of log p of the right answer, `stderr` that of this mean, `accuracy`
    the share of answers lost less those gained; `largest` is the largest |Δ log p| of any choice.
    """

    layer: int
    expert: int
    logprob: FiniteFloat
    stderr: FiniteFloat
    accuracy: FiniteFloat
    gained: int
    lost: int
    mcnemar_p: FiniteFloat
    largest: FiniteFloat


LEVEL = 0.05


class Correlation(Record):
    """Spearman's, and its 95 % interval; None where it is undefined.

    `p` is the share of shuffled harms (within layers, or over all) that agree at least as well.
    """

    rho: FiniteFloat | None
    ci95: Interval | None
    p: FiniteFloat | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the order is one beyond chance; an interval of few pairs alone does not say."""
        return bool(self.ci95 and self.ci95[0] > 0 and self.p is not None and self.p < LEVEL)


class Regret(Record):
    """At one budget: how much more harm the criterion's removals do, one by one, than the least.

    `removed` of the sampled experts go; `chosen`, `least` and `random` are sums of their harms to
    log p as the criterion chooses, at least, and on average over all choices.
    """

    fraction: FiniteFloat
    removed: int
    chosen: FiniteFloat
    least: FiniteFloat
    random: FiniteFloat

    @property
    def regret(self) -> float:
        """Never below 0, and 0 where the criterion removes the least harmful ones."""
        return self.chosen - self.least


class Verdict(Record):
    """How well a criterion foretold the harms; `within` compares experts of a layer only."""

    by: str
    within: Correlation
    overall: Correlation
    within_accuracy: Correlation
    regrets: tuple[Regret, ...]


class Audit(Record):
    """`audit.json`; `verdicts` are there when all `sampled` experts have been removed once.

    `cut` of the prompts lost tokens on their left; None where none may (`--truncate`).
    """

    format: Format1 = 1
    asked: AuditAsked
    overlap: int
    cut: int | None = None
    accuracy: FiniteFloat
    right_logprob: FiniteFloat
    sampled: tuple[Sampled, ...]
    standings: dict[str, CriterionRank]
    harms: tuple[AblationEffect, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    @model_validator(mode="after")
    def _is_of_one_sample(self) -> Self:
        n_sampled, fractions = len(self.sampled), self.asked.fractions
        if len(self.harms) > n_sampled:
            raise ValueError(f"{len(self.harms)} harms of {n_sampled} sampled experts")
        for by, its in self.standings.items():
            if {len(its.score), len(its.share), len(its.place)} != {n_sampled}:
                raise ValueError(f"{by[:60]!a} does not rank the {n_sampled} sampled experts")
        for verdict in self.verdicts:
            if tuple(regret.fraction for regret in verdict.regrets) != fractions:
                raise ValueError(f"{verdict.by[:60]!a} has regrets of other shares than were asked")
        return self

    @property
    def is_complete(self) -> bool:
        """Whether every sampled expert has been removed."""
        return len(self.harms) == len(self.sampled)


def save_audit(folder: Path, found: Audit) -> None:
    """Writes `audit.json`, whole or not at all."""
    save_outcome(folder / AUDIT_FILE, found)


def load_audit(path: Path) -> Audit:
    """An audit from its folder or file.

    Raises:
        OutputError: none there, or one that does not hold together.
    """
    return load_outcome(path / AUDIT_FILE if path.is_dir() else path, Audit)
