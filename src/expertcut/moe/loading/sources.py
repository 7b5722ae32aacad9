"""A checkpoint's folder: found here or on the hub, its config read, its bytes known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from expertcut.errors import ContractError, ModelError
from expertcut.moe.contract import check_family
from expertcut.moe.loading.checks.supported import check_supported, is_multimodal, not_a_text_model
from expertcut.moe.stored.counts import (
    EXPERT_COUNT_FIELDS,
    check_count_types,
    check_counts,
    expert_count,
)
from expertcut.moe.stored.fingerprints import fingerprint_of
from expertcut.moe.stored.folder import check_folder, refuse_pickles
from expertcut.moe.stored.headers import read_even_quantized
from expertcut.moe.stored.objects import read_config

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
        """SHA-256 over config.json (as JSON, not its spelling) and every byte of the weights.

        Raises:
            ModelError: a file that cannot be read.
        """
        return fingerprint_of(self.path)

    def expert_axes(self, names: Sequence[str]) -> Mapping[str, tuple[str, int]]:
        """By name on disk, the parameter that a tensor becomes, and its axis of experts.

        Those of `names` that have one and are not stacked with others while loading.
        """
        known: dict[tuple[str, ...], Mapping[str, tuple[str, int]]]
        known = self.__dict__.setdefault("_expert_axes", {})
        key = tuple(names)
        if key not in known:
            from expertcut.moe.loading.skeleton import expert_axes

            known[key] = expert_axes(read_config(self.path), names)
        return known[key]


def find_source(model: str, revision: str | None = None) -> Source:
    """The checkpoint's folder; a hub id is downloaded, safetensors only, or read from the cache.

    Raises:
        ModelError: no such folder or repository, no config, not a MoE model, no safetensors, or
            files that do not hold together or lead elsewhere.
    """
    path = Path(model)
    if path.is_dir():
        source = Source(model, path)
    elif path.exists() or model.count("/") != 1 or model.startswith((".", "/")):
        raise ModelError(f"no such model: {model} is neither a folder nor a hub id (owner/name)")
    else:
        folder = _download(model, revision)
        source = Source(model, folder, folder.name)
    check_folder(source.path)
    config = read_config(source.path)
    try:
        check_family(config.get("model_type"))
    except ContractError as error:
        raise ContractError(f"{source.path / 'config.json'}: {error}") from None
    check_supported(source.path, config)
    if expert_count(config) is None and is_multimodal(config):
        raise not_a_text_model(source.path, config)
    check_count_types(source.path, config)
    if expert_count(config) is None:
        family, fields = str(config.get("model_type"))[:50], ", ".join(EXPERT_COUNT_FIELDS)
        raise ModelError(
            f"{model} is not a MoE model: its config.json (model_type {family!r}) has no {fields} "
            "above 1"
        )
    if not source.weight_files:
        refuse_pickles(source.path)
        raise ModelError(f"{model} holds no *.safetensors weights: other formats are not read")
    stored = read_even_quantized(source.path)
    if "auto_map" not in config:  # else it depends on whether that code is run
        check_counts(source.path, config, stored)
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
