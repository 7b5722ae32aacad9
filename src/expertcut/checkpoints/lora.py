"""A LoRA adapter in peft's folder: its modules, and the tensors of the model that they adapt.

Needs neither peft nor a model; the format is that of peft 0.21. An adapter of all E experts of a
block with rank r is lora_A (r·E, in), row e·r + j for expert e, and lora_B (out, r·E), column
j·E + e. A second parameter of the same module wraps the first, which is then named `….base_layer`;
their shapes tell them apart.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from expertcut.checkpoints.tensor_names import DiskBlock, Headers
from expertcut.documents import first_fault
from expertcut.errors import ModelError
from expertcut.models.checkpoint_dir import read_object
from expertcut.models.safetensors_index import Stored, StoredTensor, read_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of all names in the file
_NAME = re.compile(r"\w{1,64}", re.A)  # of a parameter of experts

_DTYPES = ("F16", "BF16", "F32", "F64")
_LORA = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# An untrusted regular expression can take for ever: names, `.*`, `\d+`, and choices as (q|k)_proj.
_SIMPLE = re.compile(r"\^?([\w-]|\.\*?|\\\.|\\d\+?|\[(\w(-\w)?)+\]\+?|\([\w.|-]+\))+\$?", re.A)
_MAX_WAYS = 3  # to match a part of a name in more than one way: each multiplies the time
# Initialisations that move a part of the base's own weights into the adapter.
_MOVING = re.compile(r"(pissa|olora|corda|loftq|lora_ga).*")

_WRAPPED = r"(\.base_layer)*"
_ALL_EXPERTS = re.compile(rf"experts{_WRAPPED}")
_ONE_EXPERT = re.compile(r"experts\.(?P<expert>0|[1-9]\d*)\.(?P<part>[^.]+)")
_ROUTER = re.compile(rf"(gate|router){_WRAPPED}")
_OF_BLOCK = re.compile(r"(experts|gate|router)(\..*)?")
_LAST = re.compile(r"(.*\.)?(down_proj|w2|output_linear)")
_ANOTHER = "the adapter was trained on another model, give the one of this"


class _Settings(BaseModel):
    """The keys of `adapter_config.json` that matter here; the others are copied."""

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


@dataclass(frozen=True)
class Adapter:
    """An adapter: its config, raw and parsed, and its tensors."""

    folder: Path
    config: Mapping[str, Any]
    settings: _Settings
    stored: Stored

    @cached_property
    def pairs(self) -> Mapping[str, tuple[str, str]]:
        """The names of lora_A and lora_B by module."""
        found: dict[str, dict[str, str]] = {}
        for name in self.stored.tensors:
            if lora := _LORA.fullmatch(name):
                found.setdefault(lora["module"], {})[lora["side"]] = name
        return {module: self._pair(module, sides) for module, sides in found.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.stored.tensors[name].shape

    def rank(self, parameter: str) -> int:
        """The rank of a parameter of the model, matched as peft does."""
        patterns = (self.settings.rank_pattern or {}).items()
        own = (rank for key, rank in patterns if _pattern(key).match(parameter))
        return next(own, self.settings.r)

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
    """An adapter's config and headers; a ModelError if it is no LoRA that can be sliced."""
    file = folder / CONFIG_FILE
    if not folder.is_dir():
        raise ModelError(f"no such adapter: {folder} is not a folder, give one with {CONFIG_FILE}")
    if not file.exists():
        raise ModelError(f"{folder} holds no adapter: it has no {CONFIG_FILE}")
    config = read_object(file)
    if (kind := config.get("peft_type")) != "LORA":
        raise ModelError(f"{folder} is a {kind} adapter: only LORA can be sliced, train one")
    try:
        settings = _Settings.model_validate(config)
    except ValidationError as error:
        raise ModelError(f"{file}: {first_fault(error)}") from None
    _check_settings(folder, settings)
    if not (folder / WEIGHTS_FILE).is_file():
        if (folder / "adapter_model.bin").exists():
            raise ModelError(
                f"{folder} holds adapter_model.bin, a pickle, which could run code: load it with "
                f"peft where you trust it and save it as {WEIGHTS_FILE}"
            )
        raise ModelError(f"{folder} holds no {WEIGHTS_FILE}: save the adapter again")
    stored = read_file(folder / WEIGHTS_FILE)
    _check_tensors(folder, stored.tensors)
    return Adapter(folder, config, settings, stored)


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
    for key in settings.rank_pattern or {}:  # that may backtrack for ever
        named = f"{folder / CONFIG_FILE}: rank_pattern {key[:80]!a}"
        is_short = len(key) <= 300 and sum(map(key.count, "*+(")) <= _MAX_WAYS
        if not is_short or not _SIMPLE.fullmatch(key):
            raise ModelError(
                f"{named} is not a simple pattern: write names, with at most "
                rf"{_MAX_WAYS} of .*, \d+ and (a|b)"
            )
        try:
            _pattern(key)
        except re.error as error:
            raise ModelError(f"{named} is not a pattern: {error}") from None


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
    """A key of rank_pattern as peft matches it."""
    return re.compile(rf"(.*\.)?({key})$")


