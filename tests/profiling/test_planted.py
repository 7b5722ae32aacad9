"""An expert that was broken on purpose is the first suspect."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from expertcut.data import Quiz, Selection, load_quiz
from expertcut.models.hooks import replaced_forward
from expertcut.models.load import MoeModel
from expertcut.profiling.findings import Findings, find
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import load_profile
from expertcut.scoring.router_bias import Tilts, tilted
from expertcut.stats import mcnemar
from tests.conftest import open_model

QUICKSTART = Path(__file__).parents[2] / "checkpoints" / "quickstart"


@dataclass(frozen=True)
class Planted:
    """The bundled model on val: as it is, without one expert of its last layer, and with noise."""

    expert: int
    healthy: Findings
    masked: Findings
    noisy: Findings


def asked(moe: MoeModel, quiz: Quiz, folder: Path) -> Findings:
    list(Measurement(moe, quiz, None, MeasureOptions("answer")).run(folder))
    return find(load_profile(folder))


def right(found: Findings) -> np.ndarray:
    return found.profile.answers.is_correct_N


def is_harmless(healthy: Findings, masked: Findings) -> bool:
    """No change of a point, and none that chance would not make."""
    gained = int((right(masked) & ~right(healthy)).sum())
    lost = int((right(healthy) & ~right(masked)).sum())
    return mcnemar(gained, lost) > 0.05 and abs(gained - lost) < 0.01 * len(right(healthy))


def candidates(healthy: Findings) -> list[int]:
    """Experts of the last layer in 20–80 % of questions, not worse than chance, heaviest first.

    In the last layer noise reaches the answers of the questions that chose the expert, and no
    others; and it must weigh enough to reach them at all.
    """
    layer = healthy.layers[-1]
    p_E = healthy.significance.p_family_X[-layer.n_experts :]
    share_E = layer.appearances_E
    some = np.flatnonzero((share_E >= 0.2) & (share_E <= 0.8) & (p_E > 0.05))
    return sorted(some.tolist(), key=lambda e: -layer.contribution_pct_E[e] * share_E[e])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    folder = tmp_path_factory.mktemp("planted")
    moe = open_model(QUICKSTART)
    quiz = load_quiz(Selection(str(QUICKSTART / "quiz"), split="val"))
    block = moe.blocks[-1]
    healthy = asked(moe, quiz, folder / "healthy")
    for expert in candidates(healthy):
        forbidden_E = torch.zeros(block.n_experts)
        forbidden_E[expert] = -torch.inf
        with tilted(moe.blocks, Tilts({block.layer: forbidden_E})):
            masked = asked(moe, quiz, folder / f"without-{expert}")
        if is_harmless(healthy, masked):
            break
    with replaced_forward(block.experts, with_noise(block.experts.forward, expert)):
        noisy = asked(moe, quiz, folder / "noisy")
    return Planted(expert, healthy, masked, noisy)


def with_noise(forward: Callable[..., Tensor], expert: int, seed: int = 0) -> Callable[..., Tensor]:
    """The block's experts with one's output replaced.

    Its input turned around so fast that every question gets numbers of its own, which a random
    matrix does not do: it moves all answers in one direction, and often in a harmless one. Huge,
    because no gate weight, however small, must hide them: it is activation that is tested.
    """
    dice = torch.Generator().manual_seed(seed)

    def experts(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        is_it_TK = experts_TK == expert
        width = x_TD.shape[1]
        turn_DD = 20 * torch.randn(width, width, generator=dice.manual_seed(seed)) / width**0.5
        weight_T1 = (weights_TK * is_it_TK).sum(1, keepdim=True)
        others_TD = forward(x_TD, experts_TK, weights_TK.masked_fill(is_it_TK, 0))
        return others_TD + weight_T1 * 1e6 * torch.sin(x_TD @ turn_DD)

    return experts


def test_the_planted_case_is_one(planted: Planted):
    assert 0.2 <= planted.healthy.layers[-1].appearances_E[planted.expert] <= 0.8
    assert not planted.masked.layers[-1].is_activated_NE[:, planted.expert].any()
    assert is_harmless(planted.healthy, planted.masked)
    assert right(planted.noisy).mean() < right(planted.healthy).mean() - 0.03


def test_an_expert_whose_output_is_noise_leads_the_suspects(planted: Planted):
    place = (len(planted.healthy.layers) - 1, planted.expert)
    before, after = planted.healthy.significance, planted.noisy.significance
    x = planted.noisy.places.index(place)
    assert before.p_family_X[x] > 0.05 and before.suspects[0] != x
    assert after.suspects[0] == x
    assert after.p_family_X[x] == pytest.approx(1 / 2001)
    assert after.difference_X[x] < -0.1
