"""`sweep.json` and `audit.json`: results of cuts and of single ablations. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from expertcut.data import Truncate
from expertcut.documents import Format1, Record
from expertcut.edits.compression import Grain, Loader, Weigh
from expertcut.edits.edit_settings import Budget, CutSettings
from expertcut.edits.layouts import Fold, Layout, Positions, Removed
from expertcut.edits.plan import Expert, PlanModel
from expertcut.edits.selection import counts, wanted_count
from expertcut.errors import PlanError
from expertcut.evaluation.results import (
    ChosenOnResult,
    JudgedTexts,
    TextComparison,
    TextResult,
    load_outcome,
)
from expertcut.profiling.schema import AnyProfileInfo, BlockInfo, Settings
from expertcut.stats import LEVEL, Comparison, Count, Share

SWEEP_FILE = "sweep.json"
AUDIT_FILE = "audit.json"
COMPRESSION_SWEEP_FILE = "compress_sweep.json"
Interval = tuple[FiniteFloat, FiniteFloat]


class SweepRequest(Record):
    """Everything that a sweep depends on, so that two are never mixed.

    `scored` names the questions and the scoring settings; `profile` is the hash of the profile that
    chooses the experts, `chosen_by` its number of questions where some are held out, `blend` the
    rule, hashes and weights of several profiles. `text` are the texts, where these judge.
    """

    scored: AnyProfileInfo
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
    chosen_by: int | None = None
    sequential: Literal[True] | None = None
    blend: str | None = None
    text: JudgedTexts | None = None


class SweptModel(Record):
    """The unedited model or a cut; `bytes` are those of its weights, once written.

    `cut` prompts were truncated on the left, None without `--truncate`.
    """

    accuracy: FiniteFloat
    ci95: Interval
    questions: Count
    cut: Count | None = None
    right_logprob: FiniteFloat
    parameters: int
    active_parameters: int
    bytes: int


class SweepCell(SweptModel):
    """One cut compared with the unedited model; `keep` are the experts by block, as in a plan."""

    by: str
    fraction: FiniteFloat
    keep: dict[str, tuple[Expert, ...]] = Field(min_length=1)
    change: Comparison
    max_abs_logprob_diff: FiniteFloat
    median_abs_logprob_diff: FiniteFloat

    @property
    def kept(self) -> str:
        """Experts kept in each layer, as one number or a range."""
        return _range(self.keep)

    @property
    def is_unchanged(self) -> bool:
        """Whether no choice's log p differs from the unedited model's by a bit."""
        return not self.max_abs_logprob_diff


class SweptTexts(Record):
    """The unedited model or a cut on texts: all documents in one, and each source by name."""

    total: TextResult
    text: dict[str, TextResult] = Field(min_length=1)
    parameters: int
    active_parameters: int
    bytes: int


class TextCell(SweptTexts):
    """One cut compared with the unedited model on texts: `change` of all, `changes` by source.

    `chunks` is the folder of its sums by row, within `cells/`.
    """

    by: str
    fraction: FiniteFloat
    keep: dict[str, tuple[Expert, ...]] = Field(min_length=1)
    change: TextComparison
    changes: dict[str, TextComparison] = Field(min_length=1)
    chunks: str

    @model_validator(mode="after")
    def _is_compared(self) -> Self:
        if any(c.delta_loss is None or c.kl is None for c in (self.change, *self.changes.values())):
            raise ValueError("a cut without its change: it reads the tokens of the unedited model")
        return self

    @property
    def kept(self) -> str:
        """Experts kept in each layer, as one number or a range."""
        return _range(self.keep)

    @property
    def delta_loss(self) -> float:
        """Nats per token that the cut loses."""
        assert self.change.delta_loss is not None, "validated"
        return self.change.delta_loss

    @property
    def is_unchanged(self) -> bool:
        """Whether nothing differs from the unedited model."""
        return not self.delta_loss and not self.change.kl


def _range(keep: dict[str, tuple[Expert, ...]]) -> str:
    counts = sorted(map(len, keep.values()))
    return str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]}–{counts[-1]}"


class BestOnTexts(Record):
    """The cut of one share that loses least; `behind` are the others' losses beyond its own.

    These are intervals of 95 % in nats per token, by a paired bootstrap over documents: null where
    there are fewer than 10.
    """

    fraction: FiniteFloat
    by: str
    behind: dict[str, Interval | None]

    @property
    def ties(self) -> list[str]:
        """The criteria that are not shown to lose more."""
        return [by for by, ends in self.behind.items() if ends is None or ends[0] <= 0]


class Sweep(Record):
    """`sweep.json`; `cells` are the finished ones, in the order of the grid.

    `text` has the best cut of each share, where texts judge.
    """

    format: Format1 = 1
    asked: SweepRequest
    chosen_on: ChosenOnResult
    chance: Share | None = None  # the accuracy of guessing; older files lack it
    base: SweptModel | SweptTexts | None = None
    cells: tuple[SweepCell | TextCell, ...] = ()
    text: tuple[BestOnTexts, ...] | None = None

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Self:
        is_text = self.asked.text is not None
        if is_text != (self.asked.scored.text is not None):
            raise ValueError("it does not say which texts were read")
        if any(isinstance(c, TextCell) != is_text for c in self.cells):
            raise ValueError("a cell of a quiz among those of texts, or the other way round")
        if self.base is not None and isinstance(self.base, SweptTexts) != is_text:
            raise ValueError("the unedited model has other figures than the cells")
        return self

    @property
    def of_quiz(self) -> list[SweepCell]:
        """The cells of a sweep that a quiz judges; empty where texts do."""
        return [cell for cell in self.cells if isinstance(cell, SweepCell)]

    @property
    def of_texts(self) -> list[TextCell]:
        """The cells of a sweep that texts judge; empty where a quiz does."""
        return [cell for cell in self.cells if isinstance(cell, TextCell)]

    @property
    def is_complete(self) -> bool:
        """Whether every cell is finished."""
        return len(self.cells) == len(self.asked.by) * len(self.asked.fractions)

    @property
    def n_questions(self) -> int:
        """Questions that every cell scores."""
        return sum(subject.questions for subject in self.asked.scored.quiz.subjects.values())

    def cell(self, by: str, fraction: float) -> SweepCell | TextCell | None:
        """The cell, None if it is not finished."""
        return next((c for c in self.cells if (c.by, c.fraction) == (by, fraction)), None)


def load_sweep(path: Path) -> Sweep:
    """A sweep from its folder or file."""
    return load_outcome(path / SWEEP_FILE if path.is_dir() else path, Sweep)


class CompressionRequest(Record):
    """Everything that a sweep of sizes depends on, so that two are never mixed.

    `profile` is the hash of the profile whose questions measure errors, `sizes` are in bytes.
    """

    scored: AnyProfileInfo
    profile: str
    sizes: tuple[int, ...] = Field(min_length=1)
    loader: Loader
    options: str
    grain: Grain
    by: str
    group_size: int
    least: str | None
    rest: int | None
    weigh: Weigh
    seed: int
    text: JudgedTexts | None = None


class CompressionCell(SweptModel):
    """The options under one size, compared with the unedited model on a quiz."""

    size: int
    bits: FiniteFloat
    error: FiniteFloat
    change: Comparison
    max_abs_logprob_diff: FiniteFloat
    median_abs_logprob_diff: FiniteFloat


class CompressionTextCell(SweptTexts):
    """The options under one size, compared with the unedited model on texts."""

    size: int
    bits: FiniteFloat
    error: FiniteFloat
    change: TextComparison
    changes: dict[str, TextComparison] = Field(min_length=1)
    chunks: str


class CompressionSweep(Record):
    """`compress_sweep.json`; `cells` are the finished ones, in the order of the sizes."""

    format: Format1 = 1
    asked: CompressionRequest
    chosen_on: ChosenOnResult
    chance: Share | None = None
    base: SweptModel | SweptTexts | None = None
    cells: tuple[CompressionCell | CompressionTextCell, ...] = ()

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Self:
        is_text = self.asked.text is not None
        if any(isinstance(cell, CompressionTextCell) != is_text for cell in self.cells):
            raise ValueError("a cell of a quiz among those of texts, or the other way round")
        return self

    @property
    def n_questions(self) -> int:
        """Questions or rows that every cell scores."""
        return sum(subject.questions for subject in self.asked.scored.quiz.subjects.values())


def load_compression_sweep(path: Path) -> CompressionSweep:
    """A sweep of sizes from its folder or file."""
    return load_outcome(path / COMPRESSION_SWEEP_FILE if path.is_dir() else path, CompressionSweep)


@dataclass(frozen=True)
class Grid:
    """Every criterion with every fraction, and how a fraction becomes a number of experts."""

    by: tuple[str, ...]
    fractions: tuple[float, ...]

    def check(self, blocks: Sequence[BlockInfo], settings: CutSettings) -> None:
        """Checks that the model and the layout allow every cell."""
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
        return wanted_count(settings.updated(keep_fraction=fraction, sparsity=None), blocks)


class AuditRequest(Record):
    """Everything that an audit depends on, so that two are never mixed.

    `profile` is the hash of the profile that scores the experts, `asked` of the held-out questions.
    Of texts `questions` are documents, and `text` says how they are read.
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
    text: JudgedTexts | None = None


