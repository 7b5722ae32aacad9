"""The load-balancing loss, its loads counted over the global batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from expertcut.models.hooks import Routing, observe_routers
from expertcut.models.moe_block import MoeBlock

Reduce = Callable[[Tensor], Tensor]  # the sum over all processes


class Balance:
    """Σ_e f_e · P_e · E, the mean over blocks: 1 where all experts serve equally often.

    f_e is the share of choices that expert e was, P_e its mean probability (Switch Transformer,
    arXiv:2101.03961, equations 4 to 6), both over all tokens of a step: of a micro-batch of one
    subject nobody wants a balance (arXiv:2501.11873). So f is counted before, in passes of their
    own where a step has several, and a micro-batch's loss is its tokens' share of the whole.
    """

    def __init__(self, blocks: Sequence[MoeBlock], reduce: Reduce) -> None:
        self.blocks = blocks
        self.reduce = reduce
        self.seen: dict[int, Routing] = {}
        self.begin()

    def begin(self) -> None:
        """A new optimizer step."""
        self.own: dict[int, Tensor] = {}
        self.counts: dict[int, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps what routers decide in a forward pass."""
        self.seen = {}
        # Nothing is computed in the hook: under gradient checkpointing it would be part of what is
        # computed again.
        with observe_routers(self.blocks, lambda r: self.seen.update({r.layer: r})):
            yield

    def count(self, mask_BS: Tensor) -> None:
        """Adds the choices of the pass that was watched, pads left out."""
        real_T = mask_BS.reshape(-1).bool()
        for block in self.blocks:
            chosen = self.seen[block.layer].experts_TK[real_T].flatten()
            own_E = torch.bincount(chosen, minlength=block.n_experts).float()
            self.own[block.layer] = self.own.get(block.layer, 0) + own_E

    def share(self) -> None:
        """Adds up what all processes counted."""
        self.counts = {layer: self.reduce(own_E) for layer, own_E in self.own.items()}

    def loss(self, mask_BS: Tensor) -> Tensor:
        """Of the pass that was watched: its part of the step's loss.

        Where nothing was counted before, the pass is the whole step.
        """
        if not self.counts:
            self.count(mask_BS)
            self.share()
        real_T = mask_BS.reshape(-1).bool()
        losses = [self._of(block, self.seen[block.layer], real_T) for block in self.blocks]
        self.seen = {}
        return torch.stack(losses).mean()

    def _of(self, block: MoeBlock, routing: Routing, real_T: Tensor) -> Tensor:
        alpha_TE = block.alpha(routing.logits_TE[real_T])
        sum_E = (alpha_TE / alpha_TE.sum(dim=-1, keepdim=True)).sum(dim=0)
        total_E = self.counts[block.layer]
        n_choices = total_E.sum()
        mean_E = sum_E * routing.experts_TK.shape[1] / n_choices
        return block.n_experts * (total_E / n_choices * mean_E).sum()
