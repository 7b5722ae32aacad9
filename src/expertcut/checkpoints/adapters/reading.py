"""A LoRA adapter in peft's folder, read with care: what it adapts, and whether that can be sliced.

Needs neither peft nor a model: names, shapes and ranks say all. The form is that of peft 0.21.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from expertcut.documents import first_fault
from expertcut.errors import ModelError
from expertcut.models.checkpoint_dir import read_object
from expertcut.models.safetensors_index import Stored, StoredTensor, read_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of all names in the file
PARAMETER = re.compile(r"\w{1,64}", re.A)  # what a parameter of experts can be called

_DTYPES = ("F16", "BF16", "F32", "F64")
_PICKLED_FILE = "adapter_model.bin"
_LORA = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# A stranger's regular expression can take for ever: names, `.*`, `\d+`, and choices as (q|k)_proj.
_SIMPLE = re.compile(r"\^?([\w-]|\.\*?|\\\.|\\d\+?|\[(\w(-\w)?)+\]\+?|\([\w.|-]+\))+\$?", re.A)
_MAX_WAYS = 3  # to match a part of a name in more than one way: each multiplies the time
_MAX_PATTERN = 300
# Ways to begin that move a part of the base's own weights into the adapter.
_MOVING = re.compile(r"(pissa|olora|corda|loftq|lora_ga).*")


class _Settings(BaseModel):
    """What of `adapter_config.json` must be known; the rest is handed on as it stands."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    peft_type: str
    r: PositiveInt = 8
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    init_lora_weights: bool | str | None = None
    kasa_config: dict[str, Any] | None = None
    layer_replication: list[Any] | None = None
    use_qalora: bool | None = None

    @property
    def patterns(self) -> dict[str, Iterable[str]]:
        """All texts that name modules, by their key."""
        several = (self.rank_pattern, self.alpha_pattern, self.target_parameters)
        keys = ("rank_pattern", "alpha_pattern", "target_parameters")
        found: dict[str, Iterable[str]] = {k: v or () for k, v in zip(keys, several, strict=True)}
        for key in ("target_modules", "exclude_modules"):
            value = getattr(self, key) or ()
            found[key] = [value] if isinstance(value, str) else value
        return found


