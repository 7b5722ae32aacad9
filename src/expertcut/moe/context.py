"""Prompts and the model's context: those that do not fit are refused, or lose tokens on the left.

What is cut is what lm-evaluation-harness 0.4.13 cuts (`HFLM._loglikelihood_tokens`): the last
tokens of prompt and choice stay, as many as the context has places and one more, which is the
choice and is not run. So a prompt keeps as many tokens as there are places, loses its first ones,
a BOS among them, and its positions start at 0.
"""

from collections.abc import Iterator
from os.path import commonprefix
from typing import Any

from expertcut.data import Quiz, prompt
from expertcut.errors import ModelError
from expertcut.moe.loading import MoeModel
from expertcut.moe.packing import Encoded
from expertcut.moe.ways import grows_with_prompt

# In the order in which lm-evaluation-harness looks at them.
_PLACES = ("n_positions", "max_position_embeddings", "n_ctx")
_UNSET = 10**12  # tokenizers that know no length say 1e30
_SEAM = 16  # tokens that a text may have more when it is cut in two


def context_length(config: Any, tokenizer: Any) -> int | None:
    """How many tokens a model takes, as lm-evaluation-harness reads it; None where nothing says."""
    text = config.get_text_config(decoder=True)
    found = next((n for n in (getattr(text, name, None) for name in _PLACES) if n), None)
    length = found or getattr(tokenizer, "model_max_length", None)
    return int(length) if length and length < _UNSET else None


class Context:
    """One model's context: its `length`, None where nothing says, and whether it `takes_more`."""

    def __init__(self, moe: MoeModel) -> None:
        self.moe = moe
        self.length = context_length(moe.model.config, moe.tokenizer)
        self.takes_more = grows_with_prompt(moe.model.config)

    def fit(self, encoded: Encoded, quiz: Quiz) -> Encoded:
        """A chunk of the quiz with its prompts cut where the quiz says so.

        Raises:
            ModelError: the quiz says nothing, and a prompt is longer than the context.
        """
        if self.length is None or encoded.longest <= self.length:
            return encoded
        if quiz.truncate == "left":
            return encoded.cut_left(self.length)
        if self.takes_more:
            return encoded
        n_long = sum(len(ids) > self.length for ids in encoded.prompts)
        raise self._too_long(n_long, len(encoded), encoded.longest)

    def check(self, quiz: Quiz) -> None:
        """Refuses a quiz with a prompt that is too long, unless it says how such are cut.

        Only prompts that might be are made into tokens.

        Raises:
            ModelError: with how many there are, and how long the longest is.
        """
        if self.length is None or quiz.truncate or self.takes_more:
            return
        lengths = [n for n in self.possible(quiz, self.length) if n > self.length]
        if lengths:
            raise self._too_long(len(lengths), len(quiz), max(lengths))

    def possible(self, quiz: Quiz, limit: int) -> Iterator[int]:
        """Tokens of each prompt that may have more than the limit.

        A text has at most as many tokens as bytes, and what stands before a subject's questions is
        the same for all of them.
        """
        tokenizer = self.moe.tokenizer
        for subject, questions in quiz.questions.items():
            shots = quiz.shots_by_subject[subject]
            texts = [prompt(question, shots) for question in questions]
            before = commonprefix(texts)  # noqa: RUF071 - of texts, as it is meant here
            n_before = len(tokenizer(before)["input_ids"])
            for text in texts:
                if n_before + len(text[len(before) :].encode()) + _SEAM > limit:
                    yield len(tokenizer(text)["input_ids"])

    def _too_long(self, n_long: int, n_all: int, longest: int) -> ModelError:
        return ModelError(
            f"{n_long} of {n_all} prompts have more tokens than the {self.length} of the context "
            f"of {self.moe.source.id}, the longest {longest}: ask with fewer --shots, or with "
            "--truncate left, which cuts them as lm-evaluation-harness does"
        )
