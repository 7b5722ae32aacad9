"""Checks before and after loading: config.json, weights, tokenizer, supported kinds."""

import logging
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from expertcut.errors import ContractError, ExpertcutError, ModelError
from expertcut.models.checkpoint_dir import read_object
from expertcut.models.safetensors_index import Stored, StoredTensor, weights_file

BRINGS_CODE = "brings code of its own: read that, then --trust-remote-code"
_MAX_REASON = 300
_ZERO_EXPERTS = "zero_expert_num"  # of LongCat
_NO_WEIGHTS = "not supported: has experts without weights (zero-computation experts)"
# By config.model_type, beside `expertcut.models.find_blocks.REFUSED`.
_UNSUPPORTED = {
    "longcat_flash": _NO_WEIGHTS,  # 256 of them where config.json does not say
    "zaya": f"{_NO_WEIGHTS}: its router can skip all experts",
    "doge": "not supported: its experts are rows of an embedding, not modules",
}
_OTHER_SENSES = ("vision_config", "audio_config")
_THINKER = "thinker_config"  # of the Omni models
EXPERT_COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k")
_COUNT_FIELDS = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"),
    *(*EXPERT_COUNT_FIELDS, *_TOP_K_FIELDS),
)
_EXPERT_COUNT = re.compile(r"(n|num)_(\w+_)?experts")
_NUMBER = re.compile(r"\.(\d{1,9})\.")
_OF_ONE_EXPERT = re.compile(
    r"(?P<block>.+)\.(constant_)?experts\.(?P<expert>\d{1,9})\.(?P<part>.+)"
)
_CONSTANT = {"approx_value"}  # all that is left of a removed expert of layout exact
_MAX_BYTES = 500_000_000  # the largest known, with a quarter of a million tokens, has 33 MB
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_PROBE = "Answer: A"
_CHECKED = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
_VALUES_PER_QUANTIZED_BYTE = 8

logger = logging.getLogger(__name__)


@contextmanager
def translate_errors(name: str, file: Path) -> Iterator[None]:
    """Whatever a class of transformers raises on a stranger's files is the fault of the files.

    It raises nearly every class of error there is, so that no list would be whole.

    Raises:
        ModelError: it was raised.
    """
    try:
        with _panics_as_errors():
            yield
    except ExpertcutError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            error = ValueError(f"it {BRINGS_CODE}")
        if "provide an `offload_folder`" in str(error):
            error = ValueError("it fits in no memory: name a folder for the rest with --offload")
        reason = " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
        raise ModelError(f"{file} cannot be loaded by {name}: {reason}") from error


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """A panic in Rust, which is no Exception, becomes a ValueError, without its lines on stderr.

    Whatever else is written there comes when the block ends.
    """
    with tempfile.TemporaryFile() as said:
        own = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # pyo3 has no name to import it by
                raise
            said.truncate(0)
            raise ValueError(str(error)) from None
        finally:
            os.dup2(own, 2)
            os.close(own)
            said.seek(0)
            with suppress(OSError):  # what cannot be said stops nothing
                os.write(2, said.read())


def check_quantization(folder: Path, config: Mapping[str, Any]) -> None:
    """That transformers knows how the weights are quantized; else it takes them as they are.

    Raises:
        ModelError: it does not.
    """
    quantized = config.get("quantization_config")
    if quantized is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING  # takes a while

    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if not isinstance(method, str) or method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ModelError(
            f"{folder / 'config.json'} says quantization_config with the unknown method "
            f"{str(method)[:50]}: take the bf16, f16 or f32 weights instead"
        )


