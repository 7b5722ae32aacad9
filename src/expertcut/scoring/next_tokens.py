"""What a model predicts behind each token of a text, beside what a base model predicted there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import EncodedRows, Pass
from expertcut.scoring.passes import PassObserver, ScoringMode
from expertcut.scoring.projection import TopLogprobs, acceptance, kl_divergence


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
            changes.append((kl_N.cpu(), (best_N == own.ids_MR[:, 0]).cpu(), shared_N.cpu()))
    if not losses:
        nothing_M = torch.zeros(0)
        losses, hits = [nothing_M], [nothing_M.bool()]
    top = change = None
    if tops:
        top = TopLogprobs(*(torch.cat(parts) for parts in zip(*tops, strict=True)))
    if changes:
        change = Comparison(*(torch.cat(parts) for parts in zip(*changes, strict=True)))
    return torch.cat(losses), torch.cat(hits), top, change
