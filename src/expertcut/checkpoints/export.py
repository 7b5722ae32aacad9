"""A plan becomes a checkpoint folder, in the original names; no model is instantiated."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from expertcut.checkpoints.exact import (
    check_exact,
    constants_on_disk,
    exact_config,
    exact_rewrite,
    is_exact,
)
from expertcut.checkpoints.merged import Merging, merged_rewrite
from expertcut.checkpoints.shards import (
    MAX_SHARD_BYTES,
    Rewrite,
    check_space,
    lay_out,
    needed_bytes,
    write_checkpoint,
)
from expertcut.checkpoints.stock import Fitted, stock_rewrite
from expertcut.checkpoints.tensor_names import Headers, OutsideAxes, match_blocks
from expertcut.edits.calibrate import Constants, zero_outputs
from expertcut.edits.layouts import Layout
from expertcut.edits.plan import (
    HEALING_FILE,
    PLAN_FILE,
    PROOF_FILE,
    QUESTIONS_FILE,
    BlockEdit,
    EditPlan,
)
from expertcut.errors import ContractError
from expertcut.files import write_atomically
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import MODELLING_FILE, Source, modelling_code
from expertcut.models.meta_model import check_loads
from expertcut.models.moe_block import SELECTION_BIAS
from expertcut.models.safetensors_index import DTYPES, Stored, read_stored
from expertcut.models.validate import with_expert_count

# num_nextn_predict_layers, num_mtp_layers, mtp_num_hidden_layers, num_mtp_modules, mtp_num_layers
_COUNT = re.compile(r"(num_|n_)(\w+_)?(mtp|nextn)(_\w+)?|(mtp|nextn)_num_\w+")
_SWITCHES = {"use_mtp"}
_PARTS = ("text_config", "mtp_config")
_DEFAULT = "num_nextn_predict_layers"  # 1 in several families whose config.json does not say
_NOT_BY_LAYER = re.compile(r".*(token_id|token_ids|architectures)")
logger = logging.getLogger(__name__)

_NOT_COPIED = {
    *("config.json", "README.md"),
    *(PLAN_FILE, PROOF_FILE, QUESTIONS_FILE, HEALING_FILE),
}
_COPIED_ENDINGS = {".json", ".txt", ".model", ".jinja"}
_COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE")


def without_further_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose layers that predict further tokens are gone.

    Their count becomes 0 under every name it goes by, and lists with an entry for every layer lose
    those of theirs.
    """
    text = config.get("text_config")
    fields = {**config, **(text if isinstance(text, dict) else {})}
    n_layers, n_further = fields.get("num_hidden_layers"), max(_counts(fields), default=0)
    length = n_layers + n_further if isinstance(n_layers, int) and n_further else None
    edited = _edited(config, length, n_further)
    if not any(map(_COUNT.fullmatch, (*fields, *_nested(fields)))):
        (edited["text_config"] if isinstance(text, dict) else edited)[_DEFAULT] = 0
    return edited


def _counts(fields: Mapping[str, Any]) -> list[int]:
    both = (*fields.items(), *_nested(fields).items())
    return [value for key, value in both if _COUNT.fullmatch(key) and type(value) is int]


