"""Which experts stay, and by how much the gate weights of those that stay would grow."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from expertcut.errors import PlanError, SettingsError
from expertcut.interventions.allowed import check_edits, least_per_group
from expertcut.interventions.criteria import CRITERIA, ranked
from expertcut.interventions.lineage import numbers_of
from expertcut.interventions.plan import Draft, Edit, Fold, Layout, Positions, Removed
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
class Way:
    """How to rank and what removing means, as on the command line."""

    by: str = "activations"
    positions: Positions = "answer"
    layout: Layout = "stock"
    removed: Removed = "zero"
    fold: Fold = "answer"

    @classmethod
    def of(
        cls,
        by: str,
        positions: Positions,
        layout: Layout,
        removed: Removed | None,
        fold: Fold | None,
    ) -> Self:
        """As given, and what each layout does where nothing is.

        Raises:
            SettingsError: an option of the other layout.
        """
        if removed is not None and layout != "exact":
            raise SettingsError(
                f"--removed {removed} is of layout exact: add --layout exact or leave it out"
            )
        if fold is not None and layout != "stock":
            raise SettingsError(
                f"--fold {fold} is of layout stock: {layout} scales nothing, leave it out"
            )
        return cls(by, positions, layout, removed or "zero", fold or "answer")

    def draft(self, slug: str, action: str, criterion: str) -> Draft:
        """A draft without edits, named after what makes it differ from the usual."""
        unusual = {"all": self.positions, "exact": self.layout, "mean": self.removed}
        marks = "".join(f"-{mark}" for mark, value in unusual.items() if value == mark)
        if self.layout == "stock" and self.fold != "answer":
            marks += f"-fold-{self.fold}"
        return Draft(
            f"{slug}{marks}",
            action,
            criterion,
            self.positions,
            edits={},
            layout=self.layout,
            removed=self.removed,
            fold=self.fold,
            is_cut=True,
        )


@dataclass(frozen=True)
class Pruning:
    """The experts that stay, how many were active, and which idle ones fill up, by block."""

    draft: Draft
    n_active: dict[str, int]
    fillers: dict[str, tuple[int, ...]]


def choose(profile: Profile, keep: Keep, way: Way) -> Pruning:
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
    pruning = keep_active(profile, way) if keep.active else _keep_some(profile, keep, way)
    draft = replace(pruning.draft, numbers=numbers_of(profile))
    return replace(pruning, draft=draft)


def _keep_some(profile: Profile, keep: Keep, way: Way) -> Pruning:
    n_keep = keep.count
    if keep.fraction is not None:
        if not 0 < keep.fraction <= 1:
            raise SettingsError(f"--keep-fraction {keep.fraction:g} must be above 0, at most 1")
        n_keep = round(keep.fraction * profile.info.model.blocks[0].experts)
    assert n_keep is not None
    return keep_n(profile, n_keep, way)


def keep_active(profile: Profile, way: Way) -> Pruning:
    """Keeps what fires; layout stock also as many more as make one count for all layers.

    The others are filled by all-token count where the profile has it, else by mean α.
    """
    layers, blocks = layer_statistics(profile), profile.info.model.blocks
    counts = [CRITERIA["activations"](layer, way.positions) for layer in layers]
    n_keeps = [int((count_E > 0).sum()) for count_E in counts]
    if way.layout == "stock":
        least = map(_least_keep, (count_E > 0 for count_E in counts), blocks)
        n_keeps = [max(least)] * len(blocks)
    orders = [
        ranked_active(layer, count_E > 0) for layer, count_E in zip(layers, counts, strict=True)
    ]
    named = way.draft("keep-active", "prune --keep-active", "activations")
    return _prune(n_keeps, orders, counts, blocks, named)


def keep_n(profile: Profile, n_keep: int, way: Way) -> Pruning:
    """Keeps the best `n_keep` of each layer by a criterion.

    Raises:
        PlanError: more than there are; in layout stock, fewer than top-k.
    """
    layers, blocks = layer_statistics(profile), profile.info.model.blocks
    for block in blocks:
        least = block.top_k if way.layout == "stock" else 1
        if not least <= n_keep <= block.experts:
            raise PlanError(
                f"--keep {n_keep} does not fit {block.name}, which routes each token to "
                f"{block.top_k} of {block.experts} experts: keep {least} to {block.experts}"
            )
    counts = [CRITERIA["activations"](layer, way.positions) for layer in layers]
    scores = [CRITERIA[way.by](layer, way.positions) for layer in layers]
    orders = [ranked(s, layer.alpha_mean_E) for s, layer in zip(scores, layers, strict=True)]
    named = way.draft(f"keep-{n_keep}-{way.by}", f"prune --keep {n_keep}", way.by)
    return _prune([n_keep] * len(blocks), orders, counts, blocks, named)


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
    n_keeps: Sequence[int],
    orders: Sequence[list[int]],
    counts: Sequence[Array],
    blocks: Sequence[BlockInfo],
    named: Draft,
) -> Pruning:
    keeps = [_first(*each, named.layout) for each in zip(orders, n_keeps, blocks, strict=True)]
    edits = {b.name: Edit(keep=keep) for b, keep in zip(blocks, keeps, strict=True)}
    check_edits(edits, blocks, named.layout)
    fillers = {
        b.name: tuple(e for e in keep if count_E[e] == 0)
        for b, keep, count_E in zip(blocks, keeps, counts, strict=True)
    }
    n_active = {b.name: int((c > 0).sum()) for b, c in zip(blocks, counts, strict=True)}
    return Pruning(replace(named, edits=edits), n_active, fillers)


def _first(order: list[int], n_keep: int, block: BlockInfo, layout: Layout) -> tuple[int, ...]:
    """The first of the order, in layout stock equally many of each routing group, sorted by id."""
    n_groups = block.groups if layout == "stock" else 1
    size = block.experts // n_groups
    groups = [[e for e in order if e // size == g] for g in range(n_groups)]
    if n_keep % n_groups:
        raise PlanError(
            f"{block.name} routes in {n_groups} groups: keep a multiple of {n_groups}, not {n_keep}"
        )
    return tuple(sorted(e for group in groups for e in group[: n_keep // n_groups]))
