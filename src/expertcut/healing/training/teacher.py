"""What the uncut model would say: asked while the other is trained, or once before."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from expertcut.errors import ModelError
from expertcut.healing.training.batches import Batch, cut_rows, halves
from expertcut.healing.training.objectives import Likeliest, likeliest
from expertcut.healing.training.projection import Projection
from expertcut.models.load import MoeModel
from expertcut.models.memory import give_back, is_out_of_memory

_PASS_TOKENS = 4096  # of one forward pass: more are not faster


class Teacher(Protocol):
    """Gives its likeliest tokens at the positions of a batch that are trained on."""

    def __call__(self, batch: Batch, at_BS: Tensor) -> Likeliest:
        """`at_BS` says where, row by row."""


@dataclass(frozen=True)
class Live:
    """A model beside the one that is trained."""

    moe: MoeModel
    n_likeliest: int

    @cached_property
    def projection(self) -> Projection:
        """Its hidden states, and logits of some of them."""
        return Projection(self.moe)

    @torch.no_grad()
    def __call__(self, batch: Batch, at_BS: Tensor) -> Likeliest:
        """Forward passes of some rows each.

        Raises:
            ModelError: there is not enough memory for one row.
        """
        whole = {**batch, "at_BS": at_BS}
        n_rows = max(1, _PASS_TOKENS // at_BS.shape[1])
        return _joined([self._of(piece) for piece in cut_rows(whole, n_rows)])

    def _of(self, batch: Batch) -> Likeliest:
        """One pass, or several where memory ends."""
        try:
            return self._pass(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if len(batch["at_BS"]) == 1:
            raise ModelError(
                f"{self.moe.source.id}: not enough memory for the teacher's pass over one row of "
                f"{batch['at_BS'].shape[1]} tokens: free memory, or give a smaller --max-tokens"
            )
        give_back()
        return _joined([self._of(half) for half in halves(batch)])

    def _pass(self, batch: Batch) -> Likeliest:
        model, projection = self.moe.model, self.projection
        hidden_BSH = projection.hidden(model, batch["input_ids"], batch["attention_mask"])
        hidden_MH = hidden_BSH[batch["at_BS"]]
        return _joined(
            [
                likeliest(projection.logits(model, hidden_MH[at]), self.n_likeliest)
                for at in projection.chunks(len(hidden_MH))
            ]
        )


def _joined(parts: list[Likeliest]) -> Likeliest:
    ids, logprobs = zip(*((part.ids_MR, part.logprob_MR) for part in parts), strict=True)
    return Likeliest(torch.cat(ids), torch.cat(logprobs))
