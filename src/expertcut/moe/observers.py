"""Watching routers and experts; every context manager leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expertcut.moe.kernels.experts import BY_EXPERT, Own, by_expert, own_output
from expertcut.moe.kernels.products import INNER

if TYPE_CHECKING:
    from expertcut.moe.contract import MoeBlock


Combined = Callable[[int, Tensor], None]  # layer, the experts' weighted sum (T, D)


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
def observe_residuals(
    blocks: Sequence[MoeBlock], see: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Calls `see` with the layer and the residual stream (T, D) that its output is added to.

    It is told before the block's router runs, of blocks whose stream is known.
    """
    with ExitStack() as stack:
        for block in blocks:
            if block.residual is not None:
                hook = _relay_input(block.layer, see)
                handle = block.residual.norm.register_forward_pre_hook(hook)
                stack.callback(handle.remove)
        yield


def _relay_input(layer: int, see: Callable[[int, Tensor], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        see(layer, args[0].reshape(-1, args[0].shape[-1]))

    return hook


@contextmanager
def observe_experts(
    blocks: Sequence[MoeBlock],
    see: Callable[[ExpertCall], None],
    combined: Combined | None = None,
) -> Iterator[None]:
    """Runs experts one by one, in id order, and calls `see` with each one's own output.

    After a block's last expert, `combined` gets the layer and the weighted sum (T, D).

    One expert's output is `experts(x, e, 1)`: the model's own code, so no family needs code here.
    The sum over experts is bit-equal to what the model runs unwatched on a CPU.
    """
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block.experts, _watched(block, see, combined)))
        yield


def _watched(
    block: MoeBlock, see: Callable[[ExpertCall], None], combined: Combined | None
) -> Callable[..., Tensor]:
    own = own_expert(block)

    def note(expert: int, tokens_M: Tensor, weights_M: Tensor, output_MD: Tensor) -> None:
        see(ExpertCall(block.layer, expert, tokens_M, weights_M, output_MD))

    def run(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TD = by_expert(x_TD, experts_TK, weights_TK, own, note)
        if combined is not None:
            combined(block.layer, y_TD)
        return y_TD

    return run


def own_expert(block: MoeBlock) -> Own:
    """One expert of a block by itself: its tokens (M, D) → its outputs before any weight."""
    config = getattr(block.experts, "config", None)
    is_constant_too = hasattr(block.experts, "places")  # layout exact
    if getattr(config, "_experts_implementation", None) == BY_EXPERT and not is_constant_too:
        return partial(own_output, block.experts)
    forward = own_forward(block.experts)

    def one(expert: int, x_MD: Tensor) -> Tensor:
        chosen_M1 = torch.full((len(x_MD), 1), expert, device=x_MD.device)
        output_MD: Tensor = forward(x_MD, chosen_M1, x_MD.new_ones(len(x_MD), 1))
        return output_MD

    return one


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """What a module does, without what brings its weights where it is spread over devices."""
    forward: Callable[..., Any] = module.__dict__.get(INNER, module.forward)
    return forward


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for one module while the block runs; its weights come once for all of it."""
    name = INNER if INNER in module.__dict__ else "forward"
    before = module.__dict__.get(name)
    setattr(module, name, forward)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)
