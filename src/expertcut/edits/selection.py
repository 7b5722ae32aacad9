"""Which experts stay, and how much of the traffic the removed ones carried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from expertcut.edits.budget import floors, share_out, wanted_count
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
