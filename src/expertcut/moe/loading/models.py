"""From a folder or a hub id to a model whose experts can be watched and whose bytes are known."""

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from expertcut.errors import ModelError, SettingsError
from expertcut.moe.contract import MoeBlock, check_family, find_blocks

logger = logging.getLogger(__name__)

EXPERT_COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_PROBE_TOKENS = 16
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "README.md")


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine: where it lies, what it was asked for as, and its revision."""

    id: str
    path: Path
    revision: str | None = None

    @property
    def name(self) -> str:
        """The last part of the id, for naming outputs."""
        return Path(self.id).resolve().name if self.revision is None else self.id.split("/")[-1]

    @property
    def weight_files(self) -> list[Path]:
        """All safetensors files, by name."""
        return sorted(self.path.glob("*.safetensors"))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config.json (as JSON, not its spelling) and every byte of the weights."""
        digest = hashlib.sha256(json.dumps(read_config(self.path), sort_keys=True).encode())
        for file in self.weight_files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class LoadOptions:
    """How to load: the options shared by every command that runs a model.

    `dtype` `stored` is the checkpoint's own, `auto` is float32 on CPU and `stored` elsewhere;
    `device` `auto` is CUDA where there is one.
    """

    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


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
        device: torch.device = self.model.device
        return device


def find_source(model: str, revision: str | None = None) -> Source:
    """The checkpoint's folder; a hub id is downloaded, safetensors only, or read from the cache.

    Raises:
        ModelError: no such folder or repository, no config, not a MoE model, or no safetensors.
    """
    path = Path(model)
    if path.is_dir():
        source = Source(model, path)
    elif path.exists() or model.count("/") != 1 or model.startswith((".", "/")):
        raise ModelError(f"no such model: {model} is neither a folder nor a hub id (owner/name)")
    else:
        folder = _download(model, revision)
        source = Source(model, folder, folder.name)
    config = read_config(source.path)
    check_family(config.get("model_type"))
    if expert_count(config) is None:
        raise ModelError(
            f"{model} is not a MoE model: its config.json (model_type "
            f"{config.get('model_type')!r}) has no {', '.join(EXPERT_COUNT_FIELDS)} above 1"
        )
    if not source.weight_files:
        raise ModelError(f"{model} holds no *.safetensors weights: other formats are not read")
    return source


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"no such model: {model} is no folder here and the hub says: {reason}"
        ) from None


def read_config(path: Path) -> dict[str, Any]:
    """config.json as it stands.

    Raises:
        ModelError: missing, or not a JSON object.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} holds no model: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds a {type(config).__name__}, must be a JSON object")
    return config


def expert_count(config: dict[str, Any]) -> int | None:
    """E as config.json states it, None for a model without experts."""
    text = config.get("text_config")
    fields = {**(text if isinstance(text, dict) else {}), **config}
    counts = [fields.get(field) for field in EXPERT_COUNT_FIELDS]
    return next((n for n in counts if isinstance(n, int) and n > 1), None)


def load(source: Source, options: LoadOptions) -> MoeModel:
    """The model in eval mode, without gradients, experts run in a reproducible way.

    Raises:
        ModelError: weights or tokenizer that do not fit config.json.
    """
    device = _device(options.device)
    config = _from_pretrained(AutoConfig, source, options)
    model, info = _from_pretrained(
        AutoModelForCausalLM,
        source,
        options,
        config=config,
        dtype=_dtype(options.dtype, device),
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # refused below, by name
        output_loading_info=True,
    )
    _check_weights(source, info)
    model = model.to(device).eval().requires_grad_(False)
    set_attention(model)
    if device.type == "cpu":
        # The eager loop is bit-equal to running experts one by one, so statistics change no bit.
        model.set_experts_implementation("eager")
    tokenizer = _from_pretrained(AutoTokenizer, source, options)
    _check_tokenizer(source, tokenizer, len(model.get_input_embeddings().weight))
    probe_1T = torch.arange(_PROBE_TOKENS, device=device)[None] % model.config.vocab_size
    return MoeModel(source, model, tokenizer, find_blocks(model, probe_1T))


def _check_weights(source: Source, info: dict[str, Any]) -> None:
    lost = sorted(info["missing_keys"])
    lost += sorted(
        f"{name} of shape {list(wanted)} (it has {list(found)})"
        for name, found, wanted in info["mismatched_keys"]
    )
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
            error = ValueError("it brings code of its own: read that, then --trust-remote-code")
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{source.id} cannot be loaded by {cls.__name__}: {reason}") from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        )
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"--device {name} is not to be had: {error}") from None
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name in ("auto", "stored"):
        return torch.float32 if name == "auto" and device.type == "cpu" else "auto"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SettingsError(f"--dtype {name} is no floating-point type of torch")
    return dtype
