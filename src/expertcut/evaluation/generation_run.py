"""Writes the outputs of one model, batch by batch, into a file that is resumed.

`<out>.chunks/<model>-<8 hex of the settings>.generations.jsonl`: the settings, then a line for each
output, longest prompts first. The outputs of a batch are written together once all are complete,
and the next run begins behind the last whole batch: the same bytes, interrupted or not.
"""

import gc
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from pydantic import NonNegativeInt
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from expertcut.documents import Format1, Record
from expertcut.errors import ModelError, OutputError
from expertcut.evaluation.completions_server import CompletionsServer, Server
from expertcut.evaluation.generation import (
    Generated,
    GenerationInfo,
    Output,
    compare_generated,
    outputs_bytes,
    outputs_path,
    summarize,
)
from expertcut.evaluation.generation_prompts import ModelPrompts, Prompts
from expertcut.evaluation.results import Part
from expertcut.files import advance, parse_json, write_atomically
from expertcut.models.devices import is_out_of_memory
from expertcut.models.load import LoadOptions, load
from expertcut.models.validate import check_ids
from expertcut.profiling.locks import CLAIMS, POLL_S, Claims
from expertcut.profiling.workers import Progress
from expertcut.scoring.engine import advice
from expertcut.scoring.packing import cut_packs
from expertcut.scoring.passes import reset_rope, scoring_mode

DEFAULT_CACHE_TOKENS = 16_384  # of a batch: prompts and new tokens, with pads
_MOST_ROWS = 64
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateOptions:
    """How outputs are written; a temperature of 0 is greedy."""

    load_as: LoadOptions
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    batch_tokens: int | None = None
    threads: int | None = None


class GenerationSettings(Record):
    """The first line of the file: all that its bytes depend on."""

    format: Format1 = 1
    fingerprint: str
    prompts_sha256: str  # of the token ids
    end_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    seed: int | None
    runs_as: dict[str, str | int | None]  # of a model or a server


class _Line(Record):
    """An output and the number of its prompt."""

    prompt: NonNegativeInt
    ids: tuple[NonNegativeInt, ...]
    text: str
    is_ended: bool


class Writer(Protocol):
    """What writes outputs: a model here, or a server."""

    @property
    def runs_as(self) -> dict[str, str | int | None]:
        """What the outputs depend on, besides prompts and options."""

    def batches(self, lengths: Sequence[int]) -> list[tuple[int, ...]]:
        """Positions of the prompts of each batch, from their lengths in tokens."""

    def complete(self, prompts: Sequence[tuple[int, ...]], seed: int) -> list[Output]:
        """An output for each prompt of token ids."""


