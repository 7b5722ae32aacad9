"""The scoring engine: log-probabilities of a chunk's choices, no token run twice, none a pad.

Three ways, one result (within 1e-4 in float32):

    packed  the shared prefix once, its KV cache read by all questions in 4-D-masked rows
    padded  right-padded rows without sharing: sliding windows, recurrent layers
    single  one prompt at a time: a RoPE that depends on the prompt's length, or a failed check
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from expertcut.errors import ModelError
from expertcut.moe.loading import MoeModel
from expertcut.moe.packing import (
    Encoded,
    Pass,
    cut_packs,
    cut_rows,
    encode,
    packed_pass,
    padded_pass,
    prefix_pass,
)
from expertcut.quiz import Quiz

logger = logging.getLogger(__name__)

Way = Literal["packed", "padded", "single"]
OnPass = Callable[[Pass], None]
CHECKED_QUESTIONS = 4


def ignore(_: Pass) -> None:
    """An `OnPass` that wants to know nothing."""


class Engine:
    """Scores chunks of one model; `way` is how most chunks go, found by `check`."""

    def __init__(self, moe: MoeModel, batch_tokens: int) -> None:
        self.moe = moe
        self.batch_tokens = batch_tokens
        self.is_trusted = True

    def check(self, encoded: Encoded) -> None:
        """Scores four questions both ways; where they differ, all go one by one from now on."""
        few = Encoded(encoded.prompts[:CHECKED_QUESTIONS], encoded.choice_ids[:CHECKED_QUESTIONS])
        way = self.way(few)
        if way == "single":
            return
        one_by_one_NC = self._score(few, "single", ignore)
        difference = (self._score(few, way, ignore) - one_by_one_NC).nan_to_num(0).abs().max()
        tolerance = 1e-4 if self.moe.dtype.itemsize >= 4 else 5e-2
        self.is_trusted = bool(difference <= tolerance)
        if not self.is_trusted:
            logger.warning(
                "%s scoring is off by %.2g on %d questions (at most %g allowed): "
                "scoring one prompt at a time instead",
                *(way, float(difference), len(few), tolerance),
            )

    def way(self, encoded: Encoded) -> Way:
        """How a chunk is scored: a function of the chunk and the model alone."""
        if not self.is_trusted or _rope_depends_on_length(self.moe.model.config, encoded.longest):
            return "single"
        return "packed" if _sees_everything(self.moe.model.config, encoded.longest) else "padded"

    def score(self, encoded: Encoded, on_pass: OnPass = ignore) -> Tensor:
        """Log p of each choice (N, C) float32; −inf where a question has fewer choices.

        `on_pass` is told of each forward pass before it starts.
        """
        return self._score(encoded, self.way(encoded), on_pass)

    @torch.inference_mode()
    def _score(self, encoded: Encoded, way: Way, on_pass: OnPass) -> Tensor:
        most = max(map(len, encoded.choice_ids))
        logprob_NC = torch.full((len(encoded), most), -torch.inf)
        for done, logits_NV in self._run(encoded, way, on_pass):
            logprob_NV = logits_NV.float().log_softmax(dim=-1)
            for question, logprob_V in zip(done.questions, logprob_NV, strict=True):
                ids = torch.tensor(encoded.choice_ids[question], device=logprob_V.device)
                logprob_NC[question, : len(ids)] = logprob_V[ids].cpu()
        if logprob_NC.isnan().any():
            raise ModelError(f"{self.moe.source.id} gives logits that are not numbers")
        return logprob_NC

    def _run(self, encoded: Encoded, way: Way, on_pass: OnPass) -> Iterator[tuple[Pass, Tensor]]:
        if way == "packed":
            yield from self._run_packed(encoded, on_pass)
            return
        tokens = self.batch_tokens if way == "padded" else 0
        pad_id = self.moe.model.config.get_text_config().pad_token_id or 0
        for rows in cut_rows([len(ids) for ids in encoded.prompts], tokens):
            if way == "single":
                _reset_rope(self.moe.model)
            step = padded_pass(encoded, rows, pad_id)
            on_pass(step)
            yield step, self._forward(step, None)

    def _run_packed(self, encoded: Encoded, on_pass: OnPass) -> Iterator[tuple[Pass, Tensor]]:
        n_prefix = encoded.shared_prefix()
        cache = DynamicCache() if n_prefix else None
        if cache is not None:
            step = prefix_pass(encoded.prompts[0][:n_prefix])
            on_pass(step)
            self._forward(step, cache)
        for pack in cut_packs([len(ids) - n_prefix for ids in encoded.prompts], self.batch_tokens):
            step = packed_pass(encoded, pack, n_prefix)
            on_pass(step)
            yield step, self._forward(step, cache)
            if cache is not None:
                cache.crop(-step.n_tokens)

    def _forward(self, step: Pass, cache: DynamicCache | None) -> Tensor:
        """Logits (N, V) at the answer positions; the vocabulary is projected nowhere else."""
        device = self.moe.device
        width = step.input_ids.shape[1]
        columns, column_N = (step.answers_N % width).unique(return_inverse=True)
        logits_BCV = self.moe.model(
            input_ids=step.input_ids.to(device),
            attention_mask=None if step.mask is None else self._mask(step.mask.to(device)),
            position_ids=None if step.positions is None else step.positions.to(device),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=columns.to(device),
        ).logits
        result: Tensor = logits_BCV[step.answers_N // width, column_N]
        return result

    def _mask(self, mask: Tensor) -> Tensor:
        # eager adds its mask: a boolean one gives answers that are nats off, silently.
        if mask.ndim == 2 or self.moe.model.config._attn_implementation != "eager":
            return mask
        lowest = torch.finfo(self.moe.dtype).min
        return torch.zeros_like(mask, dtype=self.moe.dtype).masked_fill_(~mask, lowest)


def ask(engine: Engine, quiz: Quiz, on_pass: OnPass = ignore) -> Tensor:
    """Log p of each choice (N, C) for a whole quiz, subject by subject."""
    scores = []
    for subject, questions in quiz.questions.items():
        shots = quiz.shots_by_subject[subject]
        scores.append(engine.score(encode(engine.moe.tokenizer, questions, shots), on_pass))
    most = max(score_NC.shape[1] for score_NC in scores)
    return torch.cat([F.pad(s, (0, most - s.shape[1]), value=-torch.inf) for s in scores])


def _sees_everything(config: Any, longest: int) -> bool:
    """True where every layer attends to all tokens before it, and positions can restart."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "alibi", False) or getattr(text, "attention_chunk_size", None):
        return False
    return all(
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= longest)
        for layer in DynamicCache(config=config).layers
    )


def _rope_depends_on_length(config: Any, longest: int) -> bool:
    text = config.get_text_config(decoder=True)
    ropes = list(_rope_settings(getattr(text, "rope_parameters", None) or {}))
    if any("dynamic" in rope["rope_type"] for rope in ropes):
        return True
    long = [rope for rope in ropes if "longrope" in rope["rope_type"]]
    limits = [
        rope.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for rope in long
    ]
    return any(longest > limit for limit in limits)


def _rope_settings(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One mapping per kind of layer where a model has several, else the one."""
    if "rope_type" in parameters:
        yield parameters
    for value in parameters.values():
        if isinstance(value, dict):
            yield from _rope_settings(value)


def _reset_rope(model: Any) -> None:
    """Back to the frequencies of a fresh model: a dynamic RoPE remembers the longest prompt."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq") and hasattr(module, "max_seq_len_cached"):
            module.inv_freq = module.original_inv_freq
            module.max_seq_len_cached = module.original_max_seq_len
