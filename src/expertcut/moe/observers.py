"""Watching routers and experts; every context manager leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from expertcut.moe.contract import MoeBlock

_INNER = "_old_forward"  # where accelerate keeps the forward that its own goes around


@dataclass(frozen=True)
class Routing:
    """What a router read and decided in one forward pass."""

    layer: int
    input_TD: Tensor
    logits_TE: Tensor
    weights_TK: Tensor
    experts_TK: Tensor


@dataclass(frozen=True)
class ExpertCall:
    """One expert's own output, before the gate weight, on the tokens it was chosen for.

    `tokens_M` indexes T; M tokens chose the expert.
    """

    layer: int
    expert: int
    tokens_M: Tensor
    weights_M: Tensor
    output_MD: Tensor


@contextmanager
def observe_routers(blocks: Sequence[MoeBlock], see: Callable[[Routing], None]) -> Iterator[None]:
    """Calls `see` after each router's forward."""
    with ExitStack() as stack:
        for block in blocks:
            handle = block.router.register_forward_hook(_relay(block.layer, see))
            stack.callback(handle.remove)
        yield


def _relay(layer: int, see: Callable[[Routing], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits_TE, weights_TK, experts_TK = output
        input_TD = args[0].reshape(-1, args[0].shape[-1])
        see(Routing(layer, input_TD, logits_TE, weights_TK, experts_TK))

    return hook


@contextmanager
def observe_experts(
    blocks: Sequence[MoeBlock], see: Callable[[ExpertCall], None]
) -> Iterator[None]:
    """Runs experts one by one, in id order, and calls `see` with each one's own output.

    One expert's output is `experts(x, e, 1)`: the model's own code, so no family needs code here.
    The sum over experts is bit-equal to the `eager` experts implementation.
    """
    with ExitStack() as stack:
        for block in blocks:
            loop = _loop(block.layer, own_forward(block.experts), see)
            stack.enter_context(replaced_forward(block.experts, loop))
        yield


def _loop(
    layer: int, forward: Callable[..., Tensor], see: Callable[[ExpertCall], None]
) -> Callable[..., Tensor]:
    def one_by_one(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        # A: all T * K assignments, sorted once; a stable sort keeps each expert's in eager's order.
        expert_A, order_A = experts_TK.T.flatten().sort(stable=True)
        weight_A = weights_TK.T.flatten()[order_A]
        hit, counts = (found.tolist() for found in expert_A.unique_consecutive(return_counts=True))
        parts = (a.split(counts) for a in (expert_A, order_A % len(x_TD), weight_A))
        for expert, chosen_M, tokens_M, weights_M in zip(hit, *parts, strict=True):
            ones_M1 = torch.ones_like(weights_M)[:, None]
            output_MD = forward(x_TD[tokens_M], chosen_M[:, None], ones_M1)
            see(ExpertCall(layer, expert, tokens_M, weights_M, output_MD))
            y_TD.index_add_(0, tokens_M, (output_MD * weights_M[:, None]).to(y_TD.dtype))
        return y_TD

    return one_by_one


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """What a module does, without what brings its weights where it is spread over devices."""
    forward: Callable[..., Any] = module.__dict__.get(_INNER, module.forward)
    return forward


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for one module while the block runs; its weights come once for all of it."""
    name = _INNER if _INNER in module.__dict__ else "forward"
    before = module.__dict__.get(name)
    setattr(module, name, forward)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)
