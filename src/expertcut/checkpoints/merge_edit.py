"""The edit `merge`: groups of experts become averages over aligned neurons.

Averages are computed as their bytes are written, reading one projection of one expert at a time.
The reference is the merged experts under the unedited router, as both papers' own code runs them:
it chooses among all E experts and may choose two of one group, which layout stock cannot express.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from expertcut.checkpoints.edit import Calibration, Edit, LayoutWriter, RunEdited, TensorChanges
from expertcut.checkpoints.shards import Change, read_tensor
from expertcut.checkpoints.tensor_names import DiskBlock, Headers, blocks_of
from expertcut.data.corpus import CalibrationSet
from expertcut.edits import merging
from expertcut.edits.edit_settings import RouterRow
from expertcut.edits.plan import BlockEdit, EditPlan, PlanFile
from expertcut.errors import ContractError
from expertcut.models.expert_matrices import is_interleaved
from expertcut.models.hooks import registered, replaced_forward
from expertcut.models.load import MoeModel, Source
from expertcut.models.moe_block import MoeBlock
from expertcut.models.safetensors_index import DTYPES, StoredTensor
from expertcut.scoring.engine import Engine

_BOTH = re.compile(r"gate_up_proj|input_linear")  # gate and up in one tensor
_UNKNOWN = merging.Neurons(None, n_parts=0)
# By the part after the expert's number: `gate_proj.weight` is (I, D).
_OWN_NEURONS = {
    **{f"{name}.weight": merging.Neurons(0) for name in ("gate_proj", "up_proj", "w1", "w3")},
    **{f"{name}.bias": merging.Neurons(0) for name in ("gate_proj", "up_proj", "w1", "w3")},
    **{f"{name}.weight": merging.Neurons(1) for name in ("down_proj", "w2")},
    **{f"{name}.bias": merging.Neurons(None) for name in ("down_proj", "w2")},
}


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of one expert, with its neurons' places."""

    tensor: StoredTensor
    row: int | None
    neurons: merging.Neurons

    def read(self) -> Tensor:
        """The tensor on disk."""
        return read_tensor(self.tensor, self.row)


Members = list[tuple[ExpertTensor, float, Tensor | None]]  # share, order of neurons (I,)


@dataclass(frozen=True)
class Experts:
    """The tensors of a block's experts, one by one or all in one, with the places of neurons."""

    headers: Headers
    block: DiskBlock
    is_interleaved: bool

    def neurons(self, expert: int) -> list[Tensor]:
        """`Neurons.rows` of each of an expert's tensors."""
        parts = self.tensors(expert)
        if unknown := [kind for kind, part in parts.items() if part.neurons == _UNKNOWN]:
            raise ContractError(
                f"{self.block.name}: where the neurons of {unknown[0]} lie is not known, so its "
                "experts cannot be aligned: merge them with --no-align"
            )
        return [part.neurons.rows(part.read()) for part in parts.values()]

    def of(self, shares: Mapping[int, float], orders: Mapping[int, Tensor], kind: str) -> Members:
        """One kind of tensor of each member, its share, and the order of its neurons."""
        return [(self.tensors(e)[kind], share, orders.get(e)) for e, share in shares.items()]

    def tensors(self, expert: int) -> dict[str, ExpertTensor]:
        """An expert's tensors by kind: the part after its number, or the fused tensor's name."""
        if self.block.fused:
            return {
                name: ExpertTensor(self.headers[name], expert, self._fused_neurons(name))
                for name in self.block.fused
            }
        return {
            kind: ExpertTensor(self.headers[name], None, _OWN_NEURONS.get(kind, _UNKNOWN))
            for kind, name in self.block.by_expert[expert].items()
        }

    def _fused_neurons(self, name: str) -> merging.Neurons:
        """Of one row: (2I, D) and (D, I), or transposed; biases (2I,) and (D,)."""
        is_last, shape = name in self.block.last, self.headers[name].shape[1:]
        n_parts = 2 if _BOTH.search(name) else 1
        is_in_turn = self.is_interleaved and n_parts > 1
        if len(shape) == 1:
            return merging.Neurons(None) if is_last else merging.Neurons(0, n_parts, is_in_turn)
        if not self.block.last or not (is_last or n_parts == 2):
            return _UNKNOWN
        # Whether rows are inputs: a tensor that is not square tells by its axis of width D.
        width = self.headers[self.block.router_weight].shape[1]
        for other in self.block.fused:
            shape = self.headers[other].shape[1:]
            if len(shape) == 2 and shape[0] != shape[1]:
                is_transposed = shape[int(other in self.block.last)] == width
                return merging.Neurons(int(is_transposed != is_last), n_parts, is_in_turn)
        return _UNKNOWN


