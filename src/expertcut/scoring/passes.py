"""Runs the forward passes of a chunk: scoring mode, memory, last-block trick and replay."""

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from expertcut.errors import ModelError
from expertcut.models.devices import give_back, is_out_of_memory
from expertcut.models.hooks import Scope, own_forward, registered, replaced_forward
from expertcut.models.load import MoeModel
from expertcut.models.moe_block import MoeBlock
from expertcut.scoring import packing
from expertcut.scoring.attention import Prefix, Split, attending, groups
from expertcut.scoring.packing import Encoded, Pass, cut_packs, packed_pass, padded_pass
from expertcut.scoring.projection import Projection
from expertcut.stats import Array

ScoringMode = Literal["packed", "padded", "single"]
OnRows = Callable[[Tensor, bool], None]
OnPass = Callable[[Pass], None]
Attention = Literal["split", "masked"]


def scoring_mode(config: Any, longest: int) -> ScoringMode:
    """The mode for prompts of at most this length: a function of length and model alone."""
    text = config.get_text_config(decoder=True)
    rope_limits = [
        rope.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for rope in _ropes(config)
        if "longrope" in rope["rope_type"]
    ]
    depends_on_length = grows_with_prompt(config) or longest > min(rope_limits, default=longest)
    if depends_on_length or _attention_is_sparse(config, longest):
        return "single"
    if getattr(text, "alibi", False) or getattr(text, "attention_chunk_size", None):
        return "padded"  # positions cannot restart
    sees_everything = all(
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= longest)
        for layer in DynamicCache(config=config).layers
    )
    return "packed" if sees_everything else "padded"


def _attention_is_sparse(config: Any, longest: int) -> bool:
    # Of DeepSeek-V3.2, GLM-5, ...: an index would also select pads and other questions.
    most = getattr(config.get_text_config(decoder=True), "index_topk", None)
    return most is not None and longest > most


def grows_with_prompt(config: Any) -> bool:
    """Whether RoPE scales with the prompt length, so the context has no limit."""
    return any("dynamic" in rope["rope_type"] for rope in _ropes(config))


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The settings of RoPE, one mapping per kind of layer or the only one."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    by_kind = [value for value in parameters.values() if isinstance(value, dict)]
    return [rope for rope in (parameters, *by_kind) if "rope_type" in rope]