def check_supported(folder: Path, config: Mapping[str, Any]) -> None:
    """That config.json is not of a model whose experts are of an unsupported kind.

    Raises:
        ContractError: it is.
    """
    file, family = folder / "config.json", str(config.get("model_type"))[:50]
    text = config.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        n_zero = part.get(_ZERO_EXPERTS)
        if isinstance(n_zero, int) and n_zero > 0:
            raise ContractError(f"{file}: {family} is {_NO_WEIGHTS}: {_ZERO_EXPERTS} {n_zero}")
    if config.get(_ZERO_EXPERTS) is None and family in _UNSUPPORTED:
        raise ContractError(f"{file}: {family} is {_UNSUPPORTED[family]}")


def check_text_model(folder: Path, config: Any) -> None:
    """That transformers has a text model for this config, as it reads it.

    Raises:
        ModelError: it has none, as of most vision-language models.
    """
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise not_a_text_model(folder, config.to_dict())


def not_a_text_model(folder: Path, config: Mapping[str, Any]) -> ModelError:
    """Says of what kind a model is that cannot be loaded as a text model."""
    family, senses = str(config.get("model_type"))[:50], set(_senses(config))
    kind = "a vision-language model" if senses == {"vision_config"} else "a multimodal model"
    what = kind if senses else "no text model that transformers can load (AutoModelForCausalLM)"
    return ModelError(
        f"{folder / 'config.json'}: {family} is {what}, not supported: take a text model"
    )


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes more than text."""
    return any(True for _ in _senses(config))


def _senses(config: Mapping[str, Any]) -> Iterator[str]:
    thinker = config.get(_THINKER)
    for part in (config, thinker if isinstance(thinker, dict) else {}):
        yield from (name for name in _OTHER_SENSES if isinstance(part.get(name), dict))


def check_counts(folder: Path, config: Mapping[str, Any], stored: Stored) -> None:
    """That config.json states counts, and no more layers and experts than the weights hold.

    Raises:
        ModelError: it does not, or a layer lacks experts that another has.
    """
    file = folder / "config.json"
    text = config.get("text_config")
    fields = {**(text if isinstance(text, dict) else {}), **config}
    for name in _COUNT_FIELDS:
        value = fields.get(name)
        if value is not None and (type(value) is not int or value < 1):
            said = str(value)[:50]
            raise ModelError(f"{file} says {name} {said}, must be a whole number above 0")
    n_experts = expert_count(dict(config)) or 0
    for name in _TOP_K_FIELDS:
        if (fields.get(name) or 0) > n_experts:
            raise ModelError(f"{file} routes each token to {fields[name]} of {n_experts} experts")
    numbers = [int(n[1]) for name in stored.tensors if (n := _NUMBER.search(f".{name}"))]
    n_layers = max(numbers, default=-1) + 1
    if (fields.get("num_hidden_layers") or 0) > n_layers:
        raise ModelError(
            f"{file} says {fields['num_hidden_layers']} layers, the weights hold {n_layers}"
        )
    for block, n_found in _experts_one_by_one(folder, stored):
        if n_found != n_experts:
            raise ModelError(f"{file} says {n_experts} experts, {block} holds {n_found}")


def check_count_types(folder: Path, config: Mapping[str, Any]) -> None:
    """That numbers of experts are numbers: `"8"` would be read as no number of experts at all.

    Raises:
        ModelError: one is text, a list or a fraction.
    """
    text = config.get("text_config")
    fields = {**(text if isinstance(text, dict) else {}), **config}
    for name, value in fields.items():
        is_count = name in EXPERT_COUNT_FIELDS or _EXPERT_COUNT.fullmatch(name)
        if is_count and isinstance(value, str | float | list):
            raise ModelError(
                f"{folder / 'config.json'} says {name[:50]} {str(value)[:50]!r}, must be a whole "
                "number above 0"
            )


def with_expert_count(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """The config with the expert count changed, under every name it goes by."""
    edited: dict[str, Any] = {
        key: with_expert_count(value, before, after)
        if key == "text_config" and isinstance(value, dict)
        else value
        for key, value in config.items()
    }
    return edited | {f: after for f in EXPERT_COUNT_FIELDS if edited.get(f) == before}


def expert_count(config: dict[str, Any]) -> int | None:
    """E as config.json states it, None for a model without experts."""
    text = config.get("text_config")
    fields = {**(text if isinstance(text, dict) else {}), **config}
    counts = [fields.get(field) for field in EXPERT_COUNT_FIELDS]
    return next((n for n in counts if isinstance(n, int) and n > 1), None)


def _experts_one_by_one(folder: Path, stored: Stored) -> Iterator[tuple[str, int]]:
    """Blocks whose experts have tensors of their own, and how many experts each has."""
    blocks: dict[str, dict[int, dict[str, StoredTensor]]] = {}
    for name, tensor in stored.tensors.items():
        if found := _OF_ONE_EXPERT.fullmatch(name):
            experts = blocks.setdefault(f"{found['block']}.experts", {})
            experts.setdefault(int(found["expert"]), {})[found["part"]] = tensor
    for block, experts in blocks.items():
        _check_alike(folder, block, experts)
        yield block, len(experts)


def _check_alike(folder: Path, block: str, experts: dict[int, dict[str, StoredTensor]]) -> None:
    """That experts are numbered from 0 and have the same tensors, but for those made constants."""
    own = {e: parts for e, parts in experts.items() if set(parts) != _CONSTANT}
    first, wanted = min(own.items(), default=(0, {}))
    wanted = {part: t for parts in own.values() for part, t in parts.items()} | wanted
    for expert in range(len(experts)):
        parts = experts.get(expert, {})
        if set(parts) == _CONSTANT:
            continue
        for part in sorted(wanted):
            name = f"{block}.{expert}.{part}"
            if part not in parts:
                # The headers were found to be whole, so it is not the download that lacks it.
                raise ModelError(
                    f"{weights_file(folder)} lacks {name}, which other experts there have: experts "
                    "that are not alike are not supported"
                )
            if parts[part].shape != wanted[part].shape:
                raise ModelError(
                    f"{parts[part].file} is damaged: {name} has shape "
                    f"{list(parts[part].shape)}, that of expert {first} {list(wanted[part].shape)}"
                )


def check_files(folder: Path) -> None:
    """That the files which transformers reads hold JSON objects.

    Raises:
        ModelError: one does not.
    """
    for name in _FILES:
        if (folder / name).exists():
            read_object(folder / name, _MAX_BYTES)


def check_vocabulary(folder: Path, tokenizer: Any, n_embeddings: int) -> None:
    """That it turns text into ids that the model has an embedding for.

    Raises:
        ModelError: it does not.
    """
    # Without tokenizer files AutoTokenizer makes one that turns every text into nothing.
    ids = token_ids(tokenizer, [_PROBE])[0]
    if not ids:
        raise ModelError(f"{folder} holds no tokenizer: add its tokenizer.json")
    _check_end(folder, tokenizer, ids)
    if tokenizer.vocab_size > n_embeddings:
        raise ModelError(
            f"{folder / 'tokenizer.json'}: its tokenizer has {tokenizer.vocab_size} tokens but "
            f"the embedding of the weights {n_embeddings}: they belong to different models"
        )
    check_ids(folder, ids, n_embeddings)


def _check_end(folder: Path, tokenizer: Any, ids: list[int]) -> None:
    """That nothing is appended to a text: after an end of text no answer follows."""
    with translate_errors("AutoTokenizer", folder / "tokenizer.json"):
        plain: list[int] = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    n_before = next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), len(ids))
    if appended := ids[n_before + len(plain) :]:
        named = ", ".join(map(str, tokenizer.convert_ids_to_tokens(appended)))
        raise ModelError(
            f"{folder / 'tokenizer.json'} appends {named} to every text, so a prompt would end "
            "before its answer: take that out of its post_processor, or say add_eos_token false "
            "in tokenizer_config.json"
        )


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, as the tokenizer gives them.

    Raises:
        ModelError: it fails at one.
    """
    with translate_errors("AutoTokenizer", file_of(tokenizer)):
        ids: list[list[int]] = tokenizer(list(texts))["input_ids"]
    return ids


