"""A direction v with v·h ≈ 1 on a router's inputs h, so that a gate row can carry a bias.

OLMoE's gate has no bias, so layout `stock` adds b·v to the expert's row. v is the ridge solution
(E[hhᵀ] + λI)⁻¹ E[h], rescaled to mean v·h = 1. A bias for answer positions alone wants 1 there and
0 elsewhere, both kinds of tokens weighing the same: then E[h] is over answer positions, and E[hhᵀ]
is the sum of both kinds'. (Fitted on answer positions alone, v·h is anything elsewhere: see
docs/log.md.) The fit is judged on other questions by 1 − mean((target − v·h)²): with a constant
target the usual R² is undefined.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertcut.data import Quiz, round_robin
from expertcut.errors import ContractError
from expertcut.interventions.calibration import CALIBRATION_QUESTIONS
from expertcut.interventions.calibration.listening import listen
from expertcut.models.hooks import Routing
from expertcut.scoring.engine import Engine
from expertcut.scoring.router_bias import ApplyAt

_RIDGE = 1e-4  # of the mean eigenvalue of E[hhᵀ]


@dataclass(frozen=True)
class Fit:
    """How near v·h is to its target on questions that v was not fitted on.

    `quality` is over all that v was fitted for, `quality_answer` over answer positions, where the
    target is 1 in any case; means and standard deviations are those of v·h.
    """

    layer: int
    quality: float
    quality_answer: float
    mean_answer: float
    std_answer: float
    mean_elsewhere: float
    std_elsewhere: float


@dataclass
class _Sums:
    """Running Σ hhᵀ, Σ h and count, in float64."""

    outer_DD: Tensor | float = 0.0
    total_D: Tensor | float = 0.0
    n_tokens: int = 0

    def add(self, h_TD: Tensor) -> None:
        self.outer_DD = self.outer_DD + h_TD.T @ h_TD
        self.total_D = self.total_D + h_TD.sum(dim=0)
        self.n_tokens += len(h_TD)


@dataclass
class _Moments:
    """One layer's router inputs, at answer positions and elsewhere."""

    answer: _Sums = field(default_factory=_Sums)
    elsewhere: _Sums = field(default_factory=_Sums)

    def add(self, routing: Routing, is_answer_T: Tensor) -> None:
        h_TD = routing.input_TD.double()
        self.answer.add(h_TD[is_answer_T])
        self.elsewhere.add(h_TD[~is_answer_T])

    def direction_D(self, apply_at: ApplyAt) -> Tensor:
        a, b = self.answer, self.elsewhere
        if apply_at == "all":
            n_tokens = a.n_tokens + b.n_tokens
            outer_DD = (a.outer_DD + b.outer_DD) / n_tokens
            mean_D = (a.total_D + b.total_D) / n_tokens
        else:
            outer_DD = a.outer_DD / a.n_tokens + b.outer_DD / max(b.n_tokens, 1)
            mean_D = a.total_D / a.n_tokens
        assert isinstance(outer_DD, Tensor) and isinstance(mean_D, Tensor)
        ridge = _RIDGE * outer_DD.diagonal().mean()
        v_D: Tensor = torch.linalg.solve(outer_DD + ridge * torch.eye(len(mean_D)), mean_D)
        return v_D / (v_D @ mean_D)


@dataclass
class _Products:
    """v·h of every token of one layer."""

    v_D: Tensor
    answer: list[Tensor] = field(default_factory=list)
    elsewhere: list[Tensor] = field(default_factory=list)

    def add(self, routing: Routing, is_answer_T: Tensor) -> None:
        product_T = routing.input_TD.double() @ self.v_D
        self.answer.append(product_T[is_answer_T])
        self.elsewhere.append(product_T[~is_answer_T])


def fit_directions(
    engine: Engine, tuning: Quiz, layers: Collection[int], apply_at: ApplyAt = "all"
) -> dict[int, Tensor]:
    """V (D,) float64 per layer, fitted on every distinct token of at most 512 questions.

    Raises:
        ContractError: a router whose logits are more than its gate matrix times its input.
    """
    for block in engine.moe.blocks:
        if block.layer in layers and not block.is_linear:
            raise ContractError(
                f"{block.name}: its router caps or scales its logits, so nothing that is added to "
                "its gate matrix moves a logit by just a bias: boost and suppress are not "
                "supported here"
            )
    moments = {layer: _Moments() for layer in layers}
    few = round_robin(tuning, CALIBRATION_QUESTIONS)
    listen(
        engine,
        few,
        moments,
        lambda routing, is_answer_T: moments[routing.layer].add(routing, is_answer_T),
    )
    return {layer: m.direction_D(apply_at) for layer, m in moments.items()}


def judge_directions(
    engine: Engine, held_out: Quiz, directions: dict[int, Tensor], apply_at: ApplyAt = "all"
) -> list[Fit]:
    """How well each v holds on questions that it was not fitted on."""
    products = {layer: _Products(v_D) for layer, v_D in directions.items()}
    listen(
        engine,
        held_out,
        products,
        lambda routing, is_answer_T: products[routing.layer].add(routing, is_answer_T),
    )
    return [
        _fit(layer, torch.cat(p.answer), torch.cat(p.elsewhere), apply_at)
        for layer, p in products.items()
    ]


def _fit(layer: int, answer_N: Tensor, elsewhere_T: Tensor, apply_at: ApplyAt) -> Fit:
    if apply_at == "all":
        loss = ((1 - torch.cat([answer_N, elsewhere_T])) ** 2).mean()
    else:
        loss = (((1 - answer_N) ** 2).mean() + (elsewhere_T**2).mean()) / 2
    return Fit(
        layer=layer,
        quality=float(1 - loss),
        quality_answer=float(1 - ((1 - answer_N) ** 2).mean()),
        mean_answer=float(answer_N.mean()),
        std_answer=float(answer_N.std(correction=0)),
        mean_elsewhere=float(elsewhere_T.mean()),
        std_elsewhere=float(elsewhere_T.std(correction=0)),
    )
