"""Records what a profile stores of one chunk's forward passes."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertcut.errors import ModelError
from expertcut.models.hooks import (
    ExpertCall,
    Routing,
    observe_experts,
    observe_residuals,
    observe_routers,
)
from expertcut.models.load import MoeModel, runs_on
from expertcut.models.moe_block import MoeBlock
from expertcut.profiling.schema import Stats
from expertcut.profiling.storage import Arrays
from expertcut.profiling.token_sums import INPUT, NAMES, PARTS, RESIDUAL, TokenSums
from expertcut.scoring.engine import advice
from expertcut.scoring.packing import Pass


def check_finite(moe: MoeModel, subject: str, arrays: Arrays) -> None:
    """That all that was recorded per layer is finite.

    Of the last block's other tokens no answer tells.

    Raises:
        ModelError: naming the first layer where something is not.
    """
    bad = {name: found for name, array in arrays.items() if (found := _layers(name, array))}
    if not bad:
        return
    name = min(bad, key=lambda name: min(bad[name]))
    layer = min(bad[name])
    raise ModelError(
        f"{moe.source.id} computes what is no finite number for tokens of {subject}: {name} of "
        f"layer {layer} ({moe.blocks[layer].name}): {advice(moe)}"
    )


def _layers(name: str, array: np.ndarray[Any, Any]) -> list[int]:
    """The layers in which an array whose name ends in its axes holds NaN or infinity."""
    axes = name.rpartition("_")[2]
    if "L" not in axes or array.dtype.kind != "f" or np.isfinite(array).all():
        return []
    return [int(layer) for layer in np.argwhere(~np.isfinite(array))[:, axes.index("L")]]


class Recorder:
    """One chunk's records; `stats` `answer` leaves the all-token sums out, `none` everything.

    All-token sums are kept apart for the shared prefix, which ran once for the whole chunk, and
    for the questions' own tokens; of these once more for the questions that are `in_calibration`.
    """

    def __init__(
        self,
        blocks: Sequence[MoeBlock],
        n_questions: int,
        stats: Stats,
        in_calibration: Sequence[bool] | None = None,
    ) -> None:
        self.blocks = blocks
        self.stats = stats
        n_layers, top_k = len(blocks), blocks[0].top_k
        n_experts = max(block.n_experts for block in blocks)
        device = runs_on(blocks[0].router)
        self.tokens = TokenSums(n_layers, n_experts, device, _factors(blocks))
        self.in_calibration_N: Tensor | None = None
        if in_calibration is not None and stats == "all":
            self.in_calibration_N = torch.tensor(in_calibration, device=device)
        self.alpha_NLE = torch.zeros(n_questions, n_layers, n_experts, device=device)
        self.chosen_NLK = torch.zeros(
            n_questions, n_layers, top_k, dtype=torch.int16, device=device
        )
        self.weight_NLK = torch.zeros(n_questions, n_layers, top_k, device=device)
        self.gap_N = torch.full((n_questions,), torch.inf, device=device)
        self.prefix_gap = torch.full((1,), torch.inf, device=device)
        # The last block's other tokens, which no answer depends on, are kept apart.
        self.unread_gap_N = self.gap_N.clone()
        self.unread_prefix_gap = self.prefix_gap.clone()
        self.before: list[Tensor] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks the model's routers, and its experts where all tokens are wanted."""
        with ExitStack() as stack:
            if self.stats != "none":
                stack.enter_context(observe_routers(self.blocks, self._route))
            if self.stats == "all":
                stack.enter_context(observe_residuals(self.blocks, self.tokens.read))
                stack.enter_context(
                    observe_experts(self.blocks, self._expert, self.tokens.combined)
                )
            yield

    def begin(self, step: Pass) -> None:
        """Says whose tokens the coming forward pass holds."""
        device = self.alpha_NLE.device
        self.questions_N = torch.tensor(step.questions, dtype=torch.long, device=device)
        self.answers_N: Tensor | None = step.answers_N.to(device)
        self.question_T = step.question_T.to(device)
        self.is_prefix = step.is_prefix
        self.tokens.begin(PARTS.index("prefix" if step.is_prefix else "question"))
        self._mark_calibration()
        self.valid_T = None if step.valid_T is None else step.valid_T.to(device)
        self.gaps = self.gap_N, self.prefix_gap
        self.before = [tensor.clone() for tensor in self._added()]

    def undo(self, _step: Pass) -> None:
        """Forgets what was seen since the pass began."""
        for tensor, before in zip(self._added(), self.before, strict=True):
            tensor.copy_(before)

    def on_rows(self, rows_M: Tensor, is_read: bool) -> None:
        """Says that the pass goes on with these of its tokens only."""
        if self.stats == "none":
            return
        rows_M = rows_M.to(self.alpha_NLE.device)
        if is_read:  # then they are the answers; the others come after them
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
        """Says which of the pass's tokens are of questions that are not held out."""
        if self.in_calibration_N is not None and not self.is_prefix:
            self.tokens.in_calibration_T = self.in_calibration_N[self.question_T]

    def _added(self) -> list[Tensor]:
        """What a pass adds to; the rest it writes."""
        if self.stats == "none":
            return []
        gaps = [self.gap_N, self.unread_gap_N]
        sums = self.tokens
        added = [sums.sums, sums.largest, sums.calibration, sums.calibration_largest]
        return [*added, *gaps] if self.stats == "all" else gaps

    def _route(self, routing: Routing) -> None:
        if not len(routing.logits_TE):
            return
        routing = _on(routing, self.alpha_NLE.device)
        block = self.blocks[routing.layer]
        alpha_TE = block.alpha(routing.logits_TE)
        score_TE = block.selection_scores(routing.logits_TE, alpha_TE)
        self._note_gaps(block.selection_gap(score_TE, routing.experts_TK))
        if self.answers_N is not None:
            at = (self.questions_N, routing.layer)
            self.alpha_NLE[(*at, slice(block.n_experts))] = alpha_TE[self.answers_N]
            self.chosen_NLK[at] = routing.experts_TK[self.answers_N].to(torch.int16)
            self.weight_NLK[at] = routing.weights_TK[self.answers_N].float()
        if self.stats == "all":
            self.tokens.route(routing, self.valid_T)

    def _expert(self, call: ExpertCall) -> None:
        self.tokens.expert(call, self.valid_T)

    def _note_gaps(self, gap_T: Tensor) -> None:
        """Keeps how close the prefix and each question came to another choice of experts."""
        if self.valid_T is not None:
            gap_T = gap_T.where(self.valid_T, torch.inf)
        gap_N, prefix_gap = self.gaps
        if PARTS[self.tokens.part] == "prefix":
            prefix_gap.copy_(torch.minimum(prefix_gap, gap_T.min()))
        else:
            gap_N.scatter_reduce_(0, self.question_T, gap_T, "amin")

    def arrays(self) -> Arrays:
        """The chunk's tensors by their names on disk (design: §5).

        Raises:
            ModelError: a router or an expert gave what is no number.
        """
        if self.stats == "none":
            return {}
        kept = {
            "alpha_NLE": self.alpha_NLE,
            "chosen_NLK": self.chosen_NLK,
            "weight_NLK": self.weight_NLK,
            "gap_N": self.gap_N,
            "prefix_gap": self.prefix_gap,
        }
        if self.stats == "all":
            kept |= {
                "unread_gap_N": self.unread_gap_N,
                "unread_prefix_gap": self.unread_prefix_gap,
            }
            kept |= self._token_sums()
        return {name: tensor.cpu().numpy() for name, tensor in kept.items()}

    def _token_sums(self) -> dict[str, Tensor]:
        left_out = set()
        if any(block.residual is None for block in self.blocks):
            left_out.add(RESIDUAL)
        if not self.tokens.is_in_width:
            left_out |= {INPUT, RESIDUAL}
        kept = {}
        for p, part in enumerate(PARTS):
            for s, name in enumerate(NAMES):
                if name not in left_out:
                    kept[f"{part}_{name}_LE"] = self.tokens.sums[s, p]
            kept[f"{part}_largest_LE"] = self.tokens.largest[p]
        if self.in_calibration_N is not None:
            names = [n for n in NAMES if n not in left_out]
            kept |= {f"calibration_{n}_LE": self.tokens.calibration[NAMES.index(n)] for n in names}
            kept["calibration_largest_LE"] = self.tokens.calibration_largest
            kept["calibration_N"] = self.in_calibration_N.to(torch.uint8)
        return kept


def _factors(blocks: Sequence[MoeBlock]) -> dict[int, tuple[float, float]]:
    """By layer what the sum of its experts counts times, beside the block's input and the stream.

    Where a block norms that sum, what it gave before.
    """
    return {
        b.layer: (
            1.0 if b.output_factor is None else b.output_factor,
            0.0 if b.residual is None else b.residual.factor,
        )
        for b in blocks
    }


def _on(routing: Routing, device: torch.device) -> Routing:
    """The same on the recorder's device, for blocks may run on several."""
    moved: dict[str, Any] = {
        k: v.to(device) for k, v in vars(routing).items() if isinstance(v, torch.Tensor)
    }
    return replace(routing, **moved)
