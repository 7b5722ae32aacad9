"""A direction v with v·h ≈ 1 on a router's inputs h, so that a gate row can carry a bias.

OLMoE's gate has no bias, so layout `stock` adds b·v to the expert's row. v is the ridge solution
(E[hhᵀ] + λI)⁻¹ E[h], rescaled to mean v·h = 1. Its fit is judged on other questions by
1 − mean((1 − v·h)²): the target is the constant 1, so the usual R² is undefined.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertcut.interventions.calibration import CALIBRATION_QUESTIONS
from expertcut.interventions.calibration.listening import listen
from expertcut.moe.engine import Engine
from expertcut.moe.observers import Routing
from expertcut.quiz import Quiz, round_robin

_RIDGE = 1e-4  # of the mean eigenvalue of E[hhᵀ]


@dataclass(frozen=True)
class Fit:
    """How constant v·h is on questions that v was not fitted on."""

    layer: int
    quality_all: float
    quality_answer: float
    mean_all: float
    std_all: float
    mean_answer: float
    std_answer: float


@dataclass
class _Moments:
    """Running Σ hhᵀ, Σ h and count of one layer, in float64."""

    outer_DD: Tensor | float = 0.0
    total_D: Tensor | float = 0.0
    n_tokens: int = 0

    def add(self, routing: Routing, _is_answer_T: Tensor) -> None:
        h_TD = routing.input_TD.double()
        self.outer_DD = self.outer_DD + h_TD.T @ h_TD
        self.total_D = self.total_D + h_TD.sum(dim=0)
        self.n_tokens += len(h_TD)

    def direction_D(self) -> Tensor:
        outer_DD, mean_D = self.outer_DD / self.n_tokens, self.total_D / self.n_tokens
        assert isinstance(outer_DD, Tensor) and isinstance(mean_D, Tensor)
        ridge = _RIDGE * outer_DD.diagonal().mean()
        v_D: Tensor = torch.linalg.solve(outer_DD + ridge * torch.eye(len(mean_D)), mean_D)
        return v_D / (v_D @ mean_D)


@dataclass
class _Products:
    """v·h of every token of one layer."""

    v_D: Tensor
    all: list[Tensor] = field(default_factory=list)
    answer: list[Tensor] = field(default_factory=list)

    def add(self, routing: Routing, is_answer_T: Tensor) -> None:
        product_T = routing.input_TD.double() @ self.v_D
        self.all.append(product_T)
        self.answer.append(product_T[is_answer_T])


def fit_directions(engine: Engine, tuning: Quiz, layers: Collection[int]) -> dict[int, Tensor]:
    """V (D,) float64 per layer, fitted on every distinct token of at most 512 questions."""
    moments = {layer: _Moments() for layer in layers}
    few = round_robin(tuning, CALIBRATION_QUESTIONS)
    listen(
        engine,
        few,
        moments,
        lambda routing, is_answer_T: moments[routing.layer].add(routing, is_answer_T),
    )
    return {layer: m.direction_D() for layer, m in moments.items()}


def judge_directions(engine: Engine, held_out: Quiz, directions: dict[int, Tensor]) -> list[Fit]:
    """How well each v holds on questions that it was not fitted on."""
    products = {layer: _Products(v_D) for layer, v_D in directions.items()}
    listen(
        engine,
        held_out,
        products,
        lambda routing, is_answer_T: products[routing.layer].add(routing, is_answer_T),
    )
    return [_fit(layer, torch.cat(p.all), torch.cat(p.answer)) for layer, p in products.items()]


def _fit(layer: int, all_T: Tensor, answer_N: Tensor) -> Fit:
    return Fit(
        layer=layer,
        quality_all=float(1 - ((1 - all_T) ** 2).mean()),
        quality_answer=float(1 - ((1 - answer_N) ** 2).mean()),
        mean_all=float(all_T.mean()),
        std_all=float(all_T.std(correction=0)),
        mean_answer=float(answer_N.mean()),
        std_answer=float(answer_N.std(correction=0)),
    )