@dataclass(frozen=True)
class Place:
    """The target of a tensor or a pair in a MoE block, by its loaded name."""

    kind: Literal["all experts", "one expert", "router", "whole router"]
    names: tuple[str, ...]
    block: str
    expert: int | None = None
    is_last: bool = False


@dataclass(frozen=True)
class Base:
    """The adapter's base model: its tensors, and its blocks by their loaded names."""

    headers: Headers
    blocks: Mapping[str, DiskBlock]
    is_tied: bool

    def block_of(self, module: str) -> tuple[str, str]:
        """The block of a module, by its loaded name, and the module's name within it."""
        for name, disk in self.blocks.items():
            for prefix in (name, disk.name):
                if module.startswith(f"{prefix}."):
                    return name, module.removeprefix(f"{prefix}.")
        return "", module


def places(adapter: Adapter, base: Base) -> Iterator[Place]:
    """The targets in MoE blocks, in no order; a ModelError for one that cannot be sliced."""
    for module, pair in adapter.pairs.items():
        block, part = base.block_of(module)
        if block and _ALL_EXPERTS.fullmatch(part):
            yield _all_experts(adapter, base, block, pair)
        elif block and (one := _ONE_EXPERT.fullmatch(part)):
            disk, expert = base.blocks[block], int(one["expert"])
            if not disk.by_expert:
                raise adapter.refusal(
                    f"{pair[0]} is of one expert, but the experts of {block} lie in one tensor: "
                    f"{_ANOTHER}"
                )
            own = disk.by_expert[expert] if expert < disk.n_experts else {}
            _check_linear(adapter, base.headers, own.get(f"{one['part']}.weight"), pair)
            is_last = _LAST.fullmatch(one["part"]) is not None
            yield Place("one expert", pair, block, expert, is_last=is_last)
        elif block and _ROUTER.fullmatch(part):
            _check_linear(adapter, base.headers, base.blocks[block].router_weight, pair)
            yield Place("router", pair, block)
        else:
            weight = f"{module}.weight"
            if weight in base.headers or not (base.is_tied and module == "lm_head"):
                _check_linear(adapter, base.headers, weight, pair)
    paired = {name for pair in adapter.pairs.values() for name in pair}
    for name in adapter.stored.tensors:
        if name not in paired and (owner := _router_trained_whole(adapter, base, name)):
            yield Place("whole router", (name,), owner)


