"""Records what a profile stores of a chunk: routing at answers, and sums over all tokens."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expertcut.errors import ModelError
from expertcut.models import hooks
from expertcut.models.devices import runs_on
from expertcut.models.hooks import Scope
from expertcut.models.load import MoeModel
from expertcut.models.moe_block import MoeBlock, Step
from expertcut.profiling.schema import Stats
from expertcut.profiling.storage import Arrays
from expertcut.scoring.engine import advice
from expertcut.scoring.packing import Pass

# Of the shared prefix, which runs once per chunk, of the questions, and of those not held out.
PARTS = ("prefix", "question", "calibration")
INPUT = "input_shift"  # only if experts have the width of the block's input
RESIDUAL = "residual_shift"  # only if the residual stream is known; else the sums stay 0
# Defined in docs/formats.md.
NAMES = ("tokens", "weight", "norm", "weighted_norm", "votes", INPUT, RESIDUAL)


def check_finite(moe: MoeModel, subject: str, arrays: Arrays) -> None:
    """Raises a ModelError that names the first layer with a record that is not finite."""
    bad = []
    for name, array in arrays.items():
        axes = name.rpartition("_")[2]
        if "L" in axes and array.dtype.kind == "f" and not np.isfinite(array).all():
            layers = np.argwhere(~np.isfinite(array))[:, axes.index("L")]
            bad.append((int(layers.min()), name))
    if bad:
        layer, name = min(bad, key=lambda pair: pair[0])
        raise ModelError(
            f"{moe.source.id} computes a non-finite number for tokens of {subject}: {name} of "
            f"layer {layer} ({moe.blocks[layer].name}): {advice(moe)}"
        )


class Recorder:
    """The records of one chunk; `stats` `answer` is without all-token sums, `none` is empty."""

    def __init__(
        self,
        blocks: Sequence[MoeBlock],
        n_questions: int,
        stats: Stats,
        in_calibration: Sequence[bool] | None = None,
    ) -> None:
        self.blocks = blocks
        self.stats = stats
        n_layers, n_places = len(blocks), max(block.n_places for block in blocks)
        n_experts = max(block.n_experts for block in blocks)
        self.device = device = runs_on(blocks[0].router)
        self.tokens = TokenSums(blocks, n_experts, device)
        self.in_calibration_N: Tensor | None = None
        if in_calibration is not None and stats == "all":
            self.in_calibration_N = torch.tensor(in_calibration, device=device)
        self.alpha_NLE = torch.zeros(n_questions, n_layers, n_experts, device=device)
        self.weight_NLK = torch.zeros(n_questions, n_layers, n_places, device=device)
        self.chosen_NLK = torch.zeros_like(self.weight_NLK, dtype=torch.int16)
        self.gap_N = torch.full((n_questions,), torch.inf, device=device)
        self.prefix_gap = torch.full((1,), torch.inf, device=device)
        # Separate for the last block's other tokens, which no answer depends on.
        self.unread_gap_N = self.gap_N.clone()
        self.unread_prefix_gap = self.prefix_gap.clone()

    def listening(self) -> Scope:
        """Hooks the routers, and for all-token sums the experts."""
        blocks, tokens = self.blocks, self.tokens
        observers = [] if self.stats == "none" else [hooks.observe_routers(blocks, self._route)]
        if self.stats == "all":
            observers.append(tokens.listening(blocks, lambda: self.valid_T))
        return hooks.registered(observers)

    def begin(self, step: Pass) -> None:
        """Called before each forward pass."""
        device = self.device
        self.questions_N = torch.tensor(step.questions, dtype=torch.long, device=device)
        self.answers_N: Tensor | None = step.answers_N.to(device)
        self.question_T = step.question_T.to(device)
        self.is_prefix = step.is_prefix
        self.tokens.begin(0 if step.is_prefix else 1)
        self._mark_calibration()
        self.valid_T = None if step.valid_T is None else step.valid_T.to(device)
        self.gaps = self.gap_N, self.prefix_gap
        self.before = [tensor.clone() for tensor in self._added()]

    def undo(self, _step: Pass) -> None:
        """Reverts the sums of the current pass."""
        for tensor, before in zip(self._added(), self.before, strict=True):
            tensor.copy_(before)

    def on_rows(self, rows_M: Tensor, is_read: bool) -> None:
        """Continues the pass with these of its tokens only."""
        if self.stats == "none":
            return
        rows_M = rows_M.to(self.device)
        if is_read:  # the answers; the others follow
            self.all_T = self.question_T, self.valid_T
            self.answers_N = torch.arange(len(rows_M), device=rows_M.device)
        else:
            self.answers_N = None
            self.gaps = self.unread_gap_N, self.unread_prefix_gap
        self.tokens.rows_M = rows_M
        question_T, valid_T = self.all_T
        self.question_T = question_T[rows_M]
        self.valid_T = None if valid_T is None else valid_T[rows_M]
        self._mark_calibration()

    def _mark_calibration(self) -> None:
        if self.in_calibration_N is not None and not self.is_prefix:
            self.tokens.mark(self.in_calibration_N[self.question_T])

    def _added(self) -> list[Tensor]:
        gaps = [self.gap_N, self.unread_gap_N]
        if self.stats != "all":
            return gaps if self.stats == "answer" else []
        return [self.tokens.sums, self.tokens.largest, *gaps]

    def _route(self, routing: hooks.Routing) -> None:
        if not len(routing.logits_TE):
            return
        routing = routing.on(self.device)
        block = self.blocks[routing.layer]
        alpha_TE = block.alpha(routing.logits_TE)
        score_TE = block.selection_scores(routing.logits_TE, alpha_TE)
        gap_T = block.selection_gap(score_TE, routing.experts_TK)  # to another choice of experts
        if self.valid_T is not None:
            gap_T = gap_T.where(self.valid_T, torch.inf)
        gap_N, prefix_gap = self.gaps
        if self.is_prefix:
            prefix_gap.copy_(torch.minimum(prefix_gap, gap_T.min()))
        else:
            gap_N.scatter_reduce_(0, self.question_T, gap_T, "amin")
        if self.answers_N is not None:
            at = (self.questions_N, routing.layer)
            self.alpha_NLE[(*at, slice(block.n_experts))] = alpha_TE[self.answers_N]
            chosen_NK = routing.experts_TK[self.answers_N]
            chosen_NK = chosen_NK.masked_fill(chosen_NK >= block.n_experts, -1)  # nobody
            n_more = self.chosen_NLK.shape[-1] - chosen_NK.shape[1]
            self.chosen_NLK[at] = F.pad(chosen_NK, (0, n_more), value=-1).to(torch.int16)
            weight_NK = routing.weights_TK[self.answers_N].float()
            self.weight_NLK[at] = F.pad(weight_NK, (0, n_more))
        if self.stats == "all":
            self.tokens.route(routing, self.valid_T)

    def arrays(self) -> Arrays:
        """The arrays of the chunk by their names on disk."""
        if self.stats == "none":
            return {}
        names = ("alpha_NLE", "chosen_NLK", "weight_NLK", "gap_N", "prefix_gap")
        kept: dict[str, Tensor] = {name: getattr(self, name) for name in names}
        tokens, left_out, n_parts = self.tokens, set(), 0
        if self.stats == "all":
            kept["unread_gap_N"] = self.unread_gap_N
            kept["unread_prefix_gap"] = self.unread_prefix_gap
            n_parts = 2
        if self.in_calibration_N is not None:
            kept["calibration_N"] = self.in_calibration_N.to(torch.uint8)
            n_parts = 3
        if any(block.residual is None for block in self.blocks):
            left_out.add(RESIDUAL)
        if not tokens.is_in_width:
            left_out.add(INPUT)
        for i, part in enumerate(PARTS[:n_parts]):
            for name, sum_LE in zip(NAMES, tokens.sums[:, i], strict=True):
                if name not in left_out:
                    kept[f"{part}_{name}_LE"] = sum_LE
            kept[f"{part}_largest_LE"] = tokens.largest[i]
        return {name: tensor.cpu().numpy() for name, tensor in kept.items()}


def borda_points(weighted_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Borda points (T, E) of each token's K experts by weight · ‖f‖.

    K for the largest, 1 for the smallest, shared by equal ones; 0 for no contribution.
    """
    value_KT = weighted_TE.gather(1, experts_TK).T.contiguous()
    ahead_KT = (value_KT[:, None] - value_KT).sign().sum(dim=1)  # those below, less those above
    points_KT = (len(value_KT) + 1 + ahead_KT) / 2 * (value_KT > 0)
    return torch.zeros_like(weighted_TE).scatter(1, experts_TK, points_KT.T)


