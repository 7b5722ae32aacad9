"""Random controls of routing rules: some of a token's K experts are left out at random."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from expertcut.models.hooks import Routed, own_forward, registered, replaced_forward
from expertcut.models.modeling_routed import Tokens, kept
from expertcut.models.moe_block import MoeBlock
from expertcut.scoring.passes import OnPass
from expertcut.scoring.rerouting import Rerouting, gate_of, rerouted


@contextmanager
def skipping_at_random(
    blocks: Sequence[MoeBlock], routing: Rerouting, seed: int, share: float | None = None
) -> Iterator[OnPass]:
    """Leaves random experts out of each token's K; the same with equal seeds and passes.

    As many stay as the rule keeps, of each token and layer; at most K. With a `share` all experts
    but one are left out with this probability, whatever the rule.
    """
    plain = {block.layer: own_forward(block.router) for block in blocks}
    with rerouted(blocks, routing) as begin:
        changes = []
        for block in blocks:
            generator = torch.Generator().manual_seed(seed * len(blocks) + block.layer)
            forwards = plain[block.layer], own_forward(block.router)
            run = partial(_skipped, block, *forwards, routing, generator, share)
            changes.append(replaced_forward(block.router, run))
        with registered(changes):
            yield begin


def _skipped(
    block: MoeBlock,
    plain: Callable[..., Routed],
    ruled: Callable[..., Routed],
    routing: Rerouting,
    generator: torch.Generator,
    share: float | None,
    *args: Any,
    **kwargs: Any,
) -> Routed:
    logits_TE, weights_TK, experts_TK = plain(*args, **kwargs)
    n_tokens, top_k = experts_TK.shape
    if share is None:
        n_T = (ruled(*args, **kwargs)[2] < block.n_experts).sum(dim=1).clamp(max=top_k)
    else:
        stays_TX = torch.rand(n_tokens, top_k - 1, generator=generator) >= share
        n_T = 1 + stays_TX.sum(dim=1)
    keys_TK = torch.rand(n_tokens, top_k, generator=generator)
    is_kept_TK = keys_TK.argsort(dim=1).argsort(dim=1) < n_T.cpu()[:, None]
    score_TE = block.selection_scores(logits_TE)
    tokens = Tokens(gate_of(block), logits_TE, score_TE, weights_TK, experts_TK)
    chosen = kept(tokens, is_kept_TK.to(experts_TK.device), routing.rule.options)
    return (logits_TE, *chosen)
