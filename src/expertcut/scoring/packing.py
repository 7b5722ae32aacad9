"""Turns a chunk of questions or rows of texts into passes: token ids, shared prefix, packs."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from expertcut.data import Question, prompt
from expertcut.data.corpus import Row
from expertcut.data.questions import LETTERS
from expertcut.errors import ModelError
from expertcut.models.validate import file_of, token_ids
from expertcut.stats import Array


@dataclass(frozen=True)
class Encoded:
    """A chunk as token ids: each question's prompt and the answer tokens of its choices."""

    prompts: tuple[tuple[int, ...], ...]
    choice_ids: tuple[tuple[int, ...], ...]
    names: tuple[str, ...] = ()  # for errors
    cut_N: tuple[int, ...] = ()  # tokens that each prompt lost on the left; empty if none did

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> int:
        """Length of the longest prompt."""
        return max(map(len, self.prompts))

    @property
    def n_cut(self) -> int:
        """Number of truncated prompts."""
        return sum(n > 0 for n in self.cut_N)

    def part(self, questions: Iterable[int]) -> Self:
        """Some of its questions, in this order."""
        at = tuple(questions)
        picked = {name: tuple(own[q] for q in at) for name, own in vars(self).items() if own}
        return type(self)(**picked)

    def shared_prefix(self) -> int:
        """Length of the longest common prefix of all prompts, at most the shortest minus one."""
        low, high = min(self.prompts), max(self.prompts)
        same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), None)
        shortest = min(map(len, self.prompts)) - 1
        return shortest if same is None else min(same, shortest)


@dataclass(frozen=True)
class EncodedRows(Encoded):
    """Rows of texts, which have no choices: the tokens to predict (−1: none) and those that count.

    Each row is read by itself: a prefix that rows share is read in each of them.
    """

    next_ids: tuple[Array, ...] = ()
    counts: tuple[Array, ...] = ()

    def shared_prefix(self) -> int:
        """Nothing is shared."""
        return 0

    def of_pass(self, step: "Pass") -> tuple[Tensor, Tensor]:
        """Next tokens (T,) and which tokens count (T,) of a pass; pads predict nothing."""
        next_T = torch.full_like(step.question_T, -1)
        counts_T = torch.zeros_like(step.question_T, dtype=torch.bool)
        is_own_T = slice(None) if step.valid_T is None else step.valid_T
        own_next, own_counts = (
            torch.from_numpy(np.concatenate([kind[q] for q in step.questions]))
            for kind in (self.next_ids, self.counts)
        )
        next_T[is_own_T], counts_T[is_own_T] = own_next.long(), own_counts
        return next_T, counts_T


@dataclass(frozen=True)
class Pass:
    """One forward pass of T tokens, pads included: one packed row, or right-padded rows."""

    input_ids: Tensor
    positions: Tensor | None
    mask: Tensor | None
    questions: tuple[int, ...]  # positions in the chunk; none for the shared prefix
    answers_N: Tensor  # flat indices of their answer positions
    question_T: Tensor
    valid_T: Tensor | None = None  # None without pads

    @property
    def is_prefix(self) -> bool:
        """Whether this is the shared prefix."""
        return not self.questions

    @property
    def n_tokens(self) -> int:
        """Number of tokens without pads."""
        return len(self.question_T) if self.valid_T is None else int(self.valid_T.sum())


def encode(tokenizer: Any, questions: Sequence[Question], shots: Sequence[Question]) -> Encoded:
    """Token ids of the prompts; shots and question are tokenized together."""
    texts = [prompt(question, shots) for question in questions]
    prompts = [tuple(ids) for ids in token_ids(tokenizer, texts)]
    most = max(len(question.choices) for question in questions)
    answered = token_ids(tokenizer, [f"{texts[0]} {letter}" for letter in LETTERS[:most]])
    letters: list[int] = []
    for letter, (*before, last) in zip(LETTERS, answered, strict=False):
        if tuple(before) != prompts[0] or last in letters:  # a repeated one is <unk>
            raise ModelError(
                f"{file_of(tokenizer)} does not write ' {letter}' after 'Answer:' as one token of "
                "its own: this model cannot be scored by choice letters"
            )
        letters.append(last)
    names = tuple(f"question {q.row} of {q.subject} (counted from 0)" for q in questions)
    choice_ids = tuple(tuple(letters[: len(q.choices)]) for q in questions)
    return Encoded(tuple(prompts), choice_ids, names)