def shift(x_TD: Tensor, output_TD: Tensor, factor: float = 1.0) -> Tensor:
    """The angular shift of each token: max(1 − cos(x, x + factor · output), 0), (T,) float64.

    Computed as sin² / (1 + cos), which is accurate for small angles; 0 where x or the sum is 0.
    """
    output_TD = output_TD.to(x_TD.device)
    xx_T, yy_T = _norm(x_TD).double() ** 2, _norm(output_TD).double() ** 2 * factor**2
    # On a CPU twice as fast as vecdot.
    dtype = _at_least_float32(x_TD)
    xy_T = (x_TD.to(dtype) * output_TD.to(dtype)).sum(dim=-1).double() * factor
    lengths_T = xx_T * (xx_T + 2 * xy_T + yy_T).clamp(min=0)
    is_defined_T: Tensor = lengths_T > 0
    lengths_T = lengths_T.where(is_defined_T, 1.0)
    cos_T = ((xx_T + xy_T) / lengths_T.sqrt()).clamp(-1, 1)
    sin2_T = (xx_T * yy_T - xy_T**2).clamp(min=0) / lengths_T
    return torch.where(cos_T > 0, sin2_T / (1 + cos_T.abs()), 1 - cos_T) * is_defined_T


def _at_least_float32(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _norm(x_MD: Tensor) -> Tensor:
    norm_M: Tensor = torch.linalg.vector_norm(x_MD, dim=-1, dtype=_at_least_float32(x_MD))
    return norm_M


class TokenSums:
    """Sums over tokens and the largest value of each expert, for each of `PARTS`."""

    def __init__(self, blocks: Sequence[MoeBlock], n_experts: int, device: torch.device) -> None:
        shape = (len(NAMES), len(PARTS), len(blocks), n_experts)
        self.blocks, self.n_experts = blocks, n_experts
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self.largest = torch.zeros(shape[1:], device=device)
        self.is_in_width = True  # False once experts have another width than the block's input

    def listening(
        self,
        blocks: Sequence[MoeBlock],
        valid: Callable[[], Tensor | None],
        watch: Callable[[hooks.ExpertCall], None] | None = None,
    ) -> Scope:
        """Hooks what comes after the routers of some blocks; `valid` gives a pass's `valid_T`.

        `watch` sees the calls of experts as well.
        """

        def see(call: hooks.ExpertCall) -> None:
            self.expert(call, valid())
            if watch is not None:
                watch(call)

        self.sees_own = watch is None
        experts = hooks.observe_experts(blocks, see, self.combined, sees_own=self.sees_own)
        residuals = hooks.observe_residuals(blocks, self.read)
        return hooks.registered([residuals, experts, hooks.observe_steps(blocks, self.step)])

    def begin(self, part: int) -> None:
        """Starts a pass of the shared prefix (0) or of the questions (1)."""
        self.part = part
        self.in_calibration_T: Tensor | None = None  # tokens that count in both sums
        self.are_both_equal = False  # every token counts in both
        # Of one block's experts: id, tokens, weights, norms and largest sizes of an output value.
        self.pending: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
        self.routing: hooks.Routing | None = None
        self.stream: tuple[int, Tensor] | None = None
        # A block's experts' sum on its way to the stream, and each expert's weight · norm.
        self.unadded: tuple[int, Tensor, Tensor] | None = None
        self.rows_M: Tensor | None = None

    def mark(self, in_calibration_T: Tensor) -> None:
        """Tells which tokens count in both sums."""
        self.in_calibration_T = in_calibration_T
        self.are_both_equal = bool(in_calibration_T.all())

    def read(self, layer: int, x_TD: Tensor) -> None:
        """Keeps the residual stream before a block until the next block."""
        self.stream = layer, x_TD

    def route(self, routing: hooks.Routing, valid_T: Tensor | None) -> None:
        """Adds the routing of one block."""
        self.routing = routing
        experts_TK, weights_TK = routing.experts_TK, routing.weights_TK.double()
        if valid_T is not None:
            experts_TK, weights_TK = experts_TK[valid_T], weights_TK[valid_T]
        # Scattered to (T, E) and summed: the same bits every time, also on CUDA.
        place_TK = self.places(routing.layer, experts_TK)
        nothing_TX = weights_TK.new_zeros(len(experts_TK), self.n_experts + 1)
        for name, values in (("weight", weights_TK), ("tokens", torch.ones_like(weights_TK))):
            amount_TE = nothing_TX.scatter(1, place_TK, values)[:, :-1]
            self._add(name, routing.layer, amount_TE, valid_T)

    def places(self, layer: int, experts_TK: Tensor) -> Tensor:
        """Columns of the experts; nobody's is behind the last of all blocks."""
        return experts_TK.masked_fill(experts_TK >= self.blocks[layer].n_experts, self.n_experts)

    def expert(self, call: hooks.ExpertCall, valid_T: Tensor | None) -> None:
        """Keeps what `combined` needs of one expert's outputs."""
        tokens_M, weights_M, output_MD = call.tokens_M, call.weights_M, call.output_MD
        if valid_T is not None:
            is_valid_M = valid_T.to(tokens_M.device)[tokens_M]
            tokens_M, weights_M = tokens_M[is_valid_M], weights_M[is_valid_M]
            output_MD = output_MD[is_valid_M]
        if not len(tokens_M):
            return
        # Without copies of M times D values, as .float(), .abs() and an index make. By token,
        # `aminmax` is slower than both of its halves.
        norm_M = _norm(output_MD)
        largest_M = torch.maximum(output_MD.amax(dim=-1), -output_MD.amin(dim=-1)).abs()  # no −0
        self.pending.append((call.expert, tokens_M, weights_M, norm_M, largest_M))

    def combined(self, layer: int, output_TD: Tensor) -> None:
        """Adds the outputs of a block's experts, after all have run."""
        seen, self.pending = self.pending, []
        routing, self.routing = self.routing, None
        share = getattr(self.blocks[layer].experts, "share", None)
        others = share.group if share is not None and share.is_whole and self.sees_own else None
        if not seen and (others is None or routing is None):
            return
        assert routing is not None, "a block's router runs before its experts"
        device = self.sums.device
        # weights, norms and largest sizes of each token's experts
        seen_3TE = self.sums.new_zeros(3, len(output_TD), self.sums.shape[-1])
        if seen:
            experts, tokens, *values = zip(*seen, strict=True)
            expert_H = torch.tensor(experts, device=device)
            counts_H = torch.tensor([len(tokens_M) for tokens_M in tokens], device=device)
            at_A = (torch.cat(tokens).to(device), expert_H.repeat_interleave(counts_H))
            for own_TE, own in zip(seen_3TE, values, strict=True):
                own_TE[at_A] = torch.cat(own).to(own_TE)
        if others is not None:  # other processes saw the other experts
            others.total(seen_3TE)
        weight_TE, norm_TE, largest_TE = seen_3TE[0], seen_3TE[1], seen_3TE[2].to(self.largest)
        weighted_TE = norm_TE * weight_TE
        self._add("norm", layer, norm_TE)
        self._add("weighted_norm", layer, weighted_TE)
        self._raise_largest(self.part, layer, largest_TE)
        if self.in_calibration_T is not None:
            if not self.are_both_equal:
                counts_T1 = self.in_calibration_T.to(device)[:, None]
                largest_TE = largest_TE.where(counts_T1, 0.0)
            self._raise_largest(2, layer, largest_TE)
        place_TK = self.places(layer, routing.experts_TK)
        self._add("votes", layer, borda_points(F.pad(weighted_TE, (0, 1)), place_TK)[:, :-1])
        block = self.blocks[layer]
        if output_TD.shape == routing.input_TD.shape:
            # A block that norms the experts' sum has factor 1: the sum before the norm counts.
            factor = 1.0 if block.output_factor is None else block.output_factor
            input_T = shift(routing.input_TD, output_TD, factor)
            self._add(INPUT, layer, weighted_TE * input_T.to(weighted_TE)[:, None])
        else:
            self.is_in_width = False
        if block.residual is not None and block.residual.steps:
            self.unadded = layer, output_TD, weighted_TE
        else:
            self._turn(layer, output_TD, weighted_TE)

    def step(self, layer: int, step: Step, x: Tensor, y: Tensor) -> None:
        """Follows the experts' sum through a norm or projection, up to the residual stream."""
        if self.unadded is None or self.unadded[0] != layer:
            return  # its tokens were seen before
        _, part, weighted_TE = self.unadded
        part = y - step.module.forward(x - step.factor * part.reshape(x.shape))
        self.unadded = layer, part, weighted_TE
        residual = self.blocks[layer].residual
        if residual is not None and step is residual.steps[-1]:
            self.unadded = None
            self._turn(layer, part.reshape(len(weighted_TE), -1), weighted_TE)

    def _turn(self, layer: int, added_TD: Tensor, weighted_TE: Tensor) -> None:
        """Adds how far what is added turns the residual stream, if that is known."""
        if self.stream is not None and self.stream[0] == layer:
            x_TD = self.stream[1]
            x_TD = x_TD if self.rows_M is None else x_TD[self.rows_M.to(x_TD.device)]
            residual = self.blocks[layer].residual
            residual_T = shift(x_TD, added_TD, 0.0 if residual is None else residual.factor)
            self._add(RESIDUAL, layer, weighted_TE * residual_T.to(weighted_TE)[:, None])

    def _raise_largest(self, part: int, layer: int, largest_TE: Tensor) -> None:
        largest_E = self.largest[part, layer]
        torch.maximum(largest_E, largest_TE.amax(dim=0), out=largest_E)

    def _add(self, name: str, layer: int, amount_TE: Tensor, valid_T: Tensor | None = None) -> None:
        amount_E = amount_TE.sum(dim=0)
        self.sums[NAMES.index(name), self.part, layer] += amount_E
        if self.in_calibration_T is not None:
            counts_T = self.in_calibration_T if valid_T is None else self.in_calibration_T[valid_T]
            if not self.are_both_equal:
                amount_E = amount_TE[counts_T.to(amount_TE.device)].sum(dim=0)
            self.sums[NAMES.index(name), 2, layer] += amount_E