def _all_experts(adapter: Adapter, base: Base, block: str, pair: tuple[str, str]) -> Place:
    disk = base.blocks[block]
    _check_axes(adapter, pair, 2)
    (rows, n_in), (n_out, _) = (adapter.shape(name) for name in pair)
    first, last = _widths(disk, base.headers)
    shapes = f"{pair[0]} is {adapter.shape(pair[0])} and its lora_B {adapter.shape(pair[1])}"
    if first == last:
        raise adapter.refusal(f"the projections of {block} are all {first}: they look alike")
    if (n_out, n_in) in (first, last) and (n_in, n_out) not in (first, last):
        raise adapter.refusal(
            f"{shapes}: an older peft saved it, with in and out of experts exchanged, and a peft "
            "of today cannot load it: load it with that peft, merge it, and profile and prune the "
            "merged model"
        )
    if (n_in, n_out) not in (first, last) or rows % disk.n_experts:
        raise adapter.refusal(
            f"{shapes}, but {block} has {disk.n_experts} experts of {first[0]} → {first[1]} and "
            f"{last[0]} → {last[1]}: {_ANOTHER}"
        )
    is_last = (n_in, n_out) == last
    targets = {t.rpartition(".")[2] for t in adapter.settings.target_parameters or ()}
    own = {t for t in targets if _NAME.fullmatch(t) and bool(_LAST.fullmatch(t)) == is_last}
    rank, ranks = rows // disk.n_experts, {adapter.rank(f"{block}.experts.{t}") for t in own}
    if rank not in ranks:
        raise adapter.refusal(
            f"{pair[0]} has rank {rank} for each of {disk.n_experts} experts, its config says "
            f"{' or '.join(map(str, sorted(ranks))) or 'nothing'}: {_ANOTHER}"
        )
    return Place("all experts", pair, block, is_last=is_last)


def _widths(disk: DiskBlock, headers: Headers) -> tuple[tuple[int, int], tuple[int, int]]:
    """In and out widths of an expert's first projections, fused as loaded, and of its last."""
    width = headers[disk.router_weight].shape[1]
    sizes = {True: 0, False: 0}
    for name in disk.by_expert[0].values() if disk.by_expert else disk.fused:
        shape = headers[name].shape[0 if disk.by_expert else 1 :]
        if len(shape) == 2:
            sizes[name in disk.last] += math.prod(shape)
    return (width, sizes[False] // width), (sizes[True] // width, width)


def _check_linear(
    adapter: Adapter, headers: Headers, weight: str | None, pair: tuple[str, str]
) -> None:
    """Checks that a pair adapts an existing weight; widths of convolutions are not checked."""
    if weight is None or weight not in headers:
        raise adapter.refusal(f"{pair[0]} adapts what the model does not have: {_ANOTHER}")
    shape = headers[weight].shape
    _check_axes(adapter, pair, len(shape))
    (_, n_in, *more), (n_out, *_) = (adapter.shape(name) for name in pair)
    if not more and shape != (n_out, n_in):
        raise adapter.refusal(
            f"{pair[0]} and its lora_B adapt {n_in} → {n_out}, but {weight} is {shape}: {_ANOTHER}"
        )


def _check_axes(adapter: Adapter, pair: tuple[str, str], n_axes: int) -> None:
    if wrong := next((name for name in pair if len(adapter.shape(name)) != n_axes), None):
        raise adapter.refusal(
            f"{wrong} is {adapter.shape(wrong)}, but what it adapts has {n_axes} axes: {_ANOTHER}"
        )


def _router_trained_whole(adapter: Adapter, base: Base, name: str) -> str | None:
    """The block of a tensor without a pair, if it is in one; checks its shape."""
    stored = name.removeprefix(PREFIX)
    block, part = base.block_of(stored)
    is_of_block = block and _OF_BLOCK.fullmatch(part)
    if is_of_block:
        disk = base.blocks[block]
        is_weight = re.fullmatch(r"(gate|router)\.weight", part) is not None
        stored = disk.router_weight if is_weight else f"{disk.name}.{part}"
        if stored not in disk.axes or stored in disk.fused:
            raise adapter.refusal(
                f"{name} is neither lora_A nor lora_B: of experts and routers only these, and "
                "routers trained whole, can be sliced (no DoRA, no bias, no modules_to_save)"
            )
    if stored in base.headers and adapter.shape(name) != base.headers[stored].shape:
        raise adapter.refusal(
            f"{name} is {adapter.shape(name)}, in the model {base.headers[stored].shape}: "
            f"{_ANOTHER}"
        )
    return block if is_of_block else None
