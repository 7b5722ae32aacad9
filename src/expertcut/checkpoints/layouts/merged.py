"""Merged experts as a rewrite of the tensors on disk: averages in place of one of their members.

The form is that of layout `stock`. Nothing is computed before its bytes are written, and then one
projection of one expert at a time is read.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from expertcut.checkpoints.files.shards import Change, Rewrite
from expertcut.checkpoints.layouts.names import DiskBlock, Headers, OutsideAxes, blocks_of
from expertcut.checkpoints.layouts.neurons import Experts, ExpertTensor
from expertcut.checkpoints.layouts.stock import Fitted, stock_rewrite
from expertcut.edits.merge_groups import members_of
from expertcut.edits.merge_router import Rows
from expertcut.edits.plan import Edit
from expertcut.errors import ContractError
from expertcut.models.safetensors_index import DTYPES

Orders = Mapping[str, Mapping[int, Tensor]]  # by block name and member: its neurons in order (I,)


@dataclass(frozen=True)
class Merging:
    """What merging needs beside the plan: rows by layer, and the neurons of members by block.

    Without an order a member's neurons stay as they are. `interleaved` are the blocks whose gate
    and up lie in one tensor in turn.
    """

    rows: Mapping[int, Rows] = field(default_factory=dict)
    orders: Orders = field(default_factory=dict)
    interleaved: frozenset[str] = frozenset()


def merged_rewrite(
    headers: Headers,
    edits: Mapping[str, Edit],
    merging: Merging,
    outside: OutsideAxes | None = None,
) -> Rewrite:
    """What becomes of each tensor; layers in `merging` are MoE blocks, in the order of `edits`.

    Raises:
        ContractError: tensors on disk that cannot be told apart, or do not fit the edits.
    """
    cut = stock_rewrite(headers, edits, Fitted(), outside=outside)
    changed = dict(cut.changed)
    for layer, (name, block) in enumerate(blocks_of(headers, edits, outside).items()):
        edit = edits[name]
        if not edit.merged:
            continue
        experts = Experts(headers, block, is_interleaved=name in merging.interleaved)
        changed |= _expert_changes(experts, edit, merging.orders.get(name, {}))
        if layer in merging.rows:
            changed |= _router_changes(headers, block, edit, merging.rows[layer])
    return replace(cut, changed=changed)


def _expert_changes(
    experts: Experts, edit: Edit, orders: Mapping[int, Tensor]
) -> dict[str, Change]:
    """The averages, under the old names of what they take the place of."""
    headers, block, members = experts.headers, experts.block, members_of(edit)
    found: dict[str, Change] = {}
    for name in block.fused:
        groups = [experts.of(shares, orders, name) for shares in members.values()]
        shape = (len(groups), *headers[name].shape[1:])
        found[name] = Change(shape, make=partial(_averages, groups))
    for expert in (edit.merged or {}) if block.by_expert else ():
        for kind, name in block.by_expert[expert].items():
            tensors = experts.of(members[expert], orders, kind)
            found[name] = Change(headers[name].shape, make=partial(_averages, [tensors]))
    return found


def _averages(groups: list[list[ExpertTensor]]) -> Iterator[Tensor]:
    """Each group's average, summed in float64; an expert by itself keeps every bit."""
    for parts in groups:
        if len(parts) == 1:
            yield parts[0].read()
            continue
        total = torch.zeros(())
        for part in parts:
            tensor = part.read()
            if part.order_I is not None:
                tensor = part.neurons.reordered(tensor, part.order_I)
            total = total + tensor.double() * part.share
        yield total.to(DTYPES[parts[0].tensor.dtype])


def _router_changes(
    headers: Headers, block: DiskBlock, edit: Edit, rows: Rows
) -> dict[str, Change]:
    """The router's rows, its own bias, and biases on choosing."""
    if block.unclear_bias:
        raise ContractError(
            f"{block.unclear_bias} may act on gate logits or on choosing only, which its name does "
            "not tell: merging is not supported here"
        )
    fused = set(block.fused)
    fill: dict[str, Callable[[Tensor], Tensor]] = {}
    for name in block.axes:
        if name == block.router_weight:
            fill[name] = partial(_rows, edit=edit, shares=rows.shares, added=rows.added)
        elif name == block.logit_bias:
            offsets = {e: torch.tensor(offset) for e, offset in rows.offsets.items()}
            fill[name] = partial(_rows, edit=edit, shares=rows.shares, added=offsets)
        elif name not in fused:
            fill[name] = partial(_selection, edit=edit, rows=rows, axis=block.axes[name])
    shapes = {name: list(headers[name].shape) for name in fill}
    for name, shape in shapes.items():
        shape[block.axes[name]] = len(edit.keep)
    return {name: Change(tuple(shapes[name]), apply) for name, apply in fill.items()}


def _rows(
    tensor: Tensor,
    edit: Edit,
    shares: Mapping[int, Mapping[int, float]],
    added: Mapping[int, Tensor],
) -> Tensor:
    """Kept rows as they are, those of merged experts as the sum that they are."""
    kept = tensor[list(edit.keep)]
    for expert, own in shares.items():
        row = sum(tensor[member].double() * share for member, share in own.items())
        assert isinstance(row, Tensor)
        if expert in added:
            row = row + added[expert].double()
        kept[edit.keep.index(expert)] = row.to(tensor.dtype)
    return kept


def _selection(tensor: Tensor, edit: Edit, rows: Rows, axis: int) -> Tensor:
    """Biases on choosing: as fitted, else the sum that the row is."""
    moved = _rows(tensor.movedim(axis, 0), edit, rows.shares, {})
    for expert, bias in rows.selection.items():
        moved[edit.keep.index(expert)] = bias
    return moved.movedim(0, axis)
