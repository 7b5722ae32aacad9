"""Tiny models whose blocks are in other shapes: ours, after the papers, and copied to checkpoints.

Experts are a ModuleList and gating is inside the block, as in the authors' files. `config.shape`
names the block. A decoder layer hands on what its block returns beside its output.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


class DeclaredConfig(LlamaConfig):
    """Of every shape; further keys are those of its block."""

    model_type = "tiny_declared"


def chosen_sum(block: Any, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
    y_TD = torch.zeros_like(x_TD)
    for number, expert in enumerate(block.experts):
        tokens_M, places_M = torch.where(experts_TK == number)
        if len(tokens_M):
            own_MD = expert(x_TD[tokens_M]) * weights_TK[tokens_M, places_M, None]
            y_TD.index_add_(0, tokens_M, own_MD.to(y_TD.dtype))
    return y_TD


class Block(nn.Module):
    """Softmax, top k: what all shapes share."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.top_k = config, config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(config.num_experts))


class Deepseek(Block):
    """deepseek-moe-16b: α as weight, and a shared expert."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.shared_experts = LlamaMLP(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.flatten(0, -2)
        weights_TK, experts_TK = self.gate(x_TD).softmax(-1).topk(self.top_k, dim=-1)
        y_TD = chosen_sum(self, x_TD, weights_TK, experts_TK)
        return y_TD.view_as(hidden_states) + self.shared_experts(hidden_states)


class TopP(nn.Module):
    """Dynamic_MoE: as many experts as it takes to pass the share p of the probability."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.threshold = config.top_p_threshold
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(config.num_experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.flatten(0, -2)
        weights_TE, order_TE = self.router(x_TD).softmax(-1).sort(dim=-1, descending=True)
        is_over_TE = weights_TE.cumsum(-1) > self.threshold
        is_over_TE = is_over_TE & (is_over_TE.cumsum(-1) > 1)
        order_TE = torch.where(is_over_TE, -1, order_TE)
        return chosen_sum(self, x_TD, weights_TE, order_TE).view_as(hidden_states)


class Capacity(nn.Module):
    """What OpenMoE calls its router."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.factor = config.router_capacity_factor_eval

    def get_capacity(self, shape: Any) -> int:
        return max(int(2 * self.factor * shape[-2] / shape[-1]), 4)


class Dropping(Block):
    """OpenMoE: an expert takes so many tokens of a pass: first choices of all, then second ones."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.router = Capacity(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.flatten(0, -2)
        weights_TK, experts_TK = self.gate(x_TD).softmax(-1).topk(self.top_k, dim=-1)
        n = len(self.experts)
        left = [self.router.get_capacity((len(x_TD), n))] * n
        for place in range(self.top_k):
            for token, expert in enumerate(experts_TK[:, place].tolist()):
                weights_TK[token, place] *= left[expert] > 0
                left[expert] -= 1
        return chosen_sum(self, x_TD, weights_TK, experts_TK).view_as(hidden_states)


class Grouped(Block):
    """Pangu MoGE: the best expert of each group, scaled by expert."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_experts_per_tok = config.num_experts_per_tok
        self.router_scale = nn.Parameter(torch.rand(1, config.num_experts) + 0.5)
        self.shared_expert = LlamaMLP(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.flatten(0, -2)
        groups = self.gate(x_TD).softmax(-1).chunk(self.top_k, dim=-1)
        size, best = groups[0].shape[-1], [score.max(dim=-1) for score in groups]
        experts_TK = torch.stack([own.indices + g * size for g, own in enumerate(best)], dim=-1)
        weights_TK = torch.stack([own.values for own in best], dim=-1)
        weights_TK = weights_TK * self.router_scale[0][experts_TK]
        y_TD = chosen_sum(self, x_TD, weights_TK, experts_TK) + self.shared_expert(x_TD)
        return y_TD.view_as(hidden_states)


class Recurrent(Block):
    """RMoE: a GRU cell, which all layers share, reads the router's input and its last state."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self.gate
        self.weight1 = nn.Parameter(torch.randn(config.router_width, config.hidden_size) / 4)
        self.weight2 = nn.Parameter(torch.randn(config.num_experts, config.router_width))

    def forward(
        self, hidden_states: Tensor, rnn: Any = None, router_previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_TD = hidden_states.flatten(0, -2)
        state_TH = rnn(F.linear(x_TD, self.weight1), router_previous)
        logits_TE = F.linear(state_TH, self.weight2)
        weights_TK, experts_TK = logits_TE.softmax(-1).topk(self.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        y_TD = chosen_sum(self, x_TD, weights_TK, experts_TK)
        return y_TD.view_as(hidden_states), logits_TE, state_TH


class Iterated(Block):
    """Chain-of-Experts: a layer runs its block several times, each with its own gate."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width, n = config.hidden_size, config.num_experts
        gates = (nn.Linear(width, n, bias=False) for _ in range(config.inner_iter))
        self.gate = nn.ModuleList(gates)
        self.shared_experts = LlamaMLP(config)

    def forward(self, hidden_states: Tensor, _iter: int) -> tuple[Tensor, None, None]:
        x_TD = hidden_states.flatten(0, -2)
        weights_TK, experts_TK = self.gate[_iter](x_TD).softmax(-1).topk(self.top_k, dim=-1)
        y_TD = chosen_sum(self, x_TD, weights_TK, experts_TK)
        return y_TD.view_as(hidden_states) + self.shared_experts(hidden_states), None, None


class Constant(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(width))
        self.wg = nn.Linear(width, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        share = self.wg(x).softmax(-1)
        return share[..., :1] * x + share[..., 1:] * self.constant


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class PlusPlus(nn.Module):
    """MoE++: the last experts are two constants, a copy and a zero; logits go on to the next."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, n = config.hidden_size, config.num_experts[0]
        own = [LlamaMLP(config) for _ in range(n - 4)]
        self.moe, self.moe.gate, self.moe.experts = nn.Module(), nn.Module(), nn.Module()
        self.moe.gate.wg = nn.Linear(width, n, bias=False)
        self.moe.gate.gate_map = nn.Linear(n, n, bias=False)
        more = [Constant(width), Constant(width), nn.Identity(), Zero()]
        self.moe.experts.experts = nn.ModuleList([*own, *more])

    def forward(
        self, hidden_states: Tensor, used_token: None = None, gate_residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x_TD, gate = hidden_states.reshape(-1, hidden_states.shape[-1]), self.moe.gate
        logits_TE = gate.wg(x_TD)
        if gate_residual is not None:
            logits_TE = logits_TE + gate.gate_map(gate_residual)
        weights_TK, experts_TK = logits_TE.softmax(-1).topk(2, dim=-1)
        weights_TK = weights_TK.masked_fill(experts_TK == logits_TE.shape[1] - 1, 0.0)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        x_TD *= 2  # in place, as the authors do
        y_TD = chosen_sum(self.moe.experts, x_TD, weights_TK, experts_TK)
        return y_TD.view_as(hidden_states), logits_TE


SHAPES = {
    "deepseek": Deepseek,
    "top_p": TopP,
    "dropping": Dropping,
    "grouped": Grouped,
    "recurrent": Recurrent,
    "iterated": Iterated,
    "plus_plus": PlusPlus,
}


class Layer(nn.Module):
    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        self.shape, self.config = config.shape, config
        self.self_attn = LlamaAttention(config, number)
        self.mlp = SHAPES[config.shape](config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, state: Any, rnn: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        x = x + self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)[0]
        y = self.post_attention_layernorm(x)
        if self.shape == "iterated":
            for i in range(self.config.inner_iter):
                y = y + self.mlp(y, i)[0]
        elif self.shape == "recurrent":
            y, _, state = self.mlp(y, rnn=rnn, router_previous=state)
        elif self.shape == "plus_plus":
            y, state = self.mlp(y, gate_residual=state)
        else:
            y = self.mlp(y)
        return x + y, state


class DeclaredModel(PreTrainedModel):
    config_class = DeclaredConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        width = getattr(config, "router_width", 0)
        self.rnn = nn.GRUCell(width, width) if width else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        x = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        n_seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(n_seen, n_seen + x.shape[1], device=x.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary, state = self.rotary_emb(x, position_ids), None
        for layer in self.layers:
            x, state = layer(
                x,
                state,
                self.rnn,
                attention_mask=mask,
                position_embeddings=rotary,
                past_key_values=past_key_values,
            )
        return self.norm(x), past_key_values


class DeclaredForCausalLM(PreTrainedModel):
    config_class = DeclaredConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = DeclaredModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, self.config.initializer_range)

    def forward(
        self, input_ids: Tensor, logits_to_keep: int | Tensor = 0, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        x, cache = self.model(input_ids, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=self.lm_head(x[:, kept]), past_key_values=cache)