class CriterionRank(Record):
    """Scores of one criterion for the sampled experts, in their order.

    `share` is the score over its layer's sum, `place` the rank in its layer, 0 for the best.
    """

    score: tuple[FiniteFloat, ...]
    share: tuple[FiniteFloat, ...]
    place: tuple[int, ...]


class SampledExpert(Record):
    """An expert to ablate: its router row, and its number before earlier cuts."""

    layer: int
    row: int
    expert: int


class AblationEffect(Record):
    """Held-out questions without one expert, paired with the unedited model.

    `logprob` is the mean loss of log p of the right answer, `accuracy` the loss of accuracy,
    `largest` the largest |Δ log p| of any choice.
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


class TextEffect(Record):
    """Held-out texts without one expert, paired with the unedited model.

    `logprob` is the mean loss of log p of the next token, `stderr` its standard error over
    documents, `accuracy` the loss of next-token accuracy; `text` is the change of each source.
    Tokens depend on each other, so they are not counted as gained and lost.
    """

    layer: int
    expert: int
    logprob: FiniteFloat
    stderr: FiniteFloat
    accuracy: FiniteFloat
    text: dict[str, TextComparison] = Field(min_length=1)


Effect = AblationEffect | TextEffect


class Correlation(Record):
    """Spearman's ρ and its 95 % interval; None where undefined.

    `p` is the share of shuffled effects (within layers, or over all) that correlate as well.
    """

    rho: FiniteFloat | None
    ci95: Interval | None
    p: FiniteFloat | None = None

    @property
    def is_clear(self) -> bool:
        """Whether ρ is above chance; the interval of few pairs alone does not show that."""
        return bool(self.ci95 and self.ci95[0] > 0 and self.p is not None and self.p < LEVEL)


class BudgetRegret(Record):
    """At one budget: the loss of log p of the criterion's removals against the least possible.

    `removed` sampled experts go; `chosen`, `least` and `random` are sums of their single effects:
    by the criterion, at best, and on average over all choices.
    """

    fraction: FiniteFloat
    removed: int
    chosen: FiniteFloat
    least: FiniteFloat
    random: FiniteFloat

    @property
    def regret(self) -> float:
        """Never negative; 0 where the criterion removes the least harmful experts."""
        return self.chosen - self.least


class CriterionEvaluation(Record):
    """How well a criterion predicts the effects; `within` compares experts of the same layer."""

    by: str
    within: Correlation
    overall: Correlation
    within_accuracy: Correlation
    regrets: tuple[BudgetRegret, ...]


class Audit(Record):
    """`audit.json`; `verdicts` are set once all `sampled` experts have been ablated.

    `cut` prompts were truncated on the left, None without `--truncate`. Of texts, accuracy and
    log p are those of next tokens.
    """

    format: Format1 = 1
    asked: AuditRequest
    overlap: int
    cut: int | None = None
    accuracy: FiniteFloat
    right_logprob: FiniteFloat
    sampled: tuple[SampledExpert, ...]
    standings: dict[str, CriterionRank]
    harms: tuple[AblationEffect | TextEffect, ...] = ()
    verdicts: tuple[CriterionEvaluation, ...] = ()

    @model_validator(mode="after")
    def _is_of_one_sample(self) -> Self:
        n_sampled, fractions = len(self.sampled), self.asked.fractions
        if any(isinstance(h, TextEffect) != (self.asked.text is not None) for h in self.harms):
            raise ValueError("an effect on a quiz among those on texts, or the other way round")
        if len(self.harms) > n_sampled:
            raise ValueError(f"{len(self.harms)} effects of {n_sampled} sampled experts")
        for by, rank in self.standings.items():
            if {len(rank.score), len(rank.share), len(rank.place)} != {n_sampled}:
                raise ValueError(f"{by[:60]!a} does not rank the {n_sampled} sampled experts")
        for verdict in self.verdicts:
            if tuple(regret.fraction for regret in verdict.regrets) != fractions:
                raise ValueError(f"{verdict.by[:60]!a} has regrets of other fractions")
        return self

    @property
    def of_quiz(self) -> list[AblationEffect]:
        """The effects on a quiz; empty where texts judge."""
        return [effect for effect in self.harms if isinstance(effect, AblationEffect)]

    @property
    def of_texts(self) -> list[TextEffect]:
        """The effects on texts; empty where a quiz judges."""
        return [effect for effect in self.harms if isinstance(effect, TextEffect)]

    @property
    def is_complete(self) -> bool:
        """Whether every sampled expert has been ablated."""
        return len(self.harms) == len(self.sampled)


def load_audit(path: Path) -> Audit:
    """An audit from its folder or file."""
    return load_outcome(path / AUDIT_FILE if path.is_dir() else path, Audit)
