"""The mean output of a removed expert, against a sum over the tokens of prompts run one by one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expertcut.data import Quiz, Selection, load_quiz, round_robin
from expertcut.edits.calibrate import mean_outputs
from expertcut.models.hooks import ExpertCall, observe_experts
from expertcut.models.load import MoeModel
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import encode
from expertcut.scoring.router_bias import Tilts, tilted
from tests.conftest import open_model
from tests.support.exact_models import logprobs

Outputs = dict[tuple[str, int], list[Tensor]]


def outputs_one_by_one(moe: MoeModel, quiz: Quiz, n_skipped: Callable[[str, int], int]) -> Outputs:
    """Every expert's outputs on each token of each prompt, but for the first ones of a prompt."""
    found: Outputs = {}
    skipped = 0

    def see(call: ExpertCall) -> None:
        own = found.setdefault((moe.blocks[call.layer].name, call.expert), [])
        own.extend(call.output_MD[call.tokens_M >= skipped].double())

    for subject, questions in quiz.questions.items():
        encoded = encode(moe.tokenizer, questions, quiz.shots_by_subject[subject])
        for position, ids in enumerate(encoded.prompts):
            skipped = n_skipped(subject, position) and encoded.shared_prefix()
            with observe_experts(moe.blocks, see):
                logprobs(moe.model, torch.tensor([ids]))
    return found


@pytest.mark.parametrize(("family", "is_shared"), [("olmoe", True), ("jamba", False)])
def test_means_are_over_the_tokens_that_chose_the_expert(
    checkpoint: Callable[..., Path], quiz_folder: Path, family: str, is_shared: bool
) -> None:
    moe = open_model(checkpoint(family, num_experts=16))
    quiz = load_quiz(Selection(str(quiz_folder), split="val", shots=1, limit=3))
    # Where prompts are packed the shared prefix is run once; pads are never counted.
    found = outputs_one_by_one(moe, quiz, lambda _, position: is_shared and position > 0)
    removed = {block.name: tuple(range(0, 16, 2)) for block in moe.blocks}
    means = mean_outputs(Engine(moe, batch_tokens=400), quiz, removed)
    assert {block: set(own) for block, own in means.items()} == {
        block: set(experts) for block, experts in removed.items()
    }
    for block, own in means.items():
        for expert, mean_D in own.items():
            outputs = found.get((block, expert), [torch.zeros(32)])
            expected_D = torch.stack(outputs).mean(dim=0).to(mean_D)
            torch.testing.assert_close(mean_D, expected_D, atol=1e-5, rtol=1e-5)
    assert any(mean_D.abs().max() > 0.01 for own in means.values() for mean_D in own.values())


def test_an_expert_that_no_token_chose_gives_zeros(
    checkpoint: Callable[..., Path], quiz_folder: Path
) -> None:
    moe = open_model(checkpoint("olmoe"))
    quiz = load_quiz(Selection(str(quiz_folder), split="val", shots=0, limit=1))
    block = moe.blocks[1]
    removed = {block.name: (3, 6)}
    before = mean_outputs(Engine(moe, 400), quiz, removed)[block.name]
    assert all(mean_D.abs().max() > 0 for mean_D in before.values())
    bias_E = torch.zeros(8)
    bias_E[3] = -torch.inf
    with tilted(moe.blocks, Tilts({1: bias_E})):
        means = mean_outputs(Engine(moe, 400), quiz, removed)[block.name]
    assert set(means) == {3, 6}
    assert torch.equal(means[3], torch.zeros(32))
    assert means[6].abs().max() > 0


def test_a_few_questions_of_every_subject_are_enough(
    checkpoint: Callable[..., Path], quiz_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(open_model(checkpoint("olmoe")), 2048)
    quiz = load_quiz(Selection(str(quiz_folder), split="test", shots=1))
    removed = {"model.layers.0.mlp": range(8)}
    of_few = mean_outputs(engine, round_robin(quiz, 4), removed)
    of_all = mean_outputs(engine, quiz, removed)
    monkeypatch.setattr("expertcut.edits.calibrate.CALIBRATION_QUESTIONS", 4)
    for expert, mean_D in mean_outputs(engine, quiz, removed)["model.layers.0.mlp"].items():
        assert torch.equal(mean_D, of_few["model.layers.0.mlp"][expert])
        assert not torch.equal(mean_D, of_all["model.layers.0.mlp"][expert])
