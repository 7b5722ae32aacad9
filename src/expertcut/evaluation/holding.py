"""The fewest experts that hold: chosen on some questions, judged on others by cross-fitting.

Candidates are means of experts a token, tried from the most on. The first that is not shown to
hold within the margin ends the search, so trying many does not make one hold by chance.
`holding.json` has the result. N questions, B draws.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from pydantic import FiniteFloat

from expertcut.documents import Format1, Record
from expertcut.edits.plan import HOLDING_FILE
from expertcut.errors import PlanError, QuizError
from expertcut.evaluation.cross_fit import FOLDS, RandomBaseline, RandomResult, deal
from expertcut.stats import Array, Comparison, compare, gained_lost, verdict

HoldingVerdict = Literal["holds", "costs", "no evidence"]
RightAt = Callable[[float], Array]
"""Right answers (N,) with so many experts a token in the mean."""


class RandomRightAt(Protocol):
    """The same with random experts left out, by the number of a draw."""

    def __call__(self, mean: float, draw: int) -> Array:
        """Right answers (N,)."""


@dataclass(frozen=True)
class Tuning:
    """The questions that choose and judge: right answers of the model as it is, and their folds."""

    base_N: Array
    fold_N: Array
    margin: float

    @classmethod
    def of(
        cls, base_N: Array, subjects: Sequence[str], hashes: Sequence[str], margin: float, seed: int
    ) -> "Tuning":
        """Five folds, as of every cross-fit; QuizError of too few questions."""
        if len(set(hashes)) < FOLDS:
            raise QuizError(
                f"{len(base_N)} tuning questions cannot be split into {FOLDS} folds: profile more"
            )
        return cls(base_N, deal(subjects, hashes, seed), margin)

    def choose(self, means: Sequence[float], right_at: RightAt, among_N: Array) -> float | None:
        """The smallest of descending means before the first that does not hold; None without."""
        chosen, base_N = None, self.base_N[among_N]
        for mean in means:
            gained, lost = gained_lost(base_N, right_at(mean)[among_N])
            if verdict(gained, lost, len(base_N), self.margin) not in ("holds", "better"):
                break
            chosen = mean
        return chosen


class HoldingFold(Record):
    """One fold: the mean that was chosen without it (None: no change), and the change on it."""

    questions: int
    experts: FiniteFloat | None
    delta: FiniteFloat


@dataclass(frozen=True)
class Holding:
    """The choice on all questions, and the procedure judged by cross-fitting."""

    experts: float | None  # chosen on all questions; None is the model as it is
    cross_fitted: Comparison
    same_questions: Comparison
    folds: tuple[HoldingFold, ...]
    random: RandomBaseline
    margin: float
    n_questions: int

    @property
    def is_unchanged(self) -> bool:
        """Whether the model as it is was chosen in every fold."""
        return all(fold.experts is None for fold in self.folds)

    @property
    def verdict(self) -> HoldingVerdict:
        """Holds: the cross-fitted interval lies above −margin; costs: below 0.

        No evidence where no fold chose anything, for then nothing was judged.
        """
        if self.is_unchanged:
            return "no evidence"
        change = self.cross_fitted
        word = verdict(change.gained, change.lost, self.n_questions, self.margin)
        if word in ("holds", "better"):
            return "holds"
        return "costs" if change.ci95[1] < 0 else "no evidence"


def cross_fit_holding(
    tuning: Tuning,
    means: Sequence[float],
    right_at: RightAt,
    random_right_at: RandomRightAt,
    draws: int,
) -> Holding:
    """Chooses in four folds and scores in the fifth; then with random experts left out instead."""
    base_N, chosen_of = tuning.base_N, dict[int, float | None]()
    for fold in range(FOLDS):
        chosen_of[fold] = tuning.choose(means, right_at, tuning.fold_N != fold)
    right_N = _composed(tuning, chosen_of, right_at)
    folds = []
    for fold, mean in chosen_of.items():
        is_own_N = tuning.fold_N == fold
        change = right_N[is_own_N].astype(float) - base_N[is_own_N]
        n, delta = int(is_own_N.sum()), float(change.mean())
        folds.append(HoldingFold(questions=n, experts=mean, delta=delta))
    everything_N = np.ones(len(base_N), dtype=bool)
    chosen = tuning.choose(means, right_at, everything_N)
    same_N = base_N if chosen is None else right_at(chosen)
    deltas, seen = [], set[bytes]()
    for draw in range(draws if any(mean is not None for mean in chosen_of.values()) else 0):
        others_N = _composed(tuning, chosen_of, partial(random_right_at, draw=draw))
        seen.add(np.packbits(others_N).tobytes())
        deltas.append(float(others_N.mean() - base_N.mean()))
    return Holding(
        experts=chosen,
        cross_fitted=compare(base_N, right_N),
        same_questions=compare(base_N, same_N),
        folds=tuple(folds),
        random=RandomBaseline(np.array(deltas), len(seen)),
        margin=tuning.margin,
        n_questions=len(base_N),
    )


def _composed(tuning: Tuning, chosen_of: dict[int, float | None], right_at: RightAt) -> Array:
    """Right answers (N,), each with the mean chosen without the question's fold."""
    right_N = tuning.base_N.copy()
    for mean in {mean for mean in chosen_of.values() if mean is not None}:
        own = [fold for fold, other in chosen_of.items() if other == mean]
        is_own_N = np.isin(tuning.fold_N, own)
        right_N[is_own_N] = right_at(mean)[is_own_N]
    return right_N


