"""Chain-of-Experts (2506.18945): a layer runs its block `inner_iter` times in a pass.

Each run becomes a block of its own, `….mlp.0`, `….mlp.1`, …, over the same experts: what the second
iteration does stands beside the first in every table.

    expertcut profile MODEL --trust-remote-code --contract contracts/iterated.py
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from expertcut.models.declared import Declared


def blocks(model: Any) -> Iterator[Declared]:
    """Each block, in the order of its layers."""
    config = model.config
    for name, module in model.named_modules():
        if isinstance(getattr(module, "experts", None), nn.ModuleList):
            yield Declared(
                name,
                module,
                list(module.experts),
                config.num_experts_per_tok,
                partial(route, config=config),
                shared=getattr(module, "shared_experts", None),
                calls=config.inner_iter,
            )


def route(module: Any, x_TD: Tensor, iteration: int, *, config: Any) -> tuple[Tensor, ...]:
    """The likeliest by the gate of this iteration, or by the one gate of all."""
    gate = module.gate[iteration] if isinstance(module.gate, nn.ModuleList) else module.gate
    logits_TE = F.linear(x_TD.float(), gate.weight.float())
    weights_TK, experts_TK = logits_TE.softmax(-1).topk(config.num_experts_per_tok, dim=-1)
    if config.norm_topk_prob and experts_TK.shape[1] > 1:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    else:
        weights_TK = weights_TK * config.routed_scaling_factor
    return logits_TE, weights_TK, experts_TK
