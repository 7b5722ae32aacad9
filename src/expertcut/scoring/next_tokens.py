"""What a model predicts behind each token of a text, beside what a base model predicted there."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import EncodedRows, Pass
from expertcut.scoring.passes import PassObserver, ScoringMode
from expertcut.scoring.projection import TopLogprobs, acceptance, kl_divergence
from expertcut.stats import Array

_SUMS = ("loss_N", "scored_N", "right_N")
_CHANGES = ("kl_N", "agrees_N", "accepted_N")
_IDS, _LOGPROBS = "top_ids_MK", "top_logprob_MK"
ROW_SUMS = _SUMS + _CHANGES


@dataclass(frozen=True)
class Comparison:
    """A model beside a base at M positions: KL(base ‖ model), top-1 agreement, Σ min(p, q)."""

    kl_M: Tensor
    agrees_M: Tensor
    acceptance_M: Tensor


@dataclass(frozen=True)
class NextTokens:
    """Predictions at the M scored positions of a pass, in the order of its tokens.

    `at_M` are positions in the pass, `row_M` rows of the chunk, losses −log p in nats. `top` are
    the likeliest tokens, if they were asked for, `change` is there if a base was given.
    """

    at_M: Tensor
    row_M: Tensor
    loss_M: Tensor
    is_right_M: Tensor
    top: TopLogprobs | None = None
    change: Comparison | None = None


def losses(engine: Engine, rows: EncodedRows, mode: ScoringMode) -> Tensor:
    """−log p of the scored tokens of each row (N, S), NaN behind a row's last."""
    by_row: list[list[Tensor]] = [[] for _ in rows.prompts]
    for _, found in predict(engine, rows, PassObserver(), mode=mode):
        for row in found.row_M.unique().tolist():
            by_row[row].append(found.loss_M[found.row_M == row])
    own = [torch.cat(parts) if parts else torch.zeros(0) for parts in by_row]
    return pad_sequence(own, batch_first=True, padding_value=torch.nan)


BaseOf = Callable[[Tensor], TopLogprobs]
"""The base's predictions at the scored positions of the rows (M,), in their order."""


@torch.inference_mode()
def predict(
    engine: Engine,
    rows: EncodedRows,
    watch: PassObserver,
    *,
    n_top: int = 0,
    base_of: BaseOf | None = None,
    mode: ScoringMode | None = None,
) -> Iterator[tuple[Pass, NextTokens]]:
    """Predictions pass by pass.

    Raises ModelError: a non-finite loss, with the first module that gave one.
    """
    for step, hidden_TH in engine.hidden_states(rows, watch, mode):
        next_T, _ = rows.of_pass(step)
        at_M = (next_T >= 0).nonzero()[:, 0]
        row_M = step.question_T[at_M]
        base = None if base_of is None else base_of(row_M)
        hidden_MH = hidden_TH[at_M.to(hidden_TH.device)]
        found = _predictions(engine, hidden_MH, next_T[at_M], n_top, base)
        if not bool(found[0].isfinite().all()):
            bad = int(row_M[(~found[0].isfinite()).int().argmax()])
            raise engine.not_finite(rows, bad, watch.begin)
        loss_M, is_right_M, top, change = found
        yield step, NextTokens(at_M, row_M, loss_M, is_right_M, top, change)


