"""How many experts stay and which, and how much traffic the removed ones carried."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from expertcut.edits.criteria import activations, ranked
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.layouts import LAYOUTS, Layout
from expertcut.edits.plan import (
    BlockEdit,
    EditPlan,
    expert_ids,
    least_per_group,
    validate_edits,
)
from expertcut.edits.ranking import Ranking, empty_draft, protected, protection, rank
from expertcut.errors import PlanError, SettingsError
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.statistics import LayerStatistics
from expertcut.profiling.storage import Profile

if TYPE_CHECKING:
    from expertcut.scoring.engine import Engine

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


@dataclass(frozen=True)
class Pruning:
    """The experts that stay, how many were active, and which idle ones fill up, by block.

    `spared` would have gone but for their protection.
    """

    draft: EditPlan
    n_active: dict[str, int]
    fillers: dict[str, tuple[int, ...]]
    spared: dict[str, tuple[int, ...]] = field(default_factory=dict)


def choose(profile: Profile, settings: CutSettings, engine: "Engine | None" = None) -> Pruning:
    """The experts that stay; some criteria run the engine's model.

    Raises:
        SettingsError: not exactly one size of the cut, one that the layout cannot carry, positions
            that the criterion does not look at, or no engine where it needs one.
        PlanError: a count that does not fit the model, or the protected experts.
        ProfileError: the profile does not hold what the criterion needs.
    """
    settings.check()
    if settings.keep_active:
        return keep_active(profile, settings)
    blocks = profile.info.model.blocks
    n_keep = wanted_count(settings, blocks)
    if settings.budget == "layer":
        _check_count(n_keep, blocks, settings.layout)
    return cut(rank(profile, settings, engine), n_keep)


def cut(ranking: Ranking, n_keep: int) -> Pruning:
    """Keeps the best `n_keep` of each layer, with a global budget of all layers together.

    Raises:
        PlanError: more than there are, too few, or fewer than are protected by hand.
    """
    settings, stay = ranking.settings, ranking.stay
    name = f"random-{settings.seed}" if settings.by == "random" else settings.by
    if settings.budget == "global":
        n_experts = sum(block.experts for block in ranking.blocks)
        action = f"prune --budget global ({n_keep} of {n_experts} experts)"
        named = empty_draft(settings, f"keep-{n_keep}-global-{name}", action, name)
    else:
        _check_count(n_keep, ranking.blocks, settings.layout)
        named = empty_draft(settings, f"keep-{n_keep}-{name}", f"prune --keep {n_keep}", name)
    named = replace(named, numbers=ranking.numbers)
    nobody: list[tuple[int, ...]] = [() for _ in ranking.orders]
    plain, pruning = (
        _prune(_n_keeps(ranking, n_keep, first), orders, ranking.counts, ranking.blocks, named)
        for orders, first in ((ranking.orders, nobody), (stay.first(ranking.orders), stay.ids))
    )
    stay.check(pruning.draft.edits)
    return replace(pruning, spared=stay.spared(pruning.draft.edits, plain.draft.edits))


def _n_keeps(ranking: Ranking, n_keep: int, first: Sequence[Sequence[int]]) -> list[int]:
    if ranking.settings.budget == "layer":
        return [n_keep] * len(ranking.blocks)
    least = floors(ranking.blocks, ranking.settings.min_keep)
    orders = [protected(o, ids) for o, ids in zip(ranking.orders, first, strict=True)]
    return share_out(n_keep, ranking.scores, orders, first, least)


def _check_count(n_keep: int, blocks: Sequence[BlockInfo], layout: Layout) -> None:
    for block in blocks:
        least = LAYOUTS[layout].least_experts(block)
        if not least <= n_keep <= block.experts:
            raise PlanError(
                f"--keep {n_keep} does not fit {block.name}, which routes each token to "
                f"{block.top_k} of {block.experts} experts: keep {least} to {block.experts}"
            )


def keep_active(profile: Profile, settings: CutSettings) -> Pruning:
    """Keeps what fires; layout stock also as many more as make one count for all layers.

    The others are filled by all-token count where the profile has it, else by mean α. What is
    protected counts as firing.

    Raises:
        SettingsError: a criterion by which it does not choose.
    """
    if settings.by != "activations":
        raise SettingsError(f"--by {settings.by} ranks what --keep N keeps: leave it out")
    layers, blocks = profile.layers, profile.info.model.blocks
    counts = [activations(layer, settings.at) for layer in layers]
    stay = protection(profile, settings.protect)
    is_active = [
        (count_E > 0) | np.isin(np.arange(len(count_E)), list(ids))
        for count_E, ids in zip(counts, stay.ids, strict=True)
    ]
    n_keeps = [int(is_active_E.sum()) for is_active_E in is_active]
    if LAYOUTS[settings.layout].needs_equal_counts:
        n_keeps = [max(map(_least_keep, is_active, blocks))] * len(blocks)
    orders = [ranked_active(*each) for each in zip(layers, is_active, strict=True)]
    named = empty_draft(settings, "keep-active", "prune --keep-active", "activations")
    named = replace(named, numbers=expert_ids(profile))
    pruning = _prune(n_keeps, orders, counts, blocks, named)
    if not settings.protect:
        return pruning
    plain = keep_active(profile, settings.completed(protect=[]))
    return replace(pruning, spared=stay.spared(pruning.draft.edits, plain.draft.edits))


def ranked_active(layer: LayerStatistics, is_active_E: Array) -> list[int]:
    """Active experts first, then by all-token count where there is one, else by mean α."""
    fill_E = layer.alpha_mean_E if layer.tokens_E is None else layer.tokens_E
    above_E = is_active_E * (1.0 + fill_E.max())
    return ranked(above_E + fill_E, layer.alpha_mean_E)


def _least_keep(is_active_E: Array, block: BlockInfo) -> int:
    """The smallest allowed count that keeps every active expert."""
    per_group = is_active_E.reshape(block.groups, -1).sum(axis=1)
    if block.groups == 1:
        return max(int(per_group[0]), LAYOUTS["stock"].least_experts(block))
    return max(int(per_group.max()), least_per_group(block)) * block.groups


def _prune(
    n_keeps: Sequence[int],
    orders: Sequence[list[int]],
    counts: Sequence[Array],
    blocks: Sequence[BlockInfo],
    named: EditPlan,
) -> Pruning:
    keeps = [_first(*each, named.layout) for each in zip(orders, n_keeps, blocks, strict=True)]
    edits = {b.name: BlockEdit(keep=keep) for b, keep in zip(blocks, keeps, strict=True)}
    validate_edits(edits, blocks, named.layout)
    fillers = {
        b.name: tuple(e for e in keep if count_E[e] == 0)
        for b, keep, count_E in zip(blocks, keeps, counts, strict=True)
    }
    n_active = {b.name: int((c > 0).sum()) for b, c in zip(blocks, counts, strict=True)}
    return Pruning(replace(named, edits=edits), n_active, fillers)


def _first(order: list[int], n_keep: int, block: BlockInfo, layout: Layout) -> tuple[int, ...]:
    """The first of the order, in layout stock equally many of each routing group, sorted by id."""
    n_groups = block.groups if LAYOUTS[layout].needs_equal_counts else 1
    size = block.experts // n_groups
    groups = [[e for e in order if e // size == g] for g in range(n_groups)]
    if n_keep % n_groups:
        raise PlanError(
            f"{block.name} routes in {n_groups} groups: keep a multiple of {n_groups}, not {n_keep}"
        )
    return tuple(sorted(e for group in groups for e in group[: n_keep // n_groups]))


@dataclass(frozen=True)
class RemovedTraffic:
    """One block: `n_questions` chose a removed expert at the answer position.

    Over every token, shots included: `n_used` of the removed experts were chosen somewhere, and
    `mass` is their share of all gate weight. Both are None in a profile without all-token sums.
    """

    block: str
    n_removed: int
    n_questions: int
    n_used: int | None
    mass: float | None


def removed_traffic(profile: Profile, edits: Mapping[str, BlockEdit]) -> list[RemovedTraffic]:
    """What the removal of experts would touch, block by block."""
    chosen_NLK = profile.array("chosen_NLK")
    tokens_LE, weight_LE = profile.token_sum("tokens"), profile.token_sum("weight")
    found = []
    for layer, block in enumerate(profile.info.model.blocks):
        removed = list(edits[block.name].removed(block.experts))
        hit_N = np.isin(chosen_NLK[:, layer], removed).any(axis=1)
        n_used, mass = None, None
        if tokens_LE is not None and weight_LE is not None:
            n_used = int((tokens_LE[layer, removed] > 0).sum())
            mass = float(weight_LE[layer, removed].sum() / weight_LE[layer].sum())
        found.append(RemovedTraffic(block.name, len(removed), int(hit_N.sum()), n_used, mass))
    return found
