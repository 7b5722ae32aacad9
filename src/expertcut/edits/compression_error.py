"""What each option of each expert costs: the error of a block's output on stored tokens.

T are the stored tokens of a block, M those of them that chose an expert, O the options of a menu.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertcut.edits.compression import Option
from expertcut.edits.quantise import Compressed, compressed
from expertcut.errors import ContractError
from expertcut.models import hooks
from expertcut.models.expert_matrices import matrices, projection_inputs, replaced_matrices
from expertcut.models.moe_block import MoeBlock
from expertcut.models.safetensors_index import DTYPES
from expertcut.scoring.engine import Engine
from expertcut.stats import Array

Inputs = Mapping[int, Tensor]
"""By layer the inputs (T, D) of a block at the stored tokens."""


@dataclass(frozen=True)
class ExpertTokens:
    """The stored tokens that chose one expert: its inputs, gate weights and outputs."""

    block: MoeBlock
    expert: int
    x_MD: Tensor
    weight_M: Tensor
    y_MD: Tensor

    def compressed(
        self, option: Option, dtype: str, group_size: int, *, is_ggml: bool = False
    ) -> Compressed:
        """The expert under an option, made of its weights as they are on disk."""
        own = matrices(self.block, self.expert)
        weights = {name: matrix_RC.to(DTYPES[dtype]) for name, matrix_RC in own.items()}
        inputs = {}
        if option.row_share:  # whose rows are chosen by them
            inputs = projection_inputs(self.block, self.expert, self.x_MD)
        made_of = (weights, inputs, self.x_MD, self.y_MD)
        return compressed(option, *made_of, group_size, is_ggml=is_ggml)

    @torch.inference_mode()
    def squared_error(self, new: Compressed) -> float:
        """Σ g²·‖f(x) − f°(x)‖² over the tokens."""
        if new.constant is not None:
            factor, value_D = new.constant
            y_MD = factor * self.x_MD.double() + value_D.double()
        else:
            with replaced_matrices(self.block, {self.expert: new.weights}):
                y_MD = hooks.own_expert(self.block)(self.expert, self.x_MD).double()
        error_M = (self.y_MD.double() - y_MD).square().sum(dim=1)
        return float(self.weight_M.double().square() @ error_M)


@torch.inference_mode()
def expert_tokens(block: MoeBlock, x_TD: Tensor) -> Iterator[ExpertTokens]:
    """Every expert of a block that some stored token chose, in the order of ids."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(own_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, *_: Any) -> Tensor:
        calls.append((own_TD, experts_TK, weights_TK))
        return torch.zeros_like(own_TD)

    with hooks.replaced_forward(block.experts, note):
        block.module(_placed(block, x_TD)[None])
    ((own_TD, experts_TK, weights_TK),) = calls
    run = hooks.own_expert(block)
    for expert in range(block.n_experts):
        is_own_TK = experts_TK == expert
        tokens_M = is_own_TK.any(dim=1).nonzero()[:, 0]
        if len(tokens_M):
            weight_M = weights_TK.where(is_own_TK, 0).sum(dim=1)[tokens_M]
            x_MD = own_TD[tokens_M]
            yield ExpertTokens(block, expert, x_MD, weight_M, run(expert, x_MD))


def _placed(block: MoeBlock, x_TD: Tensor) -> Tensor:
    return x_TD.to(next(block.router.parameters()).device)


@torch.inference_mode()
def block_outputs(blocks: Sequence[MoeBlock], inputs: Inputs) -> dict[int, Tensor]:
    """By layer a block's output (T, D) as it runs now, in float64."""
    found = {}
    for block in blocks:
        output = block.module(_placed(block, inputs[block.layer])[None])
        y_TD = (output[0] if isinstance(output, tuple) else output)[0]
        found[block.layer] = y_TD.double().cpu()
    return found


@dataclass(frozen=True)
class Measured:
    """Squared errors by layer, expert and option, and Σ‖y‖² of each block, all over T tokens."""

    error_LEO: Array  # NaN where a layer has fewer experts
    energy_L: Array
    tokens: int


def option_errors(
    engine: Engine,
    inputs: Inputs,
    menu: Sequence[Option],
    dtype: str,
    group_size: int,
    on_expert: Callable[[int, int], None] = lambda done, total: None,
    *,
    is_ggml: bool = False,
) -> Measured:
    """The error of each option of each expert, alone in its block: Σ g²·‖f − f°‖² / T.

    Made one block at a time, of weights in their `dtype` on disk; each option's weights are made,
    used and dropped. An expert that no stored token chose has error 0. With `is_ggml` widths are
    types of llama.cpp.
    """
    blocks = engine.moe.blocks
    shape = (len(blocks), max(block.n_experts for block in blocks), len(menu))
    error_LEO, energy_L = np.full(shape, np.nan), np.zeros(len(blocks))
    n_tokens = len(next(iter(inputs.values())))
    outputs = block_outputs(blocks, inputs)
    for layer, block in enumerate(blocks):
        error_LEO[layer, : block.n_experts] = 0
        energy_L[layer] = float(outputs[block.layer].square().sum()) / n_tokens
        if not energy_L[layer] > 0:
            raise ContractError(f"{block.name} gives nothing on any token: no error is relative")
        factor = 1.0 if block.output_factor is None else block.output_factor
        for own in expert_tokens(block, inputs[block.layer]):
            for place, option in enumerate(menu):
                new = own.compressed(option, dtype, group_size, is_ggml=is_ggml)
                squared = own.squared_error(new) * factor**2
                error_LEO[layer, own.expert, place] = squared / n_tokens
            on_expert(layer * shape[1] + own.expert + 1, shape[0] * shape[1])
    return Measured(error_LEO, energy_L, n_tokens)
