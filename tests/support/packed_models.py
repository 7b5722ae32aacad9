"""Packed checkpoints of tiny models, written as export writes them, and their unpacked twins."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertcut.checkpoints.compress_edit import CompressEdit, options_of
from expertcut.checkpoints.export import check_export, cut_rewrite, export
from expertcut.checkpoints.shards import lay_out
from expertcut.edits.compression import Loader
from expertcut.edits.plan import BlockEdit, Compression, EditPlan
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import Source, find_source
from tests.conftest import open_model

GROUP = 8
EVERY_OPTION = ("1", "2", "3", "4", "8", "lowrank:0.3", "lowrank:0.3:0.1", "whole")
CONSTANTS = ("copy", "mean", "3", "zero")
WIDTHS = ("4", "8")


@dataclass(frozen=True)
class Packed:
    """A packed checkpoint, what it was made from, the edit that made it, and its predicted size."""

    folder: Path
    base: Path
    edit: CompressEdit
    predicted_bytes: int

    @property
    def source(self) -> Source:
        return find_source(str(self.folder))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")

    def dense(self) -> dict[str, Tensor]:
        """Every tensor, unpacked; without constants."""
        found = {n: t for n, t in self.tensors.items() if ".constant_experts." not in n}
        with safe_open(self.folder / "model.safetensors", "pt") as file:
            packing = self.source.packing
            assert packing is not None
            shapes = {n: (t.dtype, t.shape) for n, t in self.source.headers.items()}
            for weight, matrix in packing.matrices(shapes).items():
                for name in matrix.parts.values():
                    del found[name]
                found[weight] = matrix.read(file.get_tensor)
        return found

    def twin(self, folder: Path) -> Path:
        """The checkpoint with plain weights that it unpacks to."""
        folder.mkdir()
        save_file(self.dense(), folder / "model.safetensors", metadata={"format": "pt"})
        for file in self.base.iterdir():
            if file.suffix != ".safetensors":
                shutil.copyfile(file, folder / file.name)
        return folder


def packed_plan(base: Path, options: Sequence[str], loader: Loader = "transformers") -> EditPlan:
    """Options in turn: by expert, or by layer for vLLM."""
    edits = {}
    for layer, block in enumerate(open_model(base).blocks):
        ids = range(block.n_experts)
        own = {str(e): options[(e + layer) % len(options)] for e in ids}
        own = {"*": options[layer % len(options)]} if loader == "vllm" else own
        edits[block.name] = BlockEdit(keep=tuple(ids), options=own)
    compression = Compression(
        loader=loader, grain="expert", by="error", group_size=GROUP,
        budget_bytes=None, bytes=1, bits=4.0, gap=0.0,
    )  # fmt: skip
    action = ("compressed", "compress", "error")
    return EditPlan(*action, "all", edits, "packed", compression=compression)


def make_packed(
    base: Path, folder: Path, options: Sequence[str], loader: Loader = "transformers"
) -> Packed:
    """The packed checkpoint of a base, with constants as large as an expert's output."""
    source, plan = find_source(str(base)), packed_plan(base, options, loader)
    assert plan.compression is not None
    torch.manual_seed(2)
    constants = {
        name: {
            expert: (0.5 * (option.kind == "copy"), (option.kind != "zero") * torch.randn(32))
            for expert, option in options_of(edit, len(edit.keep)).items()
            if option.is_constant
        }
        for name, edit in plan.edits.items()
    }
    n_experts = len(next(iter(plan.edits.values())).keep)
    shards = lay_out(source.stored, cut_rewrite(source, plan, n_experts))
    constants = {name: own for name, own in constants.items() if own}
    edit = CompressEdit(plan.edits, plan.compression, constants=constants)
    check_export(source, plan, n_experts, folder)
    folder.mkdir()
    export(source, plan, n_experts, [edit], folder)
    return Packed(folder, base, edit, sum(shard.size_bytes for shard in shards))


def respelled(folder: Path, changed: dict[str, Tensor | None], **config: object) -> Path:
    """The checkpoint with other tensors (None: without), and other keys of its config."""
    file = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    for name, tensor in changed.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(read_config(folder) | config))
    return folder