@dataclass(frozen=True)
class Adapter:
    """An adapter: its config as it stands, what that says, and where its tensors lie."""

    folder: Path
    config: Mapping[str, Any]
    settings: _Settings
    stored: Stored

    @cached_property
    def pairs(self) -> Mapping[str, tuple[str, str]]:
        """The names of lora_A and lora_B by module.

        Raises:
            ModelError: one is there without the other, or their ranks differ.
        """
        found: dict[str, dict[str, str]] = {}
        for name in self.stored.tensors:
            if lora := _LORA.fullmatch(name):
                found.setdefault(lora["module"], {})[lora["side"]] = name
        return {module: self._pair(module, sides) for module, sides in found.items()}

    @property
    def others(self) -> list[str]:
        """The names of tensors that are no such pair, in order."""
        paired = {name for pair in self.pairs.values() for name in pair}
        return [name for name in self.stored.tensors if name not in paired]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor by its name."""
        return self.stored.tensors[name].shape

    def rank(self, parameter: str) -> int:
        """The rank of a parameter by its name in the model, matched as peft matches."""
        own = (rank for pattern, rank in self._ranks if pattern.match(parameter))
        return next(own, self.settings.r)

    @cached_property
    def _ranks(self) -> list[tuple[re.Pattern[str], int]]:
        return [(_pattern(key), rank) for key, rank in (self.settings.rank_pattern or {}).items()]

    def refusal(self, fault: str) -> ModelError:
        """An error about this adapter."""
        return ModelError(f"{self.folder / WEIGHTS_FILE}: {fault}")

    def _pair(self, module: str, sides: Mapping[str, str]) -> tuple[str, str]:
        if len(sides) < 2:
            missing = "B" if "A" in sides else "A"
            raise self.refusal(f"{module} has no lora_{missing}.weight: save the adapter again")
        a, b = sides["A"], sides["B"]
        is_pair = len(self.shape(a)) > 1 < len(self.shape(b)) and all(self.shape(a) + self.shape(b))
        if not is_pair or self.shape(a)[0] != self.shape(b)[1]:
            raise self.refusal(
                f"{module} has lora_A {self.shape(a)} and lora_B {self.shape(b)}, which must meet "
                "in one rank: save the adapter again"
            )
        return a, b


def read_adapter(folder: Path) -> Adapter:
    """An adapter's folder, nothing of its values.

    Raises:
        ModelError: no such folder, no LoRA adapter, or one of a kind that cannot be sliced.
    """
    if not folder.is_dir():
        raise ModelError(f"no such adapter: {folder} is no folder, give one with {CONFIG_FILE}")
    config = _read_config(folder / CONFIG_FILE)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{folder} is a {kind} adapter: only LORA can be sliced, train one")
    try:
        settings = _Settings.model_validate(config)
    except ValidationError as error:
        raise ModelError(f"{folder / CONFIG_FILE}: {first_fault(error)}") from None
    _check_settings(folder, settings)
    if not (folder / WEIGHTS_FILE).is_file():
        if (folder / _PICKLED_FILE).exists():
            raise ModelError(
                f"{folder} holds {_PICKLED_FILE}, a pickle, which could run code: load it with "
                f"peft where you trust it and save it as {WEIGHTS_FILE}"
            )
        raise ModelError(f"{folder} holds no {WEIGHTS_FILE}: save the adapter again")
    stored = read_file(folder / WEIGHTS_FILE)
    _check_tensors(folder, stored.tensors)
    return Adapter(folder, config, settings, stored)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise ModelError(f"{file.parent} holds no adapter: it has no {CONFIG_FILE}")
    return read_object(file)


def _check_settings(folder: Path, settings: _Settings) -> None:
    init = str(settings.init_lora_weights)
    if _MOVING.fullmatch(init) or settings.kasa_config:
        raise ModelError(
            f"{folder} began as {'kasa' if settings.kasa_config else init}, which changes the "
            "base's own weights: convert it to a plain LoRA adapter with peft first"
        )
    if settings.layer_replication or settings.use_qalora:
        key = "layer_replication" if settings.layer_replication else "use_qalora"
        raise ModelError(f"{folder} has {key}, which cannot be sliced: train it without")
    for key in settings.rank_pattern or {}:
        _check_pattern(folder / CONFIG_FILE, key)


def _check_pattern(file: Path, key: str) -> None:
    """That a key of rank_pattern is a regular expression, and one that cannot take for ever.

    Raises:
        ModelError: it is not.
    """
    is_short = len(key) <= _MAX_PATTERN and sum(map(key.count, "*+(")) <= _MAX_WAYS
    if not is_short or not _SIMPLE.fullmatch(key):
        raise ModelError(
            f"{file}: rank_pattern {key[:80]!a} is no simple pattern: write names, with at most "
            rf"{_MAX_WAYS} of .*, \d+ and (a|b)"
        )
    try:
        _pattern(key)
    except re.error as error:
        raise ModelError(f"{file}: rank_pattern {key[:80]!a} is no pattern: {error}") from None


def _check_tensors(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    wrong = next((name for name in tensors if not name.startswith(PREFIX)), None)
    if wrong or not tensors:
        raise ModelError(
            f"{folder / WEIGHTS_FILE} holds {wrong or 'no tensor'}, must hold names that begin "
            f"with {PREFIX}: save the adapter with peft's save_pretrained"
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ModelError(
                f"{folder / WEIGHTS_FILE}: {name} is {tensor.dtype}, must be one of "
                f"{', '.join(_DTYPES)}: save the adapter in one of these"
            )


def _pattern(key: str) -> re.Pattern[str]:
    """As peft matches a key of rank_pattern with a parameter's name."""
    return re.compile(rf"(.*\.)?({key})$")
