"""Scores against harms: rank correlations, and what a criterion's choice costs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from expertcut.evaluation.auditing.outcome import Correlation, Harm, Regret, Standing, Verdict
from expertcut.profiling.significance import Z95

Array = np.ndarray[Any, Any]
DRAWS = 2_000
_FEWEST = 3  # experts, of which a rank correlation says anything
Ranks = Callable[[Array, Array], Array]  # values (B, X) and layers (X,) → ranks (B, X)


def verdict(
    by: str, standing: Standing, harms: Sequence[Harm], fractions: Sequence[float], seed: int
) -> Verdict:
    """How well one criterion foretold the harms; X are the sampled experts."""
    layer_X = np.array([harm.layer for harm in harms])
    logprob_X = np.array([harm.logprob for harm in harms])
    accuracy_X = np.array([harm.accuracy for harm in harms])
    score_X, share_X = np.array(standing.score), np.array(standing.share)
    return Verdict(
        by=by,
        within=correlation(score_X, logprob_X, layer_X, ranks_within, seed),
        overall=correlation(share_X, logprob_X, layer_X, ranks_overall, seed),
        within_accuracy=correlation(score_X, accuracy_X, layer_X, ranks_within, seed),
        regrets=tuple(
            regret(np.array(standing.place), logprob_X, layer_X, fraction) for fraction in fractions
        ),
    )


def correlation(
    score_X: Array, harm_X: Array, layer_X: Array, ranks: Ranks, seed: int
) -> Correlation:
    """Spearman's with its interval; p is by shuffling harms within layers, or over all."""
    if len(score_X) < _FEWEST:
        return Correlation(rho=None, ci95=None)
    score_1X, harm_1X = ranks(score_X[None], layer_X), ranks(harm_X[None], layer_X)
    rho = float(_pearson(score_1X, harm_1X)[0])
    if not np.isfinite(rho):
        return Correlation(rho=None, ci95=None)
    apart_X = layer_X if ranks is ranks_within else np.zeros_like(layer_X)
    shuffled_B = _pearson(score_1X, harm_1X[0, _shuffles(apart_X, seed)])
    return Correlation(
        rho=rho,
        ci95=interval(rho, _degrees_of_freedom(score_1X[0], harm_1X[0], apart_X)),
        # Sums in another order differ in their last bits.
        p=float((1 + (shuffled_B >= rho - 1e-9).sum()) / (1 + DRAWS)),
    )


def interval(rho: float, freedom: int) -> tuple[float, float]:
    """95 % interval of a rank correlation, by Fisher's z.

    The variance (1 + ρ²/2)/(n − 3) is Bonett and Wright's (2000), Psychometrika 65:23. One mean of
    ranks is taken off there, here one of each layer, so n − 1 becomes the degrees of freedom.
    ρ = ±1 counts as 1 − 1/freedom, for a few pairs that all agree do not show a perfect order.
    """
    most = 1 - 1 / freedom
    shrunk = min(max(rho, -most), most)
    half = Z95 * math.sqrt((1 + shrunk**2 / 2) / max(freedom - 2, 1))
    low, high = math.tanh(math.atanh(shrunk) - half), math.tanh(math.atanh(shrunk) + half)
    return min(low, rho), max(high, rho)


def ranks_overall(values_BX: Array, _layer_X: Array) -> Array:
    """Ranks among all, ties shared."""
    ranks_BX = rankdata(values_BX, axis=1)
    distances_BX: Array = ranks_BX - ranks_BX.mean(axis=1, keepdims=True)
    return distances_BX


def ranks_within(values_BX: Array, layer_X: Array) -> Array:
    """Ranks among those of the same layer, ties shared, as distances from the layer's mean."""
    ranks_BX = np.empty(values_BX.shape)
    for layer in np.unique(layer_X):
        is_own_X = layer_X == layer
        ranks_BX[:, is_own_X] = ranks_overall(values_BX[:, is_own_X], layer_X)
    return ranks_BX


def regret(place_X: Array, harm_X: Array, layer_X: Array, fraction: float) -> Regret:
    """Of each layer's sampled experts so large a share stays, as with --keep-fraction."""
    removed, chosen, least, random = 0, 0.0, 0.0, 0.0
    for layer in np.unique(layer_X):
        of_layer = np.flatnonzero(layer_X == layer)
        n_removed = len(of_layer) - round(fraction * len(of_layer))
        by_place = harm_X[of_layer][np.argsort(-place_X[of_layer], kind="stable")]
        removed += n_removed
        chosen += float(by_place[:n_removed].sum())
        least += float(np.sort(by_place)[:n_removed].sum())
        random += n_removed * float(by_place.mean())
    return Regret(fraction=fraction, removed=removed, chosen=chosen, least=least, random=random)


def _pearson(a_BX: Array, b_BX: Array) -> Array:
    """Of values that are distances from their means; NaN where one does not vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        both_B = (a_BX * b_BX).sum(axis=1)
        rho_B: Array = both_B / np.sqrt((a_BX**2).sum(axis=1) * (b_BX**2).sum(axis=1))
    return rho_B


def _degrees_of_freedom(score_X: Array, harm_X: Array, apart_X: Array) -> int:
    """Σ (experts − 1) over the groups in which ranks are taken and both of them vary."""
    own = [apart_X == group for group in np.unique(apart_X)]
    return sum(
        int(is_own.sum()) - 1 for is_own in own if score_X[is_own].any() and harm_X[is_own].any()
    )


def _shuffles(layer_X: Array, seed: int) -> Array:
    """Experts of each layer in random order, (B, X)."""
    rng = np.random.default_rng(seed)
    drawn_BX = np.empty((DRAWS, len(layer_X)), dtype=np.int64)
    for layer in np.unique(layer_X):
        own = np.flatnonzero(layer_X == layer)
        drawn_BX[:, own] = rng.permuted(np.tile(own, (DRAWS, 1)), axis=1)
    return drawn_BX
