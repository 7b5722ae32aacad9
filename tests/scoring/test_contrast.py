"""Contrast of two runs: its definition in plain transformers, and a fault that it undoes."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks.planting import BUNDLED, QUIZ
from torch import Tensor

from expertcut.data import Selection, load_quiz
from expertcut.data.questions import prompt
from expertcut.models.hooks import Routed, own_forward, replaced_forward
from expertcut.models.load import MoeModel
from expertcut.models.routing_rule import RoutingRule
from expertcut.scoring.contrast import contrasted
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.rerouting import Rerouting, rerouted_engine
from expertcut.stats import Comparison, compare
from tests.conftest import open_model
from tests.support.plain import Plain

LETTERS = "ABCD"


def against(moe: MoeModel, rank: int, beta: float) -> Rerouting:
    layers = [block.layer for block in moe.blocks]
    return Rerouting(RoutingRule(rule="contrast"), dict.fromkeys(layers, float(rank)), {}, beta)


def scored(engine: Engine, quiz: Any, rank: int, beta: float) -> Tensor:
    with rerouted_engine(engine, against(engine.moe, rank, beta)) as begin:
        return ask(engine, quiz, begin)


@contextmanager
def weakly_routed(plain: Plain, rank: int) -> Iterator[None]:
    """Every router gives one expert, with the sum of its weights."""

    def alone(_module: Any, _args: Any, output: Any) -> Any:
        logits_TE, weights_TK, _ = output
        expert_T1 = logits_TE.sort(dim=1, descending=True).indices[:, rank : rank + 1]
        return logits_TE, weights_TK.sum(dim=1, keepdim=True), expert_T1

    hooks = [block.gate.register_forward_hook(alone) for block in plain.blocks.values()]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def last_logits(plain: Plain, text: str) -> Tensor:
    ids = plain.tokenizer(text, return_tensors="pt").input_ids
    logits_V: Tensor = plain.model(input_ids=ids, use_cache=False).logits[0, -1].double()
    return logits_V


def scmoe(strong_V: Tensor, weak_V: Tensor, beta: float) -> Tensor:
    """The authors' definition, of logits: −∞ below a tenth of the largest probability."""
    score_V = (1 + beta) * strong_V - beta * weak_V
    return score_V.masked_fill(strong_V < strong_V.max() + math.log(0.1), -torch.inf)


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
@pytest.mark.parametrize("rank", [1, 2])  # of K = 2: a routed expert, and one that is not
def test_it_is_the_contrast_of_two_whole_runs_of_plain_transformers(
    checkpoint: Callable[..., Path], quiz_folder: Path, family: str, rank: int
) -> None:
    path, beta = checkpoint(family), 0.7
    quiz = load_quiz(Selection(str(quiz_folder), shots=1, limit=2))
    plain, rows = Plain(path, family), []
    last = [plain.tokenizer(f" {letter}").input_ids[-1] for letter in LETTERS]
    for question in quiz:
        text = prompt(question, quiz.shots_by_subject[question.subject])
        strong_V = last_logits(plain, text)
        with weakly_routed(plain, rank):
            weak_V = last_logits(plain, text)
        rows.append((strong_V, weak_V))
    engine, n_kept = Engine(open_model(path), 300), 0
    found_NC = scored(engine, quiz, rank, beta)
    for (strong_V, weak_V), found_C in zip(rows, found_NC.double(), strict=True):
        defined_V = scmoe(strong_V, weak_V, beta)
        own_V = contrasted(strong_V.log_softmax(0)[None], weak_V.log_softmax(0)[None], beta)[0]
        assert (own_V[last] - found_C).abs().max() < 1e-5
        is_kept_V = defined_V.isfinite()
        n_kept += int(is_kept_V.sum())
        # Logits have any zero, so differences between tokens are what the definition says.
        zero_V = (defined_V - own_V)[is_kept_V]
        assert (zero_V - zero_V.mean()).abs().max() < 1e-5
        assert own_V[~is_kept_V].max() < own_V[is_kept_V].min()
        assert float(own_V.exp().sum()) == pytest.approx(1)
    assert n_kept > 2 * len(rows), "several tokens of an answer are compared"
    assert (found_NC - ask(engine, quiz)).abs().max() > 0.1
    assert engine.contrast is None


