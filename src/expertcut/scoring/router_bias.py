"""Biases on router logits and factors on gate weights of a running model."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from expertcut.errors import ContractError
from expertcut.models import hooks
from expertcut.models.hooks import Routed, biased_forward, own_forward, replaced_forward, route
from expertcut.models.moe_block import MoeBlock
from expertcut.scoring.packing import Pass

ApplyAt = Literal["answer", "all"]  # the tokens that a bias acts on


@dataclass(frozen=True)
class Tilts:
    """Changes of routers, by layer."""

    # (E,), added to logits; −inf forbids an expert.
    bias_by_layer: Mapping[int, Tensor] = field(default_factory=dict)
    # (E,), factors on gate weights after top-k and renormalisation: routing is unchanged.
    scale_by_layer: Mapping[int, Tensor] = field(default_factory=dict)
    apply_at: ApplyAt = "all"  # of finite biases


_Answers = deque[Tensor]  # the answer positions (N,) of the current pass, if it has begun


@contextmanager
def tilted(blocks: Sequence[MoeBlock], tilts: Tilts) -> Iterator[Callable[[Pass], None]]:
    """Changes routers, verified on the probe first; yields the engine's `OnPass` for `answer`."""
    answers = _Answers(maxlen=1)
    at = answers if tilts.apply_at == "answer" else None
    with ExitStack() as stack:
        for block in blocks:
            if (bias_E := tilts.bias_by_layer.get(block.layer)) is not None:
                _add_bias(stack, block, bias_E, at)
            if (scale_E := tilts.scale_by_layer.get(block.layer)) is not None:
                _scale(stack, block, scale_E, at)
        yield lambda step: answers.append(step.answers_N)


def _add_bias(stack: ExitStack, block: MoeBlock, bias_E: Tensor, answers: _Answers | None) -> None:
    if block.is_hashed:
        raise ContractError(
            f"{block.name} chooses its experts by a table of token ids: biases and masks on "
            "its router change no choice, so none of its experts can be cut or boosted"
        )

    def rows() -> Tensor | None:
        assert answers is None or answers, "tell what `tilted` gives of each pass"
        return answers[0] if answers else None

    before_TE, *_ = route(block.router, block.call)
    stack.enter_context(replaced_forward(block.router, biased_forward(block, bias_E, rows)))
    after_TE, *_ = _probe(block, answers)
    bias_TE = bias_E.expand(len(before_TE), -1)
    if answers is not None:  # the last token of the probe stands for the answer
        is_there_T1 = torch.arange(len(bias_TE))[:, None] == len(bias_TE) - 1
        bias_TE = bias_TE.where(is_there_T1 | bias_TE.isneginf(), 0.0)
    if not hooks.moved_by(before_TE, after_TE, bias_TE):
        raise _untrue(block, "a bias on its router does not move the logits by just that much")


def _scale(stack: ExitStack, block: MoeBlock, scale_E: Tensor, answers: _Answers | None) -> None:
    forward, before = own_forward(block.router), _probe(block, answers)
    factors_E = F.pad(scale_E.double(), (0, 1), value=1.0)  # also of nobody

    def scaled(*args: Any, **kwargs: Any) -> Routed:
        logits_TE, weights_TK, experts_TK = forward(*args, **kwargs)
        factors_TK = factors_E.to(experts_TK.device)[experts_TK]
        return logits_TE, (weights_TK * factors_TK).to(weights_TK.dtype), experts_TK

    stack.enter_context(replaced_forward(block.router, scaled))
    logits_TE, weights_TK, experts_TK = _probe(block, answers)
    factors_TK = factors_E.to(experts_TK.device)[experts_TK]
    wanted_TK = (before[1].double() * factors_TK).to(weights_TK.dtype)
    is_same = torch.equal(experts_TK, before[2]) and torch.equal(logits_TE, before[0])
    if not is_same or not torch.allclose(weights_TK, wanted_TK):
        raise _untrue(block, "a factor on its gate weights does not act on them")


def _untrue(block: MoeBlock, fault: str) -> ContractError:
    return ContractError(f"{block.name}: {fault}, so no result with it would be true")


def _probe(block: MoeBlock, answers: _Answers | None) -> Routed:
    if answers is None:
        return route(block.router, block.call)
    x = next(a for a in (*block.call.args, *block.call.kwargs.values()) if isinstance(a, Tensor))
    answers.append(torch.tensor([x.numel() // x.shape[-1] - 1]))
    try:
        return route(block.router, block.call)
    finally:
        answers.clear()
