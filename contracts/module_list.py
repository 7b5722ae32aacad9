"""Blocks with a ModuleList of experts that run once in a pass.

For deepseek-moe-16b (2401.06066), MoE++ (2410.07348), OpenMoE (2402.01739), Dynamic_MoE
(2403.07652), RMoE (2408.06793), and the shape of Mixtral, Qwen and OLMoE before transformers 5:

    expertcut profile MODEL --trust-remote-code --contract contracts/module_list.py

A block is told by its attributes. Copy the function that is nearest to yours and change it: the
numbers are compared with the model's own before anything is measured.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertcut.models.declared import Declared
from expertcut.models.kernels import own_output


def blocks(model: Any) -> Iterator[Declared]:
    """Each block, in the order of its layers."""
    config = model.config
    top_k = getattr(config, "num_experts_per_tok", None) or getattr(config, "router_topk", 2)
    for name, module in model.named_modules():
        inner = getattr(module, "moe", None)
        if isinstance(getattr(getattr(inner, "experts", None), "experts", None), nn.ModuleList):
            yield plus_plus(name, module, config)
        if hasattr(getattr(module, "experts", None), "gate_up_proj"):  # as transformers 5 has them
            fused, n = module.experts, len(module.experts.gate_up_proj)
            own = [partial(own_output, fused, expert) for expert in range(n)]
            is_renormalised = getattr(config, "norm_topk_prob", True)
            yield Declared(
                name, module, own, top_k, partial(best, k=top_k, is_renormalised=is_renormalised)
            )
        if not isinstance(getattr(module, "experts", None), nn.ModuleList):
            continue
        experts, names = list(module.experts), f"{name}.experts.{{e}}"
        shared = getattr(module, "shared_experts", None) or getattr(module, "shared_expert", None)
        if hasattr(module, "weight2"):  # RMoE
            yield Declared(name, module, experts, top_k, partial(recurrent, k=top_k))
        elif hasattr(config, "top_p_threshold") and hasattr(module, "router"):  # Dynamic_MoE
            route = partial(top_p, p=config.top_p_threshold)
            yield Declared(name, module, experts, len(experts), route)
        elif hasattr(getattr(module, "router", None), "get_capacity"):  # OpenMoE
            yield Declared(name, module, experts, top_k, partial(dropping, k=top_k), by_prompt=True)
        elif hasattr(module, "gate"):
            is_renormalised = getattr(config, "norm_topk_prob", True)
            route = partial(best, k=top_k, is_renormalised=is_renormalised)
            yield Declared(name, module, experts, top_k, route, shared=shared, names=names)


def best(module: Any, x_TD: Tensor, *, k: int, is_renormalised: bool) -> tuple[Tensor, ...]:
    """The k likeliest."""
    gate = module.gate  # in float32 where it is no nn.Linear, as in deepseek-moe-16b
    is_plain = isinstance(gate, nn.Linear)
    logits_TE = gate(x_TD) if is_plain else F.linear(x_TD.float(), gate.weight.float())
    weights_TK, experts_TK = logits_TE.softmax(-1, dtype=torch.float).topk(k, dim=-1)
    if is_renormalised:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return logits_TE, weights_TK.to(x_TD.dtype), experts_TK


def top_p(module: Any, x_TD: Tensor, *, p: float) -> tuple[Tensor, ...]:
    """As many of the likeliest as it takes to pass p; −1 and weight 0 in the places behind."""
    logits_TE = module.router(x_TD)
    weights_TE, experts_TE = logits_TE.softmax(-1).sort(dim=-1, descending=True)
    is_over_TE = weights_TE.cumsum(-1) > p
    is_last_TE = F.one_hot(is_over_TE.long().argmax(-1), weights_TE.shape[-1]).bool()
    is_left_out_TE = is_over_TE & ~is_last_TE
    weights_TE = weights_TE.masked_fill(is_left_out_TE, 0.0)
    return logits_TE, weights_TE, experts_TE.masked_fill(is_left_out_TE, -1)


def dropping(module: Any, x_TD: Tensor, *, k: int) -> tuple[Tensor, ...]:
    """The k likeliest that are not full: first choices of all tokens, in order, then second ones.

    What is dropped depends on the other tokens, so prompts are scored one at a time (`by_prompt`).
    """
    logits_TE = module.gate(x_TD.float())
    weights_TK, experts_TK = logits_TE.softmax(-1).topk(k, dim=-1)
    most = module.router.get_capacity(logits_TE.shape)
    asked_AE = F.one_hot(experts_TK.T.flatten(), logits_TE.shape[-1])
    place_TK = (asked_AE.cumsum(0) * asked_AE).sum(-1).view(k, -1).T
    is_dropped_TK = place_TK > most
    weights_TK = weights_TK.masked_fill(is_dropped_TK, 0.0)
    return logits_TE, weights_TK.to(x_TD.dtype), experts_TK.masked_fill(is_dropped_TK, -1)


def recurrent(
    module: Any, x_TD: Tensor, rnn: Any, previous_TH: Tensor | None, *, k: int
) -> tuple[Any, ...]:
    """RMoE: the state of a recurrent cell goes on to the next block, beside the logits."""
    arguments = () if previous_TH is None else (previous_TH,)
    state_TH = rnn(F.linear(x_TD, module.weight1), *arguments)
    logits_TE = F.linear(state_TH, module.weight2)
    weights_TK, experts_TK = logits_TE.softmax(-1, dtype=torch.float).topk(k, dim=-1)
    weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).to(x_TD.dtype)
    return logits_TE, weights_TK, experts_TK, logits_TE, state_TH


def plus_plus(name: str, module: Any, config: Any) -> Declared:
    """MoE++: two constant experts, a copy and a zero are the last, and k is always 2."""
    experts, n = list(module.moe.experts.experts), len(module.moe.experts.experts)
    kinds = {n - 4: "constant", n - 3: "constant", n - 2: "copy", n - 1: "zero"}
    is_scaled = not (config.moe_use_mixtral_gating or config.moe_feature_no_mul_topk)
    own = [partial(scaled, expert, 2) for expert in experts] if is_scaled else experts
    route = partial(with_previous_logits, config=config)
    return Declared(name, module, own, 2, route, constants=kinds)


def scaled(expert: nn.Module, factor: int, x_MD: Tensor) -> Any:
    """An expert of a block that multiplies its input first."""
    return expert(x_MD * factor)


def with_previous_logits(
    module: Any, x_TD: Tensor, _used: Any, previous_TE: Tensor | None, *, config: Any
) -> tuple[Tensor, ...]:
    """The logits of the block before are mapped and added; the zero expert takes no weight."""
    router = module.moe.gate
    sum_TE = router.wg(x_TD.float())
    if previous_TE is not None:
        sum_TE = sum_TE + router.gate_map(previous_TE.to(router.gate_map.weight.dtype))
    logits_TE = sum_TE.clone()  # a mask acts here: what goes on to the next block is without it
    score_TE = logits_TE
    if config.moe_use_logits_norm:
        score_TE = logits_TE / (sum_TE.std(dim=1, keepdim=True) / config.moe_gate_norm_std)
    if config.moe_use_mixtral_gating:
        best = score_TE.topk(2, dim=1)
        return logits_TE, best.values.softmax(1), best.indices, sum_TE
    weights_TK, experts_TK = score_TE.softmax(1).topk(2, dim=1)
    weights_TK = weights_TK.masked_fill(experts_TK == logits_TE.shape[1] - 1, 0.0)
    return logits_TE, weights_TK / weights_TK.sum(1, keepdim=True), experts_TK, sum_TE
