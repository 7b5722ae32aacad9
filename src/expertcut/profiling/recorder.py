"""Listens to one chunk's forward passes and keeps what a profile stores of it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from expertcut.moe.contract import MoeBlock
from expertcut.moe.loading.devices import runs_on
from expertcut.moe.observers import ExpertCall, Routing, observe_experts, observe_routers
from expertcut.moe.packing import Pass
from expertcut.profiling.chunks import Arrays
from expertcut.profiling.store import Stats

_Seen = TypeVar("_Seen", Routing, ExpertCall)
_PARTS = ("prefix", "question")
_SUMS = ("tokens", "weight", "norm", "weighted_norm")


class Recorder:
    """One chunk's records; `stats` `answer` leaves the all-token sums out, `none` everything.

    All-token sums are kept apart for the shared prefix, which ran once for the whole chunk, and
    for the questions' own tokens.
    """

    def __init__(self, blocks: Sequence[MoeBlock], n_questions: int, stats: Stats) -> None:
        self.blocks = blocks
        self.stats = stats
        n_layers, top_k = len(blocks), blocks[0].top_k
        n_experts = max(block.n_experts for block in blocks)
        device = runs_on(blocks[0].router)
        shape = (len(_SUMS), len(_PARTS), n_layers, n_experts)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self.largest = torch.zeros(shape[1:], device=device)
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
                stack.enter_context(observe_experts(self.blocks, self._expert))
            yield

    def begin(self, step: Pass) -> None:
        """Says whose tokens the coming forward pass holds."""
        device = self.alpha_NLE.device
        self.part = 0 if step.is_prefix else 1
        self.questions_N = torch.tensor(step.questions, dtype=torch.long, device=device)
        self.answers_N: Tensor | None = step.answers_N.to(device)
        self.question_T = step.question_T.to(device)
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
        question_T, valid_T = self.all_T
        self.question_T = question_T[rows_M]
        self.valid_T = None if valid_T is None else valid_T[rows_M]

    def _added(self) -> list[Tensor]:
        """What a pass adds to; the rest it writes."""
        if self.stats == "none":
            return []
        gaps = [self.gap_N, self.unread_gap_N]
        return [self.sums, self.largest, *gaps] if self.stats == "all" else gaps

    def _route(self, routing: Routing) -> None:
        if not len(routing.logits_TE):
            return
        routing = _on(routing, self.alpha_NLE.device)
        block = self.blocks[routing.layer]
        alpha_TE = block.alpha(routing.logits_TE)
        self._note_gaps(block, alpha_TE, routing.experts_TK)
        if self.answers_N is not None:
            at = (self.questions_N, routing.layer)
            self.alpha_NLE[(*at, slice(block.n_experts))] = alpha_TE[self.answers_N]
            self.chosen_NLK[at] = routing.experts_TK[self.answers_N].to(torch.int16)
            self.weight_NLK[at] = routing.weights_TK[self.answers_N].float()
        if self.stats == "all":
            self._count(routing)

    def _count(self, routing: Routing) -> None:
        experts_TK, weights_TK = routing.experts_TK, routing.weights_TK.double()
        if self.valid_T is not None:
            experts_TK, weights_TK = experts_TK[self.valid_T], weights_TK[self.valid_T]
        # Scattered to (T, E) and summed: the same bits every time, also on CUDA.
        nothing_TE = weights_TK.new_zeros(len(experts_TK), self.sums.shape[-1])
        self._add("weight", routing.layer, nothing_TE.scatter(1, experts_TK, weights_TK).sum(0))
        self._add("tokens", routing.layer, nothing_TE.scatter(1, experts_TK, 1.0).sum(0))

    def _expert(self, call: ExpertCall) -> None:
        call = _on(call, self.alpha_NLE.device)
        output_MD, weights_M = call.output_MD, call.weights_M
        if self.valid_T is not None:
            is_valid_M = self.valid_T[call.tokens_M]
            output_MD, weights_M = output_MD[is_valid_M], weights_M[is_valid_M]
        if not len(output_MD):
            return
        # Neither makes a copy of M times D values, as .double() and .abs() would.
        norm_M = torch.linalg.vector_norm(output_MD, dim=-1, dtype=torch.float64)
        largest = torch.stack(output_MD.aminmax()).abs().max().float()
        self._add("norm", (call.layer, call.expert), norm_M.sum())
        weighted_M = norm_M * weights_M.double()
        self._add("weighted_norm", (call.layer, call.expert), weighted_M.sum())
        at = (self.part, call.layer, call.expert)
        self.largest[at] = torch.maximum(self.largest[at], largest)

    def _add(self, name: str, at: int | tuple[int, int], amount: Tensor) -> None:
        self.sums[_SUMS.index(name), self.part][at] += amount

    def _note_gaps(self, block: MoeBlock, alpha_TE: Tensor, experts_TK: Tensor) -> None:
        """Keeps how close the prefix and each question came to another choice of experts."""
        gap_T = block.selection_gap(alpha_TE, experts_TK)
        if self.valid_T is not None:
            gap_T = gap_T.where(self.valid_T, torch.inf)
        gap_N, prefix_gap = self.gaps
        if self.part == 0:
            prefix_gap.copy_(torch.minimum(prefix_gap, gap_T.min()))
        else:
            gap_N.scatter_reduce_(0, self.question_T, gap_T, "amin")

    def arrays(self) -> Arrays:
        """The chunk's tensors by their names on disk (design: §5)."""
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
            for p, part in enumerate(_PARTS):
                kept |= {f"{part}_{name}_LE": self.sums[s, p] for s, name in enumerate(_SUMS)}
                kept[f"{part}_largest_LE"] = self.largest[p]
        return {name: tensor.cpu().numpy() for name, tensor in kept.items()}


def _on(seen: _Seen, device: torch.device) -> _Seen:
    """The same on the recorder's device, for blocks may run on several."""
    moved: dict[str, Any] = {
        k: v.to(device) for k, v in vars(seen).items() if isinstance(v, torch.Tensor)
    }
    return replace(seen, **moved)
