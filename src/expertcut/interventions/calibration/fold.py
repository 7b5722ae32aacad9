"""How much the gate weights of the kept experts grow where the removed ones' rows are cut.

Without the removed experts the softmax's denominator shrinks, so weights grow by
1 / (1 − Σ removed α). The fold of an expert is the mean of 1 − Σ removed α over the tokens that
chose it, or over all tokens where none did: multiplied into its output, it undoes the mean growth.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertcut.data import Quiz, round_robin
from expertcut.interventions.calibration import CALIBRATION_QUESTIONS
from expertcut.interventions.calibration.listening import listen
from expertcut.interventions.plan import Edit
from expertcut.models.hooks import Routing
from expertcut.models.moe_block import MoeBlock
from expertcut.profiling.statistics import layer_statistics
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine

Array = np.ndarray[Any, Any]


def fold_at_answers(
    profile: Profile,
    edits: Mapping[str, Edit],
    left_out: Collection[tuple[str, int]] = (),
) -> dict[int, Array]:
    """Folds (kept,) per layer that needs them, from a profile's answer positions.

    Questions in `left_out` (subject and row) do not count, so that they can judge the result.
    """
    names = zip(profile.subjects(), profile.array("row_N").tolist(), strict=True)
    is_used_N = np.array([name not in left_out for name in names])
    alpha_NLE = profile.array("alpha_NLE")[is_used_N]
    folds = {}
    for layer in layer_statistics(profile):
        block = profile.info.model.blocks[layer.layer]
        keep = list(edits[block.name].keep)
        if not block.inflates or len(keep) == block.experts:
            continue
        sums = _Sums(keep, block.experts)
        alpha_NE = alpha_NLE[:, layer.layer, : block.experts].astype(np.float64)
        sums.add(torch.from_numpy(alpha_NE), torch.from_numpy(layer.is_activated_NE[is_used_N]))
        folds[layer.layer] = sums.folds()
    return folds


def fold_over_tokens(engine: Engine, tuning: Quiz, edits: Mapping[str, Edit]) -> dict[int, Array]:
    """The same from every distinct token of at most 512 questions."""
    blocks = {b.layer: b for b in engine.moe.blocks if _needs_fold(b, edits[b.name])}
    sums = {
        layer: _Sums(list(edits[block.name].keep), block.n_experts)
        for layer, block in blocks.items()
    }

    def hear(routing: Routing, _is_answer_T: Tensor) -> None:
        alpha_TE = blocks[routing.layer].alpha(routing.logits_TE).double()
        chosen_TE = torch.zeros_like(alpha_TE, dtype=torch.bool)
        sums[routing.layer].add(alpha_TE, chosen_TE.scatter(1, routing.experts_TK, True))

    if sums:
        listen(engine, round_robin(tuning, CALIBRATION_QUESTIONS), sums, hear)
    return {layer: found.folds() for layer, found in sums.items()}


def _needs_fold(block: MoeBlock, edit: Edit) -> bool:
    return block.inflates and len(edit.keep) < block.n_experts


class _Sums:
    """Running sums of 1 − Σ removed α, over the tokens that chose each kept expert and over all."""

    def __init__(self, keep: list[int], n_experts: int) -> None:
        self.keep = torch.tensor(keep)
        self.is_removed_E = torch.ones(n_experts, dtype=torch.bool)
        self.is_removed_E[self.keep] = False
        self.by_expert = torch.zeros(len(keep), dtype=torch.float64)
        self.n_by_expert = torch.zeros(len(keep), dtype=torch.float64)
        self.total, self.n_tokens = 0.0, 0

    def add(self, alpha_TE: Tensor, chosen_TE: Tensor) -> None:
        left_T = 1 - alpha_TE[:, self.is_removed_E].sum(dim=1)
        chosen_TE = chosen_TE[:, self.keep].double()
        self.by_expert += left_T @ chosen_TE
        self.n_by_expert += chosen_TE.sum(dim=0)
        self.total += float(left_T.sum())
        self.n_tokens += len(left_T)

    def folds(self) -> Array:
        mean_E = self.by_expert / self.n_by_expert.clamp(min=1)
        overall = self.total / self.n_tokens
        folds: Array = torch.where(self.n_by_expert > 0, mean_E, overall).numpy()
        return folds
