"""Two models' answers compared: log p shifts, rank correlation, right answers."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from expertcut.stats import (
    Comparison,
    compare,
    gained_lost,
    logprob_shift,
    right_logprobs,
    spearman,
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
