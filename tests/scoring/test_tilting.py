"""Biases and factors in routers while a model runs, on every family of the tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertcut.data import Selection, load_quiz
from expertcut.models.hooks import Routing, observe_routers
from expertcut.models.load import MoeModel
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import encode
from expertcut.scoring.router_bias import Tilts, tilted
from tests.conftest import FAMILIES, open_model
from tests.support.exact_models import EXACT_FAMILIES
from tests.support.loaded_stock import scale_outputs

Checkpoints = Callable[..., Path]
TOKENS = torch.arange(2, 42)[None]
LAYER, EXPERT = 1, 3


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@torch.inference_mode()
def logits(moe: MoeModel) -> Tensor:
    result: Tensor = moe.model(input_ids=TOKENS, use_cache=False).logits
    return result


def vector(value: float, other: float = 0.0) -> dict[int, Tensor]:
    values_E = torch.full((8,), other, dtype=torch.float64)
    values_E[EXPERT] = value
    return {LAYER: values_E}


def test_a_factor_on_the_gate_weight_is_a_factor_on_the_experts_output(
    checkpoint: Checkpoints, family: str
) -> None:
    moe = open_model(checkpoint(family), dtype="float64")
    before = logits(moe)
    chosen: list[Tensor] = []
    factors = {LAYER: torch.linspace(0.3, 1.7, 8)}
    with (
        tilted(moe.blocks, Tilts(scale_by_layer=factors)),
        observe_routers(moe.blocks[LAYER:], lambda routing: chosen.append(routing.experts_TK)),
    ):
        scaled = logits(moe)
    with observe_routers(moe.blocks[LAYER:], lambda r: chosen.append(r.experts_TK)):
        assert torch.equal(logits(moe), before)  # what was put in is taken out
    assert torch.equal(*chosen)  # routing is unchanged
    assert (scaled - before).abs().max() > 1e-3
    scale_outputs(moe.blocks[LAYER], dict(enumerate(factors[LAYER].tolist())))
    # Some gates give float32 weights in any model.
    assert (scaled - logits(moe)).abs().max() < 1e-6 * before.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_factor_of_one_changes_no_bit(checkpoint: Checkpoints, family: str, dtype: str) -> None:
    moe = open_model(checkpoint(family), dtype=dtype)
    before = logits(moe)
    with tilted(moe.blocks, Tilts(scale_by_layer=vector(1.0, other=1.0))):
        assert torch.equal(logits(moe), before)


def by_hand(block: Any, bias_E: Tensor, rows: slice) -> Callable[[Tensor], Any]:
    """A router written out, the bias added to some rows of its logits."""

    def route(x_TD: Tensor) -> Any:
        x_TD = x_TD.reshape(-1, x_TD.shape[-1])
        logits_TE = x_TD @ block.router.weight.T
        logits_TE[rows] += bias_E
        weights_TK, experts_TK = logits_TE.softmax(-1).topk(block.top_k)
        if block.router.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return logits_TE, weights_TK, experts_TK

    return route


@pytest.mark.parametrize("family", EXACT_FAMILIES)
@pytest.mark.parametrize(("apply_at", "rows"), [("answer", slice(-1, None)), ("all", slice(None))])
def test_a_bias_acts_where_it_should_in_packs_too(
    checkpoint: Checkpoints, quiz_folder: Path, family: str, apply_at: Any, rows: slice
) -> None:
    moe = open_model(checkpoint(family), dtype="float64")
    quiz = load_quiz(Selection(str(quiz_folder), split="test", shots=1))
    subject, questions = next(iter(quiz.questions.items()))
    encoded = encode(moe.tokenizer, questions, quiz.shots_by_subject[subject])
    engine = Engine(moe, 1000)
    assert engine.mode(encoded) == "packed"
    before = engine.score(encoded)
    with tilted(moe.blocks, Tilts(vector(2.0), {}, apply_at)) as begin:
        found = engine.score(encoded, begin)
    moe.blocks[LAYER].router.forward = by_hand(moe.blocks[LAYER], vector(2.0)[LAYER], rows)
    engine.is_trusted = False  # one prompt at a time, whose last row is the answer position
    expected = engine.score(encoded)
    assert (expected - before).abs().max() > 1e-3
    assert (found - expected).abs().max() < 1e-6


def test_at_answer_positions_nothing_else_is_tilted_but_the_forbidden_stay_forbidden(
    checkpoint: Checkpoints, quiz_folder: Path, family: str
) -> None:
    moe = open_model(checkpoint(family))
    quiz = load_quiz(Selection(str(quiz_folder), split="test", shots=1))
    subject, questions = next(iter(quiz.questions.items()))
    encoded = encode(moe.tokenizer, questions, quiz.shots_by_subject[subject])
    first = Engine(moe, 1000)
    seen: list[Routing] = []
    bias_E = vector(20.0)[LAYER]
    bias_E[0] = -torch.inf
    n_answers: list[int] = []
    with (
        tilted(moe.blocks, Tilts({LAYER: bias_E}, {}, "answer")) as begin,
        observe_routers(moe.blocks[LAYER:], seen.append),
    ):
        first.score(encoded, lambda step: (n_answers.append(len(step.answers_N)), begin(step)))  # type: ignore[func-returns-value]
    assert sum(n_answers) == len(questions)
    for routing, n in zip(seen, n_answers, strict=True):
        assert not (routing.experts_TK == 0).any()
        tops_T = (routing.logits_TE.argmax(dim=1) == EXPERT).sum()
        assert n <= tops_T < len(routing.experts_TK)


def test_an_untold_pass_is_a_fault(checkpoint: Checkpoints) -> None:
    moe = open_model(checkpoint("olmoe"))
    with tilted(moe.blocks, Tilts(vector(1.0), {}, "answer")), pytest.raises(AssertionError):
        logits(moe)
