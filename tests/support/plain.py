"""Plain transformers, one prompt at a time, its routers changed by hand: what commands are held to.

Nothing of expertcut runs here but the text of the prompts. What a gate does with its logits is
written down once more, by family, after transformers' modelling files; on every call the router's
own weights and choices must be those.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from expertcut.data import Quiz
from expertcut.data.questions import LETTERS, prompt

SUMS = ("tokens", "weight", "norm", "weighted_norm")

Shifts = Mapping[str, Tensor]  # by block name what is added to logits (E,); −inf forbids
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z_TE: z_TE.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda z_TE: F.softplus(z_TE).sqrt(),
}


@dataclass(frozen=True)
class Gate:
    """How weights and choices come from logits.

    `weights` are the chosen scores, `kept` as they are or divided by their `sum`; or PhiMoE's
    `mixer`. `bias` says what the selection bias, where there is one, is added to; `groups` what a
    group of experts is ranked by.
    """

    score: Literal["softmax", "sigmoid", "sqrtsoftplus"]
    weights: Literal["sum", "kept", "mixer"] = "sum"
    bias: Literal["score", "logit"] = "score"
    groups: Literal["best", "best two"] = "best two"
    gives: Literal["logits", "probabilities"] = "logits"


_SOFTMAX, _SIGMOID = Gate("softmax"), Gate("sigmoid")
GATES = {
    **dict.fromkeys(
        ("olmoe", "flex_olmo", "qwen2_moe", "jamba", "deepseek_ocr2", "unlimited_ocr"),
        Gate("softmax", "kept"),
    ),
    "deepseek_v2": Gate("softmax", "kept", groups="best"),
    **dict.fromkeys(
        (
            *("qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "ernie4_5_moe", "qwen3_next"),
            *("aria_text", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "mellum"),
            *("hunyuan_v1_moe", "minimax", "qwen3_5_moe_text", "cohere2_moe, softmax"),
            *("aria", "mistral4", "mistral3", "qwen3_vl_moe", "qwen3_5_moe"),
            *("mistral_large4", "qwen4_exp", "qwen4_exp_text", "qwen3_omni_moe"),
            "qwen3_omni_moe_thinker",
        ),
        _SOFTMAX,
    ),
    "phimoe": Gate("softmax", "mixer"),
    **dict.fromkeys(("gemma4", "gemma4_text"), Gate("softmax", gives="probabilities")),
    "kolibri1": Gate("sigmoid", "kept", bias="logit"),
    "deepseek_v4": Gate("sqrtsoftplus"),
}


# The module whose input is the residual stream, by its name in the layer; "" is the block.
STREAMS: dict[str, str | None] = {
    # They have several, or a block reads a mixture of earlier states.
    **dict.fromkeys(("deepseek_v4", "hy_v4", "glm5_next", "qwen4_exp", "qwen4_exp_text")),
    **dict.fromkeys(("inkling2", "inkling2_text", "muse_spark")),
    **dict.fromkeys(("flex_olmo", "minimax"), ""),
    "afmoe": "pre_mlp_layernorm",
    "beam": "pre_feedforward_layernorm",
    "cohere2_moe": "input_layernorm",
    **dict.fromkeys(("gemma4", "gemma4_text"), "pre_feedforward_layernorm"),
    "jamba": "pre_ff_layernorm",
    "lfm2_moe": "ffn_norm",
    **dict.fromkeys(("nemotron_h", "nemotron_h_omni"), "norm"),
}
# What the layer multiplies that stream by.
STREAM_FACTORS: dict[str, Callable[[Any], float]] = {
    "minimax": lambda layer: layer.mlp_alpha_factor,
    "beam": lambda layer: (1 - 1 / layer.mlp_residual_add_idx) ** 0.5,
    **dict.fromkeys(("gemma4", "gemma4_text"), lambda layer: float(layer.layer_scalar)),
}


class Plain:
    """A checkpoint of a family as transformers loads it."""

    def __init__(self, path: Path, family: str) -> None:
        model: Any
        own = getattr(transformers, AutoConfig.from_pretrained(path).architectures[0])
        model, self.info = own.from_pretrained(path, output_loading_info=True)
        model = getattr(model, "thinker", model)  # of an Omni model
        model.set_experts_implementation("eager")
        self.model = model.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.gate = GATES.get(family, _SIGMOID)
        model_type = str(model.config.model_type)
        self.stream = STREAMS.get(model_type, "post_attention_layernorm")
        self.blocks = {
            name: module
            for name, module in model.named_modules()
            if isinstance(getattr(module, "experts", None), nn.Module) and "vision" not in name
        }

    @torch.no_grad()
    def logprobs(self, quiz: Quiz, shifts: Shifts | None = None) -> Tensor:
        """log p of each choice (N, C), its routers' logits shifted by hand."""
        with self._shifted(shifts or {}):
            rows = [
                self._ask(prompt(question, quiz.shots_by_subject[question.subject]), question)
                for question in quiz
            ]
        return torch.stack(rows)

    @torch.no_grad()
    def observed(self, quiz: Quiz) -> tuple[dict[str, Tensor], Tensor]:
        """`SUMS` and residual shifts (L, E) of all tokens, brute force; α (N, L, E) at answers."""
        seen, alpha = [_Seen(self, name, block) for name, block in self.blocks.items()], []

        def route(_module: nn.Module, _args: Any, output: tuple[Tensor, ...]) -> None:
            z_E = output[0][-1].double()
            if all(block.is_watched for block in seen):
                is_alpha = self.gate.gives == "probabilities"
                alpha.append(z_E if is_alpha else SCORES[self.gate.score](z_E))

        with ExitStack() as stack:
            for block in seen:
                stack.callback(block.router.register_forward_hook(route).remove)
                for handle in block.hooks():
                    stack.callback(handle.remove)
            self.logprobs(quiz)
        sums_SLE = torch.stack([block.sums_SE for block in seen], dim=1)
        alpha_NLE = torch.stack(alpha).view(len(quiz), len(seen), -1)
        names = (*SUMS, "residual_shift")[: 4 if self.stream is None else 5]
        return dict(zip(names, sums_SLE, strict=False)), alpha_NLE

    def _ask(self, text: str, question: Any) -> Tensor:
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        letters = LETTERS[: len(question.choices)]
        last = [self.tokenizer(f"{text} {letter}").input_ids[-1] for letter in letters]
        logits_V = self.model(input_ids=ids, use_cache=False).logits[0, -1]
        found: Tensor = logits_V.float().log_softmax(dim=-1)[last]
        return found

    @contextmanager
    def _shifted(self, shifts: Shifts) -> Iterator[None]:
        # The same model in another class has other names before the list of layers.
        by_layer = {name.rpartition("layers.")[2]: shift_E for name, shift_E in shifts.items()}
        layers = {name.rpartition("layers.")[2]: module for name, module in self.blocks.items()}
        assert set(by_layer) <= set(layers) and len(layers) == len(self.blocks)
        with ExitStack() as stack:
            for layer, module in layers.items():
                router = _router(module)
                hook = _hook(self.gate, module, router, by_layer.get(layer))
                stack.callback(router.register_forward_hook(hook).remove)
            yield


