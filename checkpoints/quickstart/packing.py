"""From texts to the tensors of a training step: several texts in one row, no token wasted.

In shapes: B rows, T tokens of a row.
"""

from typing import NamedTuple

import torch
from texts import Text
from torch import Tensor
from transformers import PreTrainedTokenizerFast

ROW = 420  # tokens; the longest text has about 400


class Batch(NamedTuple):
    """Texts packed into rows, several in one row (-1 in `text_BT` is padding).

    `position_BT` restarts with every text, `answer_BT` marks the first token of every answer;
    there `word_BT` is the first token of the word that is meant.
    """

    ids_BT: Tensor
    text_BT: Tensor
    position_BT: Tensor
    answer_BT: Tensor
    word_BT: Tensor


def packed_rows(lengths: list[int]) -> list[list[int]]:
    """Put text indices into as few rows of ROW tokens as longest-first, first-fit finds."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, n in enumerate(free) if n >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(ROW)
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows


def to_batch(texts: list[Text], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Tokenise and pack: texts differ in length, and padding them would cost 40 % of the time."""
    encoded = tokenizer([t.text for t in texts])
    words = sorted({word for t in texts for word in t.words})
    first_token = {
        word: ids[0]
        for word, ids in zip(words, tokenizer([f" {w}" for w in words])["input_ids"], strict=True)
    }
    lengths = [len(ids) for ids in encoded["input_ids"]]
    rows = packed_rows(lengths)
    batch = Batch(*torch.zeros(5, len(rows), ROW, dtype=torch.long))
    batch.text_BT.fill_(-1)
    for row, members in enumerate(rows):
        start = 0
        for i in members:
            here = slice(start, start + lengths[i])
            batch.ids_BT[row, here] = torch.tensor(encoded["input_ids"][i])
            batch.text_BT[row, here] = i
            batch.position_BT[row, here] = torch.arange(lengths[i])
            for answer, word in zip(texts[i].answers, texts[i].words, strict=True):
                at = start + encoded.char_to_token(i, answer + 1)  # the space is in its token
                batch.answer_BT[row, at] = 1
                batch.word_BT[row, at] = first_token[word]
            start = here.stop
    return batch


def own_past(text_BT: Tensor) -> Tensor:
    """Let each token attend to the earlier tokens of its own text: a mask (B, 1, T, T)."""
    same_BTT = text_BT[:, :, None] == text_BT[:, None, :]
    return same_BTT.tril()[:, None]
