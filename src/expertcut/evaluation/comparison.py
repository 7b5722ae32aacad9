"""Two models on the same questions: what was gained and lost, and whether chance would do it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binom

Array = np.ndarray[Any, Any]
BOOTSTRAP_DRAWS = 10_000


@dataclass(frozen=True)
class Comparison:
    """`delta` is other minus base; `gained` questions only the other got right, `lost` only base.

    `smallest_effect` is the difference that so many questions could have shown.
    """

    delta: float
    ci95: tuple[float, float]
    gained: int
    lost: int
    mcnemar_p: float
    smallest_effect: float


def compare(base_N: Array, other_N: Array, subjects: Sequence[str], seed: int = 0) -> Comparison:
    """Paired comparison of two models' right answers (N,) bool."""
    gained, lost = int((~base_N & other_N).sum()), int((base_N & ~other_N).sum())
    return Comparison(
        delta=(gained - lost) / len(base_N),
        ci95=bootstrap_interval(other_N.astype(int) - base_N.astype(int), subjects, seed),
        gained=gained,
        lost=lost,
        mcnemar_p=mcnemar(gained, lost),
        smallest_effect=smallest_effect(gained, lost, len(base_N)),
    )


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test, 1 where nothing changed."""
    if gained + lost == 0:
        return 1.0
    return min(1.0, 2 * float(binom.cdf(min(gained, lost), gained + lost, 0.5)))


def bootstrap_interval(
    change_N: Array, subjects: Sequence[str], seed: int, draws: int = BOOTSTRAP_DRAWS
) -> tuple[float, float]:
    """95 % percentile interval of the mean change, questions resampled within subjects.

    A change is −1, 0 or 1, so resampling a subject is one multinomial draw of three counts.
    """
    rng = np.random.default_rng(seed)
    names = np.asarray(subjects)
    total_B = np.zeros(draws)
    for name in dict.fromkeys(subjects):
        change_n = change_N[names == name]
        shares = [float((change_n == value).mean()) for value in (-1, 0, 1)]
        counts_B3 = rng.multinomial(len(change_n), shares, size=draws)
        total_B += counts_B3[:, 2] - counts_B3[:, 0]
    low, high = np.percentile(total_B / len(change_N), [2.5, 97.5])
    return float(low), float(high)


def smallest_effect(gained: int, lost: int, n: int) -> float:
    """2.8 standard errors of the paired difference (80 % power at 5 %); 3/N where none changed."""
    if gained + lost == 0:
        return 3 / n
    delta = (gained - lost) / n
    return 2.8 * float(np.sqrt(max(0.0, (gained + lost) / n**2 - delta**2 / n)))
