"""Pangu MoGE (2505.21411): experts lie in as many groups as a token takes experts, one of each.

    expertcut profile MODEL --trust-remote-code --contract contracts/grouped.py

Its gate weights are α times `router_scale`, which no cut on disk knows: so experts have no `names`.
Where a port chooses without groups, its numbers differ from these and the contract is refused.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from expertcut.models.declared import Declared


def blocks(model: Any) -> Iterator[Declared]:
    """Each block, in the order of its layers."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "experts", None), nn.ModuleList):
            k = model.config.num_experts_per_tok
            shared = getattr(module, "shared_expert", None)
            yield Declared(name, module, list(module.experts), k, route, shared=shared, groups=k)


def route(module: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
    """The likeliest expert of each group."""
    logits_TE, scale_E = module.gate(x_TD), module.router_scale.flatten()
    n_groups = module.num_experts_per_tok
    score_TGE = logits_TE.softmax(-1).unflatten(1, (n_groups, -1))
    weights_TK, place_TK = score_TGE.max(dim=-1)
    first_K = torch.arange(n_groups, device=x_TD.device) * score_TGE.shape[-1]
    experts_TK = place_TK + first_K
    return logits_TE, weights_TK * scale_E[experts_TK], experts_TK
