"""Two models' answers compared: log p shifts, rank correlation, right answers."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from expertcut.stats import (
    Comparison,
    compare,
    gained_lost,
    logprob_shift,
    questions_to_hold,
    right_logprobs,
    spearman,
    verdict,
)


def test_the_shift_is_over_choices_that_both_models_have():
    a_NC = np.array([[-1.0, -2.0, -np.inf], [-3.0, -4.0, -5.0]])
    b_NC = np.array([[-1.5, -2.0, -np.inf], [-3.0, -6.0, -5.25]])
    assert logprob_shift(a_NC, b_NC) == (2.0, 0.25)
    assert logprob_shift(a_NC, a_NC) == (0.0, 0.0)


def test_the_median_of_two_is_rounded_to_the_type_that_is_named():
    a_NC, b_NC = np.float32([[0.0, 0.0]]), np.float32([[-1.0, -1.0000001]])
    exact = float(np.abs(b_NC.astype(np.float64)).mean())
    assert logprob_shift(a_NC, b_NC, np.float64)[1] == exact
    assert logprob_shift(a_NC, b_NC)[1] == float(np.float32(exact)) != exact


def test_spearman_is_scipys_within_rounding_and_undefined_for_constants():
    rng = np.random.default_rng(0)
    for n in (2, 7, 64):
        a_E, b_E = rng.integers(0, n, n) + np.eye(1, n)[0], rng.standard_normal(n)
        if len(set(a_E)) > 1:
            assert spearman(a_E, b_E) == pytest.approx(spearmanr(a_E, b_E).statistic)
    assert np.isnan(spearman(np.ones(4), np.arange(4)))


def test_gained_and_lost_answers_are_told_apart():
    base_N, other_N = np.array([1, 1, 0, 0, 0], bool), np.array([1, 0, 1, 1, 0], bool)
    assert gained_lost(base_N, other_N) == (2, 1)
    found = compare(base_N, other_N)
    assert (found.gained, found.lost, found.delta) == (2, 1, 0.2)
    assert list(Comparison.model_fields) == list(found.model_dump())


def test_right_log_probabilities_are_those_of_the_answers():
    logprob_NC = np.array([[-1.0, -2.0], [-3.0, -4.0]])
    assert right_logprobs(logprob_NC, np.array([1, 0])).tolist() == [-2.0, -3.0]


def evaluations(
    n: int, discordance: float, loss: float, times: int = 1000, seed: int = 0
) -> list[list[int]]:
    """Gained and lost answers of simulated evaluations over n questions."""
    shares = [(discordance - loss) / 2, (discordance + loss) / 2, 1 - discordance]
    return np.random.default_rng(seed).multinomial(n, shares, times)[:, :2].tolist()


@pytest.mark.parametrize(("n", "discordance"), [(300, 0.05), (1000, 0.1), (2000, 0.3)])
@pytest.mark.parametrize("margin", [0.01, 0.02])
def test_a_true_loss_of_the_margin_seldom_holds(n: int, discordance: float, margin: float):
    verdicts = [verdict(*counts, n, margin) for counts in evaluations(n, discordance, margin)]
    assert verdicts.count("holds") + verdicts.count("better") <= 25
    assert verdicts.count("undecided") + verdicts.count("worse") >= 975


@pytest.mark.parametrize(("n", "discordance"), [(40, 0.15), (300, 0.01), (1500, 0.05)])
def test_the_questions_that_would_decide_do(n: int, discordance: float):
    verdicts = []
    for seed, (gained, lost) in enumerate(evaluations(n, discordance, 0, 300)):
        needed = questions_to_hold(gained, lost, n, 0.01)
        [again] = evaluations(needed, discordance, 0, 1, seed)
        verdicts.append(verdict(*again, needed, 0.01))
    assert verdicts.count("holds") + verdicts.count("better") >= 0.8 * len(verdicts)


def test_a_verdict_is_that_of_the_interval():
    assert verdict(0, 0, 1000, 0.01) == "holds"
    assert verdict(0, 0, 40, 0.01) == "undecided"  # same answers of few questions prove little
    assert verdict(60, 20, 1000, 0.01) == "better"
    assert verdict(20, 60, 1000, 0.01) == "worse"
    assert verdict(2, 20, 10_000, 0.01) == "holds"  # a loss, but within the margin
    assert verdict(1, 5, 40, 0.01) == "undecided"  # −10 points of 40 questions
