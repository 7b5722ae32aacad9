"""Rewrites and checkpoints from edits whose fitted values are given by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertcut.checkpoints import export as exporting
from expertcut.checkpoints.edit import Edit
from expertcut.checkpoints.export import edits_of, rewrite_of
from expertcut.checkpoints.prune_edit import PruneEdit
from expertcut.checkpoints.shards import Rewrite
from expertcut.checkpoints.tensor_names import Headers
from expertcut.checkpoints.tilt_edit import BiasEdit
from expertcut.edits.calibrate import Constants, Removed
from expertcut.edits.criteria import Array
from expertcut.edits.layouts import Layout, Positions
from expertcut.edits.plan import BlockEdit, EditPlan
from expertcut.models.load import Source


@dataclass(frozen=True)
class Fitted:
    """What calibration would give: folds and directions by layer, constants by block."""

    folds: Mapping[int, Array] = field(default_factory=dict)
    directions: Mapping[int, object] = field(default_factory=dict)
    constants: Constants = field(default_factory=dict)


def fitted_edits(plan: EditPlan, fitted: Fitted) -> list[Edit]:
    """The edits of a plan with these values."""
    edits: list[Edit] = []
    for edit in edits_of(plan):
        if isinstance(edit, PruneEdit):
            edit = PruneEdit(
                *(edit.blocks, edit.layout, edit.removed, edit.fold),
                *(fitted.folds, fitted.constants),
            )
        elif isinstance(edit, BiasEdit):
            edit = BiasEdit(edit.blocks, edit.layout, edit.apply_at, fitted.directions)  # type: ignore[arg-type]
        edits.append(edit)
    return edits


@dataclass(frozen=True)
class Tensors:
    """A source without a model, all of whose tensors with experts lie in their blocks."""

    headers: Headers
    packing: None = None

    def expert_axes(self, _names: Sequence[str]) -> dict[str, tuple[str, int]]:
        return {}


def _rewrite(
    headers: Headers,
    blocks: Mapping[str, BlockEdit],
    fitted: Fitted,
    layout: Layout,
    apply_at: Positions = "all",
) -> Rewrite:
    plan = EditPlan("", "", "", "answer", blocks, layout, apply_at=apply_at, is_cut=True)
    source: Any = Tensors(headers)
    return rewrite_of(layout, source, blocks, fitted_edits(plan, fitted))


def stock_rewrite(
    headers: Headers,
    blocks: Mapping[str, BlockEdit],
    fitted: Fitted,
    apply_at: Positions = "all",
) -> Rewrite:
    """What layout stock makes of each tensor."""
    return _rewrite(headers, blocks, fitted, "stock", apply_at)


def exact_rewrite(
    headers: Headers, blocks: Mapping[str, BlockEdit], constants: Constants
) -> Rewrite:
    """What layout exact makes of each tensor."""
    return _rewrite(headers, blocks, Fitted(constants=constants), "exact")


def zero_outputs(removed: Removed, width: int) -> dict[str, dict[int, Tensor]]:
    """Zeros (D,) for every removed expert."""
    return {block: {e: torch.zeros(width) for e in ids} for block, ids in removed.items()}


def export(source: Source, plan: EditPlan, n_experts: int, fitted: Fitted, folder: Path) -> None:
    """The checkpoint of a plan with these values."""
    exporting.export(source, plan, n_experts, fitted_edits(plan, fitted), folder)
