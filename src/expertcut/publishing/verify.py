"""Is it what it says it is: files, weights and plan of a checkpoint held together before upload."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from expertcut.checkpoints.exact import has_constants, is_exact
from expertcut.checkpoints.tensor_names import DiskBlock, match_blocks
from expertcut.edits.plan import PLAN_FILE, PROOF_FILE, Edit, Plan, load_hashes, load_plan
from expertcut.errors import ModelError, PlanError
from expertcut.evaluation.cross_fit import ProofResult, load_proof
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import MODELLING_FILE, Source, find_source
from expertcut.models.safetensors_index import INDEX_FILE, StoredTensor, read_headers, read_index
from expertcut.models.validate import expert_count

CARD_FILE = "README.md"
REPORT_FILE = "report.html"
_ENDINGS = (".json", ".txt", ".model", ".jinja", ".py", ".yaml")
_NAMES = ("LICENSE", "LICENCE", "NOTICE")
_RESULTS = "results"  # they go up as the card found them, not as they lie here


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose parts fit together; `tensors` are those of its headers, by name."""

    source: Source
    config: Mapping[str, Any]
    plan: Plan
    proof: ProofResult | None
    tensors: Mapping[str, StoredTensor]

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.source.path

    @property
    def has_family_form(self) -> bool:
        """Whether it is in the form of its family, without constants and biased gates."""
        return not has_constants(self.config) and not self.config.get("biased_gates")

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """What is uploaded: weights, and what names or describes them; no card and no results."""
        weights = {tensor.file for tensor in self.tensors.values()}
        return tuple(sorted(weights | {f for f in self._here if self._belongs(f)}))

    @property
    def left_out(self) -> tuple[str, ...]:
        """What else lies there, folders with a slash."""
        known = {*self.files, self.folder / CARD_FILE}
        others = [f for f in self._here if f not in known and not f.name.startswith(_RESULTS)]
        folders = [f for f in self.folder.iterdir() if f.is_dir() and not f.name.startswith(".")]
        return tuple(sorted([*(f.name for f in others), *(f"{f.name}/" for f in folders)]))

    @property
    def _here(self) -> list[Path]:
        return [f for f in self.folder.iterdir() if f.is_file() and not f.name.startswith(".")]

    def _belongs(self, file: Path) -> bool:
        if file.name.startswith(_RESULTS):
            return False
        is_index = file.name.endswith(".index.json")
        if is_index:
            return file.name == INDEX_FILE and bool(read_index(self.folder))
        return file.suffix in _ENDINGS or file.name.startswith(_NAMES) or file.name == REPORT_FILE


def verified(folder: Path) -> Checkpoint:
    """A checkpoint that `prune` or `reweight` made, every part of it checked against the others.

    Raises:
        ModelError: no checkpoint, or damaged files.
        PlanError: no plan, or one of something else.
    """
    if not folder.is_dir():
        raise ModelError(f"no such checkpoint: {folder} is no folder")
    config = read_config(folder)
    if not (folder / PLAN_FILE).is_file():
        raise PlanError(
            f"{folder} has no {PLAN_FILE}: publish takes what `prune`, `merge`, `reweight` and "
            "`heal` made"
        )
    source, tensors, plan = find_source(str(folder)), read_headers(folder), load_plan(folder)
    load_hashes(folder, plan)
    blocks, _ = match_blocks(tensors, plan.blocks)
    for name, edit in plan.blocks.items():
        _check_block(blocks[name], edit, plan, config)
    if is_exact(config) and not (folder / MODELLING_FILE).is_file():
        raise ModelError(f"{folder} lacks {MODELLING_FILE}, which layout exact needs: make it anew")
    proof = load_proof(folder) if (folder / PROOF_FILE).is_file() else None
    return Checkpoint(source, config, plan, proof, tensors)


def _check_block(block: DiskBlock, edit: Edit, plan: Plan, config: Mapping[str, Any]) -> None:
    """That the weights hold the experts that the plan keeps.

    Raises:
        PlanError: they do not.
    """
    if plan.layout == "stock":
        is_right = block.n_experts == len(edit.keep) == expert_count(dict(config))
    else:
        is_right = set(_own_experts(block, edit)) == set(edit.keep)
    if not is_right:
        n_own = len(list(_own_experts(block, edit)))
        raise PlanError(
            f"{PLAN_FILE} is not of these weights: it keeps {len(edit.keep)} experts of "
            f"{block.name}, on disk are {n_own} and config.json says "
            f"{expert_count(dict(config))}: put the plan back that made them"
        )


def _own_experts(block: DiskBlock, edit: Edit) -> Iterator[int]:
    """What the experts that are no constants are called."""
    numbers = edit.rows or range(block.n_experts)
    for row, number in zip(range(block.n_experts), numbers, strict=False):
        if not block.by_expert or block.by_expert[row]:
            yield number
