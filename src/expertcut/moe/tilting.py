"""Tilting routers while a model runs: biases on logits, factors on gate weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from expertcut.moe.observers import own_forward, replaced_forward

if TYPE_CHECKING:
    from expertcut.moe.contract import MoeBlock
    from expertcut.moe.packing import Pass

ApplyAt = Literal["answer", "all"]  # at which tokens a bias acts


@dataclass(frozen=True)
class Tilts:
    """What is done to routers, by layer; layers that are not named stay as they are.

    `bias_by_layer` (E,) is added to logits, −inf forbids an expert altogether. `scale_by_layer`
    (E,) multiplies gate weights after top-k and any renormalisation: who is chosen stays. With
    `apply_at` `answer` a finite bias acts at answer positions only; all else acts everywhere.
    """

    bias_by_layer: Mapping[int, Tensor] = field(default_factory=dict)
    scale_by_layer: Mapping[int, Tensor] = field(default_factory=dict)
    apply_at: ApplyAt = "all"


@contextmanager
def tilted(blocks: Sequence[MoeBlock], tilts: Tilts) -> Iterator[Callable[[Pass], None]]:
    """Tilts routers while the block runs, and gives what must be told of each pass before it.

    It is an `OnPass` of the engine; with `apply_at` `all` it need not be told. Where a selection
    bias exists, masking logits alone would still let masked experts be chosen, so −inf is set
    there as well.
    """
    answers = _Answers()
    with ExitStack() as stack:
        for block in blocks:
            bias_E = tilts.bias_by_layer.get(block.layer)
            if bias_E is not None:
                is_at_answers = tilts.apply_at == "answer"
                route = _biased(block, bias_E, answers if is_at_answers else None)
                stack.enter_context(replaced_forward(block.router, route))
                stack.enter_context(_forbidden(block.selection_bias(), bias_E))
            if block.layer in tilts.scale_by_layer:
                route = _scaled(block, tilts.scale_by_layer[block.layer])
                stack.enter_context(replaced_forward(block.router, route))
        yield answers.begin


class _Answers:
    """The answer positions of the current pass."""

    positions_N: Tensor | None = None

    def begin(self, step: Pass) -> None:
        """Before each forward pass."""
        self.positions_N = step.answers_N


class _AddToLogits(TorchFunctionMode):
    """Adds a bias to the one product inside a router's forward whose result has width E.

    With `rows_N` the bias goes to these rows only, but for −inf, which goes everywhere.
    """

    def __init__(self, bias_E: Tensor, rows_N: Tensor | None) -> None:
        super().__init__()
        self.bias_E = bias_E
        self.rows_N = rows_N

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and result.shape[-1] == len(self.bias_E):
            return self._added(result)
        return result

    def _added(self, logits: Tensor) -> Tensor:
        bias_E = self.bias_E.to(logits)
        if self.rows_N is None:
            return logits + bias_E
        is_forbidden_E = bias_E.isneginf()
        rows_N = self.rows_N.to(logits.device)
        added_NE = bias_E.masked_fill(is_forbidden_E, 0).expand(len(rows_N), -1)
        flat_TE = logits.reshape(-1, len(bias_E)).index_add(0, rows_N, added_NE)
        return flat_TE.masked_fill(is_forbidden_E, -torch.inf).view_as(logits)


def _biased(block: MoeBlock, bias_E: Tensor, answers: _Answers | None) -> Callable[..., Any]:
    forward = own_forward(block.router)

    def route(*args: Any, **kwargs: Any) -> Any:
        rows_N = None
        if answers is not None:
            assert answers.positions_N is not None, "tell what `tilted` gives of each pass"
            rows_N = answers.positions_N
        with _AddToLogits(bias_E, rows_N):
            return forward(*args, **kwargs)

    return route


def _scaled(block: MoeBlock, scale_E: Tensor) -> Callable[..., Any]:
    forward = own_forward(block.router)

    def route(*args: Any, **kwargs: Any) -> Any:
        logits_TE, weights_TK, experts_TK = forward(*args, **kwargs)
        factors_TK = scale_E.double().to(experts_TK.device)[experts_TK]
        return logits_TE, (weights_TK * factors_TK).to(weights_TK.dtype), experts_TK

    return route


@contextmanager
def _forbidden(selection_E: Tensor | None, bias_E: Tensor) -> Iterator[None]:
    if selection_E is None:
        yield
        return
    before = selection_E.clone()
    selection_E[bias_E.isneginf().to(selection_E.device)] = -torch.inf
    try:
        yield
    finally:
        selection_E.copy_(before)
