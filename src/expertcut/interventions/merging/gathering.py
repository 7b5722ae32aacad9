"""Calibration passes that say how alike experts are: E × E and E × D numbers for every block."""

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from expertcut.data import Quiz, round_robin
from expertcut.errors import ProfileError
from expertcut.interventions.calibration import CALIBRATION_QUESTIONS
from expertcut.interventions.calibration.listening import listen
from expertcut.interventions.merging.grouping import Evidence
from expertcut.models.hooks import Routing, own_expert, own_forward, replaced_forward
from expertcut.models.moe_block import MoeBlock
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.packing import Pass


def gather(profile: Profile, engine: Engine, tuning: Quiz, method: str) -> list[Evidence]:
    """What a method needs of each block, from every distinct token of at most 512 questions.

    Raises:
        ProfileError: a profile without all-token counts, by which weights are averaged.
    """
    tokens_LE = token_counts(profile)
    few = round_robin(tuning, CALIBRATION_QUESTIONS)
    sums = {"m_smoe": logit_products, "hc_smoe": mean_outputs_of_all}[method](engine, few)
    name = {"m_smoe": "products_EE", "hc_smoe": "outputs_ED"}[method]
    return [
        Evidence(tokens_LE[b.layer, : b.n_experts], **{name: sums[b.layer].numpy()})
        for b in engine.moe.blocks
    ]


def token_counts(profile: Profile) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """How many tokens chose each expert, shots included, (L, E).

    Raises:
        ProfileError: the profile was made with --stats answer.
    """
    tokens_LE = profile.token_sum("tokens")
    if tokens_LE is None:
        raise ProfileError(
            f"{profile.path} holds no all-token statistics (--stats answer), and weights are "
            "averaged by them: profile with --stats all"
        )
    return tokens_LE


def logit_products(engine: Engine, quiz: Quiz) -> dict[int, Tensor]:
    """Σ over tokens of l·lᵀ (E, E) float64 per layer, l being a token's router logits."""
    sums = {b.layer: torch.zeros(b.n_experts, b.n_experts).double() for b in engine.moe.blocks}

    def hear(routing: Routing, _is_answer_T: Tensor) -> None:
        logits_TE = routing.logits_TE.double()
        sums[routing.layer] += logits_TE.T @ logits_TE

    listen(engine, quiz, sums, hear)
    return sums


def mean_outputs_of_all(engine: Engine, quiz: Quiz) -> dict[int, Tensor]:
    """Mean output (E, D) float64 of every expert over all tokens, whichever these chose, by layer.

    Every expert runs on every token: E / K times the experts' work of a forward pass, and once
    more that for the pass itself.
    """
    sums = _OutputSums()
    with ExitStack() as stack:
        for block in engine.moe.blocks:
            stack.enter_context(replaced_forward(block.experts, sums.watched(block)))
        ask(engine, quiz, sums.begin)
    return {layer: total_ED / sums.n_tokens[layer] for layer, total_ED in sums.total.items()}


class _OutputSums:
    """Sums of all experts' outputs and how many tokens there were; pads are left out."""

    def __init__(self) -> None:
        self.total: dict[int, Tensor] = {}
        self.n_tokens: dict[int, int] = {}
        self.valid_T: Tensor | None = None

    def begin(self, step: Pass) -> None:
        """Before each forward pass."""
        self.valid_T = step.valid_T

    def watched(self, block: MoeBlock) -> Callable[..., Tensor]:
        """The experts' forward, with all of them run beside."""
        forward, own = own_forward(block.experts), own_expert(block)

        def run(x_TD: Tensor, *args: Tensor) -> Tensor:
            flat_TD = x_TD.reshape(-1, x_TD.shape[-1])
            if self.valid_T is not None:
                flat_TD = flat_TD[self.valid_T.to(x_TD.device)]
            outputs = [own(e, flat_TD).double().sum(dim=0) for e in range(block.n_experts)]
            total_ED = torch.stack(outputs).cpu()
            self.total[block.layer] = self.total.get(block.layer, torch.zeros(())) + total_ED
            self.n_tokens[block.layer] = self.n_tokens.get(block.layer, 0) + len(flat_TD)
            y_TD: Tensor = forward(x_TD, *args)
            return y_TD

        return run
