"""How many experts stay in each layer: the same number in all, or more where they matter more."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.layouts import LAYOUTS
from expertcut.edits.plan import least_per_group
from expertcut.errors import PlanError
from expertcut.profiling.schema import BlockInfo

Array = np.ndarray[Any, Any]


def counts(settings: CutSettings, blocks: Sequence[BlockInfo]) -> range:
    """All that a search may keep, from least to most: per layer, or of all layers together.

    Raises:
        PlanError: a floor above the number of experts.
    """
    if settings.budget == "global":
        least = floors(blocks, settings.min_keep)
        return range(sum(least), sum(block.experts for block in blocks) + 1)
    most = min(block.experts for block in blocks)
    if not LAYOUTS[settings.layout].needs_equal_counts:
        return range(1, most + 1)
    step = blocks[0].groups
    return range(max(_least_of_stock(block) for block in blocks), most + 1, step)


def _least_of_stock(block: BlockInfo) -> int:
    if block.groups == 1:
        return LAYOUTS["stock"].least_experts(block)
    return max(-(-block.top_k // block.groups), least_per_group(block)) * block.groups


def wanted_count(settings: CutSettings, blocks: Sequence[BlockInfo]) -> int:
    """What a count or a fraction asks for: per layer, or of all layers together.

    A fraction is rounded, where experts lie in groups to equally many of each.
    """
    if settings.budget == "global":
        share = settings.fraction
        wanted = [settings.keep if share is None else round(share * b.experts) for b in blocks]
        return sum(n for n in wanted if n is not None)
    if settings.fraction is None:
        assert settings.keep is not None
        return settings.keep
    step = blocks[0].groups if LAYOUTS[settings.layout].needs_equal_counts else 1
    return round(settings.fraction * blocks[0].experts / step) * step


def floors(blocks: Sequence[BlockInfo], min_keep: int | None) -> list[int]:
    """What each layer keeps at least under a global budget: top-k, and `min_keep`.

    Raises:
        PlanError: more than a layer has.
    """
    for block in blocks:
        if (min_keep or 0) > block.experts:
            raise PlanError(
                f"--min-keep {min_keep} is more than the {block.experts} experts of {block.name}"
            )
    return [max(block.top_k, min_keep or 0) for block in blocks]


def as_numbers(score_E: Array) -> Array:
    """Scores in float64; what is no number counts as the layer's lowest, +∞ as its highest."""
    is_number_E = np.isfinite(score_E)
    lowest = float(score_E[is_number_E].min()) if is_number_E.any() else 0.0
    highest = float(score_E[is_number_E].max()) if is_number_E.any() else 0.0
    filled_E = np.nan_to_num(score_E, nan=lowest, neginf=lowest, posinf=highest)
    return filled_E.astype(np.float64)


def normalised(score_E: Array) -> Array:
    """Scores as shares of their layer's sum, so that layers can be compared.

    What is below 0 counts as 0; where no score is above 0 the layer's lowest becomes 0 instead.
    Experts that all count 0 are worth the same.
    """
    filled_E = as_numbers(score_E)
    lowest = 0.0 if float(filled_E.max()) > 0 else float(filled_E.min())
    shifted_E = np.maximum(filled_E - lowest, 0)
    total = shifted_E.sum()
    equal_E = np.full(len(score_E), 1 / len(score_E))
    result: Array = shifted_E / total if total > 0 else equal_E
    return result


def share_out(
    total: int,
    scores: Sequence[Array],
    orders: Sequence[Sequence[int]],
    first: Sequence[Collection[int]],
    least: Sequence[int],
) -> list[int]:
    """How many each layer keeps of `total`, if those with the best normalised scores stay.

    `orders` are best first, with those in `first` before all others; each layer keeps `least`.

    Raises:
        PlanError: more than there are, or fewer than the layers need.
    """
    n_experts = sum(map(len, orders))
    if not sum(least) <= total <= n_experts:
        raise PlanError(
            f"--budget global cannot keep {total} experts in all: keep {sum(least)} (at least "
            f"{min(least)} in each of {len(least)} layers) to {n_experts}"
        )
    candidates = []
    for layer, order in enumerate(orders):
        share_E = normalised(scores[layer])
        values = [np.inf if e in first[layer] else float(share_E[e]) for e in order]
        # What stands before others stays before them, whatever put it there.
        best = np.maximum.accumulate(values[::-1])[::-1]
        candidates += [(-best[rank], rank, layer) for rank in range(least[layer], len(order))]
    n_keeps = list(least)
    for _, _, layer in sorted(candidates)[: total - sum(least)]:
        n_keeps[layer] += 1
    return n_keeps
