"""Whether a checkpoint that carries biases in gate rows chooses the experts of the exact bias."""

from dataclasses import dataclass

import torch
from torch import Tensor

from expertcut.checkpoints.answering import Answered, Chosen
from expertcut.edits.plan import Draft
from expertcut.models.load import MoeModel


@dataclass(frozen=True)
class Agreement:
    """One layer: the share of positions that chose the very same experts, and of experts in common.

    Over answer positions, and over every distinct token.
    """

    layer: int
    same_answer: float
    overlap_answer: float
    same_all: float
    overlap_all: float


def agreements(
    reference: Answered, edited: Answered, draft: Draft, moe: MoeModel
) -> list[Agreement]:
    """Per layer with a bias, the checkpoint against the plan in the unedited model at run time.

    Both were asked the same questions in the same passes.
    """
    keeps = {b.layer: torch.tensor(draft.edits[b.name].keep) for b in moe.blocks}
    return [
        _agreement(layer, passes, edited.chosen[layer], keeps[layer])
        for layer, passes in reference.chosen.items()
    ]


def _agreement(layer: int, a: list[Chosen], b: list[Chosen], keep: Tensor) -> Agreement:
    """`keep` gives the number in the unedited model of each row of the edited one."""
    is_answer_T = torch.cat([chosen.is_answer_T for chosen in a])
    overlap_T = torch.cat(
        [_overlap(x.experts_TK, keep[y.experts_TK.long()]) for x, y in zip(a, b, strict=True)]
    )
    answer_N = overlap_T[is_answer_T]
    return Agreement(
        layer=layer,
        same_answer=float((answer_N == 1).double().mean()),
        overlap_answer=float(answer_N.mean()),
        same_all=float((overlap_T == 1).double().mean()),
        overlap_all=float(overlap_T.mean()),
    )


def _overlap(a_TK: Tensor, b_TK: Tensor) -> Tensor:
    """The share of a token's experts that are chosen in both, (T,) float64."""
    is_in_both_TK = (a_TK[:, :, None] == b_TK[:, None, :]).any(dim=2)
    return is_in_both_TK.double().mean(dim=1)