class HoldingResult(Record):
    """`holding.json`; `same_questions` is optimistic: chosen and judged on the same questions.

    `random` left as many of the K experts out, at random; null where nothing was chosen.
    """

    format: Format1 = 1
    procedure: str
    quiz: str
    split: str
    questions: int
    seed: int
    margin: FiniteFloat
    base_accuracy: FiniteFloat
    experts: FiniteFloat | None
    cross_fitted: Comparison
    same_questions: Comparison
    random: RandomResult | None
    folds: tuple[HoldingFold, ...]
    verdict: HoldingVerdict
    sentence: str


def holding_result(
    found: Holding, base_accuracy: float, procedure: str, *, quiz: str, split: str, seed: int
) -> HoldingResult:
    """The record of a finished cross-fit."""
    random = None
    if len(deltas_B := found.random.delta_B):
        low, high = np.percentile(deltas_B, [2.5, 97.5])
        random = RandomResult(
            draws=len(deltas_B),
            distinct=found.random.distinct,
            delta_mean=float(deltas_B.mean()),
            range95=(float(low), float(high)),
            p=found.random.p(found.cross_fitted.delta),
        )
    return HoldingResult(
        procedure=procedure,
        quiz=quiz,
        split=split,
        questions=found.n_questions,
        seed=seed,
        margin=found.margin,
        base_accuracy=base_accuracy,
        experts=found.experts,
        cross_fitted=found.cross_fitted,
        same_questions=found.same_questions,
        random=random,
        folds=found.folds,
        verdict=found.verdict,
        sentence=_sentence(found),
    )


def _sentence(found: Holding) -> str:
    change = found.cross_fitted
    text = (
        f"{change.delta * 100:+.2f} points (95 % interval {change.ci95[0] * 100:+.2f} to "
        f"{change.ci95[1] * 100:+.2f}) on {found.n_questions:,} questions that it was not chosen on"
    )
    within = f"within {found.margin * 100:g} point{'' if found.margin == 0.01 else 's'}"
    if found.is_unchanged:
        return f"No smaller number of experts is shown to hold {within} on these questions."
    if found.verdict == "holds":
        return f"This procedure holds {within}: {text}."
    if found.verdict == "costs":
        return f"This procedure costs accuracy: {text}."
    return f"No evidence that this procedure holds {within}: {text}."


def load_holding(folder: Path) -> HoldingResult:
    """`holding.json` of a folder, a PlanError where it is missing or not valid."""
    return HoldingResult.load(folder / HOLDING_FILE, PlanError, "is not a valid proof")