def test_choices_below_the_cutoff_lie_in_their_order_below_the_others() -> None:
    strong_V = torch.tensor([0.55, 0.3, 0.1, 0.03, 0.02]).log()
    weak_V = torch.tensor([0.02, 0.02, 0.9, 0.01, 0.05]).log()
    found_V = contrasted(strong_V[None], weak_V[None], 2.0)[0]
    assert found_V.argsort(descending=True).tolist() == [0, 1, 2, 3, 4]
    defined_V = scmoe(strong_V, weak_V, 2.0)
    assert defined_V.isfinite().tolist() == [True] * 3 + [False] * 2
    torch.testing.assert_close(found_V[:2] - found_V[2], defined_V[:2] - defined_V[2])
    nearly_V = contrasted(strong_V[None], weak_V[None], 1e-7)[0]
    torch.testing.assert_close(nearly_V, strong_V, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["olmoe", "lfm2_moe"])  # packed, and padded
def test_packs_change_no_answer_and_beta_0_no_bit(
    checkpoint: Callable[..., Path], quiz_folder: Path, family: str
) -> None:
    engine = Engine(open_model(checkpoint(family)), 300)
    quiz = load_quiz(Selection(str(quiz_folder), shots=1, limit=3))
    plain_NC = ask(engine, quiz)
    assert torch.equal(scored(engine, quiz, 2, 0.0), plain_NC)
    together_NC = scored(engine, quiz, 2, 0.5)
    engine.is_trusted = False
    alone_NC = scored(engine, quiz, 2, 0.5)
    assert (together_NC - alone_NC).abs().max() < 1e-4
    assert (together_NC - plain_NC).abs().max() > 0.1


@contextmanager
def pushing_a_letter(moe: MoeModel, expert: int, strength: float) -> Iterator[None]:
    """In the last block this expert ranks first for every token, and pushes answer A."""
    block = moe.blocks[-1]
    router, experts = own_forward(block.router), own_forward(block.experts)
    ids = [moe.tokenizer(f" {letter}").input_ids[-1] for letter in LETTERS]
    rows_CD = moe.model.get_output_embeddings().weight[ids]
    push_D = F.normalize(rows_CD[0] - rows_CD[1:].mean(dim=0), dim=0) * strength

    def route(x_TD: Tensor) -> Routed:
        logits_TE, weights_TK, _ = router(x_TD)
        logits_TE = logits_TE.clone()
        logits_TE[:, expert] = logits_TE.amax(dim=1) + 0.1
        return logits_TE, *logits_TE.softmax(dim=1).topk(weights_TK.shape[1], dim=1)

    def run(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        is_it_TK = experts_TK == expert
        others_TD: Tensor = experts(x_TD, experts_TK, weights_TK.masked_fill(is_it_TK, 0))
        return others_TD + (weights_TK * is_it_TK).sum(dim=1, keepdim=True) * push_D

    with replaced_forward(block.router, route), replaced_forward(block.experts, run):
        yield


@torch.inference_mode()
def test_a_first_expert_that_pushes_a_letter_is_undone_and_a_sound_model_gains_nothing() -> None:
    engine = Engine(open_model(BUNDLED), 1024)
    quiz = load_quiz(Selection(str(QUIZ), "test", 0, limit=12))
    answer_N = torch.tensor([question.answer for question in quiz])

    def gain() -> Comparison:
        both = (ask(engine, quiz), scored(engine, quiz, 0, 0.5))
        return compare(*((logprob_NC.argmax(dim=1) == answer_N).numpy() for logprob_NC in both))

    sound = gain()
    with pushing_a_letter(engine.moe, 0, 20.0):
        faulty = gain()
    assert faulty.ci95[0] > 0.1 and faulty.delta > 0.15
    assert sound.ci95[0] < 0
