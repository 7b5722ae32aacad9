"""Routing rules in a running model, and the experts that its tokens use."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertcut.errors import ContractError
from expertcut.models.hooks import (
    Routed,
    Routing,
    Scope,
    observe_routers,
    own_forward,
    replaced_forward,
    route,
)
from expertcut.models.modeling_routed import RULES, Gate, Tokens, with_idle
from expertcut.models.moe_block import MoeBlock
from expertcut.models.routing_rule import RoutingRule
from expertcut.scoring.packing import Pass


@dataclass(frozen=True)
class Rerouting:
    """A rule with its thresholds by layer; other layers keep their routing."""

    rule: RoutingRule
    at_by_layer: Mapping[int, float]

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The thresholds of all layers."""
        return tuple(self.at_by_layer.values())

    def n_columns(self, top_k: int) -> int:
        """Places per token (M) that each router gives."""
        return self.rule.n_columns(top_k, self.thresholds)


@contextmanager
def rerouted(blocks: Sequence[MoeBlock], routing: Rerouting) -> Iterator[Callable[[Pass], None]]:
    """Applies the rule behind the routers, verified on the probe; yields the engine's `OnPass`."""
    with ExitStack() as stack:
        for block in blocks:
            if (at := routing.at_by_layer.get(block.layer)) is not None:
                routing.rule.check_threshold(at)
                routing.rule.check(block, at)
                _apply(stack, block, routing, at)
        yield lambda step: None


def gate_of(block: MoeBlock) -> Gate:
    """How a block makes gate weights, as rules need it."""
    if block.weights is None:  # the rule only drops, so the weights stay as they are
        return Gate(block.scoring)
    return Gate(block.scoring, block.weights.is_renormalised, block.weights.factor)


def _apply(stack: ExitStack, block: MoeBlock, routing: Rerouting, at: float) -> None:
    forward = own_forward(block.router)
    most = routing.n_columns(block.top_k)
    function, options = RULES[routing.rule.rule], routing.rule.options
    gate = gate_of(block)

    def run(*args: Any, **kwargs: Any) -> Routed:
        logits_TE, weights_TK, experts_TK = forward(*args, **kwargs)
        score_TE = block.selection_scores(logits_TE)
        given = Tokens(gate, logits_TE, score_TE, weights_TK, experts_TK)
        return (logits_TE, *function(given, at, options))

    before = route(block.router, block.call)
    stack.enter_context(replaced_forward(block.router, run))
    if hasattr(block.experts, "places"):  # layout exact has no place for nobody
        stack.enter_context(replaced_forward(block.experts, _idle(block)))
    after = route(block.router, block.call)
    if fault := next(_faults(block, before, after, most), None):
        raise ContractError(f"{block.name}: {fault}, so no result with this rule would be true")


def _idle(block: MoeBlock) -> Callable[..., Tensor]:
    forward = own_forward(block.experts)

    def run(x_TD: Tensor, experts_TM: Tensor, weights_TM: Tensor) -> Tensor:
        weights_TM, experts_TM = with_idle(weights_TM, experts_TM, block.n_experts)
        result: Tensor = forward(x_TD, experts_TM, weights_TM)
        return result

    return run


def _faults(block: MoeBlock, before: Routed, after: Routed, most: int) -> Iterator[str]:
    logits_TE, weights_TM, experts_TM = after
    if not torch.equal(logits_TE, before[0]):
        yield "its logits change"
    if weights_TM.shape != experts_TM.shape or not (
        len(experts_TM) == len(before[2]) and block.top_k <= experts_TM.shape[1] <= most
    ):
        yield f"its router gives {tuple(experts_TM.shape)} choices, at most {most} a token wanted"
    is_nobody_TM = experts_TM == block.n_experts
    if bool(((experts_TM < 0) | (experts_TM > block.n_experts)).any()):
        yield f"its router chooses experts outside 0 to {block.n_experts - 1}"
    if bool((weights_TM[is_nobody_TM] != 0).any()) or not bool(weights_TM.isfinite().all()):
        yield "its router gives weights to nobody, or none that is a number"
    used_TM = experts_TM.sort(dim=1).values
    if bool(((used_TM[:, 1:] == used_TM[:, :-1]) & (used_TM[:, 1:] < block.n_experts)).any()):
        yield "its router chooses an expert twice"


class ExpertCounts:
    """Experts that the tokens of a chunk use, by question and layer, and those of its prefix."""

    def __init__(self, blocks: Sequence[MoeBlock], n_questions: int) -> None:
        self.blocks = blocks
        self.used_NL = torch.zeros(n_questions, len(blocks), dtype=torch.int64)
        self.tokens_N = torch.zeros(n_questions, dtype=torch.int64)
        self.prefix_used_L = torch.zeros(len(blocks), dtype=torch.int64)
        self.prefix_tokens = 0

    def listening(self) -> Scope:
        """Hooks the routers."""
        return observe_routers(self.blocks, self._route)

    def begin(self, step: Pass) -> None:
        """Called before each forward pass."""
        self.step = step
        if step.is_prefix:
            self.prefix_tokens += step.n_tokens
            return
        own_T = step.question_T if step.valid_T is None else step.question_T[step.valid_T]
        self.tokens_N += own_T.bincount(minlength=len(self.tokens_N))

    def _route(self, routing: Routing) -> None:
        block, step = self.blocks[routing.layer], self.step
        used_T = (routing.experts_TK < block.n_experts).sum(dim=1).cpu()
        if step.is_prefix:
            self.prefix_used_L[routing.layer] += used_T.sum()
            return
        if step.valid_T is not None:
            used_T = used_T.where(step.valid_T, 0)
        self.used_NL[:, routing.layer].index_add_(0, step.question_T, used_T)

    @property
    def per_token(self) -> float:
        """Mean number of experts of a token in a layer; the prefix counts once."""
        n_tokens = int(self.tokens_N.sum()) + self.prefix_tokens
        n_used = int(self.used_NL.sum() + self.prefix_used_L.sum())
        return n_used / max(n_tokens * len(self.blocks), 1)
