"""The size of a model or a cut, and the largest cut that fits in a size."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from expertcut.checkpoints.build import engine_as_profiled, profiled_source, source_here
from expertcut.checkpoints.export import WRITERS, cut_rewrite
from expertcut.checkpoints.sequential import rank_sequentially
from expertcut.checkpoints.shards import lay_out
from expertcut.edits.criteria import CRITERIA
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.layouts import LAYOUTS, Layout
from expertcut.edits.plan import EditPlan
from expertcut.edits.selection import (
    Pruning,
    Ranking,
    check_wanted,
    choose,
    counts,
    cut,
    expressions_of,
    for_profile,
    rank,
    wanted_count,
)
from expertcut.errors import PlanError
from expertcut.models.load import LoadOptions, MoeModel, Source
from expertcut.models.moe_block import MoeBlock, parameters_of
from expertcut.profiling.storage import Profile

Cut = TypeVar("Cut", bound=CutSettings)
SizeOf = Callable[[EditPlan], int]


@dataclass(frozen=True)
class Size:
    """`active_parameters` are those of the token with most active experts, without constants."""

    parameters: int
    active_parameters: int
    size_bytes: int


def size(moe: MoeModel) -> Size:
    """Parameters of a loaded model, tied weights once; bytes of its safetensors files."""
    total, idle = sum(p.numel() for p in moe.model.parameters()), 0
    for block in moe.blocks:
        n_kept, per_expert, n_constants = _of_experts(block)
        idle += per_expert * max(0, n_kept - block.top_k) + n_constants
    return Size(total, total - idle, sum(file.stat().st_size for file in moe.source.weight_files))


def size_with(moe: MoeModel, experts_by_layer: Sequence[float]) -> Size:
    """The `size` of a loaded model whose tokens use so many experts in the mean."""
    whole = size(moe)
    unused = sum(
        (min(block.top_k, n_kept) - n_used) * per_expert
        for block, n_used in zip(moe.blocks, experts_by_layer, strict=True)
        for n_kept, per_expert, _ in [_of_experts(block)]
    )
    return replace(whole, active_parameters=round(whole.active_parameters - unused))


def _of_experts(block: MoeBlock) -> tuple[int, int, int]:
    """Experts of a block that are no constants, parameters of each, and of all constants."""
    experts = parameters_of(block.experts)
    if block.declared is not None:  # calls of one module share its experts
        n_calls = block.declared.source.calls
        per_expert = sum(p.numel() for p in experts.values()) // (block.n_experts * n_calls)
        return block.n_experts - (n_calls - 1) * block.top_k, per_expert, 0
    constants = experts.pop("approx_value", None)
    n_kept = len(next(iter(experts.values())))
    per_expert = sum(p.numel() for p in experts.values()) // n_kept
    return n_kept, per_expert, 0 if constants is None else constants.numel()


def stored_size(source: Source) -> tuple[int, int]:
    """Parameters and bytes of a checkpoint's safetensors files, without loading them.

    Packed weights count as they are once unpacked.
    """
    tensors = source.headers if source.packing is None else source.dense.tensors
    n_parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    return n_parameters, sum(file.stat().st_size for file in source.weight_files)


def size_of_cut(moe: MoeModel, draft: EditPlan, size_bytes: int) -> Size:
    """The `size` of the checkpoint of a cut, from the unedited model."""
    total, idle = sum(p.numel() for p in moe.model.parameters()), 0
    for block in moe.blocks:
        n_kept = len(draft.edits[block.name].keep)
        n_removed = block.n_experts - n_kept
        own = sum(p.numel() for p in parameters_of(block.experts).values()) // block.n_experts
        n_constants = 0
        if LAYOUTS[draft.layout].keeps_rows:
            n_constants = n_removed * block.width
            total += n_constants - n_removed * own
        else:
            rows = (t for _, _, t, _ in block.expert_tensors() if isinstance(t, nn.Parameter))
            total -= n_removed * sum(t.numel() // block.n_experts for t in rows)
        idle += own * max(0, n_kept - block.top_k) + n_constants
    return Size(total, total - idle, size_bytes)


def size_of_cuts(source: Source, layout: Layout, n_experts: int) -> SizeOf:
    """Bytes of the safetensors files of a cut of this checkpoint, with headers."""
    WRITERS[layout].check(source, is_cutting=True)
    return lambda draft: _size_of_cut_files(source, draft, n_experts)[1]


def _size_of_cut_files(source: Source, draft: EditPlan, n_experts: int) -> tuple[int, int]:
    """Parameters and bytes of the safetensors files of a cut, with headers."""
    shards = lay_out(source.stored, cut_rewrite(source, draft, n_experts))
    n_parameters = sum(math.prod(piece.shape) for shard in shards for piece in shard.pieces)
    return n_parameters, sum(shard.size_bytes for shard in shards)


def planned_sizes(profile: Profile, draft: EditPlan) -> tuple[tuple[int, int], tuple[int, int]]:
    """Parameters and bytes before and after a cut, from headers: no weight is read.

    Raises ModelError or ContractError: the weights are not here, or cannot be cut so.
    """
    source = source_here(profile)
    WRITERS[draft.layout].check(source, is_cutting=True)
    n_experts = profile.info.model.blocks[0].experts
    return stored_size(source), _size_of_cut_files(source, draft, n_experts)


def largest(ranking: Ranking, size_of: SizeOf) -> Pruning:
    """The cut that keeps most experts with weights of at most `max_bytes` of its settings."""
    settings = ranking.settings
    most = settings.size_bytes
    assert most is not None
    choices = counts(settings, ranking.blocks)
    least = cut(ranking, choices[0]).draft
    if (smallest := size_of(least)) > most:
        raise PlanError(
            f"--max-bytes {most:,} is too small: the smallest cut, "
            f"{least.action.removeprefix('prune ')}, has {smallest:,} bytes"
        )
    n_fitting = bisect_right(choices, most, key=lambda n: size_of(cut(ranking, n).draft))
    return cut(ranking, choices[n_fitting - 1])


def choose_cut(
    profile: Profile, settings: CutSettings, load_as: LoadOptions
) -> tuple[Pruning, tuple[str, ...]]:
    """The experts that stay, and messages."""
    settings.check()
    blocks, most, is_sequential = (
        profile.info.model.blocks,
        settings.size_bytes,
        settings.sequential,
    )
    needs_model = CRITERIA[settings.by].needs_model or is_sequential
    source = profiled_source(profile) if most or needs_model else None
    engine = engine_as_profiled(profile, source, load_as) if source and needs_model else None
    if source is None or (most is None and not is_sequential):
        return choose(profile, settings, engine), ()
    check_wanted(settings, blocks)  # before a criterion runs the model
    ranking, size_of = rank(profile, settings, engine), None
    if most is None:
        pruning = cut(ranking, wanted_count(settings, blocks))
    else:
        size_of = size_of_cuts(source, settings.layout, blocks[0].experts)
        pruning = largest(ranking, size_of)
    if engine is not None and is_sequential:
        n_keep = len(next(iter(pruning.draft.edits.values())).keep)
        pruning = cut(rank_sequentially(profile, ranking, n_keep, engine), n_keep)
    if size_of is None:
        return pruning, ()
    note = f"the weights will have {size_of(pruning.draft):,} bytes, of at most {most:,}"
    return pruning, (note,)


def with_protection(profile: Profile, settings: Cut) -> tuple[Cut, tuple[str, ...]]:
    """Settings that protect super experts by default, if the profile knows them; and messages."""
    settings = for_profile(profile, settings)
    is_known = all(part.info.settings.stats == "all" for part in profile.parts)
    is_active = settings.keep_active
    note = "Super experts are not known without all-token statistics: none is protected."
    stays = expressions_of(settings.protect, is_super=is_known and not is_active)
    is_warned = not (is_known or is_active or settings.protect)
    return settings.updated(protect=list(stays)), (note,) if is_warned else ()
