"""What an edit did to held-out questions: against the unedited base, and against the exact edit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from expertcut.interventions.plan import Edit
from expertcut.moe.contract import MoeBlock
from expertcut.moe.engine import Engine, ask
from expertcut.moe.loading import MoeModel
from expertcut.moe.observers import Routing, observe_routers, tilt_routers
from expertcut.moe.packing import Pass
from expertcut.quiz import Quiz


@dataclass(frozen=True)
class Difference:
    """Two models' log p of the same choices: |Δ log p| over all of them, and flipped answers."""

    against: str
    questions: int
    max_abs_logprob_diff: float
    median_abs_logprob_diff: float
    flipped: int


@dataclass(frozen=True)
class Answered:
    """log p of choices (N, C), and per (layer, expert) watched the share of questions it served."""

    logprob_NC: Tensor
    shares: dict[tuple[int, int], float]


def difference(against: str, a_NC: Tensor, b_NC: Tensor) -> Difference:
    """Compares the choices that both have."""
    both_NC = a_NC.isfinite() & b_NC.isfinite()
    gap = (a_NC - b_NC)[both_NC].abs().double()
    flipped = int((a_NC.argmax(dim=1) != b_NC.argmax(dim=1)).sum())
    return Difference(against, len(a_NC), float(gap.max()), float(gap.quantile(0.5)), flipped)


def answer(engine: Engine, quiz: Quiz, watched: Mapping[str, Edit]) -> Answered:
    """Scores a quiz; experts with a bias in `watched` have their appearances counted."""
    tilted = [(b, e) for b in engine.moe.blocks for e in watched[b.name].bias]
    counts = {(block.layer, expert): 0 for block, expert in tilted}
    current: list[Pass] = []

    def see(routing: Routing) -> None:
        chosen_NK = routing.experts_TK[current[0].answers_N.to(routing.experts_TK.device)]
        for layer, expert in counts:
            if layer == routing.layer:
                counts[layer, expert] += int((chosen_NK == expert).sum())

    with observe_routers([block for block, _ in tilted], see):
        logprob_NC = ask(engine, quiz, lambda step: current.__setitem__(slice(None), [step]))
    return Answered(logprob_NC, {key: n / len(quiz) for key, n in counts.items()})


@contextmanager
def at_run_time(moe: MoeModel, edits: Mapping[str, Edit]) -> Iterator[None]:
    """The plan in the unedited model: removed experts cannot be chosen, biases are exact."""
    biases = {b.layer: _logit_bias_E(b, edits[b.name]) for b in moe.blocks}
    touched = {layer: bias_E for layer, bias_E in biases.items() if bool(bias_E.any())}
    with tilt_routers(moe.blocks, touched):
        yield


def _logit_bias_E(block: MoeBlock, edit: Edit) -> Tensor:
    bias_E = torch.full((block.n_experts,), -torch.inf)
    bias_E[list(edit.keep)] = 0.0
    for expert, bias in edit.bias.items():
        bias_E[expert] = bias
    return bias_E


def proof(
    base: Answered, exact: Answered, edited: Answered, exact_name: str
) -> tuple[dict[str, Any], list[Difference]]:
    """The figures that go into the plan, and the rows that are printed."""
    rows = [
        difference("the unedited base", edited.logprob_NC, base.logprob_NC),
        difference(exact_name, edited.logprob_NC, exact.logprob_NC),
    ]
    shares = [
        {
            "layer": layer,
            "expert": expert,
            "base": base.shares[layer, expert],
            "exact": exact.shares[layer, expert],
            "edited": edited.shares[layer, expert],
        }
        for layer, expert in base.shares
    ]
    return {"held_out": [asdict(row) for row in rows], "shares": shares}, rows