def reset_rope(model: Any) -> None:
    """Makes a dynamic RoPE, which remembers the longest prompt, as it was loaded."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq") and hasattr(module, "max_seq_len_cached"):
            module.inv_freq = module.original_inv_freq
            module.max_seq_len_cached = module.original_max_seq_len


def last_decoder_layer(model: Any, blocks: Sequence[MoeBlock]) -> int | None:
    """The number of the last decoder layer, if it ends in the last MoE block."""
    match = re.fullmatch(r"(?P<list>.+)\.(?P<number>\d+)\.[^.]+", blocks[-1].name)
    is_last = match and int(match["number"]) == len(model.get_submodule(match["list"])) - 1
    return int(match["number"]) if match and is_last else None


def reading_answers(block: MoeBlock, answers_N: Tensor, watch: "PassObserver") -> Scope:
    """Runs a block on the answer positions only; its output elsewhere is zero."""
    forward, inside = own_forward(block.module), set(block.module.modules())
    steps = block.residual.steps if block.residual is not None and watch.keeps_all else ()
    following = [step.module for step in steps if step.module not in inside]

    def run(x_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
        def call(rows_M: Tensor) -> Any:
            picked = [_rows(value, x_BTD.shape[:-1], rows_M) for value in (x_BTD, *args)]
            named = {k: _rows(value, x_BTD.shape[:-1], rows_M) for k, value in kwargs.items()}
            return forward(*picked, **named)

        def watched(output: Any) -> Any:
            y_MD = output[0] if isinstance(output, tuple) else output
            for module in following:  # whoever observes them sees these rows alone
                y_MD = module(y_MD)
            return output

        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        answers = answers_N.to(x_TD.device)
        watch.on_rows(answers, True)
        output = watched(call(answers))
        is_pair = isinstance(output, tuple)  # some also return router scores
        y_TD = torch.zeros_like(x_TD)
        y_TD[answers] = (output[0] if is_pair else output).reshape(-1, x_TD.shape[-1])
        if watch.keeps_all:
            is_other_T = torch.ones(len(x_TD), dtype=torch.bool).index_fill(0, answers_N, False)
            others = is_other_T.nonzero()[:, 0].to(x_TD.device)
            watch.on_rows(others, False)
            watched(call(others))
        y_BTD = y_TD.view_as(x_BTD)
        return (y_BTD, *output[1:]) if is_pair else y_BTD

    return replaced_forward(block.module, run)


def _rows(value: Any, shape: torch.Size, rows_M: Tensor) -> Any:
    """The rows of an argument with one entry per token, in its rank, or the argument itself."""
    if not isinstance(value, Tensor) or value.shape[: len(shape)] != shape:
        return value
    own_M = value.reshape(shape.numel(), *value.shape[len(shape) :])[rows_M.to(value.device)]
    return own_M.reshape(*[1] * (len(shape) - 1), *own_M.shape)


def ignore(*_: object) -> None:
    """An observer that does nothing."""


@dataclass(frozen=True)
class PassObserver:
    """Observes single passes; allows the last-block trick and splitting of passes."""

    begin: OnPass = ignore
    undo: OnPass = ignore  # before a pass that ran out of memory is split in halves
    # Before the last MoE block runs on these tokens, and whether its output is used: on the answers
    # and, with `keeps_all`, then on the others.
    on_rows: OnRows = ignore
    keeps_all: bool = False


@dataclass
class Run:
    """The passes of one chunk; `last_layer` is the decoder layer that runs on answers only.

    With a `projection`, a pass gives the hidden states (T, H) of all its tokens instead of logits.
    """

    moe: MoeModel
    encoded: Encoded
    watch: PassObserver
    mode: ScoringMode
    batch_tokens: int
    attention: Attention
    last_layer: int | None
    projection: Projection | None = None

    def __post_init__(self) -> None:
        is_shared = self.mode == "packed"
        self.n_prefix = self.encoded.shared_prefix() if is_shared else 0
        self.splits = is_shared and self.attention == "split"
        self.prefix: Prefix = {}
        self.cache = DynamicCache() if self.n_prefix and not self.splits else None

    def passes(self) -> Iterator[tuple[Pass, Tensor]]:
        """Each pass with questions and its logits (N, V), or its hidden states (T, H)."""
        lengths = [len(ids) - self.n_prefix for ids in self.encoded.prompts]
        budget = 0 if self.mode == "single" else self.batch_tokens
        todo = list(cut_packs(lengths, budget, is_padded=self.mode != "packed"))
        if self.n_prefix:
            todo.insert(0, ())
        while todo:
            questions = todo.pop(0)
            step = self._pass(questions)
            self.watch.begin(step)
            logits_NV = self._attempt(step)
            if logits_NV is None:
                give_back()
                self.watch.undo(step)
                half = len(questions) // 2
                todo = [questions[:half], questions[half:], *todo]
            elif questions:
                yield step, logits_NV

    def _pass(self, questions: Sequence[int]) -> Pass:
        if not questions:
            return packing.prefix_pass(self.encoded.prompts[0][: self.n_prefix])
        if self.mode == "packed":
            return packed_pass(self.encoded, questions, self.n_prefix, is_masked=not self.splits)
        if self.mode == "single":
            reset_rope(self.moe.model)
        pad_id = self.moe.model.config.get_text_config().pad_token_id or 0
        return padded_pass(self.encoded, questions, pad_id)

    def _attempt(self, step: Pass) -> Tensor | None:
        """The logits of a pass; None if it ran out of memory and can be split in halves."""
        try:
            return self._forward(step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Of processes that hold one model the others still wait in the pass.
            if self.watch.undo is ignore or self.moe.group is not None:
                below = f"a --batch-tokens below {self.batch_tokens}, or on another device"
                advice = f": profile or score with {below}"
            elif len(step.questions) > 1:
                return None
            else:
                advice = ", which cannot be cut smaller: free memory, or use another device"
            what = f"not enough memory for {step.n_tokens} tokens at once"
            raise ModelError(f"{self.moe.source.id}: {what}{advice}") from None
        finally:
            layers: Any = () if self.cache is None else self.cache.layers
            for layer in layers:
                if (n_more := layer.get_seq_length() - self.n_prefix) > 0:
                    layer.crop(-n_more)

    def _forward(self, step: Pass) -> Tensor:
        """Logits (N, V) at the answer positions; only there is the vocabulary projected.

        With a projection hidden states (T, H), of which it makes logits.
        """
        device, last, keeps_all = self.moe.device, self.last_layer, self.watch.keeps_all
        width = step.input_ids.shape[1]
        columns, column_N = (step.answers_N % width).unique(return_inverse=True)
        with ExitStack() as stack:
            if self.splits:
                lengths_N = step.answers_N.diff(prepend=torch.tensor([-1]))
                split = Split(self.prefix, groups(lengths_N), last, step.answers_N, keeps_all)
                stack.enter_context(attending(self.moe.model, split))
            if last is not None:
                block = self.moe.blocks[-1]
                stack.enter_context(reading_answers(block, step.answers_N, self.watch))
            ids, mask = step.input_ids.to(device), step.mask
            mask = None if mask is None else self._mask(mask.to(device))
            positions = None if step.positions is None else step.positions.to(device)
            if self.projection is not None:
                halves, run = self.projection, self.moe.model
                return halves.hidden(run, ids, mask, position_ids=positions).flatten(0, 1)
            logits_BCV = self.moe.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=self.cache is not None,
                logits_to_keep=columns.to(device),
            ).logits
        if logits_BCV.shape[1] != len(columns):  # some models give those of all positions
            column_N = columns[column_N]
        result: Tensor = logits_BCV[step.answers_N // width, column_N]
        return result

    def _mask(self, mask: Tensor) -> Tensor:
        # eager adds its mask: a boolean one would give wrong answers silently.
        if mask.ndim == 2 or self.moe.model.config._attn_implementation != "eager":
            return mask
        lowest = torch.finfo(self.moe.dtype).min
        return torch.zeros_like(mask, dtype=self.moe.dtype).masked_fill_(~mask, lowest)


@dataclass(frozen=True)
class Layer:
    """The decoder layer that runs, and the arrays of the chunk from the layers before."""

    number: int
    is_last: bool
    before: Mapping[str, Array]
    bad: str = ""  # the first of them with a non-finite output


class Decoders:
    """The decoder layers of a model, which run from stored outputs and end early in a context."""

    def __init__(self, model: Any, blocks: Sequence[MoeBlock]) -> None:
        self.blocks = blocks
        self.number_of: dict[int, int] = {}  # by MoE block; empty if the names do not tell
        self.modules: list[nn.Module] = []
        pattern = re.compile(r"(?P<list>.+)\.(?P<number>\d+)\..+")
        found = [match for block in blocks if (match := pattern.fullmatch(block.name))]
        if len(found) == len(blocks) and len({match["list"] for match in found}) == 1:
            numbers = [int(match["number"]) for match in found]
            self.number_of = dict(zip((block.layer for block in blocks), numbers, strict=True))
            self.modules = list(model.get_submodule(found[0]["list"]).children())

    def storing(self, number: int, outputs: list[Any]) -> Scope:
        """Appends the input of decoder layer `number`, above 0, in each pass."""
        hook = self.modules[number - 1].register_forward_hook(
            lambda _module, _args, output: outputs.append(output)
        )
        return registered([hook])

    def _mixer(self, number: int) -> nn.Module:
        """The attention of a decoder layer: its largest child beside the MoE block."""
        inside = {
            id(part) for block in self.blocks for part in (block.module, *block.router.modules())
        }
        others = [
            child
            for child in self.modules[number].children()
            if not inside & set(map(id, child.modules()))
        ]
        return max(others, key=lambda child: sum(own.numel() for own in child.parameters()))

    def storing_attention(self, block: MoeBlock, outputs: list[Any]) -> Scope:
        """Appends the outputs of the attention before a MoE block, one in each pass."""
        last = deque[Any](maxlen=1)
        mixer = self._mixer(self.number_of[block.layer])

        def keep(_module: nn.Module, _args: Any) -> None:
            if last:
                outputs.append(last.pop())

        return registered(
            [
                mixer.register_forward_hook(lambda _module, _args, output: last.append(output)),
                block.router.register_forward_pre_hook(keep),
            ]
        )

    def given_attention(self, number: int, outputs: Sequence[Any]) -> Scope:
        """The stored outputs of a decoder layer's attention in its place, pass by pass."""
        left = iter(outputs)
        return replaced_forward(self._mixer(number), lambda *_, **__: next(left))

    def starting_at(self, number: int, outputs: Sequence[Any]) -> Scope:
        """Runs from decoder layer `number` on, from its stored inputs, pass by pass."""
        n_done = 0

        def stored(*_args: Any, is_last: bool, **_kwargs: Any) -> Any:
            nonlocal n_done
            n_done += is_last
            return outputs[n_done - is_last]  # only the last replaced layer's is used

        return registered(
            replaced_forward(module, partial(stored, is_last=place == number))
            for place, module in enumerate(self.modules[:number], start=1)
        )

    def ending_at(self, number: int) -> Scope:
        """Runs no decoder layer after `number`, whose output becomes that of the last."""
        last = deque[Any](maxlen=1)
        later = self.modules[number + 1 :]
        hook = self.modules[number].register_forward_hook(
            lambda _module, _args, output: last.append(output)
        )
        given = (replaced_forward(module, lambda *_, **__: last[0]) for module in later)
        return registered([hook, *given])


