"""What is made small: one number per position that is trained on, and which positions those are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expertcut.healing.data.rows import Row

IGNORED = -100  # the label of positions that are not trained on: transformers' own number


@dataclass(frozen=True)
class Likeliest:
    """A teacher's likeliest tokens at M positions: ids (M, R) and log p (M, R)."""

    ids_MR: Tensor
    logprob_MR: Tensor

    def __getitem__(self, at: slice) -> "Likeliest":
        """At some of the positions."""
        return Likeliest(self.ids_MR[at], self.logprob_MR[at])


def at_answers(row: Row) -> Sequence[int]:
    """The positions right before the letters of answers."""
    return row.answers


def everywhere(row: Row) -> Sequence[int]:
    """All positions but the last, which nothing follows."""
    return range(len(row.ids) - 1)


def cross_entropy(logits_MV: Tensor, next_M: Tensor, teacher: Likeliest | None = None) -> Tensor:
    """−log p of the token that follows, per position (M)."""
    return F.cross_entropy(logits_MV.float(), next_M, reduction="none")


def distillation(logits_MV: Tensor, next_M: Tensor, teacher: Likeliest | None = None) -> Tensor:
    """KL(teacher ‖ student) per position (M): how far the one is from what the other would say.

    All tokens beyond the teacher's R likeliest count as one, so that this is the whole divergence
    where R is V and else a lower bound of it. Hinton, Vinyals and Dean, arXiv:1503.02531, at
    temperature 1.
    """
    assert teacher is not None, "a teacher must be at hand"
    logprob_MV = logits_MV.float().log_softmax(dim=-1)
    own_MR, their_MR = logprob_MV.gather(1, teacher.ids_MR), teacher.logprob_MR.float()
    loss_M = (their_MR.exp() * (their_MR - own_MR)).sum(dim=-1)
    if teacher.ids_MR.shape[1] < logits_MV.shape[1]:
        their_M, rest_M = _log_rest(their_MR), _log_rest(own_MR)
        loss_M = loss_M + their_M.exp() * (their_M - rest_M)
    return loss_M


def likeliest(logits_MV: Tensor, n: int) -> Likeliest:
    """The R = min(n, V) likeliest tokens and their log p."""
    logprob_MV = logits_MV.float().log_softmax(dim=-1)
    found = logprob_MV.topk(min(n, logits_MV.shape[1]), dim=-1)
    return Likeliest(found.indices, found.values)


def _log_rest(logprob_MR: Tensor) -> Tensor:
    """Log of the probability of all others (M); what rounding leaves of a whole is kept above 0."""
    rest_M = -torch.expm1(logprob_MR.logsumexp(dim=-1).clamp(max=-1e-7))
    return rest_M.log()


Loss = Callable[[Tensor, Tensor, Likeliest | None], Tensor]
Where = Callable[[Row], Sequence[int]]


@dataclass(frozen=True)
class Objective:
    """A loss, the positions that it is taken at, and whether it needs a teacher."""

    name: str
    loss: Loss
    where: Where
    needs_teacher: bool = False


OBJECTIVES = {
    found.name: found
    for found in (
        Objective("distill", distillation, everywhere, needs_teacher=True),
        Objective("answer", cross_entropy, at_answers),
        Objective("lm", cross_entropy, everywhere),
    )
}
