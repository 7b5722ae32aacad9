"""Experts on disk as tensors with neurons, whichever form these have; which neurons correspond."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from expertcut.checkpoints.files.streaming import read_tensor
from expertcut.checkpoints.layouts.names import DiskBlock, Headers, blocks_of
from expertcut.edits.merge_groups import Neurons, matching
from expertcut.edits.plan import Edit
from expertcut.errors import ContractError
from expertcut.models.safetensors_index import StoredTensor

_FIRST_KINDS = ("gate_proj", "up_proj", "w1", "w3")
_LAST_KINDS = ("down_proj", "w2")
_BOTH = re.compile(r"gate_up_proj|input_linear")  # gate and up in one tensor
_UNKNOWN = Neurons(None, n_parts=0)


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of one member, where its neurons lie, and what becomes of it."""

    tensor: StoredTensor
    row: int | None
    neurons: Neurons
    share: float = 1.0
    order_I: Tensor | None = None

    def read(self) -> Tensor:
        """As it lies on disk."""
        return read_tensor(self.tensor, self.row)


def aligned_neurons(
    headers: Headers, edits: Mapping[str, Edit], interleaved: frozenset[str]
) -> dict[str, dict[int, Tensor]]:
    """The order of each member's neurons that is most like its dominant expert's.

    Two experts are in memory at a time.

    Raises:
        ContractError: experts of a form whose neurons are not known.
    """
    orders: dict[str, dict[int, Tensor]] = {}
    for name, block in blocks_of(headers, edits).items():
        experts = Experts(headers, block, is_interleaved=name in interleaved)
        orders[name] = {}
        for dominant, shares in (edits[name].merged or {}).items():
            first = experts.neurons(dominant)
            for member in shares:
                if member != dominant:
                    orders[name][member] = matching(first, experts.neurons(member))
    return orders


class Experts:
    """The tensors of a block's experts, one by one or all in one, with the places of neurons."""

    def __init__(self, headers: Headers, block: DiskBlock, *, is_interleaved: bool) -> None:
        self.headers, self.block = headers, block
        self.is_interleaved = is_interleaved

    def neurons(self, expert: int) -> list[Tensor]:
        """`Neurons.rows` of each of an expert's tensors."""
        parts = self.tensors(expert)
        unknown = [kind for kind, part in parts.items() if part.neurons == _UNKNOWN]
        if unknown:
            raise ContractError(
                f"{self.block.name}: where the neurons of {unknown[0]} lie is not known, so its "
                "experts cannot be aligned: merge them with --no-align"
            )
        return [part.neurons.rows(part.read()) for part in parts.values()]

    def of(
        self, shares: Mapping[int, float], orders: Mapping[int, Tensor], kind: str
    ) -> list[ExpertTensor]:
        """One kind of tensor of each member, with its share."""
        return [
            replace(self.tensors(member)[kind], share=share, order_I=orders.get(member))
            for member, share in shares.items()
        ]

    def tensors(self, expert: int) -> dict[str, ExpertTensor]:
        """An expert's tensors by kind: what follows its number, or the name of what holds all."""
        if self.block.fused:
            return {
                name: ExpertTensor(self.headers[name], expert, self._fused_neurons(name))
                for name in self.block.fused
            }
        return {
            kind: ExpertTensor(self.headers[name], None, _own_neurons(kind))
            for kind, name in self.block.by_expert[expert].items()
        }

    def _fused_neurons(self, name: str) -> Neurons:
        """Of one row: (2I, D) and (D, I), or transposed; biases (2I,) and (D,)."""
        is_last, shape = name in self.block.last, self.headers[name].shape[1:]
        n_parts = 2 if _BOTH.search(name) else 1
        if len(shape) == 1:
            return Neurons(None) if is_last else Neurons(0, n_parts, self._in_turn(n_parts))
        is_transposed = self._is_transposed()
        if is_transposed is None or not (is_last or n_parts == 2):
            return _UNKNOWN
        return Neurons(int(is_transposed != is_last), n_parts, self._in_turn(n_parts))

    def _in_turn(self, n_parts: int) -> bool:
        return self.is_interleaved and n_parts > 1

    def _is_transposed(self) -> bool | None:
        """Whether rows are inputs: told by where a tensor that is not square has the width D."""
        width = self.headers[self.block.router_weight].shape[1]
        for name in self.block.fused if self.block.last else ():
            shape = self.headers[name].shape[1:]
            if len(shape) == 2 and shape[0] != shape[1]:
                return shape[int(name in self.block.last)] == width
        return None


def _own_neurons(kind: str) -> Neurons:
    """Of a tensor by what follows the expert's number: `gate_proj.weight` is (I, D)."""
    projection, _, what = kind.partition(".")
    if what not in ("weight", "bias"):
        return _UNKNOWN
    if projection in _FIRST_KINDS:
        return Neurons(0)
    if projection in _LAST_KINDS:
        return Neurons(1 if what == "weight" else None)
    return _UNKNOWN
