"""Options that make an expert smaller, their exact sizes, what a loader takes; `compress.json`.

Nothing heavy is imported here. Quantised weights are laid out as compressed-tensors'
`pack-quantized` has them. R rows are outputs of a projection, C columns its inputs.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, FiniteFloat, model_validator

from expertcut.documents import Record
from expertcut.errors import PlanError, SettingsError

COMPRESSION_FILE = "compress.json"
GROUP_SIZE = 128
Loader = Literal["vllm", "llama.cpp", "transformers"]
Grain = Literal["layer", "expert"]
Projection = Literal["gate", "up", "down"]
Weigh = Literal["output", "answers"]
Kind = Literal["bits", "lowrank", "mean", "zero", "copy", "whole"]
Shape = tuple[int, int]
_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I32": 4, "I64": 8}
_GRAMMAR = "write a width (1 to 8), lowrank:SHARE, lowrank:SHARE:ROWS, mean, zero, copy or whole"
# A row's values in a block, and the bytes of the block. Where a block does not divide the columns
# the next type is named, of the same width where one is (llama-quantize itself would go up: q5_0
# for q4_K, q5_1 for q5_K), and f16 where none fits, as llama-quantize does (tensor_type_fallback).
_GGML = {
    **{"q2_K": (256, 84), "q3_K": (256, 110), "q4_K": (256, 144), "q5_K": (256, 176)},
    **{"q6_K": (256, 210), "q4_0": (32, 18), "q5_0": (32, 22), "q8_0": (32, 34)},
    **{"f16": (1, 2), "bf16": (1, 2), "f32": (1, 4)},
}
_GGML_NEXT = {"q2_K": "q4_0", "q3_K": "q4_0", "q4_K": "q4_0", "q5_K": "q5_0", "q6_K": "q8_0"}
_GGML_OF_BITS = {2: "q2_K", 3: "q3_K", 4: "q4_K", 5: "q5_K", 6: "q6_K", 8: "q8_0"}
_GGML_OF_DTYPE = {"F16": "f16", "BF16": "bf16", "F32": "f32", "F64": "f32"}


@dataclass(frozen=True)
class Option:
    """One way to store an expert.

    `bits`: integers with a scale per group. `lowrank`: W ≈ UV + S, where UV holds `rank_share` of
    the parameters and S `row_share` of the rows of W − UV (LoSparse, arXiv 2306.11222). `mean` and
    `zero`: a constant. `copy`: c·x + v (MoE++, arXiv 2410.07348). `whole`: unchanged.
    """

    kind: Kind
    bits: int = 0
    rank_share: float = 0
    row_share: float = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """The option that `str` writes so; raises SettingsError."""
        text = text.strip()
        if re.fullmatch("[1-8]", text):
            return cls("bits", bits=int(text))
        for kind in get_args(Kind)[2:]:
            if text == kind:
                return cls(kind)
        if found := re.fullmatch(r"lowrank:(\d?\.?\d{1,15})(?::(\d?\.?\d{1,15}))?", text, re.A):
            rank_share, row_share = float(found[1]), float(found[2] or 0)
            if 0 < rank_share <= 1 and row_share <= 1:
                return cls("lowrank", rank_share=rank_share, row_share=row_share)
            raise SettingsError(f"{text!a} is not an option: its shares must lie between 0 and 1")
        raise SettingsError(f"{text[:60]!a} is not an option: {_GRAMMAR}")

    def __str__(self) -> str:
        if self.kind == "bits":
            return str(self.bits)
        shares = [share for share in (self.rank_share, self.row_share) if share]
        return ":".join([self.kind, *(f"{share:.15g}" for share in shares)])

    @property
    def is_constant(self) -> bool:
        """Whether an expert keeps no matrix, and gives c·x + v."""
        return self.kind in ("mean", "zero", "copy")

    def rank(self, shape: Shape) -> int:
        """Columns of U and rows of V."""
        return min(_part(self.rank_share, math.prod(shape) / sum(shape)), *shape)

    def n_rows(self, shape: Shape) -> int:
        """Rows that S keeps."""
        return _part(self.row_share, shape[0])

    def stored(
        self, name: str, shape: Shape, dtype: str, group_size: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dtype (of safetensors) and shape of each tensor that stands for the weight `name`.

        Raises SettingsError: the group size does not divide the columns.
        """
        rows, columns = shape
        if self.kind == "bits":
            check_group_size(group_size, name, columns)
            return {
                f"{name}_packed": ("I32", (rows, -(-columns * self.bits // 32))),
                f"{name}_scale": (dtype, (rows, columns // group_size)),
                f"{name}_shape": ("I64", (2,)),
            }
        if self.kind == "lowrank":
            rank, kept = self.rank(shape), self.n_rows(shape)
            made = {f"{name}_u": (dtype, (rows, rank)), f"{name}_v": (dtype, (rank, columns))}
            sparse = {f"{name}_s": (dtype, (kept, columns)), f"{name}_rows": ("I32", (kept,))}
            return {**made, **sparse} if kept else {**made}
        return {} if self.is_constant else {name: (dtype, shape)}

    def expert_bytes(
        self, shapes: Mapping[str, Shape], dtype: str, width: int, group_size: int
    ) -> int:
        """Bytes of an expert's tensors in the files, constants of `width` values included."""
        if self.is_constant:
            return (width + (self.kind == "copy")) * _ITEM_BYTES[dtype]
        return sum(
            math.prod(stored_shape) * _ITEM_BYTES[stored_dtype]
            for name, shape in shapes.items()
            for stored_dtype, stored_shape in self.stored(name, shape, dtype, group_size).values()
        )

    def ggml_type(self, columns: int, dtype: str) -> str:
        """The type of llama.cpp for a tensor with these columns."""
        name = _GGML_OF_BITS[self.bits] if self.kind == "bits" else _GGML_OF_DTYPE[dtype]
        if columns % _GGML[name][0]:
            name = _GGML_NEXT.get(name, name)
        return "f16" if columns % _GGML[name][0] else name

    def gguf_bytes(self, shapes: Mapping[str, Shape], dtype: str) -> int:
        """Bytes of an expert's tensors in a GGUF file."""
        total = 0
        for rows, columns in shapes.values():
            block, block_bytes = _GGML[self.ggml_type(columns, dtype)]
            total += rows * columns // block * block_bytes
        return total


def _part(share: float, count: float) -> int:
    """So many of `count`, rounded up; 0.1 of 30 are 3, not 4."""
    return math.ceil(round(share * count, 9))


def check_group_size(group_size: int, name: str, columns: int) -> None:
    """Refuses a group size that does not divide the columns of a weight, with a SettingsError."""
    if columns % group_size:
        fits = [size for size in (128, 64, 32, 16) if columns % size == 0]
        instead = f"take {' or '.join(map(str, fits))}" if fits else f"take a divisor of {columns}"
        raise SettingsError(
            f"--group-size {group_size} does not divide the {columns} columns of {name}: {instead}"
        )


def parse_options(text: str) -> tuple[Option, ...]:
    """Options separated by commas, each once; raises SettingsError."""
    options = tuple(Option.parse(part) for part in text.split(","))
    if twice := [str(option) for option in options if options.count(option) > 1]:
        raise SettingsError(f"the option {twice[0]} stands twice in {text[:100]!a}: name it once")
    return options


@dataclass(frozen=True)
class LoaderRules:
    """What a loader takes; `grains` from the finest."""

    kinds: frozenset[Kind]
    widths: frozenset[int]
    grains: tuple[Grain, ...]
    options: str  # where none are named
    group_sizes: frozenset[int] = frozenset()  # any if empty
    grain_reason: str = ""  # why it takes no finer one
    needs_allow: Mapping[int, str] = field(default_factory=dict)  # widths, and what they need


LOADERS: Mapping[Loader, LoaderRules] = {
    # One scheme a layer (get_moe_method), groups of the Marlin MoE kernels.
    "vllm": LoaderRules(
        kinds=frozenset({"bits", "whole"}),
        widths=frozenset({4, 8}),
        grains=("layer",),
        options="4,8",
        group_sizes=frozenset({32, 64, 128}),
        grain_reason="vLLM takes the scheme of a layer's expert 0 for all its experts",
        needs_allow={2: "vLLM has kernels for it (Humming) since July 2026 only"},
    ),
    "llama.cpp": LoaderRules(
        kinds=frozenset({"bits", "whole"}),
        widths=frozenset(_GGML_OF_BITS),
        grains=("layer",),
        options="2,3,4,8",
        grain_reason="llama.cpp stacks the experts of a layer in tensors of one type",
    ),
    "transformers": LoaderRules(
        kinds=frozenset({"bits", "lowrank", "mean", "zero", "copy", "whole"}),
        widths=frozenset(range(1, 9)),
        grains=("expert", "layer"),
        options="1,2,3,4,8",
    ),
}


def check_menu(
    options: Iterable[Option],
    loader: Loader,
    grain: Grain,
    group_size: int,
    *,
    allow: Iterable[str] = (),
) -> None:
    """Refuses what the loader does not take, with a SettingsError; `allow` names widths."""
    rules, allowed = LOADERS[loader], set(allow)
    if grain not in rules.grains:
        raise SettingsError(
            f"--for {loader} does not take --grain {grain}: {rules.grain_reason}; take --grain "
            f"{rules.grains[0]} or --for transformers"
        )
    for option in options:
        if option.bits in rules.needs_allow and str(option.bits) in allowed:
            continue
        if option.bits in rules.needs_allow:
            raise SettingsError(
                f"--for {loader} does not take option {option}: {rules.needs_allow[option.bits]}; "
                f"add --allow {option} if yours does"
            )
        if option.kind not in rules.kinds or (option.bits or 4) not in rules.widths:
            taken = ", ".join(map(str, sorted(rules.widths)))
            raise SettingsError(
                f"--for {loader} does not take option {option}: take {taken} or whole, or --for "
                "transformers"
            )
    if rules.group_sizes and group_size not in rules.group_sizes:
        sizes = ", ".join(map(str, sorted(rules.group_sizes)))
        raise SettingsError(
            f"--for {loader} does not take --group-size {group_size}: its kernels have {sizes}"
        )


_Count = Annotated[int, Field(ge=0, le=1 << 48)]
_Error = Annotated[float, Field(ge=0)]


class CompressionQuestion(Record):
    """What was measured: the menu, and the tokens of which questions."""

    options: str
    grain: Grain
    group_size: Annotated[int, Field(ge=1)]
    tokens: _Count
    questions: _Count
    fingerprint: str
    weigh: Weigh = "output"
    is_ggml: bool = False  # by the types of llama.cpp


class BlockErrors(Record):
    """Of the chosen options by block: the sum of the experts' errors, and the block's own.

    `measured` is empty where no model was loaded.
    """

    sum: tuple[_Error, ...]
    measured: tuple[_Error, ...]


class Solver(Record):
    """How the program ended."""

    status: str
    gap: _Error
    seconds: _Error


class PeerScore(Record):
    """A choice of options under the same budget on what is held out, or the unedited model.

    `logprob` is the mean log p of right answers or next tokens. Of a quiz it says how many answers
    differ from the unedited model's, and the median |Δ log p|; of texts how often the likeliest
    next token is the same, and KL(base ‖ this).
    """

    plan: str
    bits: FiniteFloat | None = None
    bytes: _Count | None = None
    logprob: FiniteFloat
    flipped: _Count | None = None
    median_abs_logprob_diff: FiniteFloat | None = None
    top1_agreement: FiniteFloat | None = None
    kl: FiniteFloat | None = None


class CompressionFile(Record):
    """`compress.json`: error and bytes of every unit under every option.

    A unit is a block, or with `:e` behind its name an expert. The error is None where an option is
    not allowed. `weights` by block are those that squared errors were multiplied by. Another budget
    needs no model.
    """

    asked: CompressionQuestion
    units: tuple[str, ...] = Field(min_length=1)
    options: tuple[str, ...] = Field(min_length=1)
    error: tuple[tuple[_Error | None, ...], ...]
    bytes: tuple[tuple[_Count, ...], ...]
    weights: tuple[_Error, ...] = ()
    block_error: BlockErrors | None = None  # None where nothing is chosen
    solver: Solver | None = None
    peers: tuple[PeerScore, ...] = ()

    @model_validator(mode="after")
    def _is_a_table(self) -> Self:
        for name, rows in (("error", self.error), ("bytes", self.bytes)):
            if {len(self.units), *map(len, rows)} != {len(rows), len(self.options)}:
                raise ValueError(f"{name} is not a table of {len(self.units)} units")
        try:
            parse_options(",".join(self.options))
        except SettingsError as error:
            raise ValueError(f"options: {error}") from None
        return self

    @property
    def menu(self) -> tuple[Option, ...]:
        """The options."""
        return parse_options(",".join(self.options))

    @property
    def layers(self) -> tuple[str, ...]:
        """The block of each unit."""
        return tuple(re.sub(r":\d+$", "", unit) for unit in self.units)


def load_compression(file: Path) -> CompressionFile:
    """Loads `compress.json`; raises PlanError."""
    return CompressionFile.load(file, PlanError, "is not a valid table of compress")
