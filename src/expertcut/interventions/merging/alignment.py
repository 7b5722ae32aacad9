"""The neurons of experts, whatever form their tensors have, and which of two experts correspond.

An expert's intermediate neurons may stand in any order. Averaged neuron by neuron two experts
cancel out unless the second's are first put in the order in which they are most like the first's
(weight matching, as in arXiv:2310.01334, §3, after arXiv:2209.04836).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True)
class Neurons:
    """Where a tensor of one expert has its I neurons: along `axis`, or (None) nowhere.

    With `n_parts` 2 gate and up lie in one tensor, one behind the other, or, `interleaved`, in
    turn: gate, up, gate, up.
    """

    axis: int | None
    n_parts: int = 1
    is_interleaved: bool = False

    def rows(self, tensor: Tensor) -> Tensor:
        """All weights of each neuron, (I, ·); nothing (0, 0) where the tensor has no neurons."""
        if self.axis is None:
            return tensor.new_empty(0, 0)
        first = tensor.movedim(self.axis, 0)
        if self.n_parts == 1:
            return first.reshape(len(first), -1)
        if self.is_interleaved:
            parts: Tensor = first.unflatten(0, (-1, self.n_parts))
        else:
            parts = first.unflatten(0, (self.n_parts, -1)).movedim(1, 0)
        return parts.flatten(1)

    def reordered(self, tensor: Tensor, order_I: Tensor) -> Tensor:
        """The tensor with its neurons in another order; gate and up of each stay together."""
        if self.axis is None:
            return tensor
        steps = torch.arange(self.n_parts)
        if self.is_interleaved:
            index = (order_I[:, None] * self.n_parts + steps).flatten()
        else:
            index = (order_I + len(order_I) * steps[:, None]).flatten()
        return tensor.index_select(self.axis, index)


def matching(dominant: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """In which order (I,) the other's neurons are most like the dominant's.

    Each sequence holds `Neurons.rows` of the same tensors. What is maximised is the sum of inner
    products of the weights, over all tensors, which minimises the squared distance.
    """
    like_II = sum(
        a.float() @ b.float().T for a, b in zip(dominant, other, strict=True) if a.numel()
    )
    assert isinstance(like_II, Tensor), "an expert without neurons"
    _, order = linear_sum_assignment(like_II.numpy(), maximize=True)
    return torch.from_numpy(order)
