"""Accuracy of one model and comparison of two on the same questions, with uncertainty."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import bdtr

from expertcut.profiling.significance import Z95
from expertcut.profiling.significance import wilson as wilson_intervals

Array = np.ndarray[Any, Any]
LEVEL = 0.05
_HALVINGS = 60  # of an interval no wider than 2, so that an end is exact to a float's last bits


@dataclass(frozen=True)
class Accuracy:
    """Micro accuracy over questions; `stderr` is None where every subject has one question."""

    accuracy: float
    stderr: float | None
    ci95: tuple[float, float]
    n_questions: int
    by_subject: dict[str, tuple[float, int]]


def accuracy(is_correct_N: Array, subjects: Sequence[str]) -> Accuracy:
    """Accuracy over all questions and per subject; the interval is Wilson's."""
    names = np.asarray(subjects)
    by_subject = {
        str(name): (float(is_correct_N[names == name].mean()), int((names == name).sum()))
        for name in dict.fromkeys(subjects)
    }
    n_questions = len(is_correct_N)
    return Accuracy(
        accuracy=float(is_correct_N.mean()),
        stderr=pooled_stderr(list(by_subject.values())),
        ci95=wilson(float(is_correct_N.sum()), n_questions),
        n_questions=n_questions,
        by_subject=by_subject,
    )


def pooled_stderr(subjects: Sequence[tuple[float, int]]) -> float | None:
    """√(Σ n p (1 − p) / ((N − S) N)) over (p, n) per subject, as lm-evaluation-harness pools."""
    total = sum(n for _, n in subjects)
    if total == len(subjects):
        return None
    within = sum(n * p * (1 - p) for p, n in subjects)
    return float(np.sqrt(within / ((total - len(subjects)) * total)))


def wilson(n_correct: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; `n` may be an effective, fractional number."""
    low, high = wilson_intervals(np.array(n_correct / n), np.array(n))
    return float(low), float(high)


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


def compare(base_N: Array, other_N: Array) -> Comparison:
    """Paired comparison of two models' right answers (N,) bool."""
    gained, lost = int((~base_N & other_N).sum()), int((base_N & ~other_N).sum())
    n = len(base_N)
    return Comparison(
        delta=(gained - lost) / n,
        ci95=paired_interval(gained, lost, n),
        gained=gained,
        lost=lost,
        mcnemar_p=mcnemar(gained, lost),
        smallest_effect=smallest_effect(gained, lost, n),
    )


def shows_change(ci95: tuple[float, float], mcnemar_p: float) -> bool:
    """Whether a change in accuracy is significant: by the exact test, never by an interval alone.

    `paired_interval` leaves out 0 wherever the exact test rejects. Results of earlier versions may
    hold an interval that is too narrow.
    """
    return mcnemar_p < LEVEL and not ci95[0] <= 0 <= ci95[1]


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test, 1 where nothing changed."""
    if gained + lost == 0:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))


def paired_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """95 % score interval of the change in accuracy (gained − lost) / n.

    Tango (1998), Statistics in Medicine 17:891. The questions are one sample: subjects play no
    part, so the interval is as wide for one question a subject as for a thousand.
    """
    return -_upper_end(lost, gained, n), _upper_end(gained, lost, n)


def _upper_end(gained: int, lost: int, n: int) -> float:
    """The largest change that the score test does not reject, by bisection."""
    inside, outside = (gained - lost) / n, 1.0
    if _score_accepts(outside, gained, lost, n):
        return outside
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        if _score_accepts(middle, gained, lost, n):
            inside = middle
        else:
            outside = middle
    return inside


def _score_accepts(change: float, gained: int, lost: int, n: int) -> bool:
    """|gained − lost − n·change| within 1.96 standard deviations, were `change` the true one.

    The rate of lost answers is its maximum-likelihood estimate under that change.
    """
    b = (2 * n - gained + lost) * change - gained - lost
    c = lost * change * (1 - change)
    lost_rate = (math.sqrt(max(0.0, b * b + 8 * n * c)) - b) / (4 * n)
    variance = 2 * lost_rate + change * (1 - change)  # of one question
    return (gained - lost - n * change) ** 2 <= Z95**2 * n * variance


def smallest_effect(gained: int, lost: int, n: int) -> float:
    """2.8 standard errors of the paired difference (80 % power at 5 %), and no less than 3/N.

    3/N is the rule of three: what no change at all in N questions still leaves possible.
    """
    delta = (gained - lost) / n
    return max(3 / n, 2.8 * math.sqrt(max(0.0, (gained + lost) / n**2 - delta**2 / n)))