class Replay:
    """Stores the outputs of decoder layers in a first run; later runs start from them.

    Nothing before a changed router changes. Runs must have the same passes in the same order. The
    deepest layers that fit in `budget_bytes` are stored; without any, the whole model runs.
    """

    def __init__(
        self, model: Any, blocks: Sequence[MoeBlock], n_tokens: int, budget_bytes: int
    ) -> None:
        self.decoders = Decoders(model, blocks)
        self.decoder_of = self.decoders.number_of
        self.outputs: dict[int, list[Any]] = {}
        deepest = sorted({n for n in self.decoder_of.values() if n}, reverse=True)
        weight = model.get_input_embeddings().weight
        n_kept = budget_bytes // (n_tokens * weight.shape[1] * weight.element_size())
        self.starts = tuple(deepest[:n_kept])

    def recording(self) -> Scope:
        """Stores the inputs of the layers that later runs may start at."""
        self.outputs = {number: [] for number in self.starts}
        return registered(self.decoders.storing(*stored) for stored in self.outputs.items())

    def starting_at(self, layer: int) -> Scope:
        """Runs from the decoder layer of this MoE block on, or from an earlier stored one."""
        number = max((n for n in self.starts if n <= self.decoder_of[layer]), default=0)
        return self.decoders.starting_at(number, self.outputs.get(number, []))
