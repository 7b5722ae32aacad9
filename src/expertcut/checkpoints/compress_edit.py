"""The edit `compress`: experts stored as integers, factors or constants, each by its option.

What is small is fitted before (rows of low rank, constants); tensors are made again from those of
the source while they are written and while the reference runs, one matrix at a time. R rows are
outputs of a projection, C columns its inputs, D the model's width, K kept rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor

from expertcut.checkpoints.edit import Calibration, Edit, LayoutWriter, Simulation, TensorChanges
from expertcut.checkpoints.packed import layer_option
from expertcut.checkpoints.prune_edit import constant_experts
from expertcut.checkpoints.shards import Made, read_tensor
from expertcut.checkpoints.tensor_names import (
    COPIED,
    PROJECTIONS,
    DiskBlock,
    blocks_of,
    constant_name,
)
from expertcut.edits.calibrate import sample_inputs
from expertcut.edits.compression import Option, Projection
from expertcut.edits.compression_error import expert_tokens
from expertcut.edits.plan import BlockEdit, Compression, EditPlan, PlanFile
from expertcut.edits.quantise import Compressed, compressed
from expertcut.errors import ContractError
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.expert_matrices import matrices
from expertcut.models.load import MoeModel, Source
from expertcut.models.safetensors_index import DTYPES, StoredTensor
from expertcut.scoring.engine import Engine

Rows = Mapping[Projection, Tensor]  # (K,) of low rank, by projection
# Those whose blocks have one name on disk and in the model.
CONSTANT_FAMILIES = ("flex_olmo", "olmoe", "qwen2_moe", "qwen3_moe")
Constant = tuple[float, Tensor]  # c, v (D,): the expert gives c·x + v


def options_of(edit: BlockEdit, n_experts: int) -> dict[int, Option]:
    """The option of each expert of a block."""
    said = edit.options or {"*": "whole"}
    return {e: Option.parse(said.get(str(e), said.get("*", "whole"))) for e in range(n_experts)}


@dataclass(frozen=True)
class CompressEdit(Edit):
    """Every expert stays, in the form of layout `packed`."""

    blocks: Mapping[str, BlockEdit]
    compression: Compression
    # Fitted, by block and expert.
    rows: Mapping[str, Mapping[int, Rows]] = field(default_factory=dict)
    constants: Mapping[str, Mapping[int, Constant]] = field(default_factory=dict)
    reference = "the same experts unpacked in the unedited model"

    @classmethod
    def of(cls, plan: EditPlan | PlanFile) -> Self | None:
        if plan.compression is None or plan.layout != "packed":
            return None
        return cls(plan.blocks, plan.compression)

    def check(self, layout: LayoutWriter, source: Source, plan: EditPlan) -> None:
        layout.check(source, is_cutting=False)
        family, headers = str(read_config(source.path).get("model_type")), source.headers
        for name, block in blocks_of(headers, self.blocks).items():
            if self.compression.loader == "vllm":
                layer_option(name, self.blocks[name])
            for expert, option in options_of(self.blocks[name], block.n_experts).items():
                if option.is_constant and family not in CONSTANT_FAMILIES:
                    raise ContractError(
                        f"option {option} is not supported for {family} models, only for "
                        f"{', '.join(CONSTANT_FAMILIES)}: leave out copy, mean and zero"
                    )
                for _, own in _matrices(block, expert):
                    _stored(option, own, headers[own], self.compression.group_size)

    def needs_engine(self, calibration: Calibration) -> bool:
        return any(
            option.is_constant or option.row_share
            for edit in self.blocks.values()
            for option in options_of(edit, calibration.n_experts).values()
        )

    def fit(self, engine: Engine | None, calibration: Calibration) -> Self:
        """The rows and constants by the stored tokens that chose an expert."""
        if engine is None or not self.needs_engine(calibration):
            return self
        inputs = sample_inputs(engine, calibration.questions.tuning)
        headers, size = engine.moe.source.headers, self.compression.group_size
        rows: dict[str, dict[int, Rows]] = {}
        constants: dict[str, dict[int, Constant]] = {}
        for block in engine.moe.blocks:
            on_disk = blocks_of(headers, self.blocks)[block.name]
            options = options_of(self.blocks[block.name], block.n_experts)
            width = headers[on_disk.router_weight].shape[1]
            gone = [expert for expert, option in options.items() if option.is_constant]
            if gone:  # an expert that no token chose gives nothing
                constants[block.name] = dict.fromkeys(gone, (0.0, torch.zeros(width)))
            for own in expert_tokens(block, inputs[block.layer]):
                option, expert = options[own.expert], own.expert
                if not option.is_constant and not option.row_share:
                    continue
                first = next(iter(on_disk.by_expert[expert].values()))
                made = own.compressed(option, headers[first].dtype, size)
                if made.constant is not None:
                    constants[block.name][expert] = made.constant
                else:
                    of_part = {p: t["weight_rows"] for p, t in made.tensors.items()}
                    rows.setdefault(block.name, {})[expert] = of_part
        return replace(self, rows=rows, constants=constants)

    def simulate(self, simulation: Simulation) -> None:
        """Puts the experts in that the checkpoint gives when it is loaded."""
        simulation.contexts.append(self.unpacked(simulation.moe))
        constants = {b: {e: v for e, (_, v) in own.items()} for b, own in self.constants.items()}
        factors = {b: {e: c for e, (c, _) in own.items()} for b, own in self.constants.items()}
        if constants:
            blocks = simulation.moe.blocks
            simulation.contexts.append(constant_experts(blocks, constants, factors))

    @contextmanager
    def unpacked(self, moe: MoeModel) -> Iterator[None]:
        """The model with these experts, in place; read again from disk behind it."""
        try:
            self._put(moe, self._dense)
            yield
        finally:
            self._put(moe, lambda _block, _expert, _option, _part, tensor: read_tensor(tensor))

    @torch.no_grad()
    def _put(
        self,
        moe: MoeModel,
        values: Callable[[str, int, Option, Projection, StoredTensor], Tensor],
    ) -> None:
        headers = moe.source.headers
        on_disk = blocks_of(headers, self.blocks)
        for block in moe.blocks:
            for expert, option in options_of(self.blocks[block.name], block.n_experts).items():
                if option.kind == "whole" or option.is_constant:
                    continue
                loaded = matrices(block, expert)
                for part, name in _matrices(on_disk[block.name], expert):
                    loaded[part].copy_(values(block.name, expert, option, part, headers[name]))

    def _dense(
        self, block: str, expert: int, option: Option, part: Projection, tensor: StoredTensor
    ) -> Tensor:
        return self._compressed(block, expert, option, part, tensor).weights[part]

    def _compressed(
        self, block: str, expert: int, option: Option, part: Projection, tensor: StoredTensor
    ) -> Compressed:
        rows_K = self.rows.get(block, {}).get(expert, {}).get(part)
        weights, nothing = {part: read_tensor(tensor)}, torch.zeros(0, 0)
        rows = {} if rows_K is None else {part: rows_K}
        size = self.compression.group_size
        is_ggml = self.compression.loader == "llama.cpp"
        return compressed(option, weights, {}, nothing, nothing, size, rows=rows, is_ggml=is_ggml)

    def rewrite(self, _layout: LayoutWriter, tensors: TensorChanges) -> None:
        """Not fitted, the sizes are right, and values are not."""
        tensors.compression, last = self.compression, _Last()
        for name, block in tensors.blocks.items():
            for expert, option in options_of(self.blocks[name], block.n_experts).items():
                if option.is_constant:
                    self._add_constant(tensors, name, block, expert, option)
                    continue
                for part, own in _matrices(block, expert) if option.kind != "whole" else ():
                    tensor = tensors.headers[own]
                    make = partial(self._compressed, name, expert, option, part, tensor)
                    stored = _stored(option, own, tensor, self.compression.group_size)
                    tensors.made[own] = {
                        new: Made(*form, partial(last.part, make, own, part, new))
                        for new, form in stored.items()
                    }

    def _add_constant(
        self, tensors: TensorChanges, name: str, block: DiskBlock, expert: int, option: Option
    ) -> None:
        own = block.by_expert[expert]
        dtype = DTYPES[tensors.headers[next(iter(own.values()))].dtype]
        width = tensors.headers[block.router_weight].shape[1]
        fitted = self.constants.get(name, {}).get(expert, (0.0, torch.zeros(width)))
        tensors.removed |= set(own.values())
        tensors.added[constant_name(block.name, expert)] = fitted[1].to(dtype)
        if option.kind == "copy":
            scale_1 = torch.tensor([fitted[0]], dtype=dtype)
            tensors.added[constant_name(block.name, expert, COPIED)] = scale_1

    def describe(self, _n_experts: int | None) -> Iterable[str]:
        options = {o for edit in self.blocks.values() for o in (edit.options or {}).values()}
        yield (
            f"Every expert stays, stored by one of {len(options)} options "
            f"({', '.join(sorted(options))}), with {self.compression.bits:.3g} bits a weight."
        )


class _Last:
    """What was made last: the tensors of one matrix, which are written one after another."""

    name = ""
    made: Compressed | None = None

    def part(self, make: Callable[[], Compressed], name: str, part: Projection, new: str) -> Tensor:
        """One of the tensors of a matrix."""
        if self.made is None or self.name != name:
            self.name, self.made = name, make()
        return self.made.tensors[part][f"weight{new.removeprefix(name)}"]


def _matrices(block: DiskBlock, expert: int) -> Iterator[tuple[Projection, str]]:
    """The projections of an expert, and their tensors; ContractError for others."""
    for part, name in block.by_expert[expert].items():
        if part not in PROJECTIONS:
            raise ContractError(
                f"{name} is not known as a projection of an expert: this form cannot be packed"
            )
        yield PROJECTIONS[part], name


def _stored(
    option: Option, name: str, tensor: StoredTensor, group_size: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    n_rows, n_columns = tensor.shape
    return option.stored(name, (n_rows, n_columns), tensor.dtype, group_size)
