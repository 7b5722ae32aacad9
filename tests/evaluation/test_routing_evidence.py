"""Oracle and `--tune --cross-fit`: what chance gives is called chance, and what is there is found.

Answers are drawn here, so no model runs.
"""

import numpy as np

from expertcut.evaluation.holding import Tuning, cross_fit_holding, holding_result
from expertcut.evaluation.oracle import oracle_gain, reader_gain
from expertcut.stats import Array

N_QUESTIONS, N_SETTINGS, N_SETS = 400, 4, 20


def flipped(rng: np.random.Generator, base_N: Array, unstable_N: Array, shape: tuple) -> Array:
    """Answers of variants that flip an unstable question now and then."""
    is_flipped = rng.random((*shape, len(base_N))) < unstable_N
    is_right = rng.random(is_flipped.shape) < 1 / 3  # of a wrong answer's alternatives
    return np.where(is_flipped, ~base_N & is_right, base_N)


def a_quiz(seed: int) -> tuple[np.random.Generator, Array, Array]:
    rng = np.random.default_rng(seed)
    base_N = rng.random(N_QUESTIONS) < 0.75
    unstable_N = np.where(rng.random(N_QUESTIONS) < 0.2, 0.5, 0.01)
    return rng, base_N, unstable_N


def test_settings_that_are_noise_variants_gain_no_more_than_chance() -> None:
    found = []
    for seed in range(200):
        rng, base_N, unstable_N = a_quiz(seed)
        right_SN = flipped(rng, base_N, unstable_N, (N_SETTINGS,))
        noise_BSN = flipped(rng, base_N, unstable_N, (N_SETS, N_SETTINGS))
        found.append(oracle_gain(base_N, right_SN, noise_BSN))
    assert all(one.gain > 0 for one in found), "an oracle always gains"
    assert np.mean([one.verdict == "chance" for one in found]) >= 0.95


def test_settings_that_each_know_a_subject_gain_more_than_chance() -> None:
    for seed in range(10):
        rng, base_N, unstable_N = a_quiz(seed)
        subject_N = rng.integers(0, N_SETTINGS, N_QUESTIONS)
        right_SN = flipped(rng, base_N, unstable_N, (N_SETTINGS,))
        noise_BSN = flipped(rng, base_N, unstable_N, (N_SETS, N_SETTINGS))
        for setting in range(N_SETTINGS):
            right_SN[setting, subject_N == setting] = True
        assert oracle_gain(base_N, right_SN, noise_BSN).verdict == "more than chance"


def test_a_reader_gains_only_where_its_figures_tell_the_setting() -> None:
    rng, base_N, unstable_N = a_quiz(0)
    subject_N, fold_N = rng.integers(0, 2, N_QUESTIONS), np.arange(N_QUESTIONS) % 5
    right_SN = flipped(rng, base_N, unstable_N, (2,))
    for setting in range(2):
        right_SN[setting] &= subject_N == setting  # nothing of the others
        right_SN[setting] |= subject_N == setting
    telling_NF = np.column_stack([subject_N + rng.normal(0, 0.1, N_QUESTIONS)])
    told = reader_gain(base_N, right_SN, telling_NF, fold_N)
    assert told.delta > 0.2 and told.ci95[0] > 0
    untold = reader_gain(base_N, right_SN, rng.normal(size=(N_QUESTIONS, 1)), fold_N)
    assert untold.delta < 0.05


MEANS = (3.5, 3.0, 2.5, 2.0, 1.5, 1.0)


def losing(base_N: Array, loss_of: dict[float, float], seed: int = 0) -> dict[float, Array]:
    """Answers by mean, each without that share of the right ones."""
    rng, keys_N = np.random.default_rng(seed), None
    keys_N = rng.random(len(base_N))
    return {mean: base_N & (keys_N >= loss) for mean, loss in loss_of.items()}


def judged(loss_of: dict[float, float], n: int = 3000, margin: float = 0.02, seed: int = 0):
    rng = np.random.default_rng(seed)
    base_N = rng.random(n) < 0.8
    right = losing(base_N, loss_of, seed)
    hashes = [str(i) for i in range(n)]
    tuning = Tuning.of(base_N, ["all"] * n, hashes, margin, seed)

    def random_right(mean: float, draw: int) -> Array:
        return base_N & (np.random.default_rng(draw).random(n) >= 2 * loss_of[mean] + 0.05)

    return tuning, cross_fit_holding(tuning, MEANS, right.__getitem__, random_right, 20)


def test_the_fewest_experts_that_hold_are_found_and_hold() -> None:
    tuning, found = judged({3.5: 0, 3.0: 0.001, 2.5: 0.002, 2.0: 0.1, 1.5: 0.3, 1.0: 0.5})
    assert found.experts == 2.5 and found.verdict == "holds"
    assert {fold.experts for fold in found.folds} == {2.5}
    result = holding_result(
        found, float(tuning.base_N.mean()), "skip", quiz="q", split="val", seed=0
    )
    assert result.random is not None and result.random.p < 0.05, "random experts lose more"
    assert result.sentence.startswith("This procedure holds within 2 points")


def test_what_costs_is_never_said_to_hold() -> None:
    n_chosen = 0
    for seed in range(40):
        _, found = judged(dict.fromkeys(MEANS, 0.02), n=600, margin=0.01, seed=seed)
        n_chosen += found.experts is not None
        assert found.experts is None or found.verdict != "holds"
    assert n_chosen <= 2


def test_the_search_ends_at_the_first_number_that_does_not_hold() -> None:
    """A later one that holds by chance is not taken."""
    _, found = judged({3.5: 0, 3.0: 0.2, 2.5: 0, 2.0: 0, 1.5: 0, 1.0: 0})
    assert found.experts == 3.5


def test_where_nothing_holds_nothing_changes() -> None:
    _, found = judged(dict.fromkeys(MEANS, 0.3))
    assert found.experts is None and found.cross_fitted.gained == found.cross_fitted.lost == 0
    assert found.verdict == "no evidence", "nothing was chosen, so nothing is shown"
    assert not len(found.random.delta_B)