def _router(block: Any) -> Any:
    return getattr(block, "gate", None) or block.router


class _Seen:
    """The sums over one block's tokens; its layer runs once more without its experts."""

    is_watched = True

    def __init__(self, plain: Plain, name: str, block: Any) -> None:
        parent = plain.model.get_submodule(name.rpartition(".")[0])
        self.layer: Any = block if isinstance(parent, nn.ModuleList) else parent
        self.router, self.experts = _router(block), block.experts
        self.reader = block
        if plain.stream:
            self.reader = self.layer.get_submodule(plain.stream)
        factor = STREAM_FACTORS.get(plain.model.config.model_type, lambda _: 1.0)
        self.stream_factor = factor(self.layer) if plain.stream is not None else None
        self.sums_SE = torch.zeros(5, len(next(block.experts.parameters()))).double()

    def hooks(self) -> Iterator[Any]:
        yield self.experts.register_forward_hook(self.add)
        if self.stream_factor is not None:
            yield self.reader.register_forward_pre_hook(self.read)
            yield self.layer.register_forward_hook(self.turn, with_kwargs=True)

    def add(self, experts: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.is_watched:
            return torch.zeros_like(output)
        x_TD, experts_TK, weights_TK = args
        self.weighted_TE = torch.zeros(len(x_TD), self.sums_SE.shape[1]).double()
        for expert in range(self.sums_SE.shape[1]):
            is_its_TK = experts_TK == expert
            at_M, weight_T = is_its_TK.any(dim=1), (weights_TK.double() * is_its_TK).sum(dim=1)
            x_MD, weight_M = x_TD[at_M], weight_T[at_M]
            alone_M1 = torch.full((len(x_MD), 1), expert)
            norm_M = experts.forward(x_MD, alone_M1, torch.ones(len(x_MD), 1)).double().norm(dim=1)
            self.weighted_TE[at_M, expert] = weight_M * norm_M
            amounts = (torch.ones_like(norm_M), weight_M, norm_M, weight_M * norm_M)
            self.sums_SE[:4, expert] += torch.stack(amounts).sum(dim=1)
        return None

    def read(self, _module: Any, args: tuple[Tensor, ...]) -> None:
        self.x = args[0].double() if self.is_watched else self.x

    def turn(self, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.is_watched = False
        without = layer.forward(*args, **kwargs)
        self.is_watched = True
        y, y_0 = (o[0] if isinstance(o, tuple) else o for o in (output, without))
        x_TD = self.x.reshape(-1, self.x.shape[-1])
        added_TD = (y - y_0).double().reshape(x_TD.shape) / self.stream_factor
        turned_T = 1 - torch.cosine_similarity(x_TD, x_TD + added_TD, dim=1)
        self.sums_SE[4] += (self.weighted_TE * turned_T.clamp(min=0)[:, None]).sum(dim=0)


def _hook(gate: Gate, block: nn.Module, router: Any, shift_E: Tensor | None) -> Callable[..., Any]:
    selection_E = next(
        (
            tensor.reshape(-1)
            for name, tensor in [*block.named_parameters(), *block.named_buffers()]
            if name.endswith(("e_score_correction_bias", "expert_bias"))
        ),
        None,
    )
    scale_E = getattr(router, "per_expert_scale", None)

    def rerouted(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits_TE, weights_TK, experts_TK = output
        if hasattr(router, "tid2eid"):
            assert shift_E is None, "which experts a token id is sent to is a table"
            return None
        z_TE = logits_TE.log() if gate.gives == "probabilities" else logits_TE
        groups = (getattr(router, "num_group", None) or 1, getattr(router, "topk_group", None) or 1)
        k = experts_TK.shape[1]

        def choose(z_TE: Tensor) -> tuple[Tensor, Tensor]:
            if gate.weights == "mixer":
                return _mixer(z_TE, router.router_jitter_noise)
            weights, experts = _route(gate, z_TE, selection_E, groups, k)
            return weights if scale_E is None else weights * scale_E[experts], experts

        own_TK, own_experts_TK = choose(z_TE)
        factor = _same(_dense(weights_TK, experts_TK, z_TE), _dense(own_TK, own_experts_TK, z_TE))
        if shift_E is None:
            return None
        shifted_TK, chosen_TK = choose(z_TE + shift_E)
        return logits_TE, (shifted_TK * factor).to(weights_TK.dtype), chosen_TK

    return rerouted


def _route(
    gate: Gate, z_TE: Tensor, selection_E: Tensor | None, groups: tuple[int, int], k: int
) -> tuple[Tensor, Tensor]:
    score_TE = SCORES[gate.score](z_TE.float())
    by_TE = z_TE if gate.bias == "logit" else score_TE
    if selection_E is not None:
        by_TE = by_TE + selection_E
    by_TE = by_TE.masked_fill(z_TE.isneginf(), -torch.inf)
    n_groups, n_top = groups
    if n_groups > 1:
        by_TGE = by_TE.unflatten(1, (n_groups, -1))
        n_best = 1 if gate.groups == "best" else 2
        rank_TG = by_TGE.topk(n_best, dim=-1).values.sum(dim=-1)
        is_out_TG = torch.ones_like(rank_TG, dtype=torch.bool)
        is_out_TG.scatter_(1, rank_TG.topk(n_top, dim=-1).indices, False)
        by_TE = by_TGE.masked_fill(is_out_TG[..., None], -torch.inf).flatten(1)
    experts_TK = by_TE.topk(k, dim=-1).indices
    weights_TK = score_TE.gather(1, experts_TK)
    if gate.weights == "sum":
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK, experts_TK


def _mixer(z_TE: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """PhiMoE: each of two in turn, a softmax over the logits that come close to it."""
    weights, experts = [], []
    left_TE = z_TE
    for _ in range(2):
        top_T1, at_T1 = left_TE.max(dim=-1, keepdim=True)
        is_far_TE = (top_T1 - z_TE) / z_TE.abs().clamp(min=top_T1) > 2 * jitter
        near_TE = left_TE.masked_fill(is_far_TE, -torch.inf).softmax(dim=-1)
        weights.append(near_TE.gather(1, at_T1))
        experts.append(at_T1)
        left_TE = left_TE.scatter(1, at_T1, -torch.inf)
    return torch.cat(weights, dim=1), torch.cat(experts, dim=1)


def _dense(weights_TK: Tensor, experts_TK: Tensor, like_TE: Tensor) -> Tensor:
    return torch.zeros_like(like_TE, dtype=torch.float32).scatter(1, experts_TK, weights_TK.float())


def _same(model_TE: Tensor, own_TE: Tensor) -> float:
    """The constant that the model's weights are of those made by hand; they must be, and alike."""
    factor = float(model_TE.sum() / own_TE.sum())
    torch.testing.assert_close(model_TE, own_TE * factor, rtol=1e-4, atol=1e-6)
    return factor
