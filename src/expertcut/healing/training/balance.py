"""The load-balancing loss, its loads counted over the global batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from expertcut.moe.contract import MoeBlock
from expertcut.moe.observers import Routing, observe_routers

Reduce = Callable[[Tensor], Tensor]  # the sum over all processes


class Balance:
    """Σ_e f_e · P_e · E, the mean over blocks: 1 where all experts serve equally often.

    f_e is the share of choices that expert e was, P_e its mean probability (Switch Transformer,
    arXiv:2101.03961, equations 4 to 6). Of a micro-batch of one subject nobody wants a balance: as
    in arXiv:2501.11873, f is counted over all processes and over the micro-batches of this step so
    far, while P, through which the gradient flows, is the micro-batch's own.
    """

    def __init__(self, blocks: Sequence[MoeBlock], reduce: Reduce) -> None:
        self.blocks = blocks
        self.reduce = reduce
        self.seen: dict[int, Routing] = {}
        self.begin()

    def begin(self) -> None:
        """A new optimizer step."""
        self.counts = {block.layer: torch.zeros(block.n_experts) for block in self.blocks}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps what routers decide in a forward pass."""
        self.seen = {}
        # Nothing is computed in the hook: under gradient checkpointing it would be part of what is
        # computed again.
        with observe_routers(self.blocks, lambda r: self.seen.update({r.layer: r})):
            yield

    def loss(self, mask_BS: Tensor) -> Tensor:
        """Of the pass that was watched, pads left out."""
        real_T = mask_BS.reshape(-1).bool()
        losses = [self._of(block, self.seen[block.layer], real_T) for block in self.blocks]
        self.seen = {}
        return torch.stack(losses).mean()

    def _of(self, block: MoeBlock, routing: Routing, real_T: Tensor) -> Tensor:
        alpha_TE = block.alpha(routing.logits_TE[real_T])
        mean_E = (alpha_TE / alpha_TE.sum(dim=-1, keepdim=True)).mean(dim=0)
        chosen = routing.experts_TK[real_T].flatten()
        own_E = torch.bincount(chosen, minlength=block.n_experts).float()
        total_E = self.counts[block.layer].to(own_E.device) + self.reduce(own_E)
        self.counts[block.layer] = total_E
        return block.n_experts * (total_E / total_E.sum() * mean_E).sum()