@dataclass(frozen=True)
class MergeEdit(Edit):
    """Groups of experts become one expert each, in the form of layout `stock`."""

    blocks: Mapping[str, BlockEdit]
    router: RouterRow = "fitted"
    is_aligned: bool = False
    # Fitted: rows by layer, and if aligned orders of neurons (I,) by block and member.
    rows: Mapping[int, merging.Rows] = field(default_factory=dict)
    orders: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    interleaved: frozenset[str] = frozenset()  # blocks whose gate and up alternate in one tensor
    reference = "the same experts under the unedited router"

    @classmethod
    def of(cls, plan: EditPlan | PlanFile) -> Self | None:
        return cls(plan.blocks) if any(edit.merged for edit in plan.blocks.values()) else None

    def check(self, _layout: LayoutWriter, source: Source, _plan: EditPlan) -> None:
        source.refuse_packed("merged")

    def needs_engine(self, _calibration: Calibration) -> bool:
        return True

    def fit(self, engine: Engine | None, calibration: Calibration) -> Self:
        assert engine is not None, "merging runs the model"
        rows = merging.merged_rows(engine, calibration.questions.tuning, self.blocks, self.router)
        blocks, headers = engine.moe.blocks, calibration.source.headers
        interleaved = frozenset(b.name for b in blocks if is_interleaved(b.experts))
        on_disk = blocks_of(headers, self.blocks) if self.is_aligned else {}
        orders: dict[str, dict[int, Tensor]] = {name: {} for name in on_disk}
        for name, block in on_disk.items():
            experts = Experts(headers, block, is_interleaved=name in interleaved)
            for dominant, shares in (self.blocks[name].merged or {}).items():
                first = experts.neurons(dominant)
                for member in set(shares) - {dominant}:
                    orders[name][member] = merging.matching(first, experts.neurons(member))
        return replace(self, rows=rows, orders=orders, interleaved=interleaved)

    def judge(self, engine: Engine, held_out: CalibrationSet) -> Sequence[merging.Quality]:
        return merging.judge_rows(engine, held_out, self.blocks, self.rows)

    def reference_of_edited(self, moe: MoeModel) -> RunEdited:
        routers = unedited_routers(moe.blocks, self.blocks)
        return lambda blocks: registered(
            replaced_forward(block.router, routers[block.name]) for block in blocks
        )

    def rewrite(self, layout: LayoutWriter, tensors: TensorChanges) -> None:
        """Layers in `rows` are MoE blocks, in the order of the plan."""
        layout.remove_experts(tensors, {})
        for layer, (name, block) in enumerate(tensors.blocks.items()):
            edit = self.blocks[name]
            if edit.merged:
                experts = Experts(tensors.headers, block, is_interleaved=name in self.interleaved)
                _merge_experts(tensors, experts, edit, self.orders.get(name, {}))
            if layer in self.rows:
                _merge_router(tensors, block, edit, self.rows[layer])

    def describe(self, n_experts: int | None) -> Iterable[str]:
        n_left, of = len(next(iter(self.blocks.values())).keep), f"{n_experts or 'its'} experts"
        yield (
            f"Each of {len(self.blocks)} MoE layers has {of} merged into {n_left}: a removed "
            "one lives on in one that stays, which it has joined."
        )


