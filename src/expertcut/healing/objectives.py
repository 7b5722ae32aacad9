"""Training objectives: batches, the teacher, and one loss per trained position.

With a large vocabulary, the logits of a whole batch are the largest tensors of training. So loss
and gradient are computed by chunks of positions, and a chunk's logits freed before the next.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from expertcut.errors import ModelError
from expertcut.healing.data import Row
from expertcut.models.devices import give_back, unless_out_of_memory
from expertcut.models.load import MoeModel
from expertcut.scoring.projection import (
    Projection,
    Run,
    TopLogprobs,
    kl_divergence,
    top_logprobs,
)

IGNORED = -100  # the label of positions that are not trained on: transformers' own number
_PASS_TOKENS = 4096  # of one forward pass: more are not faster
Batch = dict[str, Tensor]


def at_all_tokens(row: Row) -> Sequence[int]:
    """All positions but the last, which has no next token."""
    return range(len(row.ids) - 1)


def cross_entropy(logits_MV: Tensor, next_M: Tensor, teacher: TopLogprobs | None = None) -> Tensor:
    """−log p of the next token, per position (M)."""
    return F.cross_entropy(logits_MV.float(), next_M, reduction="none")


def distillation(logits_MV: Tensor, next_M: Tensor, teacher: TopLogprobs | None = None) -> Tensor:
    """KL(teacher ‖ student) per position (M), at temperature 1 (arXiv:1503.02531).

    A lower bound where the teacher's R tokens are not all of the vocabulary.
    """
    assert teacher is not None, "distillation needs a teacher"
    return kl_divergence(logits_MV.float().log_softmax(dim=-1), teacher)


Where = Callable[[Row], Sequence[int]]


@dataclass(frozen=True)
class Objective:
    """A loss, its positions, whether it needs a teacher, and the default of `answer_weight`."""

    name: str
    loss: Callable[[Tensor, Tensor, TopLogprobs | None], Tensor]
    where: Where
    needs_teacher: bool = False
    answer_weight: float = 0.0


OBJECTIVES = {
    "distill": Objective(
        "distill", distillation, at_all_tokens, needs_teacher=True, answer_weight=1.0
    ),
    "answer": Objective("answer", cross_entropy, lambda row: row.answers),
    "lm": Objective("lm", cross_entropy, at_all_tokens),
}


def chunked_loss(
    projection: Projection, run: Run, hidden_MH: Tensor, loss_of: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """The sum of `loss_of` (logits_NV, positions) over chunks of positions, in float64.

    Gradients reach the hidden states; the vocabulary projection is not trained.
    """
    apply: Any = _ChunkedSum.apply
    chunks = list(projection.chunks(len(hidden_MH)))
    total: Tensor = apply(hidden_MH, lambda h, at: loss_of(projection.logits(run, h), at), chunks)
    return total


class _ChunkedSum(torch.autograd.Function):
    """A sum that computes its gradient chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_MH: Tensor, of_chunk: Any, chunks: list[slice]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden_MH.device)
        gradient_MH, is_trained = torch.zeros_like(hidden_MH), ctx.needs_input_grad[0]
        for at in chunks:
            with torch.set_grad_enabled(is_trained):
                hidden_NH = hidden_MH[at].detach().requires_grad_(is_trained)
                loss = of_chunk(hidden_NH, at)
            if is_trained:
                (gradient_MH[at],) = torch.autograd.grad(loss, hidden_NH)
            total += loss.detach()
        ctx.save_for_backward(gradient_MH)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_MH,) = ctx.saved_tensors
        return gradient_MH * gradients[0].to(gradient_MH.dtype), None, None


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right and adds labels and weights."""

    where: Where
    pad_id: int
    answer_weight: float = 0.0  # of a row's answer letters in addition, times the row's weight

    def __call__(self, items: Sequence[tuple[int, Row]]) -> Batch:
        """A batch of numbered rows."""
        ids = [torch.tensor(row.ids) for _, row in items]
        ids_BS = pad_sequence(ids, batch_first=True, padding_value=self.pad_id)
        mask_BS = pad_sequence([torch.ones_like(ids_S) for ids_S in ids], batch_first=True)
        labels_BS, weight_BS = torch.full_like(ids_BS, IGNORED), torch.zeros(ids_BS.shape)
        for at, (_, row) in enumerate(items):
            trained = torch.tensor(self.where(row), dtype=torch.long)
            labels_BS[at, trained] = ids_BS[at, trained + 1]
            weight_BS[at, trained] = 1
            if row.answers:
                share = self.answer_weight * len(trained) / len(row.answers)
                weight_BS[at, torch.tensor(row.answers)] += share
        return {
            "input_ids": ids_BS,
            "attention_mask": mask_BS,
            "labels": labels_BS,  # next tokens, IGNORED at positions that are not trained on
            "weight_BS": weight_BS,  # 1 at the others
            "row_B": torch.tensor([number for number, _ in items]),
        }


def cut_rows(batch: Batch, n_rows: int) -> Iterator[Batch]:
    """`n_rows` rows at a time, in order, without columns of padding."""
    for begin in range(0, len(batch["input_ids"]), n_rows):
        piece = {name: tensor[begin : begin + n_rows] for name, tensor in batch.items()}
        width = int(piece["attention_mask"].sum(dim=1).max())
        yield {name: t[:, :width] if t.ndim > 1 else t for name, t in piece.items()}


def longest_first(batch: Batch) -> Batch:
    """Rows by length, so that neighbours have similar lengths."""
    order_B = batch["attention_mask"].sum(dim=1).argsort(descending=True, stable=True)
    return {name: tensor[order_B] for name, tensor in batch.items()}


Teacher = Callable[[Batch, Tensor], TopLogprobs]  # at the positions that (B, S) marks


class LiveTeacher:
    """A teacher in memory."""

    def __init__(self, moe: MoeModel, n_likeliest: int) -> None:
        self.moe, self.n_likeliest = moe, n_likeliest
        self.projection = Projection(moe)

    @torch.no_grad()
    def __call__(self, batch: Batch, at_BS: Tensor) -> TopLogprobs:
        """Forward passes over some rows each."""
        return self._by_rows({**batch, "at_BS": at_BS}, max(1, _PASS_TOKENS // at_BS.shape[1]))

    def _by_rows(self, batch: Batch, n_rows: int) -> TopLogprobs:
        return _joined([self._top_logprobs(piece) for piece in cut_rows(batch, n_rows)])

    def _one_pass(self, batch: Batch) -> TopLogprobs:
        model, projection = self.moe.model, self.projection
        hidden_BSH = projection.hidden(model, batch["input_ids"], batch["attention_mask"])
        hidden_MH = hidden_BSH[batch["at_BS"]]
        chunks = projection.chunks(len(hidden_MH))
        logits = (projection.logits(model, hidden_MH[at]) for at in chunks)
        return _joined([top_logprobs(logits_NV, self.n_likeliest) for logits_NV in logits])

    def _top_logprobs(self, batch: Batch) -> TopLogprobs:
        """One pass, or several if memory runs out."""
        if (found := unless_out_of_memory(partial(self._one_pass, batch))) is not None:
            return found
        n_rows, n_tokens = batch["at_BS"].shape
        if n_rows == 1:
            raise ModelError(
                f"{self.moe.source.id}: not enough memory for the teacher's pass over one row of "
                f"{n_tokens} tokens: free memory, or give a smaller --max-tokens"
            )
        give_back()
        return self._by_rows(batch, n_rows // 2)


def _joined(parts: list[TopLogprobs]) -> TopLogprobs:
    ids, logprobs = zip(*((part.ids_MR, part.logprob_MR) for part in parts), strict=True)
    return TopLogprobs(torch.cat(ids), torch.cat(logprobs))
