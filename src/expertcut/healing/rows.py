"""Questions, texts and chats as rows of token ids, and several sources of rows in one order.

From questions and texts to rows of token ids. A row of a quiz is a prompt whose shots are other
questions of the same split: so no dev question is trained on, every question of the row is, and
each is met with all numbers of shots.
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

from expertcut.data import Question, answer_letter, prompt
from expertcut.data.readers import json_lines
from expertcut.errors import ModelError, QuizError


@dataclass(frozen=True)
class Text:
    """What the model reads, and what is said there: of a chat the messages without the template."""

    read: str
    said: str


def read_texts(file: Path, tokenizer: Any) -> list[Text]:
    """Each line's text, chats in the tokenizer's template.

    Raises:
        QuizError: a file that cannot be read, a line that holds neither, a chat without template.
        ModelError: a template that fails, or asks for what transformers' sandbox does not give.
    """
    texts = [_text(record, where, tokenizer) for where, record in json_lines(file)]
    if not texts:
        raise QuizError(f"{file} holds no text: one JSON object a line, with text or messages")
    return texts


def _text(record: Mapping[str, Any], where: str, tokenizer: Any) -> Text:
    if (text := record.get("text")) and isinstance(text, str):
        made = Text(text, text)
    else:
        made = _chat(record, where, tokenizer)
    if any("\ud800" <= char <= "\udfff" for char in made.read):
        raise QuizError(f"{where}: a lone surrogate, which is no character")
    return made


def _chat(record: Mapping[str, Any], where: str, tokenizer: Any) -> Text:
    messages = record.get("messages")
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise QuizError(
            f"{where}: must hold text, or messages with role and content: it holds "
            f"{', '.join(record)[:200] or 'nothing'}"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise QuizError(f"{where}: a chat, but the tokenizer has no chat template: write text")
    try:
        made: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise ModelError(f"{where}: the tokenizer's chat template fails: {error}") from None
    return Text(made, "\n".join(message["content"] for message in messages))


def _is_message(found: object) -> bool:
    return isinstance(found, dict) and all(
        isinstance(found.get(key), str) for key in ("role", "content")
    )


@dataclass(frozen=True)
class Row:
    """Token ids, and the positions right before the letter of an answer."""

    ids: tuple[int, ...]
    answers: tuple[int, ...] = ()


def group_questions(
    questions: Sequence[Question], lengths: Sequence[int], n_most: int, max_tokens: int
) -> Iterator[tuple[Question, ...]]:
    """At most `n_most` neighbours and, but for single questions, `max_tokens` tokens each."""
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
    """The last question's prompt, the others its shots, and its answer's letter.

    Raises:
        ModelError: the tokenizer does not write letters as tokens of their own.
    """
    prompts = [prompt(question, group[:i]) for i, question in enumerate(group)]
    texts = [*prompts, f"{prompts[-1]} {answer_letter(group[-1])}"]
    *begun, whole = tokenizer(texts)["input_ids"]
    is_clean = all(ids == whole[: len(ids)] for ids in begun)
    if not is_clean or len(whole) != len(begun[-1]) + 1:
        raise ModelError(
            "the tokenizer does not write an answer's letter after 'Answer:' as one token of its "
            "own: this model cannot be trained on choice letters"
        )
    return Row(tuple(whole), tuple(len(ids) - 1 for ids in begun))


def question_lengths(tokenizer: Any, questions: Sequence[Question]) -> list[int]:
    """Tokens of each question's prompt without shots, the answer's included."""
    return [len(ids) + 1 for ids in tokenizer([prompt(q) for q in questions])["input_ids"]]


def text_rows(documents: Iterable[Sequence[int]], max_tokens: int) -> Iterator[Row]:
    """Documents as rows; longer ones in pieces, each of at least two tokens."""
    for ids in documents:
        for begin in range(0, len(ids), max_tokens):
            piece = tuple(ids[begin : begin + max_tokens])
            if len(piece) > 1:
                yield Row(piece)


Shuffled = Callable[[random.Random], list[Row]]  # all rows of a source once, in a random order


@dataclass
class Part:
    """A source of rows: it begins anew, in another order, whenever it comes to an end."""

    name: str
    weight: float
    shuffled: Shuffled
    seed: int
    starts: list[int] = field(default_factory=lambda: [0])  # of the epochs known so far
    _epoch: int = -1
    _rows: list[Row] = field(default_factory=list)

    def row(self, nth: int) -> Row:
        """The nth row of all epochs."""
        while nth >= self.starts[-1]:
            self._open(len(self.starts) - 1)
            self.starts.append(self.starts[-1] + len(self._rows))
        epoch = bisect_right(self.starts, nth) - 1
        if epoch != self._epoch:
            self._open(epoch)
        return self._rows[nth - self.starts[epoch]]

    def _open(self, epoch: int) -> None:
        self._epoch = epoch
        self._rows = self.shuffled(random.Random(f"{self.seed}/{self.name}/{epoch}"))
        assert self._rows, "a source without rows is refused before"


@dataclass
class Rows(Dataset[tuple[int, Row]]):
    """`n_rows` rows of all parts in turn, each as often as its weight says; item i is (i, row)."""

    parts: Sequence[Part]
    n_rows: int

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, at: int) -> tuple[int, Row]:
        part, nth = self._order[at]
        return at, self.parts[part].row(nth)

    @cached_property
    def _order(self) -> list[tuple[int, int]]:
        """CacheKey turn it is: always that of the part that lags its share the most."""
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


@dataclass
class Fixed(Dataset[tuple[int, Row]]):
    """Rows in the order given: those held out. Their numbers go on from `first`."""

    rows: Sequence[Row]
    first: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> tuple[int, Row]:
        return self.first + at, self.rows[at]
