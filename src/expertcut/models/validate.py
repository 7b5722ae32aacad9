"""Validates a checkpoint before and after loading: config.json, weights, tokenizer."""

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
from expertcut.models.checkpoint_dir import parts_of, read_config, text_parts
from expertcut.models.modeling_packed import PACKING_KEY, TYPE_PREFIX
from expertcut.models.safetensors_index import TAKE_PLAIN, Stored, StoredTensor, weights_file

_BRINGS_CODE = "brings code of its own: read that, then --trust-remote-code"
_NO_WEIGHTS = "is not supported: has experts without weights (zero-computation experts)"
_BREAKS = "models are not supported: its"
_WEIGHS_SHARED = f"{_BREAKS} router shares each token's weight between routed and shared experts"
_ENCODES = f"{_BREAKS} encoder has experts too (an encoder-decoder model)"
_SCALES_INPUT = f"{_BREAKS} router scales the expert's input, so an expert has no output of its own"
# Families that break the contract, by config.model_type.
REFUSED = {
    "llama4": _SCALES_INPUT,
    "llama4_text": _SCALES_INPUT,
    "jetmoe": f"{_BREAKS} attention is routed too, so its experts are not all in MoE blocks",
    "longcat_flash": _NO_WEIGHTS,  # 256 of them where config.json does not say
    "zaya": f"{_NO_WEIGHTS}: its router can skip all experts",
    "doge": "is not supported: its experts are rows of an embedding, not modules",
    "dbrx": f"{_BREAKS} router chooses no experts itself, and all experts share one matrix",
    "diffusion_gemma": f"{_BREAKS} text is denoised in blocks, not written token by token",
    "ernie4_5_vl_moe": f"{_BREAKS} config.json has one count for text experts and vision experts",
    "gemma4_assistant": "is not supported: it drafts from the states of another model",
    "inkling_mm_model": _WEIGHS_SHARED,
    "inkling_text": _WEIGHS_SHARED,
    "nemo_speechlm": f"{_BREAKS} prompts are sounds, which no quiz or text has",
    "nllb-moe": _ENCODES,
    "openai_privacy_filter": f"{_BREAKS} output is a label of each token, not the next token",
    "switch_transformers": _ENCODES,
}
# By config.model_type: the rows of docs/families.md. Others are loaded with a warning.
_TESTED = """
afmoe aria aria_text axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_v2
deepseek_v3 deepseek_v32 deepseek_v4 dots1 dots3_note dots3_note_text ernie4_5_moe exaone_moe
flex_olmo flint gemma4 gemma4_text glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa
gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4
inkling2 inkling2_text jamba kimi_k25 kimi_linear kolibri1 laguna lfm2_moe mellum mimo_v2_flash
minimax minimax_m2 minimax_m3_vl minimax_m3_vl_text mistral3 mistral4 mistral_large4 mixtral
muse_spark nemotron_h nemotron_h_omni olmoe phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text
qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_thinker qwen3_vl_moe qwen4_exp qwen4_exp_text
solar_open step3p7 unlimited_ocr
"""
TESTED = frozenset(_TESTED.split())
# Tensors of parts that read or write something else; their experts are neither counted nor cut.
OTHER_PART = re.compile(r"(.+\.)?(vision|visual|audio|talker|code2wav)(_\w+)?\..+")
EXPERT_COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k")
ALL_TOP_K_FIELDS = (*_TOP_K_FIELDS, "moe_topk", "moe_top_k", "top_k_experts")
_COUNT_FIELDS = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"),
    *(*EXPERT_COUNT_FIELDS, *_TOP_K_FIELDS),
)
_OF_EXPERT = re.compile(r"(?P<block>.+)\.(constant_)?experts\.(?P<expert>\d{1,9})\.(?P<part>.+)")
_CONSTANT = {"approx_value"}  # the tensors of a removed expert of layout exact
_PROBE = "Answer: A"
_TEXT_CLASS = "AutoModelForCausalLM"
_OTHER_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")

logger = logging.getLogger(__name__)