def file_of(tokenizer: Any) -> Path:
    """Its main file, for naming it."""
    return Path(str(getattr(tokenizer, "name_or_path", ""))) / "tokenizer.json"


def check_ids(folder: Path, ids: Any, n_embeddings: int) -> None:
    """That each token of a prompt has an embedding.

    Raises:
        ModelError: one has none.
    """
    if (largest := max(ids, default=0)) >= n_embeddings:
        raise ModelError(
            f"{folder / 'tokenizer.json'} gives a prompt the token {largest}, but the weights have "
            f"embeddings for {n_embeddings}: they belong to different models"
        )


def check_total(folder: Path, model: Any, stored: Stored) -> None:
    """That the weights hold about as many values as a model, which was made on the meta device.

    What is lacking is allocated while loading, to be refused by name after that: so not too much.

    Raises:
        ModelError: they hold less than half of them.
    """
    needed = sum(parameter.numel() for parameter in model.parameters())
    held = sum(map(_most_values, stored.tensors.values()))
    if needed > 2 * held:
        raise ModelError(
            f"{folder / 'config.json'} describes a model of {needed:,} values, "
            f"{weights_file(folder)} holds {held:,}: one of them is wrong or not whole"
        )


def _most_values(tensor: StoredTensor) -> int:
    """Quantized ones, and the integers that others are packed in, hold several in a byte."""
    if tensor.dtype in ("F64", "F32", "F16", "BF16"):
        return math.prod(tensor.shape)
    return (tensor.end - tensor.begin) * _VALUES_PER_QUANTIZED_BYTE


