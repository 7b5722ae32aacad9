"""Routing rules in a running model, and the experts that its tokens use."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertcut.errors import ContractError
from expertcut.models.devices import runs_on
from expertcut.models.gate_laws import routing_faults
from expertcut.models.hooks import (
    Forward,
    Routed,
    Routing,
    Scope,
    observe_routers,
    own_forward,
    registered,
    replaced_forward,
    route,
)
from expertcut.models.kernels import BY_EXPERT
from expertcut.models.modeling_routed import RULE_FUNCTIONS, Gate, Tokens, fill_empty_slots, mixed
from expertcut.models.moe_block import MoeBlock
from expertcut.models.routing_rule import ErrorCoefficients, RoutingRule
from expertcut.scoring.contrast import Contrast
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import Pass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rerouting:
    """A rule with its thresholds by layer; other layers keep their routing."""

    rule: RoutingRule
    at_by_layer: Mapping[int, float]
    fit_by_layer: Mapping[int, ErrorCoefficients] = field(default_factory=dict)
    beta: float = 0.0  # contrast: how much its weak run counts

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The thresholds of all layers."""
        return tuple(self.at_by_layer.values())

    def n_columns(self, top_k: int) -> int:
        """Places per token (M) that each router gives."""
        return self.rule.n_columns(top_k, self.thresholds)


class PassContext:
    """What rules must know of the current pass; call it before each, as the engine's `OnPass`."""

    def __init__(self, rule: RoutingRule) -> None:
        self.rule = rule
        self.is_on = True  # else routers choose as if there were no rule
        self.key_T: Tensor | None = None
        self.prefix_sum = torch.zeros((), dtype=torch.int64)
        self.attention: dict[int, Tensor] = {}  # by layer: mean over heads (T, T)

    def __call__(self, step: Pass) -> None:
        """Begins a pass."""
        if self.rule.needs_prompt and len(step.questions) != 1:
            raise ContractError(
                f"rule {self.rule.rule} needs whole prompts: score them one at a time"
            )
        self.attention.clear()
        if self.rule.is_random:
            sum_T = _prefix_sums(step, self.prefix_sum)
            if step.is_prefix:
                self.prefix_sum = sum_T[-1]
            is_by_prompt = self.rule.rule == "random" and self.rule.level == "prompt"
            self.key_T = mixed(sum_T[-1].expand(len(sum_T)) if is_by_prompt else sum_T)

    @contextmanager
    def switched(self, is_on: bool) -> Iterator[None]:
        """Turns the rule on or off."""
        before, self.is_on = self.is_on, is_on
        try:
            yield
        finally:
            self.is_on = before

    def keys(self, layer: int, n_tokens: int) -> Tensor | None:
        """The keys of the tokens in a layer."""
        if not self.rule.is_random:
            return None
        if self.key_T is None or len(self.key_T) != n_tokens:
            raise ContractError(f"rule {self.rule.rule} was not told of a pass, so it has no keys")
        return mixed(self.key_T + layer)

    def attention_in(self, block: MoeBlock, n_tokens: int) -> Tensor | None:
        """The attention in a block's layer."""
        if not self.rule.kind.needs_attention:
            return None
        attention_TT = self.attention.get(block.layer)
        if attention_TT is None or len(attention_TT) != n_tokens:
            raise ContractError(
                f"{block.name}: its layer gives no attention weights of one whole prompt, which "
                f"rule {self.rule.rule} ranks tokens by: take another rule there"
            )
        return attention_TT


