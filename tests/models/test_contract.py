"""The laws of the MoE contract, on every family of the tests."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from expertcut.errors import ContractError
from expertcut.models.hooks import observe_experts, observe_routers
from expertcut.models.load import MoeModel
from expertcut.models.validate import check_moe
from expertcut.scoring.router_bias import Tilts, tilted
from tests.conftest import FAMILIES, open_model
from tests.support.loaded_stock import cut, scale_outputs

Checkpoints = Callable[..., Path]
TOKENS = torch.arange(2, 42)[None]
# Equal numbers from both routing groups of DeepSeek-V3.
KEEP = (0, 2, 3, 5, 6, 7)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@torch.inference_mode()
def logits(moe: MoeModel) -> Tensor:
    result: Tensor = moe.model(input_ids=TOKENS, use_cache=False).logits
    return result


def removed_bias(moe: MoeModel) -> dict[int, Tensor]:
    bias_E = torch.full((8,), -torch.inf)
    bias_E[list(KEEP)] = 0.0
    return {block.layer: bias_E for block in moe.blocks}


def test_a_cut_equals_a_router_that_cannot_choose_the_removed(
    checkpoint: Checkpoints, family: str
) -> None:
    moe = open_model(checkpoint(family))
    before = logits(moe)
    with tilted(moe.blocks, Tilts(removed_bias(moe))):
        masked = logits(moe)
    assert (before - masked).abs().max() > 0.1  # else a no-op would pass too
    assert torch.equal(logits(moe), before)  # what was put in is taken out
    for block in moe.blocks:
        cut(block, KEEP)
        assert all(tensor.shape[axis] == 6 for *_, tensor, axis in block.expert_tensors())
    assert (logits(moe) - masked).abs().max() < 1e-5


def test_experts_run_one_by_one_give_the_same_bits(checkpoint: Checkpoints, family: str) -> None:
    moe = open_model(checkpoint(family))
    before = logits(moe)
    calls: list[int] = []
    with observe_experts(moe.blocks, lambda call: calls.append(len(call.tokens_M))):
        watched = logits(moe)
    assert torch.equal(watched, before)
    assert sum(calls) == TOKENS.numel() * sum(block.top_k for block in moe.blocks)
    calls.clear()
    assert torch.equal(logits(moe), before)
    assert not calls


def test_a_blocks_output_is_the_weighted_sum_of_its_experts_own(
    checkpoint: Checkpoints, family: str
) -> None:
    moe = open_model(checkpoint(family))
    seen: list[tuple[Tensor, Tensor]] = []
    block = moe.blocks[0]
    handle = block.experts.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    logits(moe)
    handle.remove()
    (x_TD, experts_TK, weights_TK), y_TD = seen[0]
    with torch.inference_mode():
        one = torch.ones(1, 1)
        for t in range(0, len(x_TD), 7):
            own = [block.experts(x_TD[t : t + 1], e.view(1, 1), one)[0] for e in experts_TK[t]]
            total_D = sum(w * f_D for w, f_D in zip(weights_TK[t], own, strict=True))
            torch.testing.assert_close(total_D, y_TD[t], atol=1e-5, rtol=1e-5)


def test_scaling_an_experts_output_equals_scaling_its_gate_weight(
    checkpoint: Checkpoints, family: str
) -> None:
    moe = open_model(checkpoint(family))
    before = logits(moe)
    block = moe.blocks[-1]

    chosen: list[int] = []

    def quarter(_module: object, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        x_TD, experts_TK, weights_TK = args
        chosen.append(int(experts_TK.mode().values.mode().values))
        return x_TD, experts_TK, torch.where(experts_TK == chosen[0], weights_TK / 4, weights_TK)

    handle = block.experts.register_forward_pre_hook(quarter)
    expected = logits(moe)
    handle.remove()
    assert (expected - before).abs().max() > 0.01
    scale_outputs(block, {chosen[0]: 0.25})
    assert (logits(moe) - expected).abs().max() < 1e-5


def test_save_and_reload_is_bit_equal_in_per_expert_names(
    checkpoint: Checkpoints, family: str, tmp_path: Path
) -> None:
    moe = open_model(checkpoint(family))
    moe.model.save_pretrained(tmp_path)
    with (
        safe_open(moe.source.weight_files[0], "pt") as old,
        safe_open(tmp_path / "model.safetensors", "pt") as new,
    ):
        assert set(new.keys()) == set(old.keys())
        assert all(torch.equal(new.get_tensor(k), old.get_tensor(k)) for k in old.keys())  # noqa: SIM118
        per_expert = [key for key in new.keys() if ".experts.7." in key]  # noqa: SIM118
    assert per_expert or family in ("gpt_oss", "granitemoe")  # which are fused on disk


def test_the_gates_kind_is_read_off_what_it_does(checkpoint: Checkpoints) -> None:
    renormalised = open_model(checkpoint("olmoe", norm_topk_prob=True)).blocks[0]
    assert (renormalised.scoring, renormalised.inflates) == ("softmax", False)


def test_a_near_tie_between_groups_is_one_between_sets_of_experts(checkpoint: Checkpoints) -> None:
    block = open_model(checkpoint("deepseek_v3")).blocks[0]
    bias_E = block.selection_bias()
    assert bias_E is not None
    bias_E.zero_()
    far = [0.9, 0.7, 0.1, 0.1, 0.6, 0.2, 0.1, 0.1]
    best_two = [0.9, 0.1, 0.1, 0.1, 0.6, 0.399, 0.1, 0.1]
    best_one = [0.6, 0.5, 0.1, 0.1, 0.598, 0.2, 0.1, 0.1]
    chosen_TK = torch.tensor([[0, 1]] * 3)
    gap_T = block.selection_gap(torch.tensor([far, best_two, best_one]), chosen_TK)
    torch.testing.assert_close(gap_T, torch.tensor([0.1, 0.0, 0.002]), atol=1e-6, rtol=0)
    alone = replace(block, n_groups=1, top_groups=1)
    gap_T = alone.selection_gap(torch.tensor([best_one]), chosen_TK[:1])
    torch.testing.assert_close(gap_T, torch.tensor([0.098]))


def test_a_bias_at_run_time_equals_an_edit_of_the_logits(checkpoint: Checkpoints) -> None:
    moe = open_model(checkpoint("olmoe"))
    bias_E = torch.zeros(8)
    bias_E[5] = 1.5
    found: list[Tensor] = []
    with (
        tilted(moe.blocks, Tilts({1: bias_E})),
        observe_routers(moe.blocks[1:], lambda r: found.extend([r.input_TD, r.logits_TE])),
    ):
        logits(moe)
    input_TD, logits_TE = found
    weight_ED = moe.blocks[1].router.get_parameter("weight")
    torch.testing.assert_close(logits_TE, input_TD @ weight_ED.T + bias_E)


@pytest.mark.parametrize("model_type", ["llama4_text", "jetmoe"])
def test_what_breaks_the_contract_is_refused_by_name(model_type: str) -> None:
    config = {"model_type": model_type, "num_experts": 8}
    with pytest.raises(ContractError, match=rf"config\.json: {model_type} models are not"):
        check_moe("owner/name", Path("folder"), config)