class LocalModel:
    """A loaded model; `generate` of transformers runs it, with left padding."""

    def __init__(self, prompts: ModelPrompts, options: GenerateOptions) -> None:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.prompts, self.options = prompts, options
        self.moe = load(prompts.source, options.load_as)
        self.cache_tokens = options.batch_tokens or DEFAULT_CACHE_TOKENS
        self.pad_id = self.moe.tokenizer.pad_token_id or (*prompts.end_ids, 0)[0]
        self.n_done, self.n_all = 0, len(prompts.ids) * options.max_new_tokens
        n_embeddings = len(self.moe.model.get_input_embeddings().weight)
        for ids in prompts.ids:
            check_ids(prompts.source.path, ids, n_embeddings)
        longest = max(map(len, prompts.ids)) + options.max_new_tokens
        self.is_batched = scoring_mode(self.moe.model.config, longest) != "single"
        self.is_batched = self.is_batched and self._pads_well()

    @property
    def runs_as(self) -> dict[str, str | int | None]:
        """Dtype, device, kernels and versions."""
        config, on_cpu = self.moe.model.config, self.moe.device.type == "cpu"
        return {
            "dtype": str(self.moe.dtype).removeprefix("torch."),
            "device_type": self.moe.device.type,
            "threads": torch.get_num_threads(),
            "cache_tokens": self.cache_tokens if self.is_batched else None,
            "attention": str(config._attn_implementation),
            "experts_implementation": str(config._experts_implementation),
            "cpu_capability": torch.backends.cpu.get_cpu_capability() if on_cpu else None,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def batches(self, lengths: Sequence[int]) -> list[tuple[int, ...]]:
        """As many prompts as fit in the cache, with their outputs."""
        sizes = [n + self.options.max_new_tokens for n in lengths]
        budget = self.cache_tokens if self.is_batched else 0
        return list(cut_packs(sizes, budget, n_most=_MOST_ROWS, is_padded=True))

    def complete(self, prompts: Sequence[tuple[int, ...]], seed: int) -> list[Output]:
        """Greedy or sampled outputs up to an end token."""
        if not self.is_batched:
            reset_rope(self.moe.model)
        torch.manual_seed(seed)
        most, temperature = self.options.max_new_tokens, self.options.temperature
        config = self._config(most)
        if temperature:
            config.update(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
        found = self._generate(prompts, config, [_Watch(self, len(prompts))])
        self.n_done += len(prompts) * most
        return [self._output(ids) for ids in found.sequences[:, max(map(len, prompts)) :].tolist()]

    def _output(self, ids: list[int]) -> Output:
        """Without the end token and the pads behind it."""
        ends = set(self.prompts.end_ids)
        length = next((at for at, token in enumerate(ids) if token in ends), len(ids))
        text: str = self.moe.tokenizer.decode(ids[:length], skip_special_tokens=True)
        return Output(tuple(ids[:length]), text, length < len(ids))

    def _config(self, max_new_tokens: int) -> GenerationConfig:
        ends = self.prompts.end_ids
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(ends) or None,
            pad_token_id=self.pad_id,
            use_cache=True,
            return_dict_in_generate=True,
        )

    @torch.inference_mode()
    def _generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        config: GenerationConfig,
        processors: Sequence[LogitsProcessor] = (),
    ) -> Any:
        moe, width = self.moe, max(map(len, prompts))
        padded_BT = [[self.pad_id] * (width - len(ids)) + list(ids) for ids in prompts]
        mask_BT = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        try:
            return moe.model.generate(
                torch.tensor(padded_BT, device=moe.device),
                attention_mask=torch.tensor(mask_BT, device=moe.device),
                generation_config=config,
                logits_processor=LogitsProcessorList(processors),
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size = len(prompts) * (width + config.max_new_tokens)
            raise ModelError(
                f"{moe.source.id}: not enough memory for a batch of {size:,} tokens: lower "
                "--batch-tokens or --max-new-tokens"
            ) from None

    def _pads_well(self) -> bool:
        """Whether the shortest prompt goes on beside the longest as alone; warns if not.

        A faulty mask would show it pads, and recurrent layers might read them.
        """
        by_length = sorted(self.prompts.ids, key=len)
        if len(by_length[0]) == len(by_length[-1]):
            return True
        config = self._config(2)  # the second token reads the cache
        config.update(output_logits=True)
        alone = self._generate(by_length[:1], config).logits
        padded = self._generate([by_length[0], by_length[-1]], config).logits
        off = 0.0
        for alone_BV, padded_BV in zip(alone, padded, strict=False):
            a_V, b_V = (x_BV[0].float().log_softmax(dim=-1) for x_BV in (alone_BV, padded_BV))
            off = max(off, float((a_V - b_V).nan_to_num(0).abs().max()))
            if int(a_V.argmax()) != int(b_V.argmax()):  # a near tie, and then other texts
                break
        allowed = 5e-2 if self.moe.dtype.itemsize < 4 else 1e-4
        if off > allowed:
            logger.warning(
                "%s: a padded prompt is off by %.2g (at most %g allowed): generating from one "
                "prompt at a time instead",
                *(self.moe.source.id, off, allowed),
            )
        return off <= allowed


class _Watch(LogitsProcessor):
    """Stops at non-finite logits, whose likeliest token means nothing; reports progress."""

    def __init__(self, model: LocalModel, n_prompts: int) -> None:
        self.model, self.n_prompts, self.n_steps = model, n_prompts, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        moe = self.model.moe
        if not bool(scores.amax(dim=-1).isfinite().all()):
            dtype = str(moe.dtype).removeprefix("torch.")
            raise ModelError(f"{moe.source.id}: non-finite logits in {dtype}: {advice(moe)}")
        self.n_steps += 1
        done = self.model.n_done + self.n_prompts * self.n_steps
        advance(f"generating with {moe.source.name}", done, self.model.n_all, "tokens")
        return scores


def generate(
    prompts: ModelPrompts,
    options: GenerateOptions,
    folder: Path,
    server: Server | None = None,
) -> Iterator[Progress | Generated]:
    """Progress of the outputs of a model, here or on a server, into the folder; then all of them.

    Another process at the same file is waited for, and its outputs are taken over.
    """
    writer = _writer(prompts, options, server)
    settings = GenerationSettings(
        fingerprint=prompts.source.fingerprint,
        prompts_sha256=_sha256(list(prompts.ids)),
        end_ids=prompts.end_ids,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed if options.temperature else None,
        runs_as=writer.runs_as,
    )
    name = f"{prompts.source.name}-{_sha256(settings.model_dump(mode='json'))[:8]}"
    order = sorted(range(len(prompts.ids)), key=lambda n: -len(prompts.ids[n]))
    packs = writer.batches([len(prompts.ids[n]) for n in order])
    batches = [[order[at] for at in pack] for pack in packs]
    kept = _OutputFile(folder / f"{name}.generations.jsonl", settings)
    with Claims(folder / CLAIMS) as claims:
        while not claims.take(kept.path.name):
            time.sleep(POLL_S)
        n_whole = kept.load(batches)
        n_before = len(kept.outputs)
        for number, batch in enumerate(batches):
            if number >= n_whole:
                seed = int(_sha256([options.seed, number])[:8], 16)
                outputs = writer.complete([prompts.ids[n] for n in batch], seed)
                kept.append(dict(zip(batch, outputs, strict=True)))
            n_done = len(kept.outputs) if number >= n_whole else n_before
            yield Progress(n_done, len(order), n_done - n_before)
    del writer
    gc.collect()
    outputs_N = tuple(kept.outputs[n] for n in range(len(order)))
    vocabulary = prompts.tokenizer_hash if server is None else None
    yield Generated(outputs_N, prompts.encode, vocabulary)


def save_outputs(
    prompts: Prompts, found: Sequence[Generated], options: GenerateOptions, results: Path
) -> GenerationInfo:
    """Writes the outputs of all models beside the results."""
    file, names = outputs_path(results), [model.source.id for model in prompts.models]
    write_atomically(file, outputs_bytes(prompts.models[0].texts, names, found))
    return GenerationInfo(
        prompts=prompts.file.name,
        prompts_sha256=prompts.sha256,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed if options.temperature else None,
        outputs=file.name,
    )


def judge(found: Sequence[Generated], info: GenerationInfo) -> Part:
    """All models' outputs, and those of the others compared with the first's."""
    most = info.max_new_tokens
    models = [summarize(each.outputs, most) for each in found]
    changes = [compare_generated(found[0], other, most) for other in found[1:]]
    return Part("generation", models, changes, info)


def _writer(prompts: ModelPrompts, options: GenerateOptions, server: Server | None) -> Writer:
    if server is None:
        return LocalModel(prompts, options)
    names = (prompts.source.id, str(prompts.source.path.resolve()), prompts.source.name)
    name = server.model_name(names)
    return CompletionsServer(
        server, name, options.max_new_tokens, options.temperature, prompts.encode
    )


class _OutputFile:
    """The file of one model's outputs; `outputs` are those that it holds, by prompt."""

    def __init__(self, path: Path, settings: GenerationSettings) -> None:
        self.path = path
        self.head = f"{settings.model_dump_json()}\n".encode()
        self.outputs: dict[int, Output] = {}

    def load(self, batches: Sequence[Sequence[int]]) -> int:
        """The number of whole batches; what lies behind them is cut off."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.seek(0)
                is_ours = file.readline() == self.head
                end, n_whole = (file.tell(), 0) if is_ours else (0, 0)
                for batch in batches if is_ours else ():
                    lines = [_read_line(file.readline(), prompt) for prompt in batch]
                    if None in lines:
                        break
                    self.outputs |= {n: o for n, o in zip(batch, lines, strict=True) if o}
                    end, n_whole = file.tell(), n_whole + 1
                file.truncate(end)
                if not is_ours:
                    file.write(self.head)
        except OSError as error:
            raise self._cannot_be_written(error) from None
        return n_whole

    def append(self, outputs: Mapping[int, Output]) -> None:
        """Adds a whole batch."""
        lines = [_Line(prompt=n, **vars(o)).model_dump_json() for n, o in outputs.items()]
        try:
            with self.path.open("ab") as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._cannot_be_written(error) from None
        self.outputs |= outputs

    def _cannot_be_written(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path} cannot be written: {error.strerror}")


def _read_line(line: bytes, prompt: int) -> Output | None:
    """The output of a line; None if it is damaged or of another prompt."""
    try:
        found = _Line.model_validate(parse_json(line), strict=False)
    except ValueError:  # pydantic's too
        return None
    if found.prompt != prompt or not line.endswith(b"\n"):
        return None
    return Output(found.ids, found.text, found.is_ended)


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
