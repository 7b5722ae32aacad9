"""Contrast of two runs of one model: as it routes, and with weak experts (SCMoE).

Unchosen Experts Can Contribute Too, arXiv:2405.14507.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expertcut.scoring.passes import Run

CUTOFF = 0.1
"""Tokens of at least this share of the largest probability are contrasted."""


@dataclass(frozen=True)
class Contrast:
    """How much the weak run counts against the model as it is; `weak` makes it run so."""

    beta: float
    weak: Callable[[], AbstractContextManager[None]]

    def weak_logprobs(self, run: Run) -> Tensor:
        """Log p (N, V) of the weak run over the same chunk, with a prefix cache of its own."""
        with self.weak():
            parts = [
                (done.questions, logits_NV.float().log_softmax(dim=-1))
                for done, logits_NV in replace(run).passes()
            ]
        order_N = torch.tensor([q for questions, _ in parts for q in questions]).argsort()
        logprob_NV = torch.cat([own_NV for _, own_NV in parts])
        return logprob_NV[order_N.to(logprob_NV.device)]


def contrasted(strong_NV: Tensor, weak_NV: Tensor, beta: float) -> Tensor:
    """(1 + β)·log p_strong − β·log p_weak of tokens that are not unlikely, made to log p (N, V).

    In the definition unlikely tokens are −∞. Here they keep log p_strong, lowered where needed by
    one number for all of them, so that they lie below every contrasted token: choices then have an
    order where all are unlikely, and every number is finite. All are divided by their sum, which
    changes no order. β = 0 changes no bit.
    """
    if beta == 0:
        return strong_NV
    cutoff_N1 = strong_NV.amax(dim=1, keepdim=True) + math.log(CUTOFF)
    is_unlikely_NV = strong_NV < cutoff_N1
    score_NV = (1 + beta) * strong_NV - beta * weak_NV
    least_N1 = score_NV.masked_fill(is_unlikely_NV, torch.inf).amin(dim=1, keepdim=True)
    lowered_NV = strong_NV + (least_N1 - cutoff_N1).clamp(max=0)
    return torch.where(is_unlikely_NV, lowered_NV, score_NV).log_softmax(dim=-1)