@contextmanager
def translate_errors(name: str, file: Path) -> Iterator[None]:
    """Turns any exception of transformers, which raises nearly every class, into a ModelError."""
    try:
        with _panics_as_errors():
            yield
    except ExpertcutError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            error = ValueError(f"it {_BRINGS_CODE}")
        if "provide an `offload_folder`" in str(error):
            error = ValueError("it fits in no memory: name a folder for the rest with --offload")
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{file} cannot be loaded by {name}: {reason}") from error


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Turns a panic in Rust, which is no Exception, into a ValueError and hides its output."""
    with tempfile.TemporaryFile() as captured:
        own = os.dup(2)
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # pyo3 exports no class for it
                raise
            captured.truncate(0)
            raise ValueError(str(error)) from None
        finally:
            os.dup2(own, 2)
            os.close(own)
            captured.seek(0)
            with suppress(OSError):  # stderr may be closed
                os.write(2, captured.read())


def check_quantization(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses unknown quantization methods, which transformers ignores."""
    if (quantized := config.get("quantization_config")) is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING  # slow

    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if not isinstance(method, str) or method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        unknown = f"says quantization_config with the unknown method {str(method)[:50]}"
        raise ModelError(f"{folder / 'config.json'} {unknown}: {TAKE_PLAIN}")


def check_moe(model: str, folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses configs of dense models and of unsupported experts."""
    file, family = folder / "config.json", str(config.get("model_type"))[:50]
    field = "zero_expert_num"  # of LongCat
    if isinstance(n_zero := _all_fields(config).get(field), int) and n_zero > 0:
        raise ContractError(f"{file}: {family} {_NO_WEIGHTS}: {field} {n_zero}")
    if family in REFUSED and (family != "longcat_flash" or config.get(field) is None):
        raise ContractError(f"{file}: {family} {REFUSED[family]}")
    n_experts = expert_count(config)
    for name, value in _all_fields(config).items():
        is_count = name in EXPERT_COUNT_FIELDS or re.fullmatch(r"(n|num)_(\w+_)?experts", name)
        if is_count and isinstance(value, str | float | list):  # "8" would count as no experts
            raise ModelError(
                f"{file} says {name[:50]} {str(value)[:50]!r}, must be a whole number above 0"
            )
    if n_experts is None:
        raise ModelError(
            f"{model} is not a MoE model: its config.json (model_type {family!r}) has no "
            f"{', '.join(EXPERT_COUNT_FIELDS)} above 1"
        )


def warn_untested(folder: Path, config: Mapping[str, Any]) -> None:
    """Warns of a family that no test runs."""
    family = re.sub(r"^((routed|packed|exact)_)*", "", str(config.get("model_type")))[:50]
    if family not in TESTED:
        told = "%s: model_type %s is not tested (docs/families.md): its gates are as expected"
        logger.warning(told, folder / "config.json", family)


def auto_class(config: Any, *, is_whole: bool = False) -> Any:
    """The Auto class of transformers that loads a config: that of text models, if it has one.

    `is_whole`: one that loads images and sounds too, if it has one.
    """
    import transformers  # slow

    names = (*_OTHER_CLASSES, _TEXT_CLASS) if is_whole else (_TEXT_CLASS, *_OTHER_CLASSES)
    classes = (getattr(transformers, name) for name in names)
    return next((auto for auto in classes if type(config) in auto._model_mapping), None)


def class_name(config: Mapping[str, Any]) -> str:
    """The Auto class that loads a checkpoint whole, with what sees, hears or speaks in it."""
    from transformers.models.auto import modeling_auto as auto  # slow

    parts = {name for part in parts_of(config) for name, own in part.items() if own}
    image_text, multimodal = _OTHER_CLASSES
    if not {"vision_config", "audio_config"} & parts:
        return _TEXT_CLASS
    is_known = config.get("model_type") in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return image_text if is_known else multimodal


def text_model(model: Any) -> Any:
    """The part of a loaded model that reads and writes text: Omni models run in parts only."""
    return getattr(model, "thinker", model)


def not_a_text_model(folder: Path, config: Mapping[str, Any]) -> ModelError:
    """The error for a model that does not write text, or is a part of such a model."""
    model = str(config.get("model_type"))[:50]
    fault = "is not a text model that transformers can load (AutoModelForCausalLM)"
    return ModelError(f"{folder / 'config.json'}: {model} {fault}: take a text model")


def check_counts(folder: Path, config: Mapping[str, Any], stored: Stored) -> None:
    """Checks the counts of config.json against the weights."""
    file = folder / "config.json"
    fields = _all_fields(config)
    for name in _COUNT_FIELDS:
        n = fields.get(name)
        if n is not None and (type(n) is not int or n < 1):
            raise ModelError(f"{file} says {name} {str(n)[:50]}, must be a whole number above 0")
    n_experts = expert_count(config) or 0
    for name in _TOP_K_FIELDS:
        if (fields.get(name) or 0) > n_experts:
            raise ModelError(f"{file} routes each token to {fields[name]} of {n_experts} experts")
    numbers = (re.search(r"\.(\d{1,9})\.", f".{name}") for name in stored.tensors)
    n_layers = max((int(number[1]) for number in numbers if number), default=-1) + 1
    if (n_said := fields.get("num_hidden_layers") or 0) > n_layers:
        raise ModelError(f"{file} says {n_said} layers, the weights hold {n_layers}")
    blocks: dict[str, dict[int, dict[str, StoredTensor]]] = {}
    for name, tensor in stored.tensors.items():
        if (match := _OF_EXPERT.fullmatch(name)) and not OTHER_PART.fullmatch(name):
            experts = blocks.setdefault(f"{match['block']}.experts", {})
            experts.setdefault(int(match["expert"]), {})[match["part"]] = tensor
    for block, experts in blocks.items():
        if all(set(parts) == _CONSTANT for parts in experts.values()):
            continue  # the others are rows of one tensor
        _check_alike(folder, block, experts)
        if len(experts) != n_experts:
            raise ModelError(f"{file} says {n_experts} experts, {block} holds {len(experts)}")


def with_expert_count(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """The config with the text part's expert count changed in all of its fields."""
    edited = {**config}
    for name, part in text_parts(config):
        edited[name] = with_expert_count(part, before, after)
    return edited | {f: after for f in EXPERT_COUNT_FIELDS if edited.get(f) == before}


def family_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a packed model's family, with unpacked weights; of others itself."""
    if PACKING_KEY not in config:
        return {key: value for key, value in config.items() if key != "quantization_config"}
    left = {key: value for key, value in config.items() if key not in (PACKING_KEY, "auto_map")}
    return {**left, "model_type": str(config.get("model_type")).removeprefix(TYPE_PREFIX)}


def with_top_k(config: Mapping[str, Any], top_k: int) -> dict[str, Any]:
    """The config with the number of experts per token changed in all of its fields."""
    edited = {**config}
    for name, part in text_parts(config):
        edited[name] = with_top_k(part, top_k)
    for field in ALL_TOP_K_FIELDS:
        if isinstance(value := edited.get(field), list):  # by layer
            edited[field] = [top_k] * len(value)
        elif type(value) is int:
            edited[field] = top_k
    return edited


def expert_count(config: Mapping[str, Any]) -> int | None:
    """The number of experts in config.json; None for a dense model."""
    fields = _all_fields(config)
    counts = [fields.get(field) for field in EXPERT_COUNT_FIELDS]
    return next((n for n in counts if isinstance(n, int) and n > 1), None)


def _all_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for part in reversed(parts_of(config)) for k, v in part.items()}