def _prefix_sums(step: Pass, before: Tensor) -> Tensor:
    """By token the sum of hashes of its prompt's tokens up to it; `before` is that of the prefix.

    So tokens of different prompts have different keys, and packs do not matter.
    """
    ids_BT = step.input_ids
    position_T = torch.arange(ids_BT.shape[1])
    positions_BT = position_T if step.positions is None else step.positions
    sum_BT = mixed(mixed(ids_BT) + positions_BT).cumsum(dim=1)
    if step.positions is None:  # one prompt in each row
        return sum_BT.reshape(-1)
    sum_T, length_N = sum_BT[0], step.question_T.unique_consecutive(return_counts=True)[1]
    first_N = length_N.cumsum(dim=0) - length_N
    earlier_N = F.pad(sum_T, (1, 0))[first_N]
    own_T = sum_T - earlier_N.repeat_interleave(length_N)
    return own_T + before if int(step.positions[0, 0]) else own_T


@contextmanager
def rerouted(
    blocks: Sequence[MoeBlock], routing: Rerouting, model: Any = None
) -> Iterator[PassContext]:
    """Applies the rule behind the routers, verified on the probe first.

    `model` is needed by rules that read attention. Biases on logits act before the rule; a factor
    on gate weights that `tilted` sets first does too.
    """
    passes = PassContext(routing.rule)
    by_layer = {block.layer: block for block in blocks if block.layer in routing.at_by_layer}
    with ExitStack() as stack:
        for layer, block in by_layer.items():
            routing.rule.check_threshold(routing.at_by_layer[layer])
            routing.rule.check(block, routing.at_by_layer[layer])
            _apply(stack, block, routing, passes)
        if routing.rule.kind.needs_attention:
            assert model is not None, "rules that read attention need the model"
            stack.enter_context(_eager(model))
            stack.enter_context(registered(_attention_hooks(model, by_layer, passes)))
            _check_attention(model, passes)
        yield passes


@contextmanager
def rerouted_engine(engine: Engine, routing: Rerouting) -> Iterator[PassContext]:
    """`rerouted` for an engine, which scores one prompt at a time if the rule needs it.

    Of rule contrast the engine does two runs of each chunk, and only the weak one has the rule.
    """
    before = engine.is_trusted
    if routing.rule.needs_prompt:
        name = routing.rule.rule
        logger.info("rule %s scores one prompt at a time, which is several times slower", name)
        engine.is_trusted = False
    try:
        with rerouted(engine.moe.blocks, routing, engine.moe.model) as passes:
            if routing.rule.rule != "contrast":
                yield passes
                return
            engine.contrast = Contrast(routing.beta, partial(passes.switched, True))
            with passes.switched(False):
                yield passes
    finally:
        engine.is_trusted, engine.contrast = before, None


def gate_of(block: MoeBlock) -> Gate:
    """How a block makes gate weights, as rules need it."""
    if block.weights is None:  # such a rule only drops, so the weights stay as they are
        return Gate(block.scoring)
    factor = float(f"{block.weights.factor:.6g}")  # as measured
    return Gate(block.scoring, block.weights.is_renormalised, factor)


def tokens_of(block: MoeBlock, routing: Routing, fit_KK: Tensor | None = None) -> Tokens:
    """What a router gave, as rules take it; `fit_KK` is for rule fitted."""
    return Tokens(
        gate_of(block),
        routing.logits_TE,
        block.selection_scores(routing.logits_TE),
        routing.weights_TK,
        routing.experts_TK,
        input_TD=routing.input_TD,
        fit_KK=fit_KK,
    )


def _apply(stack: ExitStack, block: MoeBlock, routing: Rerouting, passes: PassContext) -> None:
    before = route(block.router, block.call)
    stack.enter_context(replaced_forward(block.router, _forward(block, routing, passes)))
    stack.enter_context(_allowing_nobody(block))
    n_tokens = len(before[0])
    passes.attention[block.layer] = torch.eye(n_tokens)
    passes.key_T = torch.arange(n_tokens) if routing.rule.is_random else None
    after = route(block.router, block.call)
    passes.key_T = None
    passes.attention.clear()
    if fault := next(_faults(block, before, after, routing.n_columns(block.top_k)), None):
        raise ContractError(f"{block.name}: {fault}, so no result with this rule would be true")


