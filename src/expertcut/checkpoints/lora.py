"""A LoRA adapter of the unpruned model in peft's folder, cut and written with the checkpoint.

With delta_e = B_e·A_e for each expert, rows and columns of kept experts are taken in the order of
the plan. Where an expert's output is scaled, so is the delta of its last projection.

Needs neither peft nor a model; the format is that of peft 0.21. An adapter of all E experts of a
block with rank r is lora_A (r·E, in), row e·r + j for expert e, and lora_B (out, r·E), column
j·E + e. A second parameter of the same module wraps the first, which is then named `….base_layer`;
their shapes tell them apart.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from torch import Tensor

from expertcut.checkpoints import shards
from expertcut.checkpoints.edit import TensorChanges
from expertcut.checkpoints.shards import write_shards
from expertcut.checkpoints.tensor_names import DiskBlock, blocks_of
from expertcut.documents import first_fault
from expertcut.edits.layouts import LAYOUTS
from expertcut.edits.plan import BlockEdit, EditPlan, PlanAdapter, PlanFile
from expertcut.errors import ModelError, OutputError
from expertcut.files import write_atomically
from expertcut.models.checkpoint_dir import read_config, read_object
from expertcut.models.load import Source
from expertcut.models.safetensors_index import Stored, read_file
from expertcut.models.validate import check_values

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
_NUMBERED = re.compile(r"experts\W+\d")  # an expert's number in a pattern of the config
_PATTERNS = (
    *("rank_pattern", "alpha_pattern", "target_parameters"),
    *("target_modules", "exclude_modules"),
)
Pair = tuple[str, str]  # names of lora_A and lora_B
Folds = Mapping[int, np.ndarray[Any, Any]]
Factors = Mapping[int, Sequence[float]]  # of the outputs of kept experts, by new number


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
        by_module: dict[str, dict[str, str]] = {}
        for name in self.stored.tensors:
            if lora := _LORA.fullmatch(name):
                by_module.setdefault(lora["module"], {})[lora["side"]] = name
        pairs = {}
        for module, sides in by_module.items():
            if len(sides) < 2:
                missing = "B" if "A" in sides else "A"
                raise self.refusal(f"{module} has no lora_{missing}.weight: save the adapter again")
            a, b = self.shape(sides["A"]), self.shape(sides["B"])
            if not len(a) > 1 < len(b) or not all(a + b) or a[0] != b[1]:
                raise self.refusal(
                    f"{module} has lora_A {a} and lora_B {b}, which must meet in one rank: save "
                    "the adapter again"
                )
            pairs[module] = sides["A"], sides["B"]
        return pairs

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
    wrong = next((name for name in stored.tensors if not name.startswith(PREFIX)), None)
    if wrong or not stored.tensors:
        raise ModelError(
            f"{folder / WEIGHTS_FILE} holds {wrong or 'no tensor'}, must hold names that begin "
            f"with {PREFIX}: save the adapter with peft's save_pretrained"
        )
    adapter = Adapter(folder, config, settings, stored)
    for name, tensor in stored.tensors.items():
        if tensor.dtype not in _DTYPES:
            raise adapter.refusal(
                f"{name} is {tensor.dtype}, must be one of {', '.join(_DTYPES)}: save the adapter "
                "in one of these"
            )
    return adapter


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


def _pattern(key: str) -> re.Pattern[str]:
    """A key of rank_pattern as peft matches it."""
    return re.compile(rf"(.*\.)?({key})$")


def _columns(b: Tensor, keep: Sequence[int], n_experts: int, scaled: Factors) -> Tensor:
    """The columns (out, r·E) of kept experts; an expert's r columns lie E apart."""
    by_expert: Tensor = b.unflatten(1, (-1, n_experts))[..., list(keep)]
    for position, factors in scaled.items():
        by_expert[..., position] = _multiplied(by_expert[..., position], factors)
    return by_expert.flatten(1)


def _multiplied(b: Tensor, factors: Sequence[float]) -> Tensor:
    made = b.double()
    for factor in factors:
        made = made * factor
    return made.to(b.dtype)


