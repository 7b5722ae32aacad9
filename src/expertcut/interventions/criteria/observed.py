"""Criteria that a profile alone can answer: what experts did while the quiz was asked."""

from typing import Any

import numpy as np

from expertcut.errors import ProfileError
from expertcut.interventions.plan import Positions
from expertcut.profiling.statistics import LayerStatistics, share
from expertcut.profiling.storage import OverTokens

Array = np.ndarray[Any, Any]


def activations(layer: LayerStatistics, positions: Positions) -> Array:
    """How many questions (answer positions) or tokens (all) chose each expert. arXiv:2502.17187."""
    if positions == "answer":
        return np.asarray(layer.is_activated_NE.sum(axis=0))
    return all_tokens(layer).tokens_E


def gate_mass(layer: LayerStatistics, positions: Positions) -> Array:
    """Σ gate weight over the questions or tokens that chose it: a soft count. arXiv:2404.05089."""
    if positions == "all":
        return all_tokens(layer).weight_E
    assert layer.weight_E is not None, "layer_statistics gives it"
    return layer.weight_E


def weighted_accuracy(layer: LayerStatistics) -> Array:
    """Σ α·1(correct) / Σ α over the questions that chose it, −∞ where none. arXiv:2502.17187."""
    return np.where(np.isnan(layer.weighted_accuracy_E), -np.inf, layer.weighted_accuracy_E)


def output_norm(layer: LayerStatistics) -> Array:
    """Σ ‖f(x)‖₂ over the tokens that chose it: the expert activation norm. arXiv:2510.13999."""
    return all_tokens(layer).norm_E


def output_norm_mean(layer: LayerStatistics) -> Array:
    """Mean ‖f(x)‖₂ over the tokens that chose it, 0 where none did. arXiv:2510.13999."""
    sums = all_tokens(layer)
    return share(sums.norm_E, sums.tokens_E, 0.0)


def reap(layer: LayerStatistics) -> Array:
    """Mean gate weight·‖f(x)‖₂ over the tokens that chose it, 0 where none. arXiv:2510.13999."""
    sums = all_tokens(layer)
    return share(sums.weighted_norm_E, sums.tokens_E, 0.0)


def easy_ep(layer: LayerStatistics) -> Array:
    """Σ gate weight·‖f(x)‖₂·max(1 − cos(x, x + y), 0) over the tokens that chose it.

    x is the residual stream and y what all routed experts add to it. arXiv:2504.06792.

    Raises:
        ProfileError: the profile does not hold it, or the family has no such stream.
    """
    sums = all_tokens(layer)
    if sums.residual_shift_E is None and sums.votes_E is not None:
        other = "another" if sums.input_shift_E is None else "easy_ep_postnorm or another"
        raise ProfileError(
            f"easy_ep: {layer.block} does not add its output to a residual stream that could be "
            f"found: take {other} criterion"
        )
    return _held(sums.residual_shift_E, "easy_ep")


def easy_ep_postnorm(layer: LayerStatistics) -> Array:
    """The same with x the block's input, behind the norm that reads the residual stream.

    Raises:
        ProfileError: the profile does not hold it.
    """
    sums = all_tokens(layer)
    if sums.input_shift_E is None and sums.votes_E is not None:
        raise ProfileError(
            f"easy_ep_postnorm: the experts of {layer.block} work in another width than the block "
            "reads, so what they add is not known: take another criterion"
        )
    return _held(sums.input_shift_E, "easy_ep_postnorm")


def ranked_choice(layer: LayerStatistics) -> Array:
    """Σ points over the tokens that chose it: K for a token's largest gate weight·‖f(x)‖₂, to 1.

    Borda's count of the tokens' votes; the definition is ours (docs/criteria.md).

    Raises:
        ProfileError: the profile does not hold it.
    """
    return _held(all_tokens(layer).votes_E, "ranked_choice")


def all_tokens(layer: LayerStatistics) -> OverTokens:
    """The sums over every token, shots included.

    Raises:
        ProfileError: the profile was made with --stats answer.
    """
    if layer.over_tokens is None:
        raise ProfileError(
            "the profile holds no all-token statistics (--stats answer): profile with --stats all"
        )
    return layer.over_tokens


def _held(sum_E: Array | None, criterion: str) -> Array:
    if sum_E is None:
        raise ProfileError(
            f"{criterion}: the profile was made before what it needs was kept: profile again, "
            "into another folder, with --stats all"
        )
    return sum_E
