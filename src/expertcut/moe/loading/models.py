"""From a checkpoint's folder to a model whose experts can be watched."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from expertcut.errors import ContractError, ModelError, SettingsError
from expertcut.moe.contract import MoeBlock, find_blocks, routers
from expertcut.moe.kernels.experts import BY_EXPERT
from expertcut.moe.kernels.products import use_faster_products
from expertcut.moe.loading.checks.refusals import BRINGS_CODE, check_quantization, refusals_of
from expertcut.moe.loading.checks.supported import check_text_model
from expertcut.moe.loading.checks.tokenizer import check_files, check_vocabulary
from expertcut.moe.loading.checks.weights import check_complete, check_finite, check_total
from expertcut.moe.loading.devices import find_device, runs_on, spread
from expertcut.moe.loading.own_code import check_named, runs_our_code_only
from expertcut.moe.loading.sources import Source
from expertcut.moe.memory import free_bytes
from expertcut.moe.stored.counts import check_counts
from expertcut.moe.stored.headers import read_even_quantized
from expertcut.moe.stored.objects import read_config

_MODELS: Any = AutoModelForCausalLM  # whose types know nothing of loading info
_PROBE_TOKENS = 16
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
    config, trusting = _checked_config(source, options)
    tokenizer = _tokenizer(source, options)
    # The config has been tried without weights by now, so a fault here may be of any file.
    with refusals_of("AutoModelForCausalLM", source.path):
        model, info = _MODELS.from_pretrained(
            source.path,
            config=config,
            trust_remote_code=trusting.trust_remote_code,
            local_files_only=True,
            dtype=_dtype(options.dtype, device),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            # Nothing is generated here; without it, transformers runs custom_generate/generate.py.
            generation_config=GenerationConfig(),
            **spreading,
        )
    _check_complete(source, info, is_trusted=trusting.trust_remote_code)
    check_finite(source.path, model, source.weight_files)
    model = (model if spreading else model.to(device)).eval().requires_grad_(False)
    set_attention(model)
    if runs_on(model.get_input_embeddings()).type == "cpu":
        # The loop that statistics watch too, so they change no bit.
        model.set_experts_implementation(BY_EXPERT)
        use_faster_products(model, routers(model))
        _align(model)
    check_vocabulary(source.path, tokenizer, len(model.get_input_embeddings().weight))
    return MoeModel(source, model, tokenizer, _blocks(source, model))


def _checked_config(source: Source, options: LoadOptions) -> tuple[Any, LoadOptions]:
    """The config, held against the weights, and the options to load the model with.

    The modelling file of this package is trusted without being asked for. What other code that the
    user trusts makes of the config is not checked.
    """
    folder, raw = source.path, read_config(source.path)
    check_named(folder, raw)
    may_run_code = options.trust_remote_code or runs_our_code_only(folder, raw)
    with refusals_of("AutoConfig", folder / "config.json"):
        if options.trust_remote_code and "auto_map" in raw:
            return AutoConfig.from_pretrained(folder, trust_remote_code=True), options
        stored = read_even_quantized(folder)
        check_counts(folder, raw, stored)
        check_quantization(folder, raw)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=may_run_code)
        if not may_run_code:
            check_text_model(folder, config)
        with torch.device("meta"):  # tensors with shapes and no bytes
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=may_run_code)
        check_total(folder, model, stored)
    return config, replace(options, trust_remote_code=may_run_code)


def _tokenizer(source: Source, options: LoadOptions) -> Any:
    check_files(source.path)
    with refusals_of("AutoTokenizer", source.path / "tokenizer.json"):
        return AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=options.trust_remote_code, local_files_only=True
        )


def _blocks(source: Source, model: Any) -> tuple[MoeBlock, ...]:
    device = runs_on(model.get_input_embeddings())
    probe_1T = torch.arange(_PROBE_TOKENS, device=device)[None] % model.config.vocab_size
    try:
        return find_blocks(model, probe_1T)
    except ContractError as error:
        raise ContractError(f"{source.path / 'config.json'}: {error}") from None
    except (RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{source.path / 'config.json'} describes a model that does not run: {reason}"
        ) from error


def _check_complete(source: Source, info: dict[str, Any], *, is_trusted: bool) -> None:
    is_lacking = info["missing_keys"] or info["mismatched_keys"]
    if is_lacking and not is_trusted and "auto_map" in read_config(source.path):
        raise ModelError(f"{source.path / 'config.json'} {BRINGS_CODE}")
    check_complete(source.path, info)


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
    return n_bytes * _MEMORY_PER_WEIGHT_BYTE <= free_bytes(device)


def _align(model: Any) -> None:
    """Moves weights that lie in memory as they lie in a file, at whatever address.

    Matrix products choose another order of summing for addresses that are not aligned, so the last
    bits would depend on how the checkpoint's files are laid out.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % _ALIGNMENT_BYTES:
            tensor.data = tensor.data.clone()


def set_attention(model: Any) -> None:
    """Sdpa where the model has it, else eager: the two whose masks the engine knows."""
    if model.config._attn_implementation not in ("sdpa", "eager"):
        try:
            model.set_attn_implementation("sdpa")
        except ValueError:
            model.set_attn_implementation("eager")


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name in ("auto", "stored"):
        return torch.float32 if name == "auto" and device.type == "cpu" else "auto"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SettingsError(f"--dtype {name} is no floating-point type of torch")
    return dtype
