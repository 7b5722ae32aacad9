"""From a checkpoint's folder to a model whose experts can be watched."""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from expertcut.errors import ModelError, SettingsError
from expertcut.moe.contract import MoeBlock, find_blocks
from expertcut.moe.kernels.experts import BY_EXPERT
from expertcut.moe.kernels.products import use_faster_products
from expertcut.moe.loading.devices import find_device, runs_on, spread
from expertcut.moe.loading.own_code import runs_our_code_only
from expertcut.moe.loading.sources import Source, read_config

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 16
_BRINGS_CODE = "brings code of its own: read that, then --trust-remote-code"
_ALIGNMENT_BYTES = 64  # what torch gives to new tensors
_MEMORY_PER_WEIGHT_BYTE = 1.25  # with what loading and running it need beside


@dataclass(frozen=True)
class LoadOptions:
    """How to load: the options shared by every command that runs a model.

    `dtype` `stored` is the checkpoint's own, `auto` is float32 on CPU and `stored` elsewhere;
    `device` `auto` is CUDA where there is one. `device_map` `auto` spreads the model over all
    devices and the CPU, within `max_memory` (`0=20GiB,cpu=60GiB`), and what fits in none is read
    from the folder `offload`.
    """

    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    device_map: str | None = None
    max_memory: str | None = None
    offload: Path | None = None


@dataclass(frozen=True)
class MoeModel:
    """A loaded model, its tokenizer, its MoE blocks, and the checkpoint it came from."""

    source: Source
    model: Any
    tokenizer: Any
    blocks: tuple[MoeBlock, ...]

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return runs_on(self.model.get_input_embeddings())


def load(source: Source, options: LoadOptions) -> MoeModel:
    """The model in eval mode, without gradients, experts run in a reproducible way.

    Raises:
        ModelError: weights or tokenizer that do not fit config.json.
    """
    device = find_device(options.device)
    spreading = spread(options.device, options.device_map, options.max_memory, options.offload)
    trusting = replace(options, trust_remote_code=_may_run_code(source, options))
    config = _from_pretrained(AutoConfig, source, trusting)
    model, info = _from_pretrained(
        AutoModelForCausalLM,
        source,
        trusting,
        config=config,
        dtype=_dtype(options.dtype, device),
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # refused below, by name
        output_loading_info=True,
        **spreading,
    )
    _check_weights(source, info, is_trusted=trusting.trust_remote_code)
    model = (model if spreading else model.to(device)).eval().requires_grad_(False)
    set_attention(model)
    device = runs_on(model.get_input_embeddings())
    if device.type == "cpu":
        # The loop that statistics watch too, so they change no bit.
        model.set_experts_implementation(BY_EXPERT)
        use_faster_products(model)
        _align(model)
    tokenizer = _from_pretrained(AutoTokenizer, source, options)
    _check_tokenizer(source, tokenizer, len(model.get_input_embeddings().weight))
    probe_1T = torch.arange(_PROBE_TOKENS, device=device)[None] % model.config.vocab_size
    return MoeModel(source, model, tokenizer, find_blocks(model, probe_1T))


def fits_in_memory(source: Source, options: LoadOptions) -> bool:
    """Whether the weights, in the dtype that they will have, fit in what is free on the device."""
    device = find_device(options.device)
    dtype = _dtype(options.dtype, device)
    n_values = n_bytes = 0
    for file in source.weight_files:
        n_bytes += file.stat().st_size
        with safe_open(file, framework="pt") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
            n_values += sum(map(math.prod, shapes))
    if isinstance(dtype, torch.dtype):
        n_bytes = n_values * dtype.itemsize
    is_cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if is_cuda else psutil.virtual_memory().available
    return n_bytes * _MEMORY_PER_WEIGHT_BYTE <= free


def _align(model: Any) -> None:
    """Moves weights that lie in memory as they lie in a file, at whatever address.

    Matrix products choose another order of summing for addresses that are not aligned, so the last
    bits would depend on how the checkpoint's files are laid out.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % _ALIGNMENT_BYTES:
            tensor.data = tensor.data.clone()


def _may_run_code(source: Source, options: LoadOptions) -> bool:
    return options.trust_remote_code or runs_our_code_only(source.path, read_config(source.path))


def _check_weights(source: Source, info: dict[str, Any], *, is_trusted: bool) -> None:
    lost = sorted(info["missing_keys"])
    lost += sorted(
        f"{name} of shape {list(wanted)} (it has {list(found)})"
        for name, found, wanted in info["mismatched_keys"]
    )
    if lost and not is_trusted and "auto_map" in read_config(source.path):
        raise ModelError(f"{source.id} {_BRINGS_CODE}")
    if lost:
        raise ModelError(f"{source.id} lacks {len(lost)} of its weights, first {lost[0]}")
    if info["unexpected_keys"]:
        n_left, first = len(info["unexpected_keys"]), min(info["unexpected_keys"])
        logger.warning("%s: no place for %d tensors, first %s: left out", source.id, n_left, first)


def _check_tokenizer(source: Source, tokenizer: Any, n_embeddings: int) -> None:
    # Without tokenizer files AutoTokenizer makes one that turns every text into nothing.
    if not tokenizer("A")["input_ids"]:
        raise ModelError(f"{source.id} holds no tokenizer: add its tokenizer.json")
    if tokenizer.vocab_size > n_embeddings:
        raise ModelError(
            f"{source.id}: its tokenizer has {tokenizer.vocab_size} tokens but its embedding "
            f"{n_embeddings}: they belong to different models"
        )


def set_attention(model: Any) -> None:
    """Sdpa where the model has it, else eager: the two whose masks the engine knows."""
    if model.config._attn_implementation not in ("sdpa", "eager"):
        try:
            model.set_attn_implementation("sdpa")
        except ValueError:
            model.set_attn_implementation("eager")


def _from_pretrained(cls: Any, source: Source, options: LoadOptions, **kwargs: Any) -> Any:
    try:
        return cls.from_pretrained(
            source.path,
            trust_remote_code=options.trust_remote_code,
            local_files_only=True,
            **kwargs,
        )
    except Exception as error:
        if "trust_remote_code" in str(error):
            error = ValueError(f"it {_BRINGS_CODE}")
        if "provide an `offload_folder`" in str(error):
            error = ValueError("it fits in no memory: name a folder for the rest with --offload")
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{source.id} cannot be loaded by {cls.__name__}: {reason}") from error


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name in ("auto", "stored"):
        return torch.float32 if name == "auto" and device.type == "cpu" else "auto"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SettingsError(f"--dtype {name} is no floating-point type of torch")
    return dtype
