"""Errors of options: of single experts as of their block, of experts no token chose, of all."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from expertcut.edits.compression import parse_options
from expertcut.edits.compression_error import block_outputs, expert_tokens, option_errors
from expertcut.models.expert_matrices import matrices, replaced_matrices
from expertcut.models.load import MoeModel
from expertcut.scoring.engine import Engine
from tests.conftest import open_model

MENU = parse_options("1,2,4,8,lowrank:0.5:0.1,mean,zero,copy,whole")
GROUP_SIZE = 16


@pytest.fixture(scope="module", params=("olmoe", "qwen2_moe", "glm4_moe"))
def moe(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> MoeModel:
    return open_model(checkpoint(request.param))


@pytest.fixture(scope="module")
def inputs(moe: MoeModel) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {block.layer: torch.randn(24, 32, generator=generator) for block in moe.blocks}


def test_the_error_of_one_expert_is_that_of_its_block_where_no_other_changes(
    moe: MoeModel, inputs: dict[int, torch.Tensor]
) -> None:
    found = option_errors(Engine(moe, 512), inputs, MENU, "F32", GROUP_SIZE)
    before = block_outputs(moe.blocks, inputs)
    block = moe.blocks[1]
    for own in list(expert_tokens(block, inputs[1]))[:3]:
        for place, option in enumerate(MENU):
            new = own.compressed(option, "F32", GROUP_SIZE)
            if new.constant is None:
                with replaced_matrices(block, {own.expert: new.weights}):
                    after = block_outputs([block], inputs)
                error = float((before[1] - after[1]).square().sum()) / 24
                assert error == pytest.approx(found.error_LEO[1, own.expert, place], rel=1e-3)
    energies = [float(before[layer].square().sum()) / 24 for layer in (0, 1)]
    assert found.energy_L == pytest.approx(energies)


def test_no_error_is_that_of_the_whole_and_the_largest_that_of_nothing(
    moe: MoeModel, inputs: dict[int, torch.Tensor]
) -> None:
    error_LEO = option_errors(Engine(moe, 512), inputs, MENU, "F32", GROUP_SIZE).error_LEO
    by_name = {str(option): error_LEO[..., place] for place, option in enumerate(MENU)}
    assert np.nanmax(by_name["whole"]) < 1e-10
    for layer, block in enumerate(moe.blocks):
        of_zero = np.zeros(block.n_experts)
        for own in expert_tokens(block, inputs[layer]):
            scaled_MD = own.weight_M[:, None].double() * own.y_MD.double()
            of_zero[own.expert] = float(scaled_MD.square().sum()) / 24 * block.output_factor**2
        assert by_name["zero"][layer, : block.n_experts] == pytest.approx(of_zero)
        is_chosen_E = of_zero > 0
        assert is_chosen_E.sum() > 0
        for errors in by_name.values():
            assert not errors[layer, : block.n_experts][~is_chosen_E].any()
        total = {name: errors[layer].sum() for name, errors in by_name.items()}
        assert total["8"] < total["4"] < total["2"] and total["copy"] <= total["zero"]


def test_measuring_leaves_the_model_as_it_was(
    moe: MoeModel, inputs: dict[int, torch.Tensor]
) -> None:
    before = [own.clone() for block in moe.blocks for own in matrices(block, 0).values()]
    option_errors(Engine(moe, 512), inputs, MENU[:2], "F32", GROUP_SIZE)
    after = [own for block in moe.blocks for own in matrices(block, 0).values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
