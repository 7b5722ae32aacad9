"""Routers at the edges of numbers: ties, overflow, and logits that are no numbers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expertcut.data import Quiz, Selection, load_quiz
from expertcut.errors import ModelError
from expertcut.models.hooks import Routing, observe_routers, own_forward, replaced_forward
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import load_profile
from expertcut.scoring.engine import Engine
from tests.conftest import Commands, make_checkpoint, open_model
from tests.evaluation.test_numbers import finite

Checkpoints = Callable[..., Path]


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A model whose experts have the same router row, and so the same logit, always."""
    path = tmp_path / "tied"
    make_checkpoint(path, "olmoe")
    moe = open_model(path)
    for block in moe.blocks:
        block.router.weight[:] = block.router.weight[0]
    moe.model.save_pretrained(path)
    return path


def test_ties_at_the_edge_of_the_top_k_are_broken_as_the_model_breaks_them(
    tied: Path, quiz_folder: Path, tmp_path: Path, expertcut: Commands
) -> None:
    command = ("profile", tied, "--quiz", quiz_folder, "--shots", 1, "--split", "val")
    for out in ("p", "again"):
        expertcut(*command, "--out", out)
    p, again = load_profile(tmp_path / "p"), load_profile(tmp_path / "again")
    for name in ("chosen_NLK", "choice_logprob_NC", "weight_NLK"):
        assert np.array_equal(p.array(name), again.array(name))
    moe, quiz = open_model(tied), load_quiz(Selection(str(quiz_folder), "val", 1))
    chosen: list[Tensor] = []
    with observe_routers(moe.blocks, lambda routing: chosen.append(routing.experts_TK[-1])):
        for encoded in Engine(moe, 2048).encode_all(quiz):
            for ids in encoded.prompts:
                moe.model(input_ids=torch.tensor([ids]))
    own_NLK = torch.stack(chosen).view(len(quiz), 2, 2).numpy()
    assert np.array_equal(np.sort(own_NLK), np.sort(p.array("chosen_NLK")))
    assert np.allclose(p.array("alpha_NLE"), 1 / 8)
    assert finite(expertcut("show", "p", "--format", "json"))["near_ties"]["questions"] == len(quiz)


def spoilt(moe: Any, value: float, layer: int, token: int) -> Any:
    """One logit of one token is not a number, as after an overflow in half precision.

    Of the last block's calls only those that no answer reads: they are of many tokens.
    """
    block = moe.blocks[layer]
    route = own_forward(block.router)

    def spoil(*args: Any, **kwargs: Any) -> Any:
        logits_TE, weights_TK, experts_TK = route(*args, **kwargs)
        if len(logits_TE) <= 7:  # questions of a subject
            return logits_TE, weights_TK, experts_TK
        logits_TE, weights_TK = logits_TE.clone(), weights_TK.clone()
        logits_TE[token, 0] = value
        weights_TK[token] = logits_TE.float().softmax(-1)[token, experts_TK[token]]
        return logits_TE, weights_TK, experts_TK

    return replaced_forward(block.router, spoil)


@pytest.fixture
def quiz(quiz_folder: Path) -> Quiz:
    return load_quiz(Selection(str(quiz_folder), "val", 1))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_router_that_overflows_stops_the_run_and_nothing_is_counted(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path, value: float, layer: int
) -> None:
    measurement = Measurement(open_model(checkpoint("olmoe")), quiz, None, MeasureOptions())
    with spoilt(measurement.moe, value, layer, token=0), pytest.raises(ModelError) as refused:
        list(measurement.run(tmp_path / "p"))
    # Of the last layer's first token no answer can tell: it is the routing that is refused.
    assert ("of layer 1 (model.layers.1.mlp)" in str(refused.value)) == layer
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "p").glob("chunks/*"))


def test_a_model_whose_gate_overflows_in_float16_is_refused_and_runs_in_float32(
    tmp_path: Path, quiz_folder: Path, expertcut: Commands
) -> None:
    path = make_checkpoint(tmp_path / "wild", "olmoe")
    moe = open_model(path)
    for block in moe.blocks:
        block.router.weight *= 60000.0  # of inputs about one: beyond 65,504
    moe.model.save_pretrained(path)
    command = ("profile", path, "--quiz", quiz_folder, "--shots", 0, "--split", "val")
    refused = expertcut(*command, "--dtype", "float16", "--out", "half", status=2)
    assert refused.count("\n") == 1 and "wild" in refused
    assert not list(tmp_path.glob("half/chunks/*"))
    expertcut(*command, "--dtype", "float32", "--out", "single")
    for layer in finite(expertcut("show", "single", "--format", "json"))["layers"]:
        assert sum(layer["rank_probability_mean"]) == pytest.approx(1)


def test_an_expert_whose_logit_is_minus_infinity_is_never_chosen(
    checkpoint: Checkpoints, quiz: Quiz
) -> None:
    moe = open_model(checkpoint("olmoe"))
    seen: list[Routing] = []
    with observe_routers(moe.blocks, seen.append):
        moe.model(input_ids=torch.arange(40)[None])
    (block, *_), (routing, *_) = moe.blocks, seen
    logits_TE = routing.logits_TE.clone()
    logits_TE[:, 3] = -torch.inf
    alpha_TE = block.alpha(logits_TE)
    assert alpha_TE.isfinite().all() and not alpha_TE[:, 3].any()
