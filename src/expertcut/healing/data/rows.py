"""From questions and texts to rows of token ids.

A row of a quiz is a prompt whose shots are other questions of the same split: so no dev question is
trained on, every question of the row is, and each is met with all numbers of shots.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from expertcut.data import Question, answer_letter, prompt
from expertcut.errors import ModelError


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
