"""Merged experts under the router that was there before: what both papers' own code runs.

That router chooses among all E experts, each of which is its group's; two of one group may be
chosen together. No checkpoint of layout stock can say so, and this is what it is held against.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertcut.edits.merge_groups import members_of
from expertcut.edits.plan import Edit
from expertcut.models.hooks import replaced_forward
from expertcut.models.moe_block import MoeBlock


@dataclass(frozen=True)
class Router:
    """A router and its bias on choosing, and at `place_E` which merged expert each expert is in."""

    module: nn.Module
    selection_E: Tensor | None
    place_E: Tensor


def unedited_routers(blocks: Sequence[MoeBlock], edits: Mapping[str, Edit]) -> dict[str, Router]:
    """Copies of the routers of a loaded, unedited model, by block name."""
    found = {}
    for block in blocks:
        place_E = torch.zeros(block.n_experts, dtype=torch.long)
        for place, members in enumerate(members_of(edits[block.name]).values()):
            place_E[list(members)] = place
        selection_E = block.selection_bias()
        kept = None if selection_E is None else selection_E.clone()
        found[block.name] = Router(copy.deepcopy(block.router), kept, place_E)
    return found


@contextmanager
def under(routers: Mapping[str, Router], blocks: Sequence[MoeBlock]) -> Iterator[None]:
    """The merged model runs with the unedited routers while the block runs."""
    with ExitStack() as stack:
        for block in blocks:
            forward = _routed(routers[block.name])
            stack.enter_context(replaced_forward(block.router, forward))
        yield


def _routed(router: Router) -> Callable[..., Any]:
    def route(x: Tensor, *biases: Tensor | None) -> Any:
        # Some families hand their router its bias on choosing with each call.
        own = [None if bias is None else router.selection_E for bias in biases]
        logits_TE, weights_TK, experts_TK = router.module(x, *own)
        return logits_TE, weights_TK, router.place_E.to(experts_TK.device)[experts_TK]

    return route
