"""One chunk's forward passes, in turn."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from expertcut.errors import ModelError
from expertcut.moe.kernels.attention import Prefix, Split, attending
from expertcut.moe.kernels.last_block import OnRows, reading_answers
from expertcut.moe.loading import MoeModel
from expertcut.moe.memory import give_back, is_out_of_memory
from expertcut.moe.packing import (
    Encoded,
    Pass,
    cut_packs,
    cut_rows,
    packed_pass,
    padded_pass,
    prefix_pass,
)
from expertcut.moe.ways import Way, reset_rope

OnPass = Callable[[Pass], None]
Attention = Literal["split", "masked"]


def ignore(*_: object) -> None:
    """A listener that wants to know nothing."""


@dataclass(frozen=True)
class Watch:
    """Who listens to passes one by one, so that work may be left out and passes may fail.

    With it nothing but answers is read of the last MoE block, whose other tokens run only where
    this `keeps_all`; `on_rows` is told which tokens each of the block's calls gets, and whether
    what it gives is read. A pass that runs out of memory comes again in halves: `undo` then
    forgets what was seen of it.
    """

    begin: OnPass = ignore
    undo: OnPass = ignore
    on_rows: OnRows = ignore
    keeps_all: bool = False


@dataclass(frozen=True)
class How:
    """`last_layer` is the decoder layer in which only answers are read, None where all are."""

    way: Way
    batch_tokens: int
    attention: Attention
    last_layer: int | None


class Run:
    """The passes of one chunk."""

    def __init__(self, moe: MoeModel, encoded: Encoded, how: How, watch: Watch) -> None:
        self.moe, self.encoded, self.how, self.watch = moe, encoded, how, watch
        is_shared = how.way == "packed"
        self.n_prefix = encoded.shared_prefix() if is_shared else 0
        self.splits = is_shared and how.attention == "split"
        self.prefix: Prefix = {}
        self.cache = DynamicCache() if self.n_prefix and not self.splits else None

    def passes(self) -> Iterator[tuple[Pass, Tensor]]:
        """Each pass that answers questions, with its logits (N, V).

        Raises:
            ModelError: there is not enough memory for one question, or for a pass that must not
                come in halves.
        """
        if self.n_prefix:
            step = prefix_pass(self.encoded.prompts[0][: self.n_prefix])
            self.watch.begin(step)
            if self._attempt(step) is None:
                raise self._too_small(step)
        todo = self._cut()
        while todo:
            questions = todo.pop(0)
            step = self._step(questions)
            self.watch.begin(step)
            logits_NV = self._attempt(step)
            if logits_NV is not None:
                yield step, logits_NV
                continue
            if len(questions) == 1:
                raise self._too_small(step)
            give_back()
            self.watch.undo(step)
            half = len(questions) // 2
            todo = [questions[:half], questions[half:], *todo]

    def _too_small(self, step: Pass) -> ModelError:
        return ModelError(
            f"{self.moe.source.id}: not enough memory for {step.n_tokens} tokens at once, which "
            "cannot be cut smaller: free memory, or use another device"
        )

    def _too_large(self, step: Pass) -> ModelError:
        return ModelError(
            f"{self.moe.source.id}: not enough memory for {step.n_tokens} tokens at once: profile "
            f"or score with a --batch-tokens below {self.how.batch_tokens}, or on another device"
        )

    def _cut(self) -> list[tuple[int, ...]]:
        lengths = [len(ids) - self.n_prefix for ids in self.encoded.prompts]
        if self.how.way == "packed":
            return list(cut_packs(lengths, self.how.batch_tokens))
        return list(cut_rows(lengths, self.how.batch_tokens if self.how.way == "padded" else 0))

    def _step(self, questions: Sequence[int]) -> Pass:
        if self.how.way == "packed":
            return packed_pass(self.encoded, questions, self.n_prefix, is_masked=not self.splits)
        if self.how.way == "single":
            reset_rope(self.moe.model)
        pad_id = self.moe.model.config.get_text_config().pad_token_id or 0
        return padded_pass(self.encoded, questions, pad_id)

    def _attempt(self, step: Pass) -> Tensor | None:
        """The pass's logits; None where it ran out of memory and can be tried in halves."""
        try:
            return self._forward(step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.watch.undo is ignore:
                raise self._too_large(step) from None
            return None
        finally:
            layers: list[Any] = [] if self.cache is None else list(self.cache.layers)
            for layer in layers:
                if (n_more := layer.get_seq_length() - self.n_prefix) > 0:
                    layer.crop(-n_more)

    def _forward(self, step: Pass) -> Tensor:
        """Logits (N, V) at the answer positions; the vocabulary is projected nowhere else."""
        device = self.moe.device
        width = step.input_ids.shape[1]
        columns, column_N = (step.answers_N % width).unique(return_inverse=True)
        with ExitStack() as stack:
            self._enter(stack, step)
            logits_BCV = self.moe.model(
                input_ids=step.input_ids.to(device),
                attention_mask=None if step.mask is None else self._mask(step.mask.to(device)),
                position_ids=None if step.positions is None else step.positions.to(device),
                past_key_values=self.cache,
                use_cache=self.cache is not None,
                logits_to_keep=columns.to(device),
            ).logits
        result: Tensor = logits_BCV[step.answers_N // width, column_N]
        return result

    def _enter(self, stack: ExitStack, step: Pass) -> None:
        """What is put in place for one pass."""
        last, keeps_all = self.how.last_layer, self.watch.keeps_all
        if self.splits:
            lengths_N = step.answers_N.diff(prepend=torch.tensor([-1]))
            split = Split(self.prefix, lengths_N, last, step.answers_N, keeps_all=keeps_all)
            stack.enter_context(attending(self.moe.model, split))
        if last is not None:
            parts = (step.answers_N, step.input_ids.numel(), self.watch.on_rows)
            block = self.moe.blocks[-1]
            stack.enter_context(reading_answers(block, *parts, keeps_all=keeps_all))

    def _mask(self, mask: Tensor) -> Tensor:
        # eager adds its mask: a boolean one gives answers that are nats off, silently.
        if mask.ndim == 2 or self.moe.model.config._attn_implementation != "eager":
            return mask
        lowest = torch.finfo(self.moe.dtype).min
        return torch.zeros_like(mask, dtype=self.moe.dtype).masked_fill_(~mask, lowest)
