"""Sums over every token, expert by expert, and the largest value that each gave."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertcut.models.hooks import ExpertCall, Routing

PARTS = ("prefix", "question")
INPUT = "input_shift"  # only where experts give what is as wide as the block's input
RESIDUAL = "residual_shift"  # and only where a model's residual stream is known
# What each is, docs/formats.md says.
NAMES = ("tokens", "weight", "norm", "weighted_norm", "votes", INPUT, RESIDUAL)


def borda_points(weighted_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Points (T, E) of each token's vote on its K experts by weight · ‖f‖, Borda's.

    K for the largest, 1 for the smallest, equal ones share theirs; 0 for what contributed nothing.
    """
    value_KT = weighted_TE.gather(1, experts_TK).T.contiguous()
    ahead_KT = (value_KT[:, None] - value_KT).sign().sum(dim=1)  # those below, less those above
    points_KT = (len(value_KT) + 1 + ahead_KT) / 2 * (value_KT > 0)
    return torch.zeros_like(weighted_TE).scatter(1, experts_TK, points_KT.T)


def shift(x_TD: Tensor, output_TD: Tensor, factor: float = 1.0) -> Tensor:
    """How far the output turns each token: max(1 − cos(x, x + factor · output), 0), (T,) float64.

    From three inner products; 1 − cos = sin² / (1 + cos), so that little of a small angle is lost.
    0 where x or the sum is 0.
    """
    output_TD = output_TD.to(x_TD.device)
    xx_T, yy_T = _squared(x_TD), _squared(output_TD) * factor**2
    xy_T = _inner(x_TD, output_TD) * factor
    zz_T = (xx_T + 2 * xy_T + yy_T).clamp(min=0)
    lengths_T = xx_T * zz_T
    is_defined_T = lengths_T > 0
    lengths_T = lengths_T.where(is_defined_T, 1.0)
    cos_T = ((xx_T + xy_T) / lengths_T.sqrt()).clamp(-1, 1)
    sin2_T = (xx_T * yy_T - xy_T**2).clamp(min=0) / lengths_T
    shift_T = torch.where(cos_T > 0, sin2_T / (1 + cos_T.abs()), 1 - cos_T)
    return shift_T * is_defined_T


def _squared(x_TD: Tensor) -> Tensor:
    norm_T: Tensor = torch.linalg.vector_norm(x_TD, dim=-1, dtype=torch.float32)
    return norm_T.double() ** 2


def _inner(x_TD: Tensor, y_TD: Tensor) -> Tensor:
    # A product and a sum are twice as fast as vecdot on a CPU.
    return (x_TD.float() * y_TD.float()).sum(dim=-1).double()


@dataclass
class _Layer:
    """One block's pass, as small as it can be kept until all its experts have run.

    `extremes` are each call's least and greatest output value.
    """

    experts: list[int] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    extremes: list[Tensor] = field(default_factory=list)
    routing: Routing | None = None


