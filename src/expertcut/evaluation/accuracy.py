"""Accuracy of one model, and how sure one can be of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expertcut.profiling.significance import wilson as wilson_intervals

Array = np.ndarray[Any, Any]


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
