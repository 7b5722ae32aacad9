"""A Mixture-of-Experts model whose experts are packed: as integers, as factors, or as constants.

On loading every matrix is unpacked into the family's own tensors, so the model runs as any of its
family. `config.json` says how each expert is stored, by its number or `*` for a whole block; blocks
that it does not name, and option `whole`, have plain weights:

    "packed_experts": {"group_size": 128, "options": {
        "model.layers.0.mlp": {"*": "4"}, "model.layers.1.mlp": {"0": "lowrank:0.25", "1": "copy"}}}

In place of `<expert>.<projection>.weight` of R rows and C columns the weights hold

    1 to 8         weight_packed (R, ⌈C·bits/32⌉) int32, as compressed-tensors packs it;
                   weight_scale (R, C/group_size); weight_shape: R and C
    lowrank        weight_u (R, r) and weight_v (r, C), whose product it is; beside them, if the
                   option has them, weight_s (k, C), added to the rows weight_rows (k) int32
    zero, mean     <block>.constant_experts.<id>.approx_value v (D): the expert gives v
    copy           as well approx_scale c (1): the expert gives c·x + v for its input x

Needs transformers 5.22 or later, and nothing of expertcut. Names of tensors end in their axes: R
rows, C columns, W words, G groups, T tokens, D width, K experts per token.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

PACKING_KEY = "packed_experts"
TYPE_PREFIX = "packed_"  # of model_type
CONSTANTS = ("zero", "mean", "copy")
_MATRIX = re.compile(r"(?P<weight>(?P<module>.+)\.weight)_(?P<part>packed|scale|shape|u|v|s|rows)")
_OF_EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<expert>0|[1-9]\d{0,4})\..+")
_CONSTANT = re.compile(
    r"(?P<block>.+)\.constant_experts\.(?P<expert>0|[1-9]\d{0,4})\.(?P<part>approx_(value|scale))"
)
_WIDTH = re.compile("[1-8]")
_FLOATS = ("BF16", "F16", "F32")
_FORMS = {
    "bits": [{"packed", "scale", "shape"}],
    "lowrank": [{"u", "v"}, {"u", "v", "s", "rows"}],
}
Named = Callable[[str], Tensor]  # a tensor on disk
Stored = tuple[str, tuple[int, ...]]  # its dtype, as safetensors names it, and shape


def unpack(packed: Tensor, bits: int, n_columns: int) -> Tensor:
    """Integers in int8 (R, C) of dense little-endian bits in int32; of 1 bit ±1."""
    words = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
    codes = words.new_zeros(*words.shape[:2], 32, dtype=torch.int8)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        low = min(bits, 32 - shift)
        code = (words[..., word] >> shift) & (2**low - 1)  # the shift fills with the sign
        if low < bits:
            code |= (words[..., word + 1] & (2 ** (bits - low) - 1)) << low
        codes[..., i] = code - 2 ** (bits - 1)
    ints_RC: Tensor = codes.flatten(1)[:, :n_columns]
    return ints_RC * 2 + 1 if bits == 1 else ints_RC.contiguous()


def dequantise(ints_RC: Tensor, scale_RG: Tensor) -> Tensor:
    """Integers times the scales of their groups, in the scales' dtype."""
    ints_RGS = ints_RC.unflatten(1, (scale_RG.shape[1], -1))
    weight_RC: Tensor = (ints_RGS.to(scale_RG.dtype) * scale_RG[:, :, None]).flatten(1)
    return weight_RC


