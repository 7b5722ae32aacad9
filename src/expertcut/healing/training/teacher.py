"""What the uncut model would say: asked while the other is trained, or once before."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from expertcut.healing.training.objectives import Likeliest, likeliest
from expertcut.moe.loading import MoeModel

Batch = dict[str, Tensor]


class Teacher(Protocol):
    """Gives its likeliest tokens at the positions of a batch that are trained on."""

    def __call__(self, batch: Batch, at_BS: Tensor) -> Likeliest:
        """`at_BS` says where, row by row."""


@dataclass(frozen=True)
class Live:
    """A model beside the one that is trained."""

    moe: MoeModel
    n_likeliest: int

    @torch.no_grad()
    def __call__(self, batch: Batch, at_BS: Tensor) -> Likeliest:
        """One forward pass."""
        logits_BSV = self.moe.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        return likeliest(logits_BSV[at_BS], self.n_likeliest)
