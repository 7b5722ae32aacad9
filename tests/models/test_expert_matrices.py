"""Matrices of single experts: those on disk, replaced for a while, and what they read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expertcut.checkpoints.shards import read_tensor
from expertcut.checkpoints.tensor_names import match_blocks
from expertcut.errors import ContractError
from expertcut.models.expert_matrices import (
    Matrices,
    matrices,
    projection_inputs,
    replaced_matrices,
)
from expertcut.models.hooks import own_expert
from expertcut.models.load import MoeModel
from tests.conftest import open_model

_PARTS = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}


def on_disk(moe: MoeModel, layer: int, expert: int) -> dict[str, Tensor]:
    headers = moe.source.headers
    blocks, _ = match_blocks(headers, [block.name for block in moe.blocks])
    own = blocks[moe.blocks[layer].name].by_expert[expert]
    return {
        name: read_tensor(headers[tensor])
        for name, parts in _PARTS.items()
        for part, tensor in own.items()
        if part.removesuffix(".weight") in parts
    }


def test_matrices_are_the_tensors_on_disk(different_moe: MoeModel) -> None:
    if different_moe.model.config.model_type in ("gpt_oss", "granitemoe"):  # fused on disk
        return
    for layer, block in enumerate(different_moe.blocks):
        for expert in (0, block.n_experts - 1):
            own, stored = matrices(block, expert), on_disk(different_moe, layer, expert)
            assert own.keys() == stored.keys()
            assert all(torch.equal(own[name], stored[name]) for name in own)


def test_gate_and_up_in_turn_are_refused(checkpoint: Callable[..., Path]) -> None:
    block = open_model(checkpoint("gpt_oss")).blocks[0]
    with pytest.raises(ContractError, match="does not hold a matrix for each projection"):
        matrices(block, 0)


@torch.inference_mode()
def test_an_expert_with_the_matrices_of_another_is_that_one_until_it_is_put_back(
    checkpoint: Callable[..., Path],
) -> None:
    moe = open_model(checkpoint("qwen3_moe"))
    block = moe.blocks[1]
    run, x_MD = own_expert(block), torch.randn(5, 32)
    before = [tensor.clone() for tensor in block.experts.parameters()]
    first_MD, other_MD = run(0, x_MD), run(3, x_MD)
    other: Matrices = {name: own.clone() for name, own in matrices(block, 3).items()}
    with replaced_matrices(block, {0: other}):
        assert torch.equal(run(0, x_MD), other_MD) and torch.equal(run(3, x_MD), other_MD)
    with pytest.raises(KeyError), replaced_matrices(block, {0: other}):
        raise KeyError
    assert torch.equal(run(0, x_MD), first_MD) and not torch.equal(first_MD, other_MD)
    for tensor, same in zip(block.experts.parameters(), before, strict=True):
        assert torch.equal(tensor, same)


@torch.inference_mode()
def test_the_last_matrix_of_its_inputs_is_the_output(checkpoint: Callable[..., Path]) -> None:
    for family in ("olmoe", "mixtral"):
        block, x_MD = open_model(checkpoint(family)).blocks[0], torch.randn(5, 32)
        own, inputs = matrices(block, 2), projection_inputs(block, 2, x_MD)
        assert {name: tensor.shape[1] for name, tensor in own.items()} == {
            name: tensor.shape[1] for name, tensor in inputs.items()
        }
        torch.testing.assert_close(inputs["down"] @ own["down"].T, own_expert(block)(2, x_MD))
