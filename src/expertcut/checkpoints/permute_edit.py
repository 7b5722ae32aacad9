"""The edit `order`: a model whose experts lie in another order, and which answers as before.

Engines that spread experts over devices give each a contiguous part of them, so a checkpoint whose
experts lie in the order of a placement needs nothing else to be served in that placement.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

from expertcut.checkpoints.edit import Edit, LayoutWriter, TensorChanges
from expertcut.checkpoints.exact import is_exact
from expertcut.checkpoints.tensor_names import DiskBlock
from expertcut.edits.layouts import Layout
from expertcut.edits.plan import BlockEdit, EditPlan, PlanFile, expert_ids
from expertcut.errors import ContractError, PlanError
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import Source
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.storage import Profile
from expertcut.stats import HeldOutResult

_INTEGERS = {"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"}


@dataclass(frozen=True)
class PermuteEdit(Edit):
    """Moves names and rows; a table of token ids gets the new numbers."""

    blocks: Mapping[str, BlockEdit]

    @classmethod
    def of(cls, plan: EditPlan | PlanFile) -> Self | None:
        is_any = any(edit.is_reordering(plan.layout) for edit in plan.blocks.values())
        return cls(plan.blocks) if is_any else None

    def rewrite(self, layout: LayoutWriter, tensors: TensorChanges) -> None:
        layout.reorder_experts(tensors)
        for name, block in tensors.blocks.items():
            if order := tensors.edits[name].order:
                for table in _tables(tensors, block):
                    tensors.apply(table, partial(_renumbered, order=order))

    def describe(self, _n_experts: int | None) -> Iterable[str]:
        yield (
            "The experts lie in another order, that of a placement; each token is routed to the "
            "same experts as before."
        )


def moved_sentence(proof: HeldOutResult) -> str:
    """How many choices of experts differ on the held-out questions; empty if none was scored."""
    n_all, n_moved = (sum(int(row[key]) for row in proof.rows) for key in ("tokens", "moved"))
    if not n_all:
        return ""
    if not n_moved:
        return f"All {n_all:,} choices of experts (tokens times layers) are the same as before."
    widest = max(row["largest_gap"] for row in proof.rows)
    return (
        f"{n_moved:,} of {n_all:,} choices of experts (tokens times layers) differ, at near-ties "
        f"(gaps of router scores up to {widest:.2g}) and behind them."
    )


def _tables(tensors: TensorChanges, block: DiskBlock) -> list[str]:
    """The tables by which a router sends token ids to experts (V, K)."""
    return [
        name
        for name, tensor in tensors.headers.items()
        if name.startswith(f"{block.name}.") and tensor.dtype in _INTEGERS
        if name not in block.axes and len(tensor.shape) == 2 and not name.endswith("_packed")
    ]


def _renumbered(table: Tensor, order: Sequence[int]) -> Tensor:
    if not bool(((table >= 0) & (table < len(order))).all()):
        raise ContractError(
            f"a router's table of token ids names experts outside of 0 to {len(order) - 1}: this "
            "form cannot be put in another order"
        )
    place_E = torch.empty(len(order), dtype=table.dtype)
    place_E[list(order)] = torch.arange(len(order), dtype=table.dtype)
    return place_E[table.long()]


def permute_draft(
    profile: Profile, source: Source, order: Sequence[Sequence[int]], action: str, slug: str
) -> EditPlan:
    """A plan that keeps every expert and puts each block's in an order of their ids.

    Raises PlanError for an order that is none of the block, or that mixes groups of a router;
    ContractError for layout exact with another number of experts in each layer.
    """
    blocks, numbers = profile.info.model.blocks, expert_ids(profile)
    layout: Layout = "exact" if is_exact(read_config(source.path)) else "stock"
    counts = {b.experts - len(numbers.constant.get(b.name, ())) for b in blocks}
    if layout == "exact" and len(counts) > 1:
        raise ContractError(
            f"{source.id} keeps {min(counts)} to {max(counts)} experts by layer (layout exact), "
            "so no device would hold equally many: place the model that it was cut from"
        )
    if len(order) != len(blocks):
        raise PlanError(f"an order of {len(order)} layers does not fit {len(blocks)} MoE layers")
    edits = {}
    for block, ids in zip(blocks, order, strict=True):
        same = tuple(range(block.experts))
        row_by_id = {numbers.number(block.name, row): row for row in same}
        if sorted(ids) != sorted(row_by_id):
            raise PlanError(
                f"the order of {block.name} must name each of its {block.experts} experts once"
            )
        rows = tuple(row_by_id[expert] for expert in ids)
        check_groups(block, rows)
        edits[block.name] = BlockEdit(keep=same, order=None if rows == same else rows)
    return EditPlan(slug, action, "by hand", "all", edits, layout, numbers=numbers)


def check_groups(block: BlockInfo, rows: Sequence[int]) -> None:
    """Raises a PlanError for an order of rows that takes a router's groups apart."""
    size = block.experts // block.groups
    for at in range(0, block.experts, size):
        if len({row // size for row in rows[at : at + size]}) > 1:
            raise PlanError(
                f"{block.name} routes in {block.groups} groups of {size} experts, and this order "
                "mixes them: give each device whole groups, by a number of devices that divides "
                f"{block.groups}"
            )
