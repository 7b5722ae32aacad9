"""Significance: compares questions that activated an expert with the others of their subjects.

A subject is a stratum: n1 questions activated the expert and n0 did not, y1 and y0 of them were
answered right, n = n1 + n0, Y = y1 + y0.
Further shape suffixes: X experts of all blocks in order, S subjects, B permutations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expertcut.profiling.statistics import LayerStatistics, or_none, routing_json, share
from expertcut.stats import Array

MIN_VARIANCE = 2.5  # below, the sum of the strata is too far from normal to test
PERMUTATIONS = 2_000
_WIDTH = 1024  # experts per matrix product, to bound memory


@dataclass(frozen=True)
class SubjectCounts:
    """Questions and right answers by subject: of all, and of those that activated each expert."""

    names: tuple[str, ...]
    rows: tuple[Array, ...]  # the questions of each subject, as indices into N
    questions_S: Array
    right_S: Array
    activated_SX: Array
    activated_right_SX: Array


def count_by_subject(
    subjects: Sequence[str], is_correct_N: Array, is_activated_NX: Array
) -> SubjectCounts:
    """Counts by subject, in the order of first questions."""
    names = tuple(dict.fromkeys(subjects))
    rows = tuple(np.flatnonzero(np.asarray(subjects) == name) for name in names)
    right = [row[is_correct_N[row]] for row in rows]
    return SubjectCounts(
        names=names,
        rows=rows,
        questions_S=np.array([len(row) for row in rows]),
        right_S=np.array([is_correct_N[row].sum() for row in rows]),
        activated_SX=np.array([is_activated_NX[row].sum(0) for row in rows]),
        activated_right_SX=np.array([is_activated_NX[row].sum(0) for row in right]),
    )


def subjects_json(counts: SubjectCounts, layers: Sequence[LayerStatistics]) -> list[dict[str, Any]]:
    """One object per subject; `appearances` and `expert_accuracy` list a layer's experts."""
    subjects = []
    for s, name in enumerate(counts.names):
        n, start, rows = counts.questions_S[s], 0, []
        for layer in layers:
            span = slice(start, start := start + layer.n_experts)
            activated_E = counts.activated_SX[s, span]
            accuracy_E = share(counts.activated_right_SX[s, span], activated_E)
            row = {"layer": layer.layer} | routing_json(layer, counts.rows[s])
            row["appearances"] = (activated_E / n).tolist()
            row["expert_accuracy"] = [or_none(value) for value in accuracy_E]
            rows.append(row)
        subject = {"subject": name, "questions": int(n), "accuracy": float(counts.right_S[s] / n)}
        subjects.append(subject | {"layers": rows})
    return subjects


@dataclass(frozen=True)
class Significance:
    """Tests per expert (X,), NaN where undefined; z < 0 means lower accuracy with the expert."""

    difference_X: Array
    se_X: Array
    z_X: Array
    p_X: Array
    p_adjusted_X: Array  # by Benjamini and Hochberg over the defined tests
    p_family_X: Array  # probability, by permutation, that any test reaches this |z|
    permutations: int
    seed: int

    @property
    def n_tests(self) -> int:
        """Number of tested experts."""
        return int((~np.isnan(self.z_X)).sum())

    @property
    def p_family(self) -> float | None:
        """That of the largest |z|; None without tests."""
        return float(np.nanmin(self.p_family_X)) if self.n_tests else None

    @property
    def suspects(self) -> list[int]:
        """Tested experts with z < 0, the lowest first."""
        return [int(x) for x in np.argsort(self.z_X, kind="stable") if self.z_X[x] < 0]


