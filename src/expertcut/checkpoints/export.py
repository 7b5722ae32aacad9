"""A plan becomes a checkpoint folder, in the original names; no model is instantiated."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from expertcut.checkpoints.files.shards import Rewrite
from expertcut.checkpoints.files.streaming import check_space, needed_bytes, write_checkpoint
from expertcut.checkpoints.layouts.exact import (
    check_exact,
    exact_config,
    exact_rewrite,
    is_exact,
)
from expertcut.checkpoints.layouts.merged import Merging, merged_rewrite
from expertcut.checkpoints.layouts.stock import Fitted, stock_config, stock_rewrite
from expertcut.errors import ContractError
from expertcut.interventions.calibration.outputs import Constants, zero_outputs
from expertcut.interventions.plan import (
    HEALING_FILE,
    PLAN_FILE,
    PROOF_FILE,
    QUESTIONS_FILE,
    Draft,
    Edit,
    Layout,
)
from expertcut.moe.loading import MODELLING_FILE, Source, modelling_code, read_config
from expertcut.moe.stored.headers import Stored, read_stored
from expertcut.profiling.chunks import write_atomically

_NOT_COPIED = {
    *("config.json", "README.md"),
    *(PLAN_FILE, PROOF_FILE, QUESTIONS_FILE, HEALING_FILE),
}
_COPIED_ENDINGS = {".json", ".txt", ".model", ".jinja"}
_COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE")


@dataclass(frozen=True)
class Gathered:
    """What a layout needs beside the plan: `fitted` for stock, `constants` for exact.

    `merging` is for plans that merge experts.
    """

    fitted: Fitted = field(default_factory=Fitted)
    constants: Constants = field(default_factory=dict)
    merging: Merging = field(default_factory=Merging)


def check_export(source: Source, draft: Draft, n_experts: int, folder: Path) -> None:
    """That the layout can carry the plan for this model, and that there is room for the result.

    Raises:
        ContractError: a family or a form on disk that the layout does not support.
        ModelError: damaged or quantized weights.
        OutputError: too little space.
    """
    check_layout(source, draft.layout, is_cutting=draft.is_cut)
    stored = read_stored(source.path)
    check_space(folder, needed_bytes(stored, cut_rewrite(source, stored, draft, n_experts)))


def cut_rewrite(source: Source, stored: Stored, draft: Draft, n_experts: int) -> Rewrite:
    """What a plan's cut does to each tensor, tilts left out; its sizes are right, not its values.

    Raises:
        ContractError: a form on disk that the layout does not support.
    """
    width = int(read_config(source.path).get("hidden_size", 0))
    cut = {name: Edit(keep=edit.keep) for name, edit in draft.edits.items()}
    constants = zero_outputs(removed_experts(cut, n_experts), width)
    return _rewrite(stored, replace(draft, edits=cut), Gathered(constants=constants))


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


def export(source: Source, draft: Draft, n_experts: int, gathered: Gathered, folder: Path) -> None:
    """Writes the checkpoint that a plan describes into an empty folder, without the plan.

    `n_experts` is the unedited count. Tensors are copied from file to file; only those that the
    plan edits are read and changed.
    """
    rewrite = _rewrite(read_stored(source.path), draft, gathered)
    write_checkpoint(source.path, folder, rewrite)
    config = read_config(source.path)
    if draft.layout == "exact":
        biased = [name for name, edit in draft.edits.items() if edit.bias]
        config = exact_config(config, removed_experts(draft.edits, n_experts), biased)
    else:
        n_kept = len(next(iter(draft.edits.values())).keep)
        config = stock_config(config, n_experts, n_kept)
    for file in companions(source.path):
        write_atomically(folder / file.name, file.read_bytes())
    if draft.layout == "exact":
        write_atomically(folder / MODELLING_FILE, modelling_code())
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def removed_experts(edits: Mapping[str, Edit], n_experts: int) -> dict[str, tuple[int, ...]]:
    """The experts that each block's edit does not keep; blocks that keep all are left out."""
    removed = {name: edit.removed(n_experts) for name, edit in edits.items()}
    return {name: experts for name, experts in removed.items() if experts}


def _rewrite(stored: Stored, draft: Draft, gathered: Gathered) -> Rewrite:
    if draft.layout == "exact":
        return exact_rewrite(stored.tensors, gathered.constants, draft.edits)
    if draft.is_merging:
        return merged_rewrite(stored.tensors, draft.edits, gathered.merging)
    return stock_rewrite(stored.tensors, draft.edits, gathered.fitted, draft.apply_at)


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