def low_rank(u: Tensor, v: Tensor, s: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """U (R, P) · V (P, C), plus S (K, C) at its rows; the sums are not rounded before the end."""
    wide = torch.promote_types(u.dtype, torch.float32)
    weight_RC = u.to(wide) @ v.to(wide)
    if s is not None and rows is not None:
        weight_RC[rows.long()] += s.to(wide)
    return weight_RC.to(u.dtype)


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix on disk: its parts by their names after `weight_`, shape, dtype, and bits."""

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    bits: int = 0

    def read(self, named: Named) -> Tensor:
        """The dense matrix; ValueError for numbers that do not fit the shape."""
        parts = {part: named(name) for part, name in self.parts.items()}
        if "shape" in parts and tuple(parts["shape"].tolist()) != self.shape:
            said = parts["shape"].tolist()
            raise ValueError(f"{self.parts['shape']} says {said}, must be {list(self.shape)}")
        if "rows" in parts:
            rows = parts["rows"].tolist()
            if len({*rows}) < len(rows) or not all(0 <= row < self.shape[0] for row in rows):
                raise ValueError(
                    f"{self.parts['rows']} must name rows 0 to {self.shape[0] - 1}, each once"
                )
        if "packed" in parts:
            return dequantise(unpack(parts["packed"], self.bits, self.shape[1]), parts["scale"])
        return low_rank(**parts)


@dataclass(frozen=True)
class Packing:
    """What `packed_experts` of a config says; `modules` are widths beside those of experts."""

    group_size: int
    options: Mapping[str, Mapping[str, str]]
    modules: Mapping[str, str]

    @classmethod
    def of(cls, said: Any) -> "Packing":
        """Raises ValueError for another form."""
        said = said if isinstance(said, Mapping) else {}
        size, options, modules = (said.get(k) for k in ("group_size", "options", "modules"))
        blocks = [*options.values(), modules or {}] if isinstance(options, Mapping) else [None]
        is_valid = type(size) is int and size > 0
        for block in blocks:
            values = block.values() if isinstance(block, Mapping) else [None]
            is_valid &= all(isinstance(option, str) for option in values)
        if not is_valid:
            raise ValueError(f"{PACKING_KEY} must give a group_size and options by block")
        return cls(size, options, modules or {})

    def option(self, block: str, expert: int | str) -> str:
        """How an expert is stored."""
        by_expert = self.options.get(block, {"*": "whole"})
        option = by_expert.get(str(expert), by_expert.get("*"))
        if option is None:
            raise ValueError(f"{PACKING_KEY} does not say how expert {expert} of {block} is stored")
        return option

    def option_of(self, module: str) -> str:
        """How a module's weight is stored."""
        of = _OF_EXPERT.fullmatch(f"{module}.weight")
        if module in self.modules or of is None:
            return self.modules.get(module, "whole")
        return self.option(of["block"], of["expert"])

    def constants(self, block: str, experts: int) -> dict[int, str]:
        """The experts of a block without weights, with their options."""
        if block not in self.options:
            return {}
        options = {expert: self.option(block, expert) for expert in range(experts)}
        return {expert: option for expert, option in options.items() if option in CONSTANTS}

    def matrices(self, tensors: Mapping[str, Stored]) -> dict[str, StoredMatrix]:
        """The packed matrices among tensors (dtype, shape), by the name of their dense weight.

        Raises ValueError for one that is not stored as the config says.
        """
        found: dict[str, dict[str, str]] = {}
        for name in tensors:
            if of := _MATRIX.fullmatch(name):
                found.setdefault(of["weight"], {})[of["part"]] = name
            elif (own := _CONSTANT.fullmatch(name)) and own["block"] in self.options:
                self._check_constant(own, tensors[name])
        for name in tensors:
            if name.endswith(".weight") and name not in found:
                option = self.option_of(name.removesuffix(".weight"))
                if option != "whole":
                    raise ValueError(f"{name} is a plain weight, but the config says {option}")
        return {weight: self._matrix(weight, parts, tensors) for weight, parts in found.items()}

    def _check_constant(self, own: re.Match[str], stored: Stored) -> None:
        option = self.option(own["block"], own["expert"])
        if option not in CONSTANTS or (own["part"] == "approx_scale" and option != "copy"):
            raise ValueError(f"{own[0]} is there, but the config says {option}")
        wanted = 1 if own["part"] == "approx_scale" else None
        if stored[0] not in _FLOATS or len(stored[1]) != 1 or wanted not in (None, *stored[1]):
            raise ValueError(f"{own[0]} is {stored[0]} {list(stored[1])}: must be a float vector")

    def _matrix(
        self,
        weight: str,
        parts: Mapping[str, str],
        tensors: Mapping[str, Stored],
    ) -> StoredMatrix:
        option = self.option_of(weight.removesuffix(".weight"))
        is_width = _WIDTH.fullmatch(option) is not None
        kind = "bits" if is_width else option.partition(":")[0]
        if weight in tensors:
            raise ValueError(f"{weight} is there packed and plain")
        if kind not in _FORMS:
            raise ValueError(f"{weight} is packed, but the config says {option[:50]}")
        if {*parts} not in _FORMS[kind]:
            lacks = " or ".join(
                ", ".join(sorted(f"weight_{part}" for part in form)) for form in _FORMS[kind]
            )
            has = ", ".join(sorted(f"weight_{part}" for part in parts))
            raise ValueError(f"{weight} ({option[:50]}) has {has}: must have {lacks}")
        stored = {part: tensors[name] for part, name in parts.items()}
        first = stored["scale" if is_width else "u"]
        wanted = _wanted(stored, int(option) if is_width else 0, self.group_size)
        for part, want in wanted.items():
            if stored[part] != want or first[0] not in _FLOATS:
                dtype, shape = stored[part]
                raise ValueError(
                    f"{parts[part]} is {dtype} {list(shape)}, must be {want[0]} {list(want[1])}"
                )
        n_rows, n_columns = first[1][0], stored["scale" if is_width else "v"][1][1]
        shape = (n_rows, n_columns * self.group_size if is_width else n_columns)
        return StoredMatrix(parts, shape, first[0], int(option) if is_width else 0)


def _wanted(stored: Mapping[str, Stored], bits: int, group_size: int) -> dict[str, Stored]:
    """What the parts of a matrix must be by those that say its shape."""

    def size(part: str, axis: int) -> int:
        shape = stored[part][1]
        return shape[axis] if len(shape) == 2 else 0

    if bits:
        n_rows, n_groups = size("scale", 0), size("scale", 1)
        return {
            "scale": (stored["scale"][0], (n_rows, n_groups)),
            "packed": ("I32", (n_rows, -(-n_groups * group_size * bits // 32))),
            "shape": ("I64", (2,)),
        }
    dtype, rank, n_columns = stored["u"][0], size("u", 1), size("v", 1)
    wanted: dict[str, Stored] = {
        "u": (dtype, (size("u", 0), rank)),
        "v": (dtype, (rank, n_columns)),
    }
    if "s" in stored:
        n_kept = size("s", 0)
        wanted |= {"s": (dtype, (n_kept, n_columns)), "rows": ("I32", (n_kept,))}
    return wanted


class _Late:
    """A tensor that is made when transformers reads it, as a slice of safetensors is."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make

    def __getitem__(self, _: Any) -> Tensor:
        return self.make()


def unpacked(packing: Packing, slices: Mapping[str, Any]) -> dict[str, Any]:
    """Slices of safetensors by the family's names; ValueError for what the config does not say."""
    tensors = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    matrices = packing.matrices(tensors)
    gone = {name for matrix in matrices.values() for name in matrix.parts.values()}
    found = {name: part for name, part in slices.items() if name not in gone}

    def named(name: str) -> Tensor:
        values: Tensor = slices[name][...]
        return values

    for weight, matrix in matrices.items():
        found[weight] = _Late(partial(matrix.read, named))
    of_block: dict[str, dict[int, dict[str, Any]]] = {}
    for name in slices:
        own = _CONSTANT.fullmatch(name)
        if own is not None and own["block"] in packing.options:
            experts = of_block.setdefault(own["block"], {})
            experts.setdefault(int(own["expert"]), {})[own["part"]] = found.pop(name)
    for block, experts in of_block.items():
        ordered = [experts[expert] for expert in sorted(experts)]
        found[f"{block}.experts.approx_value"] = _Late(partial(_values, ordered))
        if any("approx_scale" in parts for parts in ordered):
            found[f"{block}.experts.approx_scale"] = _Late(partial(_scales, ordered))
    return found


def _values(experts: list[dict[str, Any]]) -> Tensor:
    return torch.stack([parts["approx_value"][...] for parts in experts])


def _scales(experts: list[dict[str, Any]]) -> Tensor:
    zero = torch.zeros(1)
    return torch.cat([parts.get("approx_scale", zero)[...].float() for parts in experts])


@cache
def _constant_classes() -> tuple[Any, Any]:
    """The experts classes with constants: plain ones, and those that copy their input too."""
    from .modeling_exact import ConstantExperts

    class CopiedExperts(ConstantExperts):
        """Constants of which some add a multiple of their input: c·x + v."""

        approx_scale: Tensor

        def make_constant(self, removed: list[int]) -> None:
            """As of constants; the factors c (R) start as zeros."""
            super().make_constant(removed)
            self.approx_scale = nn.Parameter(self.down_proj.new_zeros(len(removed)))

        def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
            """As `ConstantExperts`."""
            y_TD = super().forward(x_TD, experts_TK, weights_TK)
            places_TK = torch.tensor(self.places, device=experts_TK.device)[experts_TK]
            scale_X = nn.functional.pad(self.approx_scale.float(), (self.num_experts, 0))
            factor_T1 = (weights_TK.float() * scale_X[places_TK]).sum(dim=1, keepdim=True)
            copied_TD = (factor_T1 * x_TD.float()).to(y_TD.dtype)
            return torch.where(factor_T1 != 0, y_TD + copied_TD, y_TD)

    return ConstantExperts, CopiedExperts


def _make_constant(experts: Any, options: Mapping[int, str]) -> None:
    """The class of the one module changes, as in torch's own parametrize and fully_shard."""
    plain, copied = _constant_classes()
    mixin, base = copied if "copy" in options.values() else plain, type(experts)
    body = {"__module__": __name__}
    experts.__class__ = type(f"{mixin.__name__}Of{base.__name__}", (mixin, base), body)
    experts.make_constant(sorted(options))


class PackedModel:
    """Goes before a family's class for causal language modelling."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        packing = Packing.of(getattr(config, PACKING_KEY))
        for name, module in list(self.named_modules()):  # type: ignore[attr-defined]
            block = name.removesuffix(".experts")
            n_experts = getattr(module, "num_experts", 0) if name.endswith(".experts") else 0
            if constants := packing.constants(block, n_experts):
                _make_constant(module, constants)

    @classmethod
    def _load_pretrained_model(
        cls, model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As every model, of tensors that are unpacked when they are read."""
        if state_dict is None:
            slices: dict[str, Any] = {}
            for file in checkpoint_files:
                opened: Any = safe_open(file, framework="pt")
                slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            state_dict = unpacked(Packing.of(getattr(model.config, PACKING_KEY)), slices)
        family: Any = super()
        return family._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As every model, on one process or by `device_map`."""
        for option in ("tp_plan", "tp_size", "distributed_config"):
            if kwargs.get(option) is not None:
                raise ValueError(f"{option} is not supported: a packed model is loaded as one")
        return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the family's own model, unpacked; ValueError for one with constants."""
        if any(hasattr(module, "approx_value") for module in self.modules()):  # type: ignore[attr-defined]
            raise ValueError("a packed model with constant experts cannot be saved unpacked")
        packed, family = self.config, self.config.__class__.__base__
        left_out = (PACKING_KEY, "auto_map", "model_type")
        said = {key: v for key, v in packed.to_dict().items() if key not in left_out}
        self.config = family.from_dict(said)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
            self.config.architectures = [type(self).__name__.removeprefix("Packed")]
            self.config.save_pretrained(save_directory)
        finally:
            self.config = packed


@cache
def _defined(name: str) -> Any:
    """`PackedOlmoeForCausalLM` and `PackedOlmoeConfig`, of the classes without `Packed`.

    The config has a `model_type` of its own: whatever knows the family only would load the model
    with random experts.
    """
    base = getattr(transformers, name.removeprefix("Packed"))
    if issubclass(base, transformers.PreTrainedConfig):
        body = {"model_type": f"{TYPE_PREFIX}{base.model_type}", "__module__": __name__}
        return type(name, (base,), body)
    config = _defined(f"Packed{base.config_class.__name__}")
    model = type(name, (PackedModel, base), {"config_class": config, "__module__": __name__})
    # Custom code is given no conversions of its family; it gets them by the class's name.
    own = get_checkpoint_conversion_mapping(base.__name__)
    family = get_checkpoint_conversion_mapping(base.config_class.model_type)
    if (conversions := own or family) is not None:
        register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
    return model


def __getattr__(name: str) -> Any:
    """The classes of a family, made when they are asked for."""
    if name.startswith("Packed"):
        return _defined(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
