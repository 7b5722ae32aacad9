"""A mask and a bias reach the router's choice in every family, dtype and place that loads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expertcut.errors import ContractError
from expertcut.models.hooks import Routing, moved_by, observe_routers
from expertcut.models.load import LoadOptions, find_source, load
from expertcut.scoring.router_bias import Tilts, tilted
from tests.conftest import FAMILIES, slow_but
from tests.support.families import MORE

Checkpoints = Callable[..., Path]
TOKENS = torch.arange(2, 42)[None]
# A bare parameter, nn.Linear inside, a router that gives probabilities, a selection bias
# handed over, one of the router's own, groups.
QUICK = ("mixtral", "hunyuan_v1_moe", "gemma4_text", "afmoe", "minimax_m2", "deepseek_v3")


@pytest.mark.parametrize("family", slow_but(QUICK, {**FAMILIES, **MORE}))
@pytest.mark.parametrize("place", ["float32", "bfloat16", "offloaded"])
def test_masks_and_biases_are_seen_to_act(
    checkpoint: Checkpoints, tmp_path: Path, family: str, place: str
) -> None:
    options = LoadOptions(dtype=place)
    if place == "offloaded":
        options = LoadOptions(device_map="auto", max_memory="cpu=1", offload=tmp_path / "offload")
    moe = load(find_source(str(checkpoint(family))), options)
    assert place != "offloaded" or any(p.device.type == "meta" for p in moe.model.parameters())
    block = moe.blocks[-1]  # a change in it changes no other router
    assert not block.is_hashed
    seen: list[Routing] = []
    with torch.inference_mode(), observe_routers([block], seen.append):
        moe.model(input_ids=TOKENS, use_cache=False)
        expert = int(seen[0].experts_TK.flatten().mode().values)
        bias_E = torch.zeros(8)
        bias_E[expert], bias_E[(expert + 1) % 8] = -torch.inf, 0.5
        with tilted([block], Tilts({block.layer: bias_E})):
            moe.model(input_ids=TOKENS, use_cache=False)
        moe.model(input_ids=TOKENS, use_cache=False)
    before, after, later = seen
    assert (before.experts_TK == expert).any() and not (after.experts_TK == expert).any()
    assert moved_by(before.logits_TE, after.logits_TE, bias_E)
    assert not moved_by(before.logits_TE, after.logits_TE, bias_E * 1.5)
    assert all(
        torch.equal(getattr(before, n), getattr(later, n)) for n in ("logits_TE", "weights_TK")
    )


@pytest.mark.parametrize("family", ["hunyuan_v1_moe", "olmoe"])
def test_an_expert_that_is_chosen_all_the_same_stops_the_run(
    checkpoint: Checkpoints, family: str
) -> None:
    moe = load(find_source(str(checkpoint(family))), LoadOptions())
    bias_E = torch.zeros(8)
    bias_E[:7] = -torch.inf  # two must be chosen, one is left
    with (
        pytest.raises(ContractError, match="chooses an expert that is masked"),
        tilted(moe.blocks, Tilts({0: bias_E})),
    ):
        pass


def test_one_bias_inside_another_adds_up(checkpoint: Checkpoints) -> None:
    moe = load(find_source(str(checkpoint("deepseek_v3"))), LoadOptions())
    seen: list[Routing] = []
    one_E, other_E = torch.zeros(8), torch.zeros(8)
    one_E[1], other_E[1], other_E[5] = 0.5, 0.25, -torch.inf
    block = moe.blocks[-1]
    with torch.inference_mode(), observe_routers([block], seen.append):
        moe.model(input_ids=TOKENS, use_cache=False)
        one, other = (Tilts({block.layer: bias_E}) for bias_E in (one_E, other_E))
        with tilted([block], one), tilted([block], other):
            moe.model(input_ids=TOKENS, use_cache=False)
    assert moved_by(seen[0].logits_TE, seen[1].logits_TE, one_E + other_E)
    assert not (seen[1].experts_TK == 5).any()