def check_complete(folder: Path, info: dict[str, Any]) -> None:
    """That every weight of the model was in the files, in its shape.

    What the model has no place for is warned of.

    Raises:
        ModelError: one was not.
    """
    lost = sorted(info["missing_keys"])
    lost += sorted(
        f"{name} of shape {list(wanted)} (it has {list(found)})"
        for name, found, wanted in info["mismatched_keys"]
    )
    if lost:
        raise ModelError(
            f"{weights_file(folder)} lacks {len(lost)} of the model's weights, first {lost[0]}"
        )
    if info["unexpected_keys"]:
        n_left, first = len(info["unexpected_keys"]), min(info["unexpected_keys"])
        logger.warning("%s: no place for %d tensors, first %s: left out", folder, n_left, first)


def check_finite(folder: Path, model: Any, files: list[Path]) -> None:
    """That no weight is NaN or infinite: one pass over each, the file is sought only where one is.

    Raises:
        ModelError: one is, as stored or in the dtype that it was loaded in.
    """
    tensors = model.state_dict()
    # What accelerate brings in when it is used is on the meta device until then.
    is_elsewhere = any(tensor.device.type == "meta" for tensor in tensors.values())
    bad = next((name for name, tensor in tensors.items() if not _is_finite(tensor)), None)
    if bad is None and not is_elsewhere:
        return
    for file in files:
        check_values(file)
    if bad is not None:
        raise ModelError(
            f"{weights_file(folder)} holds values that do not fit in {model.dtype}, in {bad}: "
            "take another --dtype"
        )


def check_values(file: Path) -> None:
    """That no weight in a file is NaN or infinite.

    Raises:
        ModelError: one is.
    """
    for name, tensor in _on_disk(file):
        if not _is_finite(tensor):
            n_bad = int((~tensor.isfinite()).sum())
            raise ModelError(
                f"{file} holds NaN or infinity, {n_bad} of the {tensor.numel()} values of "
                f"{name}: download it again, or ask who made it"
            )


def _on_disk(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            yield name, weights.get_tensor(name)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are; NaN goes through minimum and maximum, which read at full speed."""
    if tensor.dtype not in _CHECKED or tensor.device.type == "meta" or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() & high.isfinite())