def _nested(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    found = fields.get("mtp_config")
    return found if isinstance(found, dict) else {}


def _edited(config: Mapping[str, Any], length: int | None, n_further: int) -> dict[str, Any]:
    edited: dict[str, Any] = {}
    for key, value in config.items():
        if key in _PARTS and isinstance(value, dict):
            edited[key] = _edited(value, length, n_further)
        elif _COUNT.fullmatch(key) and type(value) in (int, type(None)):
            edited[key] = 0
        elif key in _SWITCHES:
            edited[key] = False
        elif isinstance(value, list) and len(value) == length and not _NOT_BY_LAYER.fullmatch(key):
            edited[key] = value[:-n_further]
        else:
            edited[key] = value
    return edited


@dataclass(frozen=True)
class Gathered:
    """What a layout needs beside the plan: `fitted` for stock, `constants` for exact.

    `merging` is for plans that merge experts.
    """

    fitted: Fitted = field(default_factory=Fitted)
    constants: Constants = field(default_factory=dict)
    merging: Merging = field(default_factory=Merging)


def check_export(source: Source, draft: EditPlan, n_experts: int, folder: Path) -> None:
    """That the layout can carry the plan for this model, and that there is room for the result.

    Raises:
        ContractError: a family or a form on disk that the layout does not support.
        ModelError: damaged or quantized weights.
        OutputError: too little space.
    """
    check_layout(source, draft.layout, is_cutting=draft.is_cut)
    stored = read_stored(source.path)
    rewrite = cut_rewrite(source, stored, draft, n_experts)
    check_space(folder, needed_bytes(stored, rewrite))
    if draft.layout == "stock" and _n_kept(draft) < n_experts:
        config = _stock_config(source, stored, draft, n_experts)
        pieces = [p for shard in lay_out(stored, rewrite, MAX_SHARD_BYTES) for p in shard.pieces]
        tensors = {
            p.name: torch.empty(p.shape, dtype=DTYPES[p.dtype], device="meta") for p in pieces
        }
        check_loads(config, tensors, f"{source.id} with {_n_kept(draft)} experts a layer")


def cut_rewrite(source: Source, stored: Stored, draft: EditPlan, n_experts: int) -> Rewrite:
    """What a plan's cut does to each tensor, tilts left out; its sizes are right, not its values.

    Raises:
        ContractError: a form on disk that the layout does not support.
    """
    width = int(read_config(source.path).get("hidden_size", 0))
    cut = {name: BlockEdit(keep=edit.keep) for name, edit in draft.edits.items()}
    constants = zero_outputs(removed_experts(cut, n_experts), width)
    return _rewrite(source, stored, replace(draft, edits=cut), Gathered(constants=constants))


def check_layout(source: Source, layout: Layout, *, is_cutting: bool) -> None:
    """That the layout knows the model's family, and can carry on what was made of it before.

    Raises:
        ContractError: it does not, or cannot.
    """
    config = read_config(source.path)
    if layout == "exact":
        check_exact(config, is_cutting=is_cutting)
    elif is_exact(config):
        raise ContractError(
            f"{source.id} has layout exact, which layout stock cannot carry on: take --layout exact"
        )


def export(
    source: Source, draft: EditPlan, n_experts: int, gathered: Gathered, folder: Path
) -> None:
    """Writes the checkpoint that a plan describes into an empty folder, without the plan.

    `n_experts` is the unedited count. Tensors are copied from file to file; only those that the
    plan edits are read and changed.
    """
    stored = read_stored(source.path)
    write_checkpoint(source.path, folder, _rewrite(source, stored, draft, gathered))
    config = read_config(source.path)
    if draft.layout == "exact":
        biased = [name for name, edit in draft.edits.items() if edit.bias]
        removed = removed_experts(draft.edits, n_experts)
        earlier = constants_on_disk(stored.tensors) if is_exact(config) else None
        config = exact_config(config, removed, biased, earlier)
    else:
        config = _stock_config(source, stored, draft, n_experts, is_said=True)
    for file in companions(source.path):
        write_atomically(folder / file.name, file.read_bytes())
    if draft.layout == "exact":
        write_atomically(folder / MODELLING_FILE, modelling_code())
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def removed_experts(edits: Mapping[str, BlockEdit], n_experts: int) -> dict[str, tuple[int, ...]]:
    """The experts that each block's edit does not keep; blocks that keep all are left out."""
    removed = {name: edit.removed(n_experts) for name, edit in edits.items()}
    return {name: experts for name, experts in removed.items() if experts}


def _rewrite(source: Source, stored: Stored, draft: EditPlan, gathered: Gathered) -> Rewrite:
    if draft.layout == "exact":
        return exact_rewrite(stored.tensors, gathered.constants, draft.edits)
    outside = outside_axes(source, stored.tensors, draft)
    if draft.is_merging:
        return merged_rewrite(stored.tensors, draft.edits, gathered.merging, outside)
    return stock_rewrite(stored.tensors, draft.edits, gathered.fitted, draft.apply_at, outside)


def outside_axes(source: Source, headers: Headers, draft: EditPlan) -> OutsideAxes:
    """Tensors with an axis of experts that lie on disk elsewhere than their block.

    Which block they are of is what transformers makes of their names; so is whether a bias whose
    name does not tell is one on choosing, which is then among them.

    Raises:
        ContractError: one belongs to no block.
    """
    matched, unused = match_blocks(headers, draft.edits)
    n_experts = {block.n_experts for block in matched.values()}
    inside = tuple(f"{block.name}." for block in matched.values())
    suspects = [
        name
        for name, tensor in headers.items()
        if n_experts & set(tensor.shape) and not name.startswith(inside) and name not in unused
    ]
    unclear = {block.unclear_bias for block in matched.values() if block.unclear_bias}
    suspects += sorted(unclear)
    if not suspects:
        return {}
    found: dict[str, dict[str, int]] = {}
    for name, (parameter, axis) in source.expert_axes(suspects).items():
        block = next((b for b in matched if parameter.startswith(f"{b}.")), None)
        if block is None:
            raise ContractError(
                f"{name} has an entry for each expert, but belongs to no MoE block of the model: "
                "this form is not supported"
            )
        if name not in unclear or parameter.rpartition(".")[2] in SELECTION_BIAS:
            found.setdefault(block, {})[name] = axis
    return found


def _n_kept(draft: EditPlan) -> int:
    return len(next(iter(draft.edits.values())).keep)


def _stock_config(
    source: Source, stored: Stored, draft: EditPlan, n_experts: int, *, is_said: bool = False
) -> dict[str, Any]:
    """The config of a checkpoint of layout stock; `is_said` warns of what it no longer counts."""
    config, n_kept = read_config(source.path), _n_kept(draft)
    _, unused = match_blocks(stored.tensors, draft.edits)
    if n_kept == n_experts or not unused:
        return with_expert_count(config, n_experts, n_kept)
    if is_said:
        logger.warning(
            "%d tensors of layers that predict further tokens (MTP), first %s, are left out, and "
            "config.json counts 0 of them: serve the checkpoint without MTP",
            *(len(unused), min(unused)),
        )
    return without_further_tokens(with_expert_count(config, n_experts, n_kept))


def companions(folder: Path) -> Iterator[Path]:
    """Tokenizer, generation config, chat template and licence, and code that they or config name.

    No weights, no index.
    """
    endings = _COPIED_ENDINGS | ({".py"} if _names_code(folder) else set())
    for file in sorted(folder.iterdir()):
        is_wanted = file.suffix in endings or file.name.startswith(_COPIED_NAMES)
        is_other = file.name in _NOT_COPIED or ".index." in file.name or not file.is_file()
        if is_wanted and not is_other:
            yield file


def _names_code(folder: Path) -> bool:
    files = (folder / "config.json", folder / "tokenizer_config.json")
    return any(f.is_file() and b'"auto_map"' in f.read_bytes() for f in files)
