"""A plan becomes a checkpoint folder, in the original names; no model is instantiated."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from expertcut.checkpoints.compress_edit import CompressEdit
from expertcut.checkpoints.edit import Edit, LayoutWriter, TensorChanges
from expertcut.checkpoints.exact import ExactWriter, zero_constants
from expertcut.checkpoints.merge_edit import MergeEdit
from expertcut.checkpoints.packed import PackedWriter
from expertcut.checkpoints.permute_edit import PermuteEdit
from expertcut.checkpoints.prune_edit import PruneEdit
from expertcut.checkpoints.reroute_edit import RerouteEdit
from expertcut.checkpoints.routed import RoutedWriter
from expertcut.checkpoints.serving import TENSOR_TYPES
from expertcut.checkpoints.shards import (
    Shard,
    check_space,
    lay_out,
    total_bytes,
    write_checkpoint,
)
from expertcut.checkpoints.stock import StockWriter
from expertcut.checkpoints.tensor_names import CONSTANT
from expertcut.checkpoints.tilt_edit import BiasEdit, ScaleEdit, SelectionEdit
from expertcut.edits.layouts import LAYOUTS, Layout
from expertcut.edits.plan import RECORDS, BlockEdit, EditPlan, PlanFile, removed_experts
from expertcut.files import write_atomically
from expertcut.models.load import Source
from expertcut.models.meta_model import check_loads
from expertcut.models.safetensors_index import DTYPES, Stored, StoredTensor, dense, packing_of

logger = logging.getLogger(__name__)
_NOT_COPIED = {*RECORDS, TENSOR_TYPES, "config.json", "README.md"}
_COPIED_ENDINGS = {".json", ".txt", ".model", ".jinja"}
_COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE")
WRITERS: Mapping[Layout, LayoutWriter] = {
    "stock": StockWriter(),
    "exact": ExactWriter(),
    "routed": RoutedWriter(),
    "packed": PackedWriter(),
}
# A factor acts before the rescaling of a cut, which rounds anew; merged experts replace kept ones.
EDITS: list[type[Edit]] = [
    *(ScaleEdit, PruneEdit, BiasEdit, SelectionEdit, MergeEdit, RerouteEdit, PermuteEdit),
    CompressEdit,
]


def edits_of(plan: EditPlan | PlanFile) -> list[Edit]:
    """The edits of a plan, not fitted yet."""
    return [edit for kind in EDITS if (edit := kind.of(plan)) is not None]


def check_export(source: Source, plan: EditPlan, n_experts: int, folder: Path) -> None:
    """That the layout can hold the plan for this model, and that there is room for the result."""
    for edit in edits_of(plan):
        edit.check(WRITERS[plan.layout], source, plan)
    WRITERS[plan.layout].check(source, is_cutting=plan.is_cut)
    rewrite = cut_rewrite(source, plan, n_experts)
    shards = lay_out(source.stored, rewrite)
    check_space(folder, total_bytes(shards))
    n_kept = len(next(iter(plan.edits.values())).keep)
    if not LAYOUTS[plan.layout].keeps_rows and n_kept < n_experts:
        _check_loads(source, plan, rewrite, shards, n_experts)


def _check_loads(
    source: Source,
    plan: EditPlan,
    rewrite: TensorChanges,
    shards: Sequence[Shard],
    n_experts: int,
) -> None:
    """That the family's class has a place for every tensor, packed ones as they are unpacked."""
    config = WRITERS[plan.layout].config(source, rewrite, n_experts)
    pieces = [piece for shard in shards for piece in shard.pieces]
    stored = Stored({p.name: StoredTensor(Path(), p.dtype, p.shape, 0, 0) for p in pieces}, {})
    if source.packing is not None:
        if any(CONSTANT in name for name in stored.tensors):  # the family has no place for them
            return
        packing = packing_of(config, {p.name: (p.dtype, p.shape) for p in pieces})
        stored = dense(packing, stored)
    tensors = {
        name: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
        for name, tensor in stored.tensors.items()
    }
    n_kept = len(next(iter(plan.edits.values())).keep)
    check_loads(config, tensors, f"{source.id} with {n_kept} experts a layer")


def cut_rewrite(source: Source, plan: EditPlan, n_experts: int) -> TensorChanges:
    """What a plan's cut or options do to each tensor; sizes are right, fitted values are not."""
    cut = {n: BlockEdit(keep=edit.keep, options=edit.options) for n, edit in plan.edits.items()}
    removed = removed_experts(cut, n_experts) if LAYOUTS[plan.layout].keeps_rows else {}
    constants = zero_constants(source.headers, removed)
    edits: list[Edit] = [PruneEdit(cut, plan.layout, constants=constants)]
    if (packed := CompressEdit.of(plan)) is not None:
        edits.append(packed)
    return rewrite_of(plan.layout, source, cut, edits)


def rewrite_of(
    layout: Layout, source: Source, blocks: Mapping[str, BlockEdit], edits: Sequence[Edit]
) -> TensorChanges:
    """What becomes of each tensor."""
    tensors = WRITERS[layout].changes(source, blocks)
    for edit in edits:
        edit.rewrite(WRITERS[layout], tensors)
    return tensors


def export(
    source: Source, plan: EditPlan, n_experts: int, edits: Sequence[Edit], folder: Path
) -> None:
    """Writes the checkpoint of fitted edits into an empty folder, without the plan."""
    writer, rewrite = WRITERS[plan.layout], rewrite_of(plan.layout, source, plan.edits, edits)
    write_checkpoint(source.stored, folder, rewrite)
    config = writer.config(source, rewrite, n_experts)
    if dropped := rewrite.removed & rewrite.unused:
        logger.warning(
            "%d tensors of layers that predict further tokens (MTP), first %s, are left out, and "
            "config.json counts 0 of them: serve the checkpoint without MTP",
            *(len(dropped), min(dropped)),
        )
    for file in companions(source.path):
        write_atomically(folder / file.name, file.read_bytes())
    for name, content in writer.files(source, rewrite).items():
        write_atomically(folder / name, content)
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def companions(folder: Path) -> Iterator[Path]:
    """Tokenizer, generation config, chat template, licence, and code that the configs name."""
    configs = (folder / "config.json", folder / "tokenizer_config.json")
    names_code = any(f.is_file() and b'"auto_map"' in f.read_bytes() for f in configs)
    endings = _COPIED_ENDINGS | ({".py"} if names_code else set())
    for file in sorted(folder.iterdir()):
        is_wanted = file.suffix in endings or file.name.startswith(_COPIED_NAMES)
        is_other = file.name in _NOT_COPIED or ".index." in file.name or not file.is_file()
        if is_wanted and not is_other:
            yield file