def _forward(block: MoeBlock, routing: Rerouting, passes: PassContext) -> Forward:
    forward, layer = own_forward(block.router), block.layer
    function, options = RULE_FUNCTIONS[routing.rule.rule], routing.rule.options
    at, fit = routing.at_by_layer[layer], routing.fit_by_layer.get(layer)
    fit_KK = None if fit is None else torch.tensor(fit, dtype=torch.float64)

    def run(*args: Any, **kwargs: Any) -> Routed:
        routed: Routed = forward(*args, **kwargs)
        if not passes.is_on:
            return routed
        logits_TE = routed[0]
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        key_T = passes.keys(layer, len(logits_TE))
        seen = Routing(layer, x.reshape(-1, x.shape[-1]), *routed)
        given = replace(
            tokens_of(block, seen, fit_KK),
            attention_TT=passes.attention_in(block, len(logits_TE)),
            key_T=None if key_T is None else key_T.to(logits_TE.device),
        )
        return (logits_TE, *function(given, at, options))

    return run


@contextmanager
def _allowing_nobody(block: MoeBlock) -> Iterator[None]:
    """Lets the experts take the id of nobody, as our own loop does.

    Kernels of transformers know it from expert parallelism. For its loops, some of which allow no
    further id, and layout exact it is an expert that the token does not use, with weight 0.
    """
    experts: Any = block.experts
    kind = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    if kind == BY_EXPERT and not hasattr(experts, "places"):
        yield
    elif kind in (BY_EXPERT, "eager", None) or not hasattr(experts, "_is_expert_parallel"):
        with replaced_forward(experts, _idle(block)):
            yield
    else:
        before, experts._is_expert_parallel = experts._is_expert_parallel, True
        try:
            yield
        finally:
            experts._is_expert_parallel = before


def _idle(block: MoeBlock) -> Forward:
    forward = own_forward(block.experts)

    def run(x_TD: Tensor, experts_TM: Tensor, weights_TM: Tensor) -> Any:
        weights_TM, experts_TM = fill_empty_slots(weights_TM, experts_TM, block.n_experts)
        return forward(x_TD, experts_TM, weights_TM)

    return run


def _faults(block: MoeBlock, before: Routed, after: Routed, most: int) -> Iterator[str]:
    logits_TE, weights_TM, experts_TM = after
    if not torch.equal(logits_TE, before[0]):
        yield "its logits change"
    is_wide = block.top_k <= experts_TM.shape[1] <= most
    if not is_wide or weights_TM.shape != experts_TM.shape or len(experts_TM) != len(before[2]):
        yield f"its router gives {tuple(experts_TM.shape)} choices, at most {most} a token wanted"
    yield from routing_faults(after, block.n_experts)


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Attention that gives its weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attention_hooks(
    model: Any, by_layer: Mapping[int, MoeBlock], passes: PassContext
) -> Iterator[Any]:
    """Hooks on what runs beside the block in its decoder layer."""

    def see(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
        parts = output[1:] if isinstance(output, tuple) else ()
        for part in parts:
            if isinstance(part, Tensor) and part.ndim == 4 and part.shape[-1] == part.shape[-2]:
                passes.attention[layer] = part[0].float().mean(dim=0)

    for layer, block in by_layer.items():
        for module in model.get_submodule(block.name.rpartition(".")[0]).children():
            if module is not block.module:
                yield module.register_forward_hook(partial(see, layer))


@torch.inference_mode()
def _check_attention(model: Any, passes: PassContext) -> None:
    """Runs some tokens: a layer without attention weights is refused by its router."""
    ids_T = torch.arange(8)
    passes.key_T = ids_T if passes.rule.is_random else None
    model(input_ids=ids_T.to(runs_on(model.get_input_embeddings()))[None], use_cache=False)
    passes.key_T = None
    passes.attention.clear()


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
