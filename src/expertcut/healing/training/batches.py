"""Rows as the tensors of one forward pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertcut.healing.data.rows import Row
from expertcut.healing.training.objectives import IGNORED, Where

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right.

    `labels` (B, S) are the tokens that follow, `IGNORED` where nothing is trained on; `weight_BS`
    is 1 at these positions, and more before the letters of answers: all of a row's together weigh
    `answer_weight` times as much again as all its positions. `row_B` are the numbers of the rows.
    """

    where: Where
    pad_id: int
    answer_weight: float = 0.0

    def __call__(self, items: Sequence[tuple[int, Row]]) -> dict[str, Tensor]:
        """One batch."""
        width = max(len(row.ids) for _, row in items)
        ids_BS = torch.full((len(items), width), self.pad_id)
        mask_BS = torch.zeros(len(items), width, dtype=torch.long)
        labels_BS = torch.full((len(items), width), IGNORED)
        weight_BS = torch.zeros(len(items), width)
        for at, (_, row) in enumerate(items):
            ids_BS[at, : len(row.ids)] = torch.tensor(row.ids)
            mask_BS[at, : len(row.ids)] = 1
            trained = torch.tensor(self.where(row), dtype=torch.long)
            labels_BS[at, trained] = ids_BS[at, trained + 1]
            weight_BS[at, trained] = 1
            if row.answers:
                weight_BS[at, torch.tensor(row.answers)] += (
                    self.answer_weight * len(trained) / len(row.answers)
                )
        numbers_B = torch.tensor([number for number, _ in items])
        return {
            "input_ids": ids_BS,
            "attention_mask": mask_BS,
            "labels": labels_BS,
            "weight_BS": weight_BS,
            "row_B": numbers_B,
        }


def cut_rows(batch: Batch, n_rows: int) -> Iterator[Batch]:
    """So many rows at a time, in their order, without the columns in which all of them are pads."""
    for begin in range(0, len(batch["input_ids"]), n_rows):
        yield _rows(batch, slice(begin, begin + n_rows))


def halves(batch: Batch) -> Iterator[Batch]:
    """The first and the second half of at least two rows."""
    n_rows = len(batch["input_ids"])
    yield _rows(batch, slice(0, n_rows // 2))
    yield _rows(batch, slice(n_rows // 2, n_rows))


def longest_first(batch: Batch) -> Batch:
    """Rows by length, so that rows that are cut off together are alike long."""
    order_B = batch["attention_mask"].sum(dim=1).argsort(descending=True, stable=True)
    return {name: tensor[order_B] for name, tensor in batch.items()}


def _rows(batch: Batch, rows: slice) -> Batch:
    taken = {name: tensor[rows] for name, tensor in batch.items()}
    width = int(taken["attention_mask"].sum(dim=1).max())
    return {name: t[:, :width] if t.ndim > 1 else t for name, t in taken.items()}
