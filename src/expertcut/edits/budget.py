"""How many experts stay in each layer: the same number in all, or more where they matter more."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from expertcut.edits.layouts import LAYOUTS, Layout
from expertcut.edits.plan import least_per_group
from expertcut.errors import PlanError, SettingsError
from expertcut.profiling.schema import BlockInfo

Array = np.ndarray[Any, Any]
Budget = Literal["layer", "global"]

_SIZE = re.compile(
    r"(?P<number>\d{1,19}(\.\d{0,19})?|\.\d{1,19})\s*((?P<prefix>[kmgt])(?P<binary>i)?)?(b)?", re.I
)
_TOO_MANY = 1 << 62  # bytes


@dataclass(frozen=True)
class Keep:
    """How many to keep: exactly one of the first four, as on the command line.

    `max_bytes` is for the weights as they are written. With `budget` `global` the number is that
    of all layers together, and every layer keeps top-k of its experts and `min_keep` at least.
    """

    active: bool = False
    count: int | None = None
    fraction: float | None = None
    max_bytes: int | None = None
    budget: Budget = "layer"
    min_keep: int | None = None

    def check(self, layout: Layout) -> None:
        """That it is said once, and in a way that the layout can carry.

        Raises:
            SettingsError: it is not.
        """
        numbers = (self.count, self.fraction, self.max_bytes)
        if self.active + sum(number is not None for number in numbers) != 1:
            raise SettingsError(
                "say how many experts to keep: --keep-active, --keep N, --keep-fraction F or "
                "--max-bytes SIZE, and only one of them"
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise SettingsError(f"--keep-fraction {self.fraction:g} must be above 0, at most 1")
        check_budget(self.budget, self.min_keep, layout)
        if self.active and self.budget == "global":
            raise SettingsError("--budget global ranks experts: give it without --keep-active")


def check_budget(budget: Budget, min_keep: int | None, layout: Layout) -> None:
    """That the layout can carry the budget.

    Raises:
        SettingsError: it cannot, or --min-keep goes with another.
    """
    if budget == "global" and LAYOUTS[layout].needs_equal_counts:
        raise SettingsError(
            "--budget global keeps another number in each layer, which layout stock cannot: "
            "add --layout exact"
        )
    if min_keep is not None and (budget != "global" or min_keep < 1):
        raise SettingsError(f"--min-keep {min_keep} must be above 0 and go with --budget global")


def counts(keep: Keep, blocks: Sequence[BlockInfo], layout: Layout) -> range:
    """All that a search may keep, from least to most: per layer, or of all layers together.

    Raises:
        PlanError: a floor above the number of experts.
    """
    if keep.budget == "global":
        least = floors(blocks, keep.min_keep)
        return range(sum(least), sum(block.experts for block in blocks) + 1)
    most = min(block.experts for block in blocks)
    if not LAYOUTS[layout].needs_equal_counts:
        return range(1, most + 1)
    step = blocks[0].groups
    return range(max(_least_of_stock(block) for block in blocks), most + 1, step)


def _least_of_stock(block: BlockInfo) -> int:
    if block.groups == 1:
        return LAYOUTS["stock"].least_experts(block)
    return max(-(-block.top_k // block.groups), least_per_group(block)) * block.groups


def asked_count(keep: Keep, blocks: Sequence[BlockInfo], layout: Layout) -> int:
    """What a count or a fraction asks for: per layer, or of all layers together.

    A fraction is rounded, where experts lie in groups to equally many of each.
    """
    if keep.budget == "global":
        share = keep.fraction
        wanted = [keep.count if share is None else round(share * b.experts) for b in blocks]
        return sum(n for n in wanted if n is not None)
    if keep.fraction is None:
        assert keep.count is not None
        return keep.count
    step = blocks[0].groups if LAYOUTS[layout].needs_equal_counts else 1
    return round(keep.fraction * blocks[0].experts / step) * step


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


def read_size(text: str) -> int:
    """`4GB`, `500MB`, `3.5GiB` or a number of bytes as bytes.

    Raises:
        SettingsError: not of that form.
    """
    found = _SIZE.fullmatch(text.strip())
    power = " kmgt".index(((found and found["prefix"]) or " ").lower())
    unit = 1024 if found and found["binary"] else 1000
    size_bytes = int(float(found["number"]) * unit**power) if found else 0
    if not 1 <= size_bytes < _TOO_MANY:
        raise SettingsError(f"--max-bytes {text!r} is no size: write it as 4GB, 500MB or 3.5GiB")
    return size_bytes