def _check_alike(folder: Path, block: str, experts: dict[int, dict[str, StoredTensor]]) -> None:
    """Checks that experts are numbered from 0 and alike, except constant ones."""
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
                # The headers are complete, so the download is not the cause.
                raise ModelError(
                    f"{weights_file(folder)} lacks {name}, which other experts there have: experts "
                    "that are not alike are not supported"
                )
            if parts[part].shape != wanted[part].shape:
                raise ModelError(
                    f"{parts[part].file} is damaged: {name} has shape "
                    f"{list(parts[part].shape)}, that of expert {first} {list(wanted[part].shape)}"
                )


def check_vocabulary(folder: Path, tokenizer: Any, n_embeddings: int) -> None:
    """Checks that the tokenizer gives ids that the model has embeddings for."""
    # Without tokenizer files, AutoTokenizer makes one that gives no ids.
    ids = token_ids(tokenizer, [_PROBE])[0]
    if not ids:
        raise ModelError(f"{folder} holds no tokenizer: add its tokenizer.json")
    plain = token_ids(tokenizer, [_PROBE], add_special_tokens=False)[0]
    n_before = next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), len(ids))
    if appended := ids[n_before + len(plain) :]:  # after an end of text no answer follows
        named = ", ".join(map(str, tokenizer.convert_ids_to_tokens(appended)))
        raise ModelError(
            f"{folder / 'tokenizer.json'} appends {named} to every text, so a prompt would end "
            "before its answer: take that out of its post_processor, or say add_eos_token false "
            "in tokenizer_config.json"
        )
    if tokenizer.vocab_size > n_embeddings:
        raise ModelError(
            f"{folder / 'tokenizer.json'}: its tokenizer has {tokenizer.vocab_size} tokens but "
            f"the embedding of the weights {n_embeddings}: they belong to different models"
        )
    check_ids(folder, ids, n_embeddings)


