"""What a block's experts give on stored tokens, so that removals can be tried one after another.

Beside the legend of `moe`: a Gram matrix (E, E) per token holds the inner products of all experts'
outputs, from which the change of the block's output follows for any gate weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expertcut.data import Quiz, round_robin
from expertcut.interventions.calibration import CALIBRATION_QUESTIONS
from expertcut.interventions.calibration.listening import listen
from expertcut.models.hooks import Routing, own_forward, replaced_forward
from expertcut.models.moe_block import MoeBlock
from expertcut.scoring.engine import Engine
from expertcut.scoring.router_bias import Tilts, tilted

MOST_TOKENS = 1024
KEPT_BYTES = 256 << 20  # of all layers' inputs, and again of one layer's Gram matrices
_SCRATCH_BYTES = 64 << 20


class Tried:
    """A block on stored tokens, all its experts run on all of them once."""

    @torch.inference_mode()
    def __init__(self, block: MoeBlock, x_TD: Tensor) -> None:
        self.block = block
        self.x_TD = x_TD.to(next(block.router.parameters()).device)
        self.route, own_TD = _own_calls(block, self.x_TD)
        n_rows = max(1, _SCRATCH_BYTES // (block.n_experts * x_TD.shape[1] * 8))
        parts = zip(self.x_TD.split(n_rows), own_TD.split(n_rows), strict=True)
        self.gram_TEE = torch.cat([_gram(block, *rows) for rows in parts])
        self.gate_TE = self._gates(())

    @torch.inference_mode()
    def change(self, removed: tuple[int, ...]) -> float:
        """Mean ‖Δy‖² over the tokens, these experts cut and the tokens routed anew."""
        delta_TE = self._gates(removed) - self.gate_TE
        return float(torch.einsum("te,tef,tf->t", delta_TE, self.gram_TEE, delta_TE).mean())

    def _gates(self, removed: tuple[int, ...]) -> Tensor:
        """Gate weights (T, E) by the model's own router, float64, 0 where not chosen."""
        bias_E = torch.zeros(self.block.n_experts)
        bias_E[list(removed)] = -torch.inf
        with tilted([self.block], Tilts({self.block.layer: bias_E} if removed else {})):
            _, weights_TK, experts_TK = self.route()
        nothing_TE = torch.zeros(len(self.x_TD), len(bias_E), dtype=torch.float64)
        return nothing_TE.scatter(1, experts_TK.cpu(), weights_TK.double().cpu())


def keep_inputs(engine: Engine, quiz: Quiz) -> dict[int, Tensor]:
    """Inputs (T, D) of every block, by layer, at the same T tokens.

    They are drawn from all distinct tokens of at most 512 questions, at most 1,024 and no more than
    `KEPT_BYTES` hold.
    """
    draw = _Draw(_n_tokens(engine))
    layers = {block.layer for block in engine.moe.blocks}
    listen(engine, round_robin(quiz, CALIBRATION_QUESTIONS), layers, draw.see)
    return draw.kept


def _n_tokens(engine: Engine) -> int:
    blocks = engine.moe.blocks
    width = int(engine.moe.model.config.get_text_config().hidden_size)
    n_experts = max(block.n_experts for block in blocks)
    by_inputs = KEPT_BYTES // (len(blocks) * width * engine.moe.dtype.itemsize)
    return max(1, min(MOST_TOKENS, by_inputs, KEPT_BYTES // (n_experts**2 * 8)))


class _Draw:
    """Keeps the inputs of the T tokens with the smallest of seeded random keys, pass by pass."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.generator = torch.Generator().manual_seed(0)
        self.keys = torch.empty(0)
        self.kept: dict[int, Tensor] = {}
        self.stays = torch.empty(0, dtype=torch.long)
        self.seen: set[int] = set()

    def see(self, routing: Routing, _is_answer_T: Tensor) -> None:
        """One router's tokens; the first of a pass draws for all."""
        if not self.seen or routing.layer in self.seen:
            self.seen = set()
            self._draw(len(routing.input_TD))
        self.seen.add(routing.layer)
        before = self.kept.get(routing.layer, routing.input_TD[:0])
        n_before = len(before)
        is_old_T = self.stays < n_before
        rows = (before[self.stays[is_old_T]], routing.input_TD[self.stays[~is_old_T] - n_before])
        self.kept[routing.layer] = torch.cat(rows)

    def _draw(self, n_new: int) -> None:
        keys = torch.cat([self.keys, torch.rand(n_new, generator=self.generator)])
        n_kept = min(self.n_tokens, len(keys))
        self.stays = keys.topk(n_kept, largest=False).indices.sort().values
        self.keys = keys[self.stays]


def _gram(block: MoeBlock, x_RD: Tensor, own_RD: Tensor) -> Tensor:
    """Inner products (R, E, E) of what all experts add to the block's output, float64."""
    n_rows, n_experts = len(x_RD), block.n_experts
    device = next(block.experts.parameters()).device
    forward = own_forward(block.experts)
    rows = own_RD.to(device)
    # Experts that work in another width are followed by a projection.
    is_projected = own_RD.shape[1] != x_RD.shape[1]
    nothing_RD = _given(block, x_RD, torch.zeros_like(rows)) if is_projected else torch.zeros(())
    outputs = []
    for expert in range(n_experts):
        chosen_R1 = torch.full((n_rows, 1), expert, device=device)
        output_RD = forward(rows, chosen_R1, rows.new_ones(n_rows, 1))
        if is_projected:
            output_RD = _given(block, x_RD, output_RD)
        outputs.append(output_RD.double().cpu() - nothing_RD)
    f_RED = torch.stack(outputs, dim=1)
    return f_RED @ f_RED.transpose(1, 2)


def _given(block: MoeBlock, x_RD: Tensor, output_RW: Tensor) -> Tensor:
    """What the block gives, (R, D) float64, where its experts give this."""
    with replaced_forward(block.experts, lambda *_: output_RW):
        found = block.module(x_RD[None])
    y_RD: Tensor = (found[0] if isinstance(found, tuple) else found)[0]
    return y_RD.double().cpu()


def _own_calls(block: MoeBlock, x_TD: Tensor) -> tuple[Callable[[], Any], Tensor]:
    """The router on these tokens as its block calls it, and what the block gives its experts.

    A router may want another rank than (T, D), and more than the tokens; experts may want what a
    projection makes of them.
    """
    calls: list[tuple[Any, ...]] = []
    given: list[Tensor] = []

    def nothing(own_TD: Tensor, *_: Any) -> Tensor:
        given.append(own_TD)
        return torch.zeros_like(own_TD)

    handle = block.router.register_forward_pre_hook(lambda _module, args: calls.append(args))
    try:
        with replaced_forward(block.experts, nothing):
            block.module(x_TD[None])
    finally:
        handle.remove()
    return lambda: block.router(*calls[0]), given[0]
