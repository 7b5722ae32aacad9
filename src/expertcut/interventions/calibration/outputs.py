"""What a removed expert gives instead of its output: nothing, or the mean of what it gave."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from expertcut.data import Quiz, round_robin
from expertcut.interventions.calibration import CALIBRATION_QUESTIONS
from expertcut.models.hooks import ExpertCall, observe_experts
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.packing import Pass

# By block name and expert id: which experts, and what each gives (D,).
Removed = Mapping[str, Collection[int]]
Constants = Mapping[str, Mapping[int, Tensor]]


def zero_outputs(removed: Removed, width: int) -> dict[str, dict[int, Tensor]]:
    """Zeros (D,) for every removed expert."""
    return {block: {e: torch.zeros(width) for e in ids} for block, ids in removed.items()}


def mean_outputs(engine: Engine, quiz: Quiz, removed: Removed) -> dict[str, dict[int, Tensor]]:
    """Mean output (D,) of each removed expert over the tokens that chose it, zeros where none did.

    It is what the expert gave before its gate weight, summed in float64. Every distinct token of
    at most 512 questions counts.
    """
    sums = _OutputSums(removed)
    blocks = [block for block in engine.moe.blocks if block.name in removed]
    names = {block.layer: block.name for block in blocks}
    with observe_experts(blocks, lambda call: sums.add(names[call.layer], call)):
        ask(engine, round_robin(quiz, CALIBRATION_QUESTIONS), sums.start)
    width = int(engine.moe.model.config.get_text_config().hidden_size)
    means = zero_outputs(removed, width)
    for (block, expert), (total_D, n_tokens) in sums.by_expert.items():
        means[block][expert] = total_D / n_tokens
    return means


class _OutputSums:
    """Sums of the removed experts' outputs and how many there were; pads are left out."""

    def __init__(self, removed: Removed) -> None:
        self.removed = removed
        self.by_expert: dict[tuple[str, int], tuple[Tensor, int]] = {}
        self.valid_T: Tensor | None = None

    def start(self, step: Pass) -> None:
        """Before each forward pass."""
        self.valid_T = step.valid_T

    def add(self, block: str, call: ExpertCall) -> None:
        """One expert's outputs in that pass."""
        if call.expert not in self.removed[block]:
            return
        output_MD = call.output_MD
        if self.valid_T is not None:
            output_MD = output_MD[self.valid_T.to(output_MD.device)[call.tokens_M]]
        if not len(output_MD):
            return
        total_D, n_tokens = self.by_expert.get((block, call.expert), (torch.zeros(()), 0))
        total_D = total_D + output_MD.double().sum(dim=0).cpu()
        self.by_expert[block, call.expert] = (total_D, n_tokens + len(output_MD))
