"""Criteria that look at no question: the weights alone, and chance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, Any]
_NO_WEIGHTS = -1.0  # least of all, for mean |w| is never above the root mean square


def aimer(weights: Iterable[Tensor]) -> Array:
    """−(mean |w| / root mean square of w) over all of an expert's matrices (E, ·, ·), biases apart.

    Weights that are few large ones among many small ones score high; an expert without any weight
    but 0 scores least. arXiv:2603.18492, whose score is without the sign: it prunes the highest.
    """
    matrices = list(weights)
    return np.array([_aimer([m[e] for m in matrices]) for e in range(len(matrices[0]))])


def _aimer(matrices: list[Tensor]) -> float:
    n_weights = sum(m.numel() for m in matrices)
    absolute = sum(float(m.double().abs().sum()) for m in matrices)
    squared = sum(float(m.double().square().sum()) for m in matrices)
    if not squared:
        return _NO_WEIGHTS
    return -(absolute / n_weights) / float(np.sqrt(squared / n_weights))


def random(n_experts: int, layer: int, seed: int) -> Array:
    """A permutation of 0 to E − 1, drawn for each layer and seed: what a criterion must beat."""
    return np.random.default_rng((seed, layer)).permutation(n_experts).astype(np.float64)
