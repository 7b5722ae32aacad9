"""The gate's fragility: how far the last chosen expert is ahead of the first that was not."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from expertcut.profiling.info import BlockInfo
from expertcut.profiling.statistics import or_none
from expertcut.profiling.store import Profile

Array = np.ndarray[Any, Any]
THRESHOLDS = (1e-4, 1e-3, 1e-2)  # of probability
QUANTILES = (0.01, 0.05, 0.25, 0.75, 0.95, 0.99)
_ROUNDING = 0.01  # relative; probabilities rounded to bfloat16 may be ordered otherwise within it


@dataclass(frozen=True)
class Margin:
    """Rank K minus rank K+1 of one layer at the answer position, per question.

    `undefined` says why there is none, and the arrays are empty: the profile holds α, so where
    experts are chosen by something else the distance to another choice cannot be told from it.
    """

    undefined: str
    probability_N: Array
    logit_N: Array


def margins(profile: Profile) -> list[Margin]:
    """Every layer's margins."""
    alpha_NLE, chosen_NLK = profile.array("alpha_NLE"), profile.array("chosen_NLK")
    return [
        margin(block, alpha_NLE[:, layer, : block.experts], chosen_NLK[:, layer].astype(np.int64))
        for layer, block in enumerate(profile.info.model.blocks)
    ]


def margin(block: BlockInfo, alpha_NE: Array, chosen_NK: Array) -> Margin:
    """α of the K-th expert minus α of the next, and the same of their logits.

    The difference of logits is ln α − ln α' under a softmax, logit α − logit α' under a sigmoid,
    and that of the inverse of √softplus where that is α.
    """
    reason = _rule(block)
    if not reason:
        alpha_NE = alpha_NE.astype(np.float64)
        last_N = np.take_along_axis(alpha_NE, chosen_NK, axis=1).min(axis=1)
        rest_NE = alpha_NE.copy()
        np.put_along_axis(rest_NE, chosen_NK, -np.inf, axis=1)
        next_N = rest_NE.max(axis=1)
        if (next_N <= last_N * (1 + _ROUNDING)).all():
            with np.errstate(divide="ignore", invalid="ignore"):
                logit_N = logits(block, last_N) - logits(block, next_N)
            return Margin("", np.maximum(last_N - next_N, 0), np.maximum(logit_N, 0))
        reason = "experts were chosen that do not have the largest α"
    nothing = np.empty(0)
    return Margin(reason, nothing, nothing)


def margin_json(found: Margin) -> dict[str, Any]:
    """A layer's margins, all null with a reason where they are undefined."""
    if found.undefined:
        return {
            "margin_undefined": found.undefined,
            "margin_probability": None,
            "margin_logit": None,
            "margin_below": None,
        }
    return {
        "margin_undefined": None,
        "margin_probability": _distribution(found.probability_N),
        "margin_logit": _distribution(found.logit_N),
        "margin_below": [
            {"probability": threshold, "share": float((found.probability_N < threshold).mean())}
            for threshold in THRESHOLDS
        ],
    }


def _rule(block: BlockInfo) -> str:
    """Why α alone does not say who is chosen; empty if it may."""
    if block.is_hashed:
        return "a table of token ids chooses the experts"
    if block.top_k == block.experts:
        return "every expert is always chosen"
    if block.selection_bias:
        return "a bias is added to α where experts are chosen"
    if block.selection_bias is None and block.scoring != "softmax":
        return "the profile does not say whether a bias is added to α where experts are chosen"
    if block.top_groups < block.groups:
        return "experts are chosen within the best groups"
    return ""


def logits(block: BlockInfo, alpha: Array) -> Array:
    """Logits, up to what all experts of a question share; infinite where α was rounded to 0 or 1.

    NumPy warns of the infinite ones.
    """
    if block.scoring == "sqrtsoftplus":
        softplus: Array = alpha**2
        return softplus + np.log(-np.expm1(-softplus))
    log: Array = np.log(alpha)
    return log if block.scoring == "softmax" else log - np.log1p(-alpha)


def _distribution(values_N: Array) -> dict[str, float | None]:
    with np.errstate(invalid="ignore"):  # infinite where α was rounded to 0 or 1
        found = {
            "mean": values_N.mean(),
            "std": values_N.std(),
            "median": np.median(values_N),
            **{f"q{100 * q:02.0f}": np.quantile(values_N, q) for q in QUANTILES},
        }
    return {name: or_none(float(value)) for name, value in found.items()}