def _predictions(
    engine: Engine, hidden_MH: Tensor, next_M: Tensor, n_top: int, base: TopLogprobs | None
) -> tuple[Tensor, Tensor, TopLogprobs | None, Comparison | None]:
    """Loss and hits of all positions, by chunks of them: their logits are the largest tensors."""
    losses, hits, tops, changes = [], [], [], []
    halves = engine.projection
    for chunk in halves.chunks(len(next_M)):
        logits_NV = halves.logits(engine.moe.model, hidden_MH[chunk])
        logprob_NV = logits_NV.float().log_softmax(dim=-1)
        next_N = next_M[chunk].to(logprob_NV.device)
        losses.append(-logprob_NV.gather(1, next_N[:, None])[:, 0].cpu())
        best_N = logprob_NV.argmax(dim=-1)
        hits.append((best_N == next_N).cpu())
        if n_top:
            best = logprob_NV.topk(min(n_top, logprob_NV.shape[1]), dim=-1)
            tops.append((best.indices.cpu(), best.values.cpu()))
        if base is not None:
            own = TopLogprobs(*(t[chunk].to(best_N.device) for t in (base.ids_MR, base.logprob_MR)))
            kl_N, shared_N = kl_divergence(logprob_NV, own), acceptance(logprob_NV, own)
            # By log p, not by id: of equal logits `argmax` and `topk` take different ones.
            same_N = logprob_NV.gather(1, own.ids_MR[:, :1])[:, 0] >= logprob_NV.amax(dim=-1)
            changes.append((kl_N.cpu(), same_N.cpu(), shared_N.cpu()))
    if not losses:
        nothing_M = torch.zeros(0)
        losses, hits = [nothing_M], [nothing_M.bool()]
    top = change = None
    if tops:
        top = TopLogprobs(*(torch.cat(parts) for parts in zip(*tops, strict=True)))
    if changes:
        change = Comparison(*(torch.cat(parts) for parts in zip(*changes, strict=True)))
    return torch.cat(losses), torch.cat(hits), top, change


class RowSums:
    """Sums over the scored positions of each row, added in float64, and their likeliest tokens."""

    def __init__(self, rows: EncodedRows, n_top: int = 0) -> None:
        names, n_rows = _SUMS + _CHANGES, len(rows)
        self.sums = {name: torch.zeros(n_rows, dtype=torch.float64) for name in names}
        # In one piece for all passes: smaller ones would lie between what passes free, and the C
        # library could not use that memory again.
        size = sum(int((next_T >= 0).sum()) for next_T in rows.next_ids), n_top
        self.top = TopLogprobs(torch.zeros(size, dtype=torch.int32), torch.zeros(size))
        self.n_kept = 0
        self.is_compared = False

    def begin(self, _step: Pass) -> None:
        """Sums are added behind a pass, so before it there is nothing to do."""

    def undo(self, _step: Pass) -> None:
        """Nor behind one that ran out of memory."""

    def add(self, found: NextTokens) -> None:
        """Adds what a pass predicts."""
        values = dict(zip(_SUMS, (found.loss_M, found.loss_M >= 0, found.is_right_M), strict=True))
        values["scored_N"] = torch.ones_like(found.loss_M)
        if found.change is not None:
            self.is_compared, own = True, found.change
            of_change = (own.kl_M, own.agrees_M, own.acceptance_M)
            values |= dict(zip(_CHANGES, of_change, strict=True))
        for name, value_M in values.items():
            self.sums[name].index_add_(0, found.row_M, value_M.double())
        if found.top is not None:
            at = slice(self.n_kept, self.n_kept + len(found.loss_M))
            self.top.ids_MR[at], self.top.logprob_MR[at] = found.top.ids_MR, found.top.logprob_MR
            self.n_kept = at.stop

    def arrays(self) -> dict[str, Array]:
        """The sums (N,), with those of a comparison, or the predictions of a base."""
        names = _SUMS + (_CHANGES if self.is_compared else ())
        arrays = {name: self.sums[name].numpy() for name in names}
        if self.top.ids_MR.shape[1]:
            arrays[_IDS], arrays[_LOGPROBS] = self.top.ids_MR.numpy(), self.top.logprob_MR.numpy()
        return arrays


class Predictions:
    """The base's predictions for one chunk."""

    def __init__(self, chunk: Mapping[str, Array]) -> None:
        self.ends_N = chunk["scored_N"].astype(np.int64).cumsum()
        self.ids_MK, self.logprob_MK = chunk[_IDS], chunk[_LOGPROBS]

    def __call__(self, row_M: Tensor) -> TopLogprobs:
        """Those at the scored positions of consecutive rows."""
        if not len(row_M):
            at = slice(0, 0)
        else:
            first, last = int(row_M[0]), int(row_M[-1])
            at = slice(int(self.ends_N[first - 1]) if first else 0, int(self.ends_N[last]))
        assert at.stop - at.start == len(row_M), "the rows are those of the base"
        ids_MK = torch.from_numpy(self.ids_MK[at]).long()
        return TopLogprobs(ids_MK, torch.from_numpy(self.logprob_MK[at]))