def _output_factors(edit: BlockEdit, folds_E: np.ndarray[Any, Any] | None) -> Factors:
    """The factors of each kept expert's output, one after another, by its new number."""
    factors = {}
    for position, expert in enumerate(edit.keep):
        both = (edit.scale.get(expert, 1.0), 1.0 if folds_E is None else float(folds_E[position]))
        if own := tuple(factor for factor in both if factor != 1.0):
            factors[position] = own
    return factors


@dataclass(frozen=True)
class AdapterCut:
    """An adapter of a model, and the plan that cuts both; `folder` is the new checkpoint."""

    adapter: Adapter
    source: Source
    plan: EditPlan
    folder: Path

    def write(self, temporary: Path, plan: PlanFile, folds: Folds) -> PlanFile:
        """Writes the sliced adapter in peft's format; returns the plan that names it."""
        shard, place = self.laid_out(folds), temporary / "adapter"
        try:
            write_shards(place, [shard])
        except OSError as error:
            raise OutputError(f"{place} cannot be written: {error.strerror}") from None
        shards.check_written(place, [shard])
        config = {**self.adapter.config, "revision": None}
        config["base_model_name_or_path"] = str(self.folder.resolve())
        if LAYOUTS[self.plan.layout].keeps_rows:
            config |= {"auto_mapping": None, "task_type": config.get("task_type") or "CAUSAL_LM"}
        write_atomically(place / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
        sums = {}
        for key, name in (("config", CONFIG_FILE), ("weights", WEIGHTS_FILE)):
            with (self.adapter.folder / name).open("rb") as stream:
                sums[f"{key}_sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
        record = PlanAdapter(path=str(self.adapter.folder), **sums)
        return plan.model_copy(update={"adapter": record})

    def laid_out(self, folds: Folds) -> shards.Shard:
        """The file of its weights; with empty `folds` only its size is right."""
        (shard,) = shards.lay_out(self.adapter.stored, self._rewrite(folds), 1 << 62)
        return replace(shard, name=WEIGHTS_FILE)

    @cached_property
    def _blocks(self) -> Mapping[str, DiskBlock]:
        return blocks_of(self.source.headers, self.plan.edits)

    @property
    def _is_stock(self) -> bool:
        return not LAYOUTS[self.plan.layout].keeps_rows

    def _rewrite(self, folds: Folds) -> TensorChanges:
        """What becomes of its tensors in MoE blocks; a ModelError if one cannot be sliced."""
        stored, edits, headers = self.adapter.stored, self.plan.edits, self.source.headers
        rewrite = TensorChanges(headers=stored.tensors, edits=edits, blocks=self._blocks)
        is_tied = bool(read_config(self.source.path).get("tie_word_embeddings"))
        factors = {
            name: _output_factors(edit, folds.get(layer))
            for layer, (name, edit) in enumerate(edits.items())
        }
        for module, pair in self.adapter.pairs.items():
            block, part = self._block_of(module)
            if block and _ALL_EXPERTS.fullmatch(part):
                self._slice_all(rewrite, block, pair, factors[block])
            elif block and (one := _ONE_EXPERT.fullmatch(part)):
                self._slice_one(rewrite, block, pair, one, factors[block])
            elif block and _ROUTER.fullmatch(part):
                self._check_linear(self._blocks[block].router_weight, pair)
                targets = self.adapter.settings.target_parameters or ()
                if not any(t.endswith(("gate.weight", "router.weight")) for t in targets):
                    self._refuse_linear_layer(pair)
                self._slice_router(rewrite, block, pair[1], axis=0)
            elif f"{module}.weight" in headers or not (is_tied and module == "lm_head"):
                self._check_linear(f"{module}.weight", pair)
        paired = {name for pair in self.adapter.pairs.values() for name in pair}
        for name in stored.tensors:
            if name not in paired:
                self._slice_unpaired(rewrite, name)
        if self._is_stock and rewrite.renamed:
            self._refuse_numbers()
        return rewrite

    def _block_of(self, module: str) -> tuple[str, str]:
        """The block of a module, by its loaded name, and the module's name within it."""
        for name, disk in self._blocks.items():
            for prefix in (name, disk.name):
                if module.startswith(f"{prefix}."):
                    return name, module.removeprefix(f"{prefix}.")
        return "", module

    def _slice_all(self, rewrite: TensorChanges, block: str, pair: Pair, factors: Factors) -> None:
        adapter, n_experts = self.adapter, self._blocks[block].n_experts
        self._check_axes(pair, 2)
        (rows, n_in), (n_out, _) = map(adapter.shape, pair)
        first, last = self._widths(block)
        shapes = f"{pair[0]} is {adapter.shape(pair[0])} and its lora_B {adapter.shape(pair[1])}"
        if first == last:
            raise adapter.refusal(f"the projections of {block} are all {first}: they look alike")
        if (n_out, n_in) in (first, last) and (n_in, n_out) not in (first, last):
            raise adapter.refusal(
                f"{shapes}: an older peft saved it, with in and out of experts exchanged, and a "
                "peft of today cannot load it: load it with that peft, merge it, and profile and "
                "prune the merged model"
            )
        if (n_in, n_out) not in (first, last) or rows % n_experts:
            raise adapter.refusal(
                f"{shapes}, but {block} has {n_experts} experts of {first[0]} → {first[1]} and "
                f"{last[0]} → {last[1]}: {_ANOTHER}"
            )
        is_last = (n_in, n_out) == last
        targets = {t.rpartition(".")[2] for t in adapter.settings.target_parameters or ()}
        own = {t for t in targets if _NAME.fullmatch(t) and bool(_LAST.fullmatch(t)) == is_last}
        rank, ranks = rows // n_experts, {adapter.rank(f"{block}.experts.{t}") for t in own}
        if rank not in ranks:
            raise adapter.refusal(
                f"{pair[0]} has rank {rank} for each of {n_experts} experts, its config says "
                f"{' or '.join(map(str, sorted(ranks))) or 'nothing'}: {_ANOTHER}"
            )
        keep, scaled = self.plan.edits[block].keep, factors if is_last else {}
        if len(keep) < n_experts:
            kept_rows = tuple(expert * rank + j for expert in keep for j in range(rank))
            rewrite.keep_rows(pair[0], 0, kept_rows)
        if len(keep) < n_experts or scaled:
            apply = partial(_columns, keep=keep, n_experts=n_experts, scaled=scaled)
            rewrite.changed[pair[1]] = shards.Change((n_out, rank * len(keep)), apply)

    def _widths(self, block: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """In and out widths of an expert's first projections, fused as loaded, and of its last."""
        disk, headers = self._blocks[block], self.source.headers
        width = headers[disk.router_weight].shape[1]
        sizes = {True: 0, False: 0}
        for name in disk.by_expert[0].values() if disk.by_expert else disk.fused:
            shape = headers[name].shape[0 if disk.by_expert else 1 :]
            if len(shape) == 2:
                sizes[name in disk.last] += math.prod(shape)
        return (width, sizes[False] // width), (sizes[True] // width, width)

    def _slice_one(
        self, rewrite: TensorChanges, block: str, pair: Pair, one: re.Match[str], factors: Factors
    ) -> None:
        disk, keep, expert = self._blocks[block], self.plan.edits[block].keep, int(one["expert"])
        if not disk.by_expert:
            raise self.adapter.refusal(
                f"{pair[0]} is of one expert, but the experts of {block} lie in one tensor: "
                f"{_ANOTHER}"
            )
        own = disk.by_expert[expert] if expert < disk.n_experts else {}
        self._check_linear(own.get(f"{one['part']}.weight"), pair)
        self._refuse_linear_layer(pair)
        if expert not in keep:
            rewrite.removed |= set(pair)
            return
        position = keep.index(expert)
        if self._is_stock and position != expert:
            old, new = f".experts.{expert}.", f".experts.{position}."
            rewrite.renamed |= {name: name.replace(old, new) for name in pair}
        if position in factors and _LAST.fullmatch(one["part"]):
            rewrite.apply(pair[1], partial(_multiplied, factors=factors[position]))

    def _refuse_linear_layer(self, pair: Pair) -> None:
        """Refuses a linear layer, which peft converts to a parameter, beside gates with biases."""
        if not self._is_stock and self.plan.is_biased:
            raise self.adapter.refusal(
                f"{pair[0]} is as transformers 4 has experts and routers, which peft cannot bring "
                "to gates with biases: leave out --boost and --suppress, or --layout exact"
            )

    def _check_linear(self, weight: str | None, pair: Pair) -> None:
        """Checks that a pair adapts an existing weight; widths of convolutions are not checked."""
        headers, adapter = self.source.headers, self.adapter
        if weight is None or weight not in headers:
            raise adapter.refusal(f"{pair[0]} adapts what the model does not have: {_ANOTHER}")
        shape = headers[weight].shape
        self._check_axes(pair, len(shape))
        (_, n_in, *more), (n_out, *_) = map(adapter.shape, pair)
        if not more and shape != (n_out, n_in):
            raise adapter.refusal(
                f"{pair[0]} and its lora_B adapt {n_in} → {n_out}, but {weight} is {shape}: "
                f"{_ANOTHER}"
            )

    def _check_axes(self, pair: Pair, n_axes: int) -> None:
        shape = self.adapter.shape
        if wrong := next((name for name in pair if len(shape(name)) != n_axes), None):
            raise self.adapter.refusal(
                f"{wrong} is {shape(wrong)}, but what it adapts has {n_axes} axes: {_ANOTHER}"
            )

    def _slice_unpaired(self, rewrite: TensorChanges, name: str) -> None:
        """Slices a router that was trained whole; refuses other tensors of a block."""
        headers, stored = self.source.headers, name.removeprefix(PREFIX)
        block, part = self._block_of(stored)
        is_of_block = block and _OF_BLOCK.fullmatch(part)
        if is_of_block:
            disk = self._blocks[block]
            is_weight = re.fullmatch(r"(gate|router)\.weight", part) is not None
            stored = disk.router_weight if is_weight else f"{disk.name}.{part}"
            if stored not in disk.axes or stored in disk.fused:
                raise self.adapter.refusal(
                    f"{name} is neither lora_A nor lora_B: of experts and routers only these, and "
                    "routers trained whole, can be sliced (no DoRA, no bias, no modules_to_save)"
                )
        shape = self.adapter.shape(name)
        if stored in headers and shape != headers[stored].shape:
            raise self.adapter.refusal(
                f"{name} is {shape}, in the model {headers[stored].shape}: {_ANOTHER}"
            )
        if is_of_block and self.plan.edits[block].bias:
            raise self.adapter.refusal(
                f"{name} takes the place of a router that --boost or --suppress would change: "
                "leave these out, or train the router by lora_A and lora_B"
            )
        if is_of_block:
            self._slice_router(rewrite, block, name, shape.index(self._blocks[block].n_experts))

    def _slice_router(self, rewrite: TensorChanges, block: str, name: str, axis: int) -> None:
        """Cuts the router's rows, which layout exact keeps."""
        keep = self.plan.edits[block].keep
        if self._is_stock and len(keep) < self._blocks[block].n_experts:
            rewrite.keep_rows(name, axis, keep)

    def _refuse_numbers(self) -> None:
        for key in _PATTERNS:
            value = getattr(self.adapter.settings, key) or ()
            texts = [value] if isinstance(value, str) else value
            if wrong := next((text for text in texts if _NUMBERED.search(text)), None):
                raise ModelError(
                    f"{self.adapter.folder / CONFIG_FILE}: {key} names an expert by its number "
                    f"({wrong}), and numbers change in layout stock: take --layout exact"
                )


def adapter_cut(
    adapter: Path | None, source: Source, plan: EditPlan, folder: Path
) -> AdapterCut | None:
    """An adapter that fits the model, the plan and the disk; None without an adapter."""
    if adapter is None:
        return None
    source.refuse_packed("cut together with an adapter")
    adapted = AdapterCut(read_adapter(adapter), source, plan, folder)
    shards.check_space(folder, adapted.laid_out({}).size_bytes)
    check_values(adapter / WEIGHTS_FILE)
    return adapted
