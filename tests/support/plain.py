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
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertcut.data import Quiz
from expertcut.data.questions import LETTERS, prompt

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
    **dict.fromkeys(("olmoe", "flex_olmo", "qwen2_moe", "jamba"), Gate("softmax", "kept")),
    "deepseek_v2": Gate("softmax", "kept", groups="best"),
    **dict.fromkeys(
        (
            *("qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "ernie4_5_moe", "qwen3_next"),
            *("aria_text", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "mellum"),
            *("hunyuan_v1_moe", "minimax", "qwen3_5_moe_text", "cohere2_moe, softmax"),
        ),
        _SOFTMAX,
    ),
    "phimoe": Gate("softmax", "mixer"),
    "gemma4_text": Gate("softmax", gives="probabilities"),
    "kolibri1": Gate("sigmoid", "kept", bias="logit"),
    "deepseek_v4": Gate("sqrtsoftplus"),
}


class Plain:
    """A checkpoint of a family as transformers loads it."""

    def __init__(self, path: Path, family: str) -> None:
        model: Any
        model, self.info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        model.set_experts_implementation("eager")
        self.model = model.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.gate = GATES.get(family, _SIGMOID)
        self.blocks = {
            name: module
            for name, module in model.named_modules()
            if isinstance(getattr(module, "experts", None), nn.Module)
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

    def _ask(self, text: str, question: Any) -> Tensor:
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        letters = LETTERS[: len(question.choices)]
        last = [self.tokenizer(f"{text} {letter}").input_ids[-1] for letter in letters]
        logits_V = self.model(input_ids=ids, use_cache=False).logits[0, -1]
        found: Tensor = logits_V.float().log_softmax(dim=-1)[last]
        return found

    @contextmanager
    def _shifted(self, shifts: Shifts) -> Iterator[None]:
        assert set(shifts) <= set(self.blocks)
        with ExitStack() as stack:
            for name, module in self.blocks.items():
                router = getattr(module, "gate", None) or module.router
                hook = _hook(self.gate, module, router, shifts.get(name))
                stack.callback(router.register_forward_hook(hook).remove)
            yield


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