def token_ids(tokenizer: Any, texts: Sequence[str], **options: bool) -> list[list[int]]:
    """The token ids of each text."""
    with translate_errors("AutoTokenizer", file_of(tokenizer)):
        ids: list[list[int]] = tokenizer(list(texts), **options)["input_ids"]
    return ids


def file_of(tokenizer: Any) -> Path:
    """The main file of a tokenizer, for errors."""
    return Path(str(getattr(tokenizer, "name_or_path", ""))) / "tokenizer.json"


def check_ids(folder: Path, ids: Any, n_embeddings: int) -> None:
    """Checks that each token of a prompt has an embedding."""
    if (largest := max(ids, default=0)) >= n_embeddings:
        raise ModelError(
            f"{folder / 'tokenizer.json'} gives a prompt the token {largest}, but the weights have "
            f"embeddings for {n_embeddings}: they belong to different models"
        )


def check_total(folder: Path, model: Any, stored: Stored) -> None:
    """Checks that the weights hold half of a meta model's values, before loading allocates all."""
    needed = sum(parameter.numel() for parameter in model.parameters())
    held = 0
    for tensor in stored.tensors.values():
        is_plain = tensor.dtype in ("F64", "F32", "F16", "BF16")  # packed values: at least a bit
        held += math.prod(tensor.shape) if is_plain else (tensor.end - tensor.begin) * 8
    if needed > 2 * held:
        raise ModelError(
            f"{folder / 'config.json'} describes a model of {needed:,} values, "
            f"{weights_file(folder)} holds {held:,}: one of them is wrong or not whole"
        )


def lost_weights(info: Mapping[str, Any], has: str = "has") -> list[str]:
    """The weights that loading did not find, or found in another shape."""
    return sorted(info["missing_keys"]) + sorted(
        f"{name} of shape {list(wanted)} (it {has} {list(found)})"
        for name, found, wanted in info["mismatched_keys"]
    )


def check_complete(folder: Path, info: dict[str, Any], *, is_trusted: bool) -> None:
    """Checks that the files held every weight in its shape; warns of surplus tensors."""
    lost, surplus = lost_weights(info), info["unexpected_keys"]
    if lost and not is_trusted and "auto_map" in read_config(folder):
        raise ModelError(f"{folder / 'config.json'} {_BRINGS_CODE}")
    if lost:
        part = f"{len(lost)} of the model's weights, first {lost[0]}"
        raise ModelError(f"{weights_file(folder)} lacks {part}")
    if surplus:
        told = "%s: no place for %d tensors, first %s: left out"
        logger.warning(told, folder, len(surplus), min(surplus))


def check_finite(folder: Path, model: Any, files: list[Path]) -> None:
    """Checks that no weight is NaN or infinite, as stored or in the loaded dtype."""
    tensors = model.state_dict()
    is_offloaded = any(tensor.device.type == "meta" for tensor in tensors.values())
    bad = next((name for name, tensor in tensors.items() if not is_finite(tensor)), None)
    if bad is None and not is_offloaded:
        return
    for file in files:
        check_values(file)
    if bad is not None:
        raise ModelError(
            f"{weights_file(folder)} holds values that do not fit in {model.dtype}, in {bad}: "
            "take another --dtype"
        )


def check_values(file: Path) -> None:
    """Checks that no weight in a file is NaN or infinite."""
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            if not is_finite(tensor := weights.get_tensor(name)):
                n_bad = int((~tensor.isfinite()).sum())
                raise ModelError(
                    f"{file} holds NaN or infinity, {n_bad} of the {tensor.numel()} values of "
                    f"{name}: download it again, or ask who made it"
                )


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; true of the meta device."""
    tensor = getattr(tensor, "to_local", lambda: tensor)()  # of a sharded one this process's part
    checked = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if tensor.dtype not in checked or tensor.device.type == "meta" or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # fast; they propagate NaN
    return bool(low.isfinite() & high.isfinite())
