"""Rule `fitted`: its errors are those of the block, and its threshold bounds what they promise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertcut.data import Selection, load_quiz
from expertcut.edits.route_fit import fit_block, fit_errors, measured_errors
from expertcut.models.hooks import replaced_forward, route
from expertcut.models.moe_block import MoeBlock
from expertcut.models.routing_rule import RoutingRule
from expertcut.scoring.engine import Engine
from expertcut.scoring.rerouting import Rerouting, rerouted
from tests.conftest import open_model

# Renormalised or not, a shared expert, groups with a factor.
FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "deepseek_v3")
N_EXPERTS = 4


def experts_sum(block: MoeBlock, x_TD: Tensor) -> Tensor:
    """Σ gate weight · output, without shared experts."""
    sums: list[Tensor] = []
    forward = block.experts.forward

    def kept(*args: Any) -> Tensor:
        sums.append(forward(*args))
        return sums[-1]

    with replaced_forward(block.experts, kept):
        block.module(x_TD[None])
    return sums[0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_measured_errors_are_those_of_the_blocks_output(
    checkpoint: Callable[..., Path], family: str
) -> None:
    path = (
        checkpoint(family, num_experts_per_tok=N_EXPERTS, topk_group=2)
        if (family == "deepseek_v3")
        else checkpoint(family, num_experts_per_tok=N_EXPERTS)
    )
    block = open_model(path, dtype="float64").blocks[1]
    torch.manual_seed(0)
    x_TD = torch.randn(60, 32, dtype=torch.float64)
    errors_TK, shares_TK = measured_errors(block, x_TD)
    assert errors_TK.shape == (60, N_EXPERTS - 1) and shares_TK.shape == (60, N_EXPERTS)
    whole_TD = experts_sum(block, x_TD)
    for k in range(1, N_EXPERTS):
        with rerouted([block], Rerouting(RoutingRule(rule="top-k"), {1: k})):
            moved_TD = experts_sum(block, x_TD) - whole_TD
        expected_T = moved_TD.norm(dim=1) / whole_TD.norm(dim=1)
        torch.testing.assert_close(errors_TK[:, k - 1], expected_T, rtol=1e-4, atol=1e-5)
    assert (errors_TK.mean(dim=0).diff() < 0).all() and errors_TK.min() > 1e-3


@torch.inference_mode()
def test_a_fit_foretells_errors_and_its_rule_keeps_below_the_threshold(
    checkpoint: Callable[..., Path], quiz_folder: Path
) -> None:
    moe = open_model(checkpoint("olmoe", num_experts_per_tok=N_EXPERTS))
    quiz = load_quiz(Selection(str(quiz_folder), split="val", shots=1))
    fits = fit_errors(Engine(moe, 400), quiz)
    assert [len(fits[block.layer]) for block in moe.blocks] == [3, 3]
    block = moe.blocks[0]
    torch.manual_seed(0)
    x_TD = torch.randn(600, 32)
    train, test = x_TD[:400], x_TD[400:]
    fit_KK = torch.tensor(fit_block(block, train), dtype=torch.float64)
    errors_TK, shares_TK = measured_errors(block, test)
    foretold_TK = shares_TK @ fit_KK.T
    spread_K = errors_TK.std(dim=0)
    assert ((foretold_TK - errors_TK).pow(2).mean(dim=0).sqrt() < 0.9 * spread_K).all()
    n_used = []
    for at in (0.0, 0.3, 0.6, 9.0):
        routing = Rerouting(RoutingRule(rule="fitted"), {0: at}, {0: fit_block(block, train)})
        with rerouted([block], routing):
            n_T = (route(block.router, block.call)[2] < 8).sum(dim=1)
        n_used.append(float(n_T.float().mean()))
    assert n_used == sorted(n_used, reverse=True) and n_used[0] > n_used[1] > n_used[2] > n_used[3]
    assert n_used[-1] == 1
