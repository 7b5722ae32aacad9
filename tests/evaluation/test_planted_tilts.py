"""A planted saboteur is suppressed, a starved expert fed, and noise is no news.

The whole runs, through the commands, are those of benchmarks/planted.py.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.planting import BUNDLED, LAST, QUIZ, cost, saboteur, strong_noise
from benchmarks.teaching import EXPERT, drawn, home, learn, lesson, margin, write_turned_quiz

from expertcut.data import Selection, load_quiz
from expertcut.edits.reweight_select import Chooser, SelectedExpert, right
from expertcut.edits.router_edits import Procedure, RouterEdit
from expertcut.evaluation.cross_fit import CrossFit, cross_fit, verdict
from expertcut.evaluation.reweight_search import CachedScorer
from expertcut.models.load import MoeModel
from expertcut.scoring.engine import Engine
from expertcut.scoring.router_bias import Tilts, tilted
from tests.conftest import open_model

N_VAL, N_TEST = 20, 15  # questions of each of 11 subjects, without shots


def asked(moe: MoeModel, quiz: Path, split: str = "val", limit: int = N_VAL) -> CachedScorer:
    return CachedScorer(Engine(moe, 1024), load_quiz(Selection(str(quiz), split, 0, limit=limit)))


def accuracy(rescorer: CachedScorer, shifts: tuple[RouterEdit, ...] = ()) -> float:
    return float(right(rescorer.ask(shifts), rescorer.records.answer_N).mean())


def judged(rescorer: CachedScorer, procedure: Procedure, draws: int) -> CrossFit:
    return cross_fit(rescorer.records, procedure, rescorer.ask, draws)


@pytest.fixture(scope="module")
def bundled() -> MoeModel:
    return open_model(BUNDLED)


@pytest.fixture(scope="module")
def healthy(bundled: MoeModel) -> CachedScorer:
    return asked(bundled, QUIZ)


def test_a_saboteur_is_found_and_suppressed(healthy: CachedScorer):
    expert = saboteur(healthy)
    whole = accuracy(asked(healthy.engine.moe, QUIZ, "test", N_TEST))
    moe = open_model(BUNDLED)
    experts = moe.blocks[-1].experts
    for weights in (experts.gate_up_proj.data, experts.down_proj.data):
        weights[expert] = strong_noise(weights[expert], torch.Generator().manual_seed(0))
    procedure = Procedure(chooser=Chooser(suppress_worst=1), is_tuned=True)
    found = judged(asked(moe, QUIZ), procedure, draws=1)
    assert found.settled.shifts[0][:2] == (LAST, expert)
    assert found.cross_fitted.ci95[0] > 0
    assert found.random.delta_B.max() < found.cross_fitted.delta / 2
    test = asked(moe, QUIZ, "test", N_TEST)
    harmed, repaired = accuracy(test), accuracy(test, found.settled.shifts)
    assert harmed < whole - 0.1
    assert repaired - harmed > 0.8 * (whole - harmed)


@pytest.mark.slow  # the saboteur, suppressed by the same search, is always tried
def test_a_starved_expert_is_fed(tmp_path: Path):
    quiz, moe = write_turned_quiz(tmp_path), open_model(BUNDLED)
    pupil = learn(moe, lesson(moe, drawn(120, seed=0)), epochs=100, seed=0)
    for place, weights in zip(home(moe).parts, pupil.parts, strict=True):
        place.copy_(weights)
    taught = asked(moe, quiz)
    assert cost(taught, EXPERT) > 0.1
    whole = accuracy(asked(moe, quiz, "test", N_TEST))
    down_E = torch.zeros(moe.blocks[-1].n_experts)
    down_E[EXPERT] = -margin(taught.records.alpha_NLE[:, LAST], share=0.03)
    with tilted(moe.blocks, Tilts({LAST: down_E})):
        starved = asked(moe, quiz)
        appears = (starved.records.chosen_NLK[:, LAST] == EXPERT).any(axis=1).mean()
        procedure = Procedure(named=((SelectedExpert(LAST, EXPERT, +1), None),), is_tuned=True)
        found = judged(starved, procedure, draws=1)
        test = asked(moe, quiz, "test", N_TEST)
        harmed, fed = accuracy(test), accuracy(test, found.settled.shifts)
    assert 0.01 <= appears <= 0.05
    assert found.cross_fitted.ci95[0] > 0
    assert harmed < whole - 0.1
    assert fed - harmed > 0.8 * (whole - harmed)


@pytest.mark.parametrize(
    ("draws", "least"), [(5, 5), pytest.param(15, 14, marks=pytest.mark.slow)], ids=["few", "more"]
)
def test_shuffled_answers_of_a_healthy_model_are_no_evidence(
    healthy: CachedScorer, draws: int, least: int
):
    chooser = Chooser(suppress_worst=1, layers=(LAST,))
    procedure, verdicts = Procedure(chooser=chooser, is_tuned=True), Counter[str]()
    for seed in range(draws):
        answer_N = np.random.default_rng(seed).permutation(healthy.records.answer_N)
        records = replace(healthy.records, answer_N=answer_N)
        # One draw could never let it say "helps": as if no random expert ever did as well.
        found = cross_fit(records, procedure, healthy.ask, draws=1, seed=seed).cross_fitted
        verdicts[verdict(found, p_random=0)] += 1
    assert verdicts["no evidence"] >= least, verdicts