def significance(
    counts: SubjectCounts,
    is_correct_N: Array,
    is_activated_NX: Array,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Significance:
    """Differences, tests and permutation tests of every expert."""
    from scipy.special import ndtr  # slow import

    difference_X, se_X = difference(counts)
    z_X = z_scores(counts)
    expected_X, variance_X = null_moments(counts)
    p_X = 2 * ndtr(-np.abs(z_X))
    p_adjusted_X, p_family_X = np.full_like(z_X, np.nan), np.full_like(z_X, np.nan)
    if len(tested := np.flatnonzero(~np.isnan(z_X))):
        from scipy.stats import false_discovery_control  # slow import

        shuffled_BN = shuffles(counts, is_correct_N, permutations, seed)
        largest_B = np.zeros(permutations)
        for start in range(0, len(tested), _WIDTH):
            x = tested[start : start + _WIDTH]
            right_BX = shuffled_BN @ is_activated_NX[:, x].astype(np.float32)
            z_BX = (right_BX - expected_X[x]) / np.sqrt(variance_X[x])
            largest_B = np.maximum(largest_B, np.abs(z_BX).max(axis=1))
        p_adjusted_X[tested] = false_discovery_control(p_X[tested])
        # (1 + number of permutations that reach |z|) / (1 + number of permutations)
        below_X = np.searchsorted(np.sort(largest_B), np.abs(z_X[tested]), side="left")
        p_family_X[tested] = (1 + permutations - below_X) / (1 + permutations)
    return Significance(difference_X, se_X, z_X, p_X, p_adjusted_X, p_family_X, permutations, seed)


def z_scores(counts: SubjectCounts) -> Array:
    """Cochran–Mantel–Haenszel z (X,), without continuity correction; NaN where not tested."""
    expected_X, variance_X = null_moments(counts)
    excess_X = counts.activated_right_SX.sum(0) - expected_X
    return share(excess_X, np.sqrt(np.where(variance_X >= MIN_VARIANCE, variance_X, 0)))


def difference(counts: SubjectCounts) -> tuple[Array, Array]:
    """Mantel–Haenszel difference in accuracy, with minus without, and its standard error.

    Σ w (p1 − p0) / Σ w with w = n1 n0 / n. The variance is Sato's (1989), Biometrics 45:1323, valid
    for few large and many small subjects; that of two binomials would be 0 for n = 2.
    """
    n1_SX, n_S1 = counts.activated_SX.astype(float), counts.questions_S[:, None]
    n0_SX = n_S1 - n1_SX
    y1_SX = counts.activated_right_SX
    y0_SX = counts.right_S[:, None] - y1_SX
    total_X = (n1_SX * n0_SX / n_S1).sum(0)
    difference_X = share(((y1_SX * n0_SX - y0_SX * n1_SX) / n_S1).sum(0), total_X)
    p_SX = n1_SX**2 * y0_SX - n0_SX**2 * y1_SX + n1_SX * n0_SX * (n0_SX - n1_SX) / 2
    q_SX = (y1_SX * (n0_SX - y0_SX) + y0_SX * (n1_SX - y1_SX)) / 2
    spread_X = difference_X * (p_SX / n_S1**2).sum(0) + (q_SX / n_S1).sum(0)
    return difference_X, share(np.sqrt(np.maximum(spread_X, 0)), total_X)


def null_moments(counts: SubjectCounts) -> tuple[Array, Array]:
    """Mean and variance of Σ y1 under the null hypothesis of Cochran–Mantel–Haenszel.

    Σ n1 Y / n and Σ n1 n0 Y (n − Y) / (n² (n − 1)).
    """
    n1_SX, n_S1 = counts.activated_SX, counts.questions_S[:, None]
    right_S1 = counts.right_S[:, None]
    expected_SX = n1_SX * right_S1 / n_S1
    rate_S1 = share(right_S1 * (n_S1 - right_S1), n_S1**2 * (n_S1 - 1), 0.0)
    return expected_SX.sum(0), (n1_SX * (n_S1 - n1_SX) * rate_S1).sum(0)


def shuffles(counts: SubjectCounts, is_correct_N: Array, draws: int, seed: int) -> Array:
    """Correctness permuted within subjects (B, N), float32 for fast matrix products."""
    rng = np.random.default_rng(seed)
    # Products with 0 and 1 are integers far below 2²⁴, so they are exact.
    shuffled_BN = np.empty((draws, len(is_correct_N)), dtype=np.float32)
    for row in counts.rows:
        tiled_BN = np.tile(is_correct_N[row].astype(np.float32), (draws, 1))
        shuffled_BN[:, row] = rng.permuted(tiled_BN, axis=1)
    return shuffled_BN
