"""Which experts stay, and by how much the gate weights of those that stay would grow."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from expertcut.errors import PlanError, SettingsError
from expertcut.interventions.criteria import CRITERIA, ranked
from expertcut.interventions.plan import Draft, Edit, Positions, check_stock, least_per_group
from expertcut.profiling.statistics import LayerStatistics, layer_statistics
from expertcut.profiling.store import BlockInfo, Profile

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Keep:
    """How many to keep: exactly one of the three, as on the command line."""

    active: bool = False
    count: int | None = None
    fraction: float | None = None


@dataclass(frozen=True)
class Pruning:
    """The experts that stay, how many were active, and which idle ones fill up, by block."""

    draft: Draft
    n_active: dict[str, int]
    fillers: dict[str, tuple[int, ...]]


def choose(profile: Profile, keep: Keep, by: str, positions: Positions) -> Pruning:
    """The experts that stay.

    Raises:
        SettingsError: not exactly one way of saying how many, or a fraction outside (0, 1].
        PlanError: a count that does not fit the model.
    """
    if [keep.active, keep.count is not None, keep.fraction is not None].count(True) != 1:
        raise SettingsError(
            "say how many experts to keep: --keep-active, --keep N or "
            "--keep-fraction F, and only one of them"
        )
    if keep.active:
        return keep_active(profile, positions)
    n_keep = keep.count
    if keep.fraction is not None:
        if not 0 < keep.fraction <= 1:
            raise SettingsError(f"--keep-fraction {keep.fraction:g} must be above 0, at most 1")
        n_keep = round(keep.fraction * profile.info.model.blocks[0].experts)
    assert n_keep is not None
    return keep_n(profile, n_keep, by, positions)


def keep_active(profile: Profile, positions: Positions) -> Pruning:
    """Keeps what fires, and as many more as make one count for all layers (layout stock).

    The others are filled by all-token count where the profile has it, else by mean α.
    """
    layers, blocks = layer_statistics(profile), profile.info.model.blocks
    counts = [CRITERIA["activations"](layer, positions) for layer in layers]
    n_keep = max(
        _least_keep(count_E > 0, block) for count_E, block in zip(counts, blocks, strict=True)
    )
    orders = [
        ranked_active(layer, count_E > 0) for layer, count_E in zip(layers, counts, strict=True)
    ]
    suffix = "" if positions == "answer" else "-all"
    named = Draft(f"keep-active{suffix}", "prune --keep-active", "activations", positions, {})
    return _prune(n_keep, orders, counts, blocks, named)


def keep_n(profile: Profile, n_keep: int, by: str, positions: Positions) -> Pruning:
    """Keeps the best `n_keep` of each layer by a criterion.

    Raises:
        PlanError: fewer than top-k or more than there are.
    """
    layers, blocks = layer_statistics(profile), profile.info.model.blocks
    for block in blocks:
        if not block.top_k <= n_keep <= block.experts:
            raise PlanError(
                f"--keep {n_keep} does not fit {block.name}, which routes each token to "
                f"{block.top_k} of {block.experts} experts: keep {block.top_k} to {block.experts}"
            )
    counts = [CRITERIA["activations"](layer, positions) for layer in layers]
    scores = [CRITERIA[by](layer, positions) for layer in layers]
    orders = [ranked(s, layer.alpha_mean_E) for s, layer in zip(scores, layers, strict=True)]
    suffix = "" if positions == "answer" else "-all"
    named = Draft(f"keep-{n_keep}-{by}{suffix}", f"prune --keep {n_keep}", by, positions, {})
    return _prune(n_keep, orders, counts, blocks, named)


def ranked_active(layer: LayerStatistics, is_active_E: Array) -> list[int]:
    """Active experts first, then by all-token count where there is one, else by mean α."""
    fill_E = layer.alpha_mean_E if layer.tokens_E is None else layer.tokens_E
    above_E = is_active_E * (1.0 + fill_E.max())
    return ranked(above_E + fill_E, layer.alpha_mean_E)


def _least_keep(is_active_E: Array, block: BlockInfo) -> int:
    """The smallest allowed count that keeps every active expert."""
    per_group = is_active_E.reshape(block.groups, -1).sum(axis=1)
    if block.groups == 1:
        return max(int(per_group[0]), block.top_k)
    return max(int(per_group.max()), least_per_group(block)) * block.groups


def _prune(
    n_keep: int,
    orders: Sequence[list[int]],
    counts: Sequence[Array],
    blocks: Sequence[BlockInfo],
    named: Draft,
) -> Pruning:
    keeps = [_first(order, n_keep, block) for order, block in zip(orders, blocks, strict=True)]
    edits = {b.name: Edit(keep=keep) for b, keep in zip(blocks, keeps, strict=True)}
    check_stock(edits, blocks)
    fillers = {
        b.name: tuple(e for e in keep if count_E[e] == 0)
        for b, keep, count_E in zip(blocks, keeps, counts, strict=True)
    }
    n_active = {b.name: int((c > 0).sum()) for b, c in zip(blocks, counts, strict=True)}
    return Pruning(replace(named, edits=edits), n_active, fillers)


def _first(order: list[int], n_keep: int, block: BlockInfo) -> tuple[int, ...]:
    """The first of the order, equally many of each routing group, sorted by id."""
    size = block.experts // block.groups
    groups = [[e for e in order if e // size == g] for g in range(block.groups)]
    if n_keep % block.groups:
        raise PlanError(
            f"{block.name} routes in {block.groups} groups: keep a multiple of {block.groups}, "
            f"not {n_keep}"
        )
    return tuple(sorted(e for group in groups for e in group[: n_keep // block.groups]))


def fold_factors(
    profile: Profile,
    edits: Mapping[str, Edit],
    left_out: Collection[tuple[str, int]] = (),
) -> dict[int, Array]:
    """What undoes the inflation of the kept experts' gate weights, (kept,) per inflating layer.

    Without the removed experts the softmax's denominator shrinks, so weights grow by
    1 / (1 − Σ removed α); the factor is the mean of 1 − Σ removed α over the questions that
    chose the expert, or over all questions where none did. Questions in `left_out` (subject and
    row) do not count, so that they can judge the result.
    """
    names = zip(profile.subjects(), profile.array("row_N").tolist(), strict=True)
    is_used_N = np.array([name not in left_out for name in names])
    alpha_NLE = profile.array("alpha_NLE")[is_used_N]
    factors = {}
    for layer in layer_statistics(profile):
        block = profile.info.model.blocks[layer.layer]
        keep = list(edits[block.name].keep)
        if not block.inflates or len(keep) == block.experts:
            continue
        is_removed_E = ~np.isin(np.arange(block.experts), keep)
        alpha_NE = alpha_NLE[:, layer.layer, : block.experts].astype(np.float64)
        left_N = 1 - alpha_NE[:, is_removed_E].sum(axis=1)
        chosen_NE = layer.is_activated_NE[is_used_N][:, keep]
        count_E = chosen_NE.sum(axis=0)
        mean_E = (left_N[:, None] * chosen_NE).sum(axis=0) / np.maximum(count_E, 1)
        factors[layer.layer] = np.where(count_E > 0, mean_E, left_N.mean())
    return factors
