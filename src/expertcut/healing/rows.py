"""Questions, texts and chats as rows of token ids, and the order of rows of several sources.

The shots of a quiz's row are questions of the same split, so that no dev question is trained on,
every question of the row is, and all numbers of shots occur.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from torch.utils.data import Dataset

from expertcut.data import Question, prompt
from expertcut.data.questions import LETTERS
from expertcut.data.readers import json_lines
from expertcut.errors import ModelError, QuizError


@dataclass(frozen=True)
class Text:
    """A text with the chat template (`read`), and without (`said`)."""

    read: str
    said: str


def read_texts(file: Path, tokenizer: Any) -> list[Text]:
    """The text of each line, chats in the tokenizer's template."""
    texts = []
    for where, record in json_lines(file):
        if isinstance(text := record.get("text"), str) and text:
            texts.append(Text(text, text))
        else:
            texts.append(_chat(record, where, tokenizer))
        if any("\ud800" <= char <= "\udfff" for char in texts[-1].read):
            raise QuizError(f"{where}: a lone surrogate is not a character: remove it")
    if not texts:
        raise QuizError(f"{file} holds no text: write lines of JSON with text or messages")
    return texts


def _chat(record: Mapping[str, Any], where: str, tokenizer: Any) -> Text:
    messages, keys = record.get("messages"), ("role", "content")
    if not (isinstance(messages, list) and messages) or not all(
        isinstance(m, dict) and isinstance(m.get(key), str) for m in messages for key in keys
    ):
        raise QuizError(
            f"{where}: must hold text, or messages with role and content: it holds "
            f"{', '.join(record)[:200] or 'nothing'}"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise QuizError(f"{where}: a chat, but the tokenizer has no chat template: write text")
    try:
        chat: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise ModelError(f"{where}: the tokenizer's chat template fails: {error}") from None
    return Text(chat, "\n".join(message["content"] for message in messages))


@dataclass(frozen=True)
class Row:
    """Token ids, and the positions just before answer letters."""

    ids: tuple[int, ...]
    answers: tuple[int, ...] = ()


def group_questions(
    questions: Sequence[Question], lengths: Sequence[int], n_most: int, max_tokens: int
) -> Iterator[tuple[Question, ...]]:
    """Groups of at most `n_most` neighbours and, except single questions, `max_tokens` tokens."""
    group: list[Question] = []
    used = 0
    for question, length in zip(questions, lengths, strict=True):
        if group and (len(group) == n_most or used + length > max_tokens):
            yield tuple(group)
            group, used = [], 0
        group.append(question)
        used += length
    if group:
        yield tuple(group)


def question_row(tokenizer: Any, group: Sequence[Question]) -> Row:
    """The prompt of the last question, with the others as shots, and its answer letter."""
    prompts = [prompt(question, group[:i]) for i, question in enumerate(group)]
    texts = [*prompts, f"{prompts[-1]} {LETTERS[group[-1].answer]}"]
    *prefixes, whole = tokenizer(texts)["input_ids"]
    is_clean = all(ids == whole[: len(ids)] for ids in prefixes)
    if not is_clean or len(whole) != len(prefixes[-1]) + 1:
        raise ModelError(
            "the tokenizer does not write an answer letter after 'Answer:' as a single token: "
            "train this model on text, with --text"
        )
    return Row(tuple(whole), tuple(len(ids) - 1 for ids in prefixes))


def question_lengths(tokenizer: Any, questions: Sequence[Question]) -> list[int]:
    """Tokens of each question's prompt without shots, the answer's included."""
    return [len(ids) + 1 for ids in tokenizer([prompt(q) for q in questions])["input_ids"]]


def text_rows(documents: Iterable[Sequence[int]], max_tokens: int) -> Iterator[Row]:
    """Documents as rows of 2 to `max_tokens` tokens; longer documents are cut."""
    for ids in documents:
        for begin in range(0, len(ids), max_tokens):
            piece = tuple(ids[begin : begin + max_tokens])
            if len(piece) > 1:
                yield Row(piece)


Shuffled = Callable[[random.Random], list[Row]]  # one epoch of a source in random order


@dataclass
class Part:
    """A source of rows: epochs without end, each in another order."""

    name: str
    weight: float
    shuffled: Shuffled
    seed: int
    starts: list[int] = field(default_factory=lambda: [0])  # of the epochs opened so far
    _epoch: int = -1
    _rows: list[Row] = field(default_factory=list)

    def row(self, nth: int) -> Row:
        """The nth row of all epochs."""
        while nth >= self.starts[-1]:
            self.starts.append(self.starts[-1] + len(self._epoch_rows(len(self.starts) - 1)))
        epoch = bisect_right(self.starts, nth) - 1
        return self._epoch_rows(epoch)[nth - self.starts[epoch]]

    def _epoch_rows(self, epoch: int) -> list[Row]:
        if epoch != self._epoch:
            self._epoch = epoch
            self._rows = self.shuffled(random.Random(f"{self.seed}/{self.name}/{epoch}"))
            assert self._rows, "sources without rows are refused"
        return self._rows


@dataclass
class Rows(Dataset[tuple[int, Row]]):
    """`n_rows` rows of all parts, mixed by weight; item i is (i, row)."""

    parts: Sequence[Part]
    n_rows: int

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, at: int) -> tuple[int, Row]:
        part, nth = self._order[at]
        return at, self.parts[part].row(nth)

    @cached_property
    def _order(self) -> list[tuple[int, int]]:
        """Part and row of each item: always the part that lags its share most."""
        total = sum(part.weight for part in self.parts)
        shares = [part.weight / total for part in self.parts]
        counts = [0] * len(shares)
        order = []
        for at in range(1, self.n_rows + 1):
            lags = [share * at - count for share, count in zip(shares, counts, strict=True)]
            part = lags.index(max(lags))
            order.append((part, counts[part]))
            counts[part] += 1
        return order