def _merge_experts(
    tensors: TensorChanges, experts: Experts, edit: BlockEdit, orders: Mapping[int, Tensor]
) -> None:
    block, members = experts.block, merging.members_of(edit)
    for name in block.fused:
        groups = [experts.of(shares, orders, name) for shares in members.values()]
        tensors.changed[name] = Change(tensors.change(name).shape, make=partial(_averages, groups))
    for expert in (edit.merged or {}) if block.by_expert else ():
        for kind, name in block.by_expert[expert].items():
            own = [experts.of(members[expert], orders, kind)]
            tensors.changed[name] = Change(tensors.change(name).shape, make=partial(_averages, own))


def _averages(groups: list[Members]) -> Iterator[Tensor]:
    """Each group's average, summed in float64; a group of one keeps every bit."""
    for members in groups:
        first, _, _ = members[0]
        if len(members) == 1:
            yield first.read()
            continue
        total = torch.zeros(())
        for part, share, order_I in members:
            tensor = part.read()
            if order_I is not None:
                tensor = part.neurons.reordered(tensor, order_I)
            total = total + tensor.double() * share
        yield total.to(DTYPES[first.tensor.dtype])


def _merge_router(
    tensors: TensorChanges, block: DiskBlock, edit: BlockEdit, rows: merging.Rows
) -> None:
    if block.unclear_bias:
        raise ContractError(
            f"{block.unclear_bias} may act on gate logits or on choosing only, which its name does "
            "not tell: merging is not supported here"
        )
    for name, axis in block.axes.items():
        if name == block.router_weight:
            apply = partial(_rows, edit=edit, rows=rows, added=rows.added)
        elif name == block.logit_bias:
            offsets = {e: torch.tensor(offset) for e, offset in rows.offsets.items()}
            apply = partial(_rows, edit=edit, rows=rows, added=offsets)
        elif name not in block.fused:
            apply = partial(_selection, edit=edit, rows=rows, axis=axis)
        else:
            continue
        tensors.changed[name] = Change(tensors.change(name).shape, apply)


def _rows(
    tensor: Tensor, edit: BlockEdit, rows: merging.Rows, added: Mapping[int, Tensor]
) -> Tensor:
    """Kept rows; rows of merged experts are their weighted sums."""
    kept = tensor[list(edit.keep)]
    for expert, own in rows.shares.items():
        row = sum(tensor[member].double() * share for member, share in own.items())
        assert isinstance(row, Tensor)
        if expert in added:
            row = row + added[expert].double()
        kept[edit.keep.index(expert)] = row.to(tensor.dtype)
    return kept


def _selection(tensor: Tensor, edit: BlockEdit, rows: merging.Rows, axis: int) -> Tensor:
    """Selection biases: fitted, else weighted sums."""
    moved = _rows(tensor.movedim(axis, 0), edit, rows, {})
    for expert, bias in rows.selection.items():
        moved[edit.keep.index(expert)] = bias
    return moved.movedim(0, axis)


def unedited_routers(
    blocks: Sequence[MoeBlock], edits: Mapping[str, BlockEdit]
) -> dict[str, Callable[..., Any]]:
    """Copies of the routers of an unedited model, which choose merged experts; by block name."""
    routers: dict[str, Callable[..., Any]] = {}
    for block in blocks:
        groups = merging.members_of(edits[block.name])
        place_E = torch.full((block.n_experts + 1,), len(groups))  # the last of nobody
        for place, members in enumerate(groups.values()):
            place_E[list(members)] = place
        selection_E = block.selection_bias()
        kept = None if selection_E is None else selection_E.clone()
        routers[block.name] = partial(_route, copy.deepcopy(block.router), kept, place_E)
    return routers


def _route(
    router: nn.Module, selection_E: Tensor | None, place_E: Tensor, x: Tensor, *biases: Any
) -> Any:
    # Some families pass the selection bias to their router with each call.
    own = [None if bias is None else selection_E for bias in biases]
    logits_TE, weights_TK, experts_TK = router(x, *own)
    return logits_TE, weights_TK, place_E.to(experts_TK.device)[experts_TK]