class TokenSums:
    """Kept apart for the shared prefix, which ran once for the whole chunk, and for the rest.

    `factors` are what the sum of a block's experts is multiplied with where it is held against the
    block's input, and where against the residual stream, by layer; a sum that needs the stream
    stays 0 where it is not told of. `is_in_width` turns false where experts work in another width.
    """

    def __init__(
        self,
        n_layers: int,
        n_experts: int,
        device: torch.device,
        factors: dict[int, tuple[float, float]],
    ) -> None:
        shape = (len(NAMES), len(PARTS), n_layers, n_experts)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self.largest = torch.zeros(shape[1:], device=device)
        # Over the questions' own tokens, but for the questions that are held out.
        self.calibration = torch.zeros_like(self.sums[:, 0])
        self.calibration_largest = torch.zeros_like(self.largest[0])
        self.factors = factors
        self.is_in_width = True

    def begin(self, part: int) -> None:
        """Says whose tokens come, as a place in `PARTS`."""
        self.part = part
        self.in_calibration_T: Tensor | None = None  # whose tokens count in both sums
        self.pending = _Layer()
        self.stream: tuple[int, Tensor] | None = None
        self.rows_M: Tensor | None = None

    def read(self, layer: int, x_TD: Tensor) -> None:
        """Keeps the residual stream before a block until the next block's comes."""
        self.stream = layer, x_TD

    def route(self, routing: Routing, valid_T: Tensor | None) -> None:
        """Adds one router's choices."""
        self.pending.routing = routing
        experts_TK, weights_TK = routing.experts_TK, routing.weights_TK.double()
        if valid_T is not None:
            experts_TK, weights_TK = experts_TK[valid_T], weights_TK[valid_T]
        # Scattered to (T, E) and summed: the same bits every time, also on CUDA.
        nothing_TE = weights_TK.new_zeros(len(experts_TK), self.sums.shape[-1])
        self._add("weight", routing.layer, nothing_TE.scatter(1, experts_TK, weights_TK), valid_T)
        self._add("tokens", routing.layer, nothing_TE.scatter(1, experts_TK, 1.0), valid_T)

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
        if self.in_calibration_T is not None:
            output_MD = output_MD[self.in_calibration_T.to(tokens_M.device)[tokens_M]]
            if len(output_MD):
                largest_E = self.calibration_largest[call.layer]
                largest = output_MD.abs().amax().to(largest_E)
                largest_E[call.expert] = largest_E[call.expert].maximum(largest)

    def combined(self, layer: int, output_TD: Tensor) -> None:
        """Adds what the block's experts gave, all having run; their sum is the output."""
        seen, self.pending = self.pending, _Layer()
        if not seen.experts:
            return
        device = self.sums.device
        expert_H = torch.tensor(seen.experts, device=device)
        counts_H = torch.tensor([len(tokens_M) for tokens_M in seen.tokens], device=device)
        at_A = (torch.cat(seen.tokens).to(device), expert_H.repeat_interleave(counts_H))
        norm_TE = self.sums.new_zeros(len(output_TD), self.sums.shape[-1])
        norm_TE[at_A] = torch.cat(seen.norms).to(norm_TE)
        weight_TE = torch.zeros_like(norm_TE)
        weight_TE[at_A] = torch.cat(seen.weights).to(weight_TE)
        weighted_TE = norm_TE * weight_TE
        self._add("norm", layer, norm_TE)
        self._add("weighted_norm", layer, weighted_TE)
        self._contributions(layer, weighted_TE, output_TD, seen.routing)
        largest_E = self.largest[self.part, layer]
        largest_H = torch.stack(seen.extremes).abs().amax(dim=1).to(largest_E)
        largest_E[expert_H] = largest_E[expert_H].maximum(largest_H)

    def _contributions(
        self, layer: int, weighted_TE: Tensor, output_TD: Tensor, routing: Routing | None
    ) -> None:
        """Adds what weighs a token's experts against each other, or tokens by how far they move.

        Pads weigh 0, whatever they are.
        """
        assert routing is not None, "a block's router runs before its experts"
        self._add("votes", layer, borda_points(weighted_TE, routing.experts_TK))
        if output_TD.shape != routing.input_TD.shape:
            self.is_in_width = False
            return
        by_input, by_stream = self.factors[layer]
        input_T = shift(routing.input_TD, output_TD, by_input)
        self._add(INPUT, layer, weighted_TE * input_T.to(weighted_TE)[:, None])
        if self.stream is not None and self.stream[0] == layer:
            x_TD = self.stream[1]
            x_TD = x_TD if self.rows_M is None else x_TD[self.rows_M.to(x_TD.device)]
            residual_T = shift(x_TD, output_TD, by_stream)
            self._add(RESIDUAL, layer, weighted_TE * residual_T.to(weighted_TE)[:, None])

    def _add(self, name: str, layer: int, amount_TE: Tensor, valid_T: Tensor | None = None) -> None:
        """Adds amounts of all tokens, or of those that are valid."""
        self.sums[NAMES.index(name), self.part, layer] += amount_TE.sum(dim=0)
        if self.in_calibration_T is not None:
            counts_T = self.in_calibration_T if valid_T is None else self.in_calibration_T[valid_T]
            amount_E = amount_TE[counts_T.to(amount_TE.device)].sum(dim=0)
            self.calibration[NAMES.index(name), layer] += amount_E
