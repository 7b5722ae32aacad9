"""`audit.json`: what removing single experts did, and who foretold it. No torch here."""

from pathlib import Path
from typing import Self

from pydantic import Field, FiniteFloat, model_validator

from expertcut.data import Truncate
from expertcut.documents import Format1, Record
from expertcut.edits.plan import Layout, PlanModel, Positions
from expertcut.evaluation.folders import load_outcome, save_outcome
from expertcut.profiling.schema import Settings

AUDIT_FILE = "audit.json"
Interval = tuple[FiniteFloat, FiniteFloat]


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


class Standing(Record):
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


class Harm(Record):
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
    standings: dict[str, Standing]
    harms: tuple[Harm, ...] = ()
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
