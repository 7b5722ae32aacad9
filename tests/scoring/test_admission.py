"""The admission gap: with it on its logits, an expert scores as the last one that is let in."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, logit, softmax

from expertcut.data import Selection, load_quiz
from expertcut.edits.reweight_select import (
    QuestionOutcomes,
    SelectedExpert,
    admission_gap,
    no_default_strength,
    stored_selection,
)
from expertcut.edits.router_edits import gap, tilts
from expertcut.errors import ContractError, PlanError
from expertcut.evaluation.reweight_search import CachedScorer
from expertcut.profiling.measure import Measurement, MeasureOptions, model_info
from expertcut.profiling.recorder import Recorder
from expertcut.profiling.storage import load_profile
from expertcut.scoring.engine import Engine
from expertcut.scoring.router_bias import Tilts, tilted
from tests.conftest import FAMILIES, open_model
from tests.support.families import MORE
from tests.support.hand_made import block

Array = np.ndarray[Any, Any]
SIGMOID = block(0, 8, 2, scoring="sigmoid")
ALPHA: dict[str, Callable[[Array], Array]] = {
    "softmax": lambda logits: softmax(logits, axis=-1),
    "sigmoid": expit,
    "sqrtsoftplus": lambda logits: np.sqrt(np.log1p(np.exp(logits))),
}


def chosen(score_NE: Array, top_k: int) -> Array:
    return np.argsort(-score_NE, axis=1, kind="stable")[:, :top_k]


def searched(logits_NE: Array, scoring: str, expert: int, goal: float) -> float:
    """The bias by halving, each time with α worked out from all logits."""
    low, high = -60.0, 60.0
    for _ in range(80):
        middle = (low + high) / 2
        moved_NE = logits_NE.copy()
        moved_NE[:, expert] += middle
        is_short = ALPHA[scoring](moved_NE)[:, expert].mean() < goal
        low, high = (middle, high) if is_short else (low, middle)
    return low


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize(
    ("scoring", "n_experts", "top_k"),
    [("softmax", 4, 1), ("softmax", 64, 8), ("sigmoid", 8, 2), ("sqrtsoftplus", 8, 2)],
)
def test_with_the_gap_on_its_logits_an_expert_scores_as_the_last_one_let_in(
    scoring: str, n_experts: int, top_k: int, spread: float, has_bias: bool
) -> None:
    rng, its = np.random.default_rng(0), block(0, n_experts, top_k, scoring=scoring)
    logits_NE = rng.normal(0, spread, (200, n_experts)) + rng.normal(0, 1, n_experts)
    selection_E = rng.normal(0, 0.05 if has_bias else 0.0, n_experts)
    alpha_NE = ALPHA[scoring](logits_NE)
    score_NE = alpha_NE + selection_E
    chosen_NK = chosen(score_NE, top_k)
    last = np.sort(score_NE, axis=1)[:, -top_k].mean()
    signs, n_closed = set(), 0
    for expert in range(min(n_experts, 6)):
        found = admission_gap(its, alpha_NE, chosen_NK, expert, selection_E if has_bias else None)
        # Empty places (−1) of a routing rule, and questions without experts, do not count.
        beside_NK = np.pad(chosen_NK, ((0, 1), (0, 1)), constant_values=-1)
        own = (np.pad(alpha_NE, ((0, 1), (0, 0))), beside_NK, expert)
        assert found == admission_gap(its, *own, selection_E if has_bias else None)
        goal = last - selection_E[expert]
        if not math.isfinite(found):
            assert not 0 < goal < 1
            continue
        logits = logits_NE.copy()
        logits[:, expert] += found
        assert ALPHA[scoring](logits)[:, expert].mean() == pytest.approx(goal, rel=1e-9)
        assert found == pytest.approx(searched(logits_NE, scoring, expert, goal), abs=1e-6)
        signs.add(np.sign(found))
        n_closed += 1
    assert n_closed >= 3 and 1 in signs


@pytest.mark.parametrize("scoring", ALPHA)
def test_where_logits_choose_the_gap_is_a_mean_distance_of_logits(scoring: str) -> None:
    rng, its = np.random.default_rng(0), block(0, 8, 2, scoring=scoring, selection="logits")
    logits_NE, selection_E = rng.normal(0, 2, (100, 8)), rng.normal(0, 0.5, 8)
    score_NE = logits_NE + selection_E
    last_N = np.sort(score_NE, axis=1)[:, -2]
    for expert in range(8):
        found = admission_gap(
            its, ALPHA[scoring](logits_NE), chosen(score_NE, 2), expert, selection_E
        )
        assert found == pytest.approx((last_N - score_NE[:, expert]).mean(), abs=1e-9)


def test_a_logarithm_of_means_would_be_far_too_weak() -> None:
    rng = np.random.default_rng(3)
    logits_NE = rng.normal(0, 1.5, (500, 8)) + np.array([2, 1, 1, 0, 0, 0, 0, -1.5])
    alpha_NE = expit(logits_NE)
    found = admission_gap(SIGMOID, alpha_NE, chosen(alpha_NE, 2), 7)
    last = np.sort(alpha_NE, axis=1)[:, -2].mean()
    weak = math.log(last / alpha_NE[:, 7].mean())
    assert last > 0.8 and found > 2.5 * weak
    assert expit(logits_NE[:, 7] + weak).mean() < 0.6 < last - 0.2
    assert expit(logits_NE[:, 7] + found).mean() == pytest.approx(last)


def test_an_expert_that_no_bias_lifts_has_an_infinite_gap() -> None:
    alpha_NE, first_NK = np.array([[0.7, 0.3, 0.0], [0.6, 0.4, 0.0]]), np.array([[0], [0]])
    assert admission_gap(block(0, 3, 1), alpha_NE, first_NK, 2) == math.inf
    assert admission_gap(block(0, 3, 1), alpha_NE, first_NK, 0) == 0
    low_E, high_E = np.array([0.0, 0.0, -2.0]), np.array([0.0, 0.0, 2.0])
    assert admission_gap(SIGMOID, alpha_NE + 0.1, first_NK, 2, low_E) == math.inf
    assert admission_gap(SIGMOID, alpha_NE + 0.1, np.array([[2], [0]]), 2, high_E) == -math.inf
    hashed = block(0, 3, 1, scoring="sqrtsoftplus", selection="table")
    assert math.isnan(admission_gap(hashed, alpha_NE, first_NK, 0))
    assert "a table of token ids chooses" in no_default_strength(1, 3, +1, math.nan)
    assert "no bias on its logit lifts expert 3 of layer 1" in no_default_strength(
        1, 3, +1, math.inf
    )
    assert "is admitted on average already" in no_default_strength(1, 3, +1, -math.inf)
    assert "no bias on its logit lowers expert 3" in no_default_strength(1, 3, -1, -math.inf)


def check_in_the_running_model(path: Path, quiz_folder: Path, folder: Path) -> bool:
    """Bias an expert of the last layer by its gap; whether the layer has a selection bias."""
    moe = open_model(path)
    quiz = load_quiz(Selection(str(quiz_folder), split="val", shots=1))
    list(Measurement(moe, quiz, None, MeasureOptions("answer")).run(folder))
    profile = load_profile(folder)
    records, gate = QuestionOutcomes.of(profile, quiz), moe.blocks[-1]
    layer, selection_E, stored_E = (
        gate.layer,
        gate.selection_bias(),
        records.selection_of(gate.layer),
    )
    assert (stored_E is None) == (selection_E is None)
    bias_E = np.zeros(gate.n_experts) if selection_E is None else selection_E.double().numpy()
    assert stored_E is None or np.allclose(stored_E, bias_E)
    ranked: Callable[[Array], Array] = logit if gate.selection == "logits" else np.asarray
    score_NE = ranked(records.alpha_NLE[:, layer, : gate.n_experts].astype(float)) + bias_E
    chosen_NK = records.chosen_NLK[:, layer].astype(int)
    last = float(np.take_along_axis(score_NE, chosen_NK, axis=1).min(axis=1).mean())
    gaps = [gap(records, SelectedExpert(layer, e, +1)) for e in range(gate.n_experts)]
    expert = int(np.argmax([g if math.isfinite(g) else -math.inf for g in gaps]))
    assert gaps[expert] > 0.1
    (tilt,) = tilts(profile, [f"{layer}:{expert}"], [])
    assert tilt.bias == gaps[expert]
    rescorer = CachedScorer(Engine(moe, 2048), quiz)
    assert gap(rescorer.records, SelectedExpert(layer, expert, +1)) == pytest.approx(
        gaps[expert], abs=1e-3
    )
    shifted_E = torch.zeros(gate.n_experts)
    shifted_E[expert] = gaps[expert]
    alphas = []
    with tilted(moe.blocks, Tilts({layer: shifted_E})):
        for chunk in rescorer.chunks:
            recorder = Recorder(moe.blocks, len(chunk), "answer")
            with recorder.listening():
                rescorer.engine.score(chunk, recorder.begin)
            alphas.append(recorder.arrays()["alpha_NLE"][:, layer, expert])
    lifted = ranked(np.concatenate(alphas).astype(float)).mean() + bias_E[expert]
    assert lifted == pytest.approx(last, abs=1e-4)
    return selection_E is not None


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "ernie4_5_moe", "laguna"])
def test_a_running_model_with_the_gap_on_its_logits_scores_the_expert_so(
    checkpoint: Callable[..., Path], quiz_folder: Path, tmp_path: Path, family: str
) -> None:
    has_bias = check_in_the_running_model(checkpoint(family), quiz_folder, tmp_path / "p")
    assert has_bias == (family != "olmoe")


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*FAMILIES, *MORE}))
def test_a_running_model_of_any_family_scores_the_expert_so(
    checkpoint: Callable[..., Path], quiz_folder: Path, tmp_path: Path, family: str
) -> None:
    path = checkpoint(family)
    try:
        open_model(path)
    except ContractError as error:
        pytest.skip(str(error))
    check_in_the_running_model(path, quiz_folder, tmp_path / "p")


def test_a_checkpoint_that_lacks_the_bias_asks_for_a_strength(
    checkpoint: Callable[..., Path],
) -> None:
    moe = open_model(checkpoint("olmoe"))
    info = model_info(moe)
    biased = info.blocks[0].model_copy(update={"selection_bias": True})
    with pytest.raises(PlanError, match=r"holds 0 tensors that may be the bias .* give one, as in"):
        stored_selection(info.model_copy(update={"blocks": (biased, *info.blocks[1:])}), 0)
    unknown = biased.model_copy(update={"selection_bias": None, "scoring": "sigmoid"})
    model = info.model_copy(update={"blocks": (unknown, *info.blocks[1:])})
    assert stored_selection(model, 0) is None
