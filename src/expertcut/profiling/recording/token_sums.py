"""Sums over every token, expert by expert, and the largest value that each gave."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertcut.moe.observers import ExpertCall, Routing

PARTS = ("prefix", "question")
NAMES = ("tokens", "weight", "norm", "weighted_norm")


@dataclass
class _Layer:
    """One block's calls of its experts, as small as they can be kept until all have run.

    `extremes` are each call's least and greatest output value.
    """

    experts: list[int] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    extremes: list[Tensor] = field(default_factory=list)


class TokenSums:
    """Kept apart for the shared prefix, which ran once for the whole chunk, and for the rest."""

    def __init__(self, n_layers: int, n_experts: int, device: torch.device) -> None:
        shape = (len(NAMES), len(PARTS), n_layers, n_experts)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self.largest = torch.zeros(shape[1:], device=device)

    def begin(self, part: int) -> None:
        """Says whose tokens come, as a place in `PARTS`."""
        self.part = part
        self.pending = _Layer()

    def route(self, routing: Routing, valid_T: Tensor | None) -> None:
        """Adds one router's choices."""
        experts_TK, weights_TK = routing.experts_TK, routing.weights_TK.double()
        if valid_T is not None:
            experts_TK, weights_TK = experts_TK[valid_T], weights_TK[valid_T]
        # Scattered to (T, E) and summed: the same bits every time, also on CUDA.
        nothing_TE = weights_TK.new_zeros(len(experts_TK), self.sums.shape[-1])
        self._add("weight", routing.layer, nothing_TE.scatter(1, experts_TK, weights_TK))
        self._add("tokens", routing.layer, nothing_TE.scatter(1, experts_TK, 1.0))

    def expert(self, call: ExpertCall, valid_T: Tensor | None) -> None:
        """Keeps what is needed of one expert's outputs until `combined`."""
        tokens_M, weights_M, output_MD = call.tokens_M, call.weights_M, call.output_MD
        if valid_T is not None:
            is_valid_M = valid_T.to(tokens_M.device)[tokens_M]
            tokens_M, weights_M = tokens_M[is_valid_M], weights_M[is_valid_M]
            output_MD = output_MD[is_valid_M]
        if not len(tokens_M):
            return
        seen = self.pending
        seen.experts.append(call.expert)
        seen.tokens.append(tokens_M)
        seen.weights.append(weights_M)
        # Neither makes a copy of M times D values, as .float() and .abs() would.
        seen.norms.append(torch.linalg.vector_norm(output_MD, dim=-1, dtype=torch.float32))
        seen.extremes.append(torch.stack(output_MD.aminmax()))

    def combined(self, layer: int, n_tokens: int) -> None:
        """Adds what the block's experts gave, all having run."""
        seen, self.pending = self.pending, _Layer()
        if not seen.experts:
            return
        device = self.sums.device
        expert_H = torch.tensor(seen.experts, device=device)
        counts_H = torch.tensor([len(tokens_M) for tokens_M in seen.tokens], device=device)
        at_A = (torch.cat(seen.tokens).to(device), expert_H.repeat_interleave(counts_H))
        norm_TE = self.sums.new_zeros(n_tokens, self.sums.shape[-1])
        norm_TE[at_A] = torch.cat(seen.norms).to(norm_TE)
        weight_TE = torch.zeros_like(norm_TE)
        weight_TE[at_A] = torch.cat(seen.weights).to(weight_TE)
        self._add("norm", layer, norm_TE)
        self._add("weighted_norm", layer, norm_TE * weight_TE)
        largest_E = self.largest[self.part, layer]
        largest_H = torch.stack(seen.extremes).abs().amax(dim=1).to(largest_E)
        largest_E[expert_H] = largest_E[expert_H].maximum(largest_H)

    def _add(self, name: str, layer: int, amount_TE: Tensor) -> None:
        self.sums[NAMES.index(name), self.part, layer] += amount_TE.sum(dim=0)
