"""Text by contrast of two runs of one model: as it routes, and by one weak expert a layer.

As `custom_generate/generate.py` beside `modeling_routed.py` in a folder, with the rule filled in,
this is what transformers (5.22 or later) runs for

    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True)

It needs nothing of expertcut. The next token is chosen by (1 + β)·log p − β·log p_weak among those
of at least a tenth of the largest p (SCMoE, arXiv:2405.14507). The weak run reads the whole prompt
too, with a cache of its own. Names of tensors end in their axes: B sequences, V vocabulary.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from .modeling_routed import RoutedRouter, fill_empty_slots

# As in config.json of layout routed.
EXPERT_ROUTING: dict[str, Any] = {}
BETA = 0.5
CUTOFF = 0.1
_NEVER = 1e4  # nats below all others: never drawn, and in their order where nothing else is left
_NOT_BY_TOKEN = ("assistant_model", "prompt_lookup_num_tokens", "penalty_alpha")


def generate(*args: Any, model: Any, **kwargs: Any) -> Any:
    """`model.generate`, whose next tokens are contrasted; beams are refused."""
    config = kwargs.get("generation_config") or model.generation_config

    def asked(name: str) -> Any:
        return getattr(config, name, None) if kwargs.get(name) is None else kwargs[name]

    given = [name for name in _NOT_BY_TOKEN if asked(name)]
    given += ["num_beams"] if (asked("num_beams") or 1) > 1 else []
    given += ["past_key_values"] if kwargs.get("past_key_values") is not None else []
    if given:
        raise ValueError(
            f"contrast reads whole prompts and writes token by token: leave out {given[0]}"
        )
    with contrasted_forward(model):
        # Of the class: a model that was loaded from this folder has the function above.
        return type(model).generate(model, *args, **kwargs)


@contextmanager
def contrasted_forward(model: Any) -> Iterator[None]:
    """Lets the forward pass of a model give the contrasted scores of the last token alone."""
    run, before, routers = model.forward, vars(model).get("forward"), weak_routers(model)
    weak_cache: Any = None
    is_first = True

    @wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal weak_cache, is_first
        if is_first:
            weak_cache, is_first = copy.deepcopy(kwargs.get("past_key_values")), False  # empty
        found = run(*args, **kwargs)
        with weakly_routed(routers):
            weak = run(*args, **{**kwargs, "past_key_values": weak_cache})
        weak_cache = getattr(weak, "past_key_values", None)
        found.logits = contrasted(found.logits[:, -1], weak.logits[:, -1])[:, None]
        return found

    model.forward = forward
    try:
        yield
    finally:
        _put_back(model, before)


def _put_back(module: Any, forward: Any) -> None:
    """The forward function that a module had of its own, None for that of its class."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def contrasted(strong_BV: Tensor, weak_BV: Tensor) -> Tensor:
    """(1 + β)·log p_strong − β·log p_weak of tokens that are not unlikely (B, V) float32."""
    strong_BV, weak_BV = (own_BV.float().log_softmax(dim=-1) for own_BV in (strong_BV, weak_BV))
    least_B1 = strong_BV.amax(dim=-1, keepdim=True) + math.log(CUTOFF)
    score_BV = (1 + BETA) * strong_BV - BETA * weak_BV
    is_unlikely_BV = strong_BV < least_B1
    lowest_B1 = score_BV.masked_fill(is_unlikely_BV, torch.inf).amin(dim=-1, keepdim=True)
    return torch.where(is_unlikely_BV, strong_BV - least_B1 + lowest_B1 - _NEVER, score_BV)


class WeakRouter(RoutedRouter):
    """Gives one expert for each token, behind a router that stays as it is."""

    def __init__(self, router: Any, layer: int, expert_routing: dict[str, Any]) -> None:
        super().__init__()
        self.router, self.layer, self.expert_routing = router, layer, expert_routing
        self.run, self.before = router.forward, vars(router).get("forward")

    def family_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the router gives."""
        return self.run(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (T, E), the sum of the gate weights (T, 1) and the expert (T, 1)."""
        logits_TE, weights_TK, experts_TK = super().forward(*args, **kwargs)
        return logits_TE, *fill_empty_slots(
            weights_TK[:, :1], experts_TK[:, :1], logits_TE.shape[1]
        )


def weak_routers(model: Any, expert_routing: dict[str, Any] = EXPERT_ROUTING) -> list[WeakRouter]:
    """One for each MoE layer."""
    routers = []
    blocks = [m for m in model.modules() if isinstance(getattr(m, "experts", None), nn.Module)]
    for layer, block in enumerate(blocks):
        (own,) = (m for m in block.children() if hasattr(m, "top_k") and m is not block.experts)
        routers.append(WeakRouter(own, layer, expert_routing))
    return routers


@contextmanager
def weakly_routed(routers: list[WeakRouter]) -> Iterator[None]:
    """Lets every MoE layer use the weak expert alone."""
    try:
        for weak in routers:
            weak.router.forward = weak.forward
        yield
    finally:
        for weak in routers:
            if "forward" in vars(weak.router):
                _put_back(weak.router, weak.before)