def encode_rows(rows: Sequence[Row]) -> EncodedRows:
    """Rows of texts, to be read in one chunk."""
    return EncodedRows(
        prompts=tuple(tuple(row.ids.tolist()) for row in rows),
        choice_ids=((),) * len(rows),
        names=tuple(row.document.where for row in rows),
        next_ids=tuple(row.next_T for row in rows),
        counts=tuple(row.counts_T for row in rows),
    )


def cut_packs(
    lengths: Sequence[int], most: int, *, n_most: float = math.inf, is_padded: bool = False
) -> Iterator[tuple[int, ...]]:
    """Consecutive items of at most this length in all, each padded to the longest or not.

    A pack has 1 to `n_most` items; one item alone may be longer.
    """
    pack: list[int] = []
    size = 0  # the longest length if padded, else the sum of all
    for item, length in enumerate(lengths):
        grown = max(size, length) if is_padded else size + length
        is_full = len(pack) == n_most or grown * (len(pack) + 1 if is_padded else 1) > most
        if pack and is_full:
            yield tuple(pack)
            pack, grown = [], length
        pack.append(item)
        size = grown
    if pack:
        yield tuple(pack)


def prefix_pass(ids: Sequence[int]) -> Pass:
    """The pass of the shared prefix."""
    no_answers_N = torch.empty(0, dtype=torch.long)
    return Pass(torch.tensor([ids]), None, None, (), no_answers_N, torch.full((len(ids),), -1))


def packed_pass(
    encoded: Encoded, questions: Sequence[int], n_prefix: int, *, is_masked: bool = True
) -> Pass:
    """Questions in one row; each attends only to the prefix and itself."""
    tails = [encoded.prompts[q][n_prefix:] for q in questions]
    lengths_N = torch.tensor([len(tail) for tail in tails])
    ends_N = lengths_N.cumsum(0)
    owner_T = torch.arange(len(tails)).repeat_interleave(lengths_N)
    positions_T = torch.arange(len(owner_T)) - (ends_N - lengths_N)[owner_T] + n_prefix
    mask = None
    if is_masked:
        itself_TT = (owner_T[:, None] == owner_T).tril_()
        prefix_TP = torch.ones(len(owner_T), n_prefix, dtype=torch.bool)
        mask = torch.cat([prefix_TP, itself_TT], dim=1)[None, None]  # (1, 1, T, P + T)
    return Pass(
        input_ids=torch.tensor([[token for tail in tails for token in tail]]),
        positions=positions_T[None],
        mask=mask,
        questions=tuple(questions),
        answers_N=ends_N - 1,
        question_T=torch.tensor(questions)[owner_T],
    )


def padded_pass(encoded: Encoded, questions: Sequence[int], pad_id: int) -> Pass:
    """One question per row, padded on the right; `mask` is (N, S)."""
    prompts = [encoded.prompts[q] for q in questions]
    width = max(map(len, prompts))
    rows = [[*ids, *[pad_id] * (width - len(ids))] for ids in prompts]
    lengths_N = torch.tensor([len(ids) for ids in prompts])
    mask_NS = torch.arange(width) < lengths_N[:, None]
    is_full = bool(mask_NS.all())
    return Pass(
        input_ids=torch.tensor(rows),
        positions=None,
        mask=None if is_full else mask_NS.long(),
        questions=tuple(questions),
        answers_N=torch.arange(len(rows)) * width + lengths_N - 1,
        question_T=torch.tensor(questions).repeat_interleave(width),
        valid_T=None if is_full else mask_NS.reshape(-1),
    )
