"""Choosing models by category: planted differences, none, budgets, recruits, the routing reader."""

import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy.special import softmax

from expertcut.errors import ProfileError
from expertcut.evaluation.dispatch_results import verdict
from expertcut.evaluation.dispatching import (
    Answered,
    CrossFitted,
    Routes,
    SelectionOptions,
    best_set,
    cross_fit_routes,
    fit,
    impute,
    most_right,
    oracle_null,
    predict_labels,
    recruit,
    shrinkage,
)
from expertcut.evaluation.logistic import fit_logistic
from expertcut.stats import Array, compare

SUBJECTS = 8


def answered(right_MN: Array, seed: int = 0, n_choices: int = 4) -> Answered:
    """Models that are right or wrong as said, with log p at random; subjects take turns."""
    rng, (n_models, n) = np.random.default_rng(seed), right_MN.shape
    answer_N = rng.integers(n_choices, size=n)
    shift_MN = np.where(right_MN == 1, 0, rng.integers(1, n_choices, (n_models, n)))
    logit_MNC = rng.normal(size=(n_models, n, n_choices))
    said_MN1 = ((answer_N + shift_MN) % n_choices)[..., None]
    np.put_along_axis(logit_MNC, said_MN1, logit_MNC.max(axis=2, keepdims=True) + 1, axis=2)
    logprob_MNC = logit_MNC - np.logaddexp.reduce(logit_MNC, axis=2, keepdims=True)
    logprob_MNC[np.isnan(right_MN)] = np.nan
    subject_N = np.array([f"s{i % SUBJECTS}" for i in range(n)])
    group_N = np.array([f"{i:016x}" for i in range(n)])
    return Answered(logprob_MNC, answer_N, subject_N, group_N, np.full(n_models, 10))


def by_subject(world: Answered) -> Array:
    return 1.0 * (world.subject_N[:, None] == np.unique(world.subject_N))


def learned(world: Answered, options: SelectionOptions) -> Routes:
    return fit(world.right_MN, by_subject(world), world.size_M, options, world.chance)


def judged(world: Answered, crossed: CrossFitted) -> str:
    change = compare(crossed.single_N, crossed.chosen_N)
    return verdict(change, crossed.chosen_N.sum(), world.right_MN.sum(axis=1).max())


def test_one_model_changes_nothing() -> None:
    world = answered(1.0 * (np.random.default_rng(0).random((1, 200)) < 0.7))
    for options in (
        SelectionOptions(),
        SelectionOptions(most=2),
        SelectionOptions("symbolic"),
        SelectionOptions(max_bytes=10),
    ):
        crossed = cross_fit_routes(world, by_subject(world), options)
        for right_N in (crossed.chosen_N, crossed.single_N, crossed.votes_N):
            assert (right_N == (world.right_MN[0] == 1)).all() and 0 < right_N.mean() < 1


@pytest.mark.parametrize(
    "options",
    [SelectionOptions(), SelectionOptions("symbolic", most=1), SelectionOptions(max_bytes=20)],
)
def test_models_right_on_disjoint_subjects_reach_their_union(options: SelectionOptions) -> None:
    n = 320
    is_first_N = np.arange(n) % SUBJECTS < 3
    world = answered(np.stack([is_first_N, ~is_first_N]) * 1.0)
    crossed = cross_fit_routes(world, by_subject(world), options)
    assert crossed.chosen_N.all() and crossed.single_N.mean() == 5 / 8
    assert judged(world, crossed) == "helps"
    routes = learned(world, options)
    weight_MS = routes.weights(np.eye(SUBJECTS), np.ones((2, SUBJECTS), dtype=bool))
    assert (weight_MS[0] > 0).tolist() == [True] * 3 + [False] * 5
    assert shrinkage(world.right_MN, by_subject(world)) == 0


def test_models_that_differ_by_shuffled_answers_are_no_evidence() -> None:
    words = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        hard_S = rng.uniform(0.3, 0.95, SUBJECTS)  # for both models alike
        n = 240
        first_N = 1.0 * (rng.random(n) < hard_S[np.arange(n) % SUBJECTS])
        other_N = first_N.copy()
        for s in range(SUBJECTS):
            other_N[s::SUBJECTS] = rng.permutation(first_N[s::SUBJECTS])
        world = answered(np.stack([first_N, other_N]), seed)
        crossed = cross_fit_routes(world, by_subject(world), SelectionOptions(), seed)
        words.append(judged(world, crossed))
        assert (first_N != other_N).any()
    assert words.count("no evidence") >= 190
    assert words.count("helps") <= 5


def test_models_of_one_accuracy_in_each_subject_are_no_evidence() -> None:
    words = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        hard_S = rng.uniform(0.3, 0.95, SUBJECTS)
        right_MN = 1.0 * (rng.random((3, 240)) < hard_S[np.arange(240) % SUBJECTS])
        world = answered(right_MN, seed)
        crossed = cross_fit_routes(world, by_subject(world), SelectionOptions(), seed)
        words.append(judged(world, crossed))
    assert words.count("no evidence") >= 190


def some_models(seed: int = 1, n_models: int = 4, n: int = 400) -> Answered:
    rng = np.random.default_rng(seed)
    p_MS = rng.uniform(0.3, 0.9, (n_models, SUBJECTS))
    return answered(1.0 * (rng.random((n_models, n)) < p_MS[:, np.arange(n) % SUBJECTS]), seed)


def test_infinite_kappa_is_the_best_single_model() -> None:
    world = some_models()
    crossed = cross_fit_routes(world, by_subject(world), SelectionOptions(kappa=np.inf))
    assert (crossed.chosen_N == crossed.single_N).all()
    free = cross_fit_routes(world, by_subject(world), SelectionOptions())
    assert (free.chosen_N != free.single_N).any()
    within = cross_fit_routes(
        world, by_subject(world), SelectionOptions(kappa=np.inf, max_bytes=20)
    )
    assert (within.chosen_N == within.single_N).all()


def test_a_budget_of_one_model_is_the_best_single_model() -> None:
    half_N = np.arange(320) // SUBJECTS % 2 == 0
    equal = answered(1.0 * np.stack([half_N, ~half_N, half_N ^ (np.arange(320) % 16 < 8)]))
    for world in (equal, some_models()):
        options = SelectionOptions(max_bytes=19)  # each has ten
        crossed = cross_fit_routes(world, by_subject(world), options)
        assert (crossed.chosen_N == crossed.single_N).all()
        assert learned(world, options).is_held_M.sum() == 1


def test_kappa_is_that_of_the_world_and_ignores_what_is_hard_for_all() -> None:
    rng = np.random.default_rng(0)
    n, n_subjects, kappa = 40_000, 200, 30
    category_NS = np.eye(n_subjects)[np.arange(n) % n_subjects]
    p_MS = rng.beta(0.6 * kappa, 0.4 * kappa, (2, n_subjects))
    right_MN = 1.0 * (rng.random((2, n)) < p_MS[:, np.arange(n) % n_subjects])
    assert 20 < shrinkage(right_MN, category_NS) < 45
    same_MN = 1.0 * (rng.random((2, n)) < p_MS[:1, np.arange(n) % n_subjects])
    assert shrinkage(same_MN, category_NS) > 500


@pytest.mark.parametrize(
    "options", [SelectionOptions(), SelectionOptions(most=3), SelectionOptions("symbolic")]
)
def test_an_unseen_category_takes_the_best_single_model(options: SelectionOptions) -> None:
    world = some_models()
    category_NS = np.column_stack([by_subject(world), np.zeros(400)])  # one without a question
    routes = fit(world.right_MN, category_NS, world.size_M, options, world.chance)
    unseen_NS = np.eye(SUBJECTS + 1)[[-1]]
    weight_M = routes.weights(unseen_NS, np.ones((4, 1), dtype=bool))[:, 0]
    assert weight_M.tolist() == np.eye(4)[routes.single].tolist()
    assert routes.single == world.right_MN.mean(axis=1).argmax()


def test_facility_location_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    n_small = 0
    for _ in range(40):
        n_models, n_subjects = rng.integers(1, 9), rng.integers(1, 7)
        value_MS = rng.random((n_models, n_subjects)) * rng.integers(1, 50, n_subjects)
        size_M = rng.integers(1, 20, n_models) * 10**9
        most = int(rng.integers(size_M.min(), size_M.sum() + 1))
        if rng.random() < 0.5:
            most = int(rng.permutation(size_M)[: rng.integers(1, n_models + 1)].sum())  # exact
        sets = [
            list(c)
            for k in range(1, n_models + 1)
            for c in combinations(range(n_models), k)
            if size_M[list(c)].sum() <= most
        ]
        best = max((value_MS[own].max(axis=0).sum() for own in sets), default=None)
        if best is None:
            continue
        is_held_M = best_set(value_MS, size_M, most)
        assert size_M[is_held_M].sum() <= most
        assert value_MS[is_held_M].max(axis=0).sum() == pytest.approx(best, abs=1e-9)
        n_small += not is_held_M.all()
    assert n_small > 10


def drawn_by_symbolic_moe(
    leads: list[float], strengths: list[float], chance: random.Random, k: int = 3
) -> list[int]:
    """Recruits as the authors' script draws them, with replacement, from its description.

    `benchmarks/dispatch.py recruits` asks the script itself.
    """
    able = [m for m, lead in enumerate(leads) if lead > 0]
    values = {m: leads[m] for m in able} or {m: v - min(leads) + 1 for m, v in enumerate(leads)}
    return chance.choices([*values], [v * strengths[m] for m, v in values.items()], k=k)


@pytest.mark.parametrize(
    ("leads", "totals"),
    [([5, -2, 3], [40, 10, 60]), ([-5, -2, 0], [4, -10, 60]), ([1, 1, 1], [-3, -3, -3])],
)
def test_symbolic_shares_are_those_of_the_authors_draws(
    leads: list[float], totals: list[float]
) -> None:
    shifted = [t - min(totals) + 1 for t in totals] if min(totals) < 0 else totals
    strengths = [t**2 / sum(t**2 for t in shifted) for t in shifted]
    chance, draws = random.Random(0), 100_000
    counts = np.zeros(3)
    for _ in range(draws):
        for m in drawn_by_symbolic_moe(leads, strengths, chance):
            counts[m] += 1
    own_M = recruit(np.array(leads)[:, None], np.array(totals), np.ones((3, 1), dtype=bool))[:, 0]
    assert own_M.sum() == pytest.approx(1)
    sigma_M = np.sqrt(own_M * (1 - own_M) / (3 * draws))
    assert (np.abs(counts / (3 * draws) - own_M) <= 3 * sigma_M + 1e-12).all()


def test_several_vote_by_accuracy_above_chance() -> None:
    world = some_models()
    routes = learned(world, SelectionOptions(most=2))
    weight_MS = routes.weights(np.eye(SUBJECTS), np.ones((4, SUBJECTS), dtype=bool))
    for s in range(SUBJECTS):
        first, second = np.argsort(-routes.accuracy_MS[:, s])[:2]
        above = [max(routes.accuracy_MS[m, s] - 0.25, 0) for m in (first, second)]
        wanted = np.zeros(4)
        wanted[[first, second]] = np.array(above) / sum(above)
        assert weight_MS[:, s] == pytest.approx(wanted)
    sums_NC = np.tensordot(weight_MS[:, 0], world.logprob_MNC, axes=1)
    right_N = world.is_right(np.tile(weight_MS[:, :1], 400))
    assert (right_N == (sums_NC.argmax(axis=1) == world.answer_N)).all()


def test_a_model_that_did_not_answer_has_no_vote() -> None:
    right_MN = some_models().right_MN.copy()
    right_MN[0, :200] = np.nan
    world = answered(right_MN)
    for options in (SelectionOptions(), SelectionOptions(most=2), SelectionOptions("symbolic")):
        weight_MN = learned(world, options).weights(by_subject(world), world.is_answered_MN)
        assert not weight_MN[0, :200].any() and weight_MN[0, 200:].any()
        assert weight_MN.sum(axis=0) == pytest.approx(1)


def partly(n: int = 2000, easy: float = 0.8, seed: int = 0) -> Answered:
    """A model that answers all, and a worse one that answered the easier half of each subject."""
    rng, is_easy_N = np.random.default_rng(seed), np.arange(n) // SUBJECTS % 2 == 0
    full_N = 1.0 * (rng.random(n) < np.where(is_easy_N, 0.95, 0.45))
    part_N = np.where(is_easy_N, 1.0 * (rng.random(n) < easy), np.nan)
    return answered(np.stack([full_N, part_N]), seed)


def test_a_model_that_answered_only_easy_questions_does_not_win() -> None:
    world = partly()
    full_N, part_N = world.right_MN
    assert full_N.mean() < np.nanmean(part_N) < np.mean(full_N[np.isfinite(part_N)])
    for options in (SelectionOptions(), SelectionOptions("symbolic", most=1)):
        routes = learned(world, options)
        weight_MS = routes.weights(np.eye(SUBJECTS), np.ones((2, SUBJECTS), dtype=bool))
        assert routes.single == 0 and (weight_MS[0] == 1).all()
        crossed = cross_fit_routes(world, by_subject(world), options)
        assert (crossed.chosen_N == full_N).all() and (crossed.single_N == full_N).all()
    within = learned(world, SelectionOptions(max_bytes=10))
    assert within.is_held_M.tolist() == [True, False]
    better = learned(partly(easy=1.0), SelectionOptions())
    assert better.single == 1  # where it is the better one on the same questions


def test_what_was_not_answered_is_told_by_questions_and_models_in_common() -> None:
    rng = np.random.default_rng(0)
    whole_MN = rng.random((4, 1)) + rng.random((1, 60))
    right_MN = whole_MN.copy()
    for m in range(4):  # a chain: only neighbours have questions in common
        right_MN[m, [n for n in range(60) if n // 15 not in (m, m + 1)]] = np.nan
    assert impute(right_MN) == pytest.approx(whole_MN)
    assert impute(whole_MN) is whole_MN


def test_a_category_that_one_model_alone_answered_takes_the_best_single_model() -> None:
    right_MN = some_models(n_models=3).right_MN.copy()
    right_MN[1:, 0::SUBJECTS] = np.nan
    right_MN[0, 0::SUBJECTS] = 1.0  # it alone, and always right
    routes = learned(answered(right_MN), SelectionOptions())
    assert routes.accuracy_MS[:, 0] == pytest.approx(routes.overall_M)


def test_the_bar_of_helps_is_the_best_model_with_the_best_single_one_in_its_gaps() -> None:
    full_N = np.arange(200) % 2 == 0
    part_N = np.where(np.arange(200) < 60, 1.0, np.nan)
    world = answered(np.stack([full_N * 1.0, part_N]))
    routes = learned(world, SelectionOptions())
    assert most_right(world, routes) == 60 + 70
    alone = learned(answered(full_N[None] * 1.0), SelectionOptions())
    assert most_right(answered(full_N[None] * 1.0), alone) == 100


def test_choosing_helps_only_beyond_what_any_single_model_gets_right() -> None:
    change = compare(np.arange(100) < 50, np.arange(100) < 70)
    assert [verdict(change, 70, most) for most in (69, 70)] == ["helps", "no evidence"]
    back = compare(np.arange(100) < 70, np.arange(100) < 50)
    assert verdict(back, 50, 0) == "hurts"


def test_equal_votes_add_up_and_chance_is_that_of_the_choices() -> None:
    world = some_models()
    crossed = cross_fit_routes(world, by_subject(world), SelectionOptions())
    best_N = world.logprob_MNC.sum(axis=0).argmax(axis=1)
    assert (crossed.votes_N == (best_N == world.answer_N)).all()
    assert (crossed.votes_N != crossed.single_N).any()
    for n_choices in (2, 5):
        assert answered(world.right_MN, n_choices=n_choices).chance == pytest.approx(1 / n_choices)


def test_the_oracle_null_leaves_out_models_beyond_the_bytes() -> None:
    world, options = some_models(), SelectionOptions(max_bytes=20)
    world = replace(world, size_M=np.array([10, 10, 99, 99]))
    few = replace(world, logprob_MNC=world.logprob_MNC[:2], size_M=world.size_M[:2])
    found = oracle_null(world, learned(world, options))
    assert found == oracle_null(few, learned(few, options))
    assert found[1] < oracle_null(world, learned(world, SelectionOptions()))[0]


def test_the_oracle_null_draws_no_answers_where_a_model_gave_none() -> None:
    right_MN = some_models(n_models=2, n=4000).right_MN.copy()
    both = answered(right_MN)
    right_MN[1, 400:] = np.nan
    part, alone = answered(right_MN), answered(right_MN[:1])
    ranges = [
        oracle_null(world, learned(world, SelectionOptions())) for world in (alone, part, both)
    ]
    assert ranges[0][1] < ranges[2][0] and ranges[1][1] < ranges[2][0]
    mean_alone, mean_part, mean_both = (sum(ends) / 2 for ends in ranges)
    assert mean_part - mean_alone == pytest.approx((mean_both - mean_alone) / 10, abs=0.01)


def test_the_oracle_null_is_the_union_of_as_many_lists_as_accurate() -> None:
    world = some_models(n=4000)
    accuracy_M = world.right_MN.mean(axis=1)
    low, high = oracle_null(world, learned(world, SelectionOptions()))
    assert accuracy_M.max() < low < high < 1
    alone = answered(world.right_MN[:1])
    low, high = oracle_null(alone, learned(alone, SelectionOptions()))
    assert low < alone.right_MN.mean() < high


def test_a_linear_reader_tells_labels_that_features_hold_and_no_others() -> None:
    rng = np.random.default_rng(0)
    label_N, fold_N = rng.integers(4, size=400), rng.integers(5, size=400)
    feature_NX = rng.random((400, 10))
    blind_N = predict_labels(feature_NX, label_N, fold_N)
    assert (blind_N == label_N).mean() < 0.35
    feature_NX[:, :4] += np.eye(4)[label_N]
    predicted_N = predict_labels(feature_NX, label_N, fold_N)
    assert (predicted_N == label_N).mean() > 0.95
    # Nothing of a fold reaches its reader.
    other_N = np.where(fold_N == 2, (label_N + 1) % 4, label_N)
    assert (predict_labels(feature_NX, other_N, fold_N) == predicted_N)[fold_N == 2].all()
    # Features of all folds but its own, and no random numbers.
    assert (predict_labels(feature_NX, label_N, fold_N) == predicted_N).all()


def test_the_logistic_regression_is_at_the_minimum_of_its_loss() -> None:
    rng = np.random.default_rng(0)
    figure_NX, label_N = rng.normal(size=(300, 5)) * [1, 9, 1, 1, 0], rng.integers(3, size=300)
    label_N[figure_NX[:, 0] > 0.5] = 2
    fitted = fit_logistic(figure_NX, label_N, 3, ridge=2.0)
    p_NS = softmax(fitted.scores(figure_NX), axis=1)
    scaled_NX = (figure_NX - fitted.mean_X) / fitted.scale_X
    slope_XS = scaled_NX.T @ (p_NS - np.eye(3)[label_N]) + 2.0 * fitted.weight_XS[:-1]
    assert np.abs(slope_XS).max() < 1e-3 and np.abs(fitted.weight_XS[:-1]).max() > 0.1
    assert p_NS.mean(axis=0) == pytest.approx(np.eye(3)[label_N].mean(axis=0), abs=1e-5)


def test_a_regression_that_does_not_converge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertcut.evaluation.logistic._STEPS", 1)
    rng = np.random.default_rng(0)
    with pytest.raises(ProfileError, match="did not converge"):
        fit_logistic(rng.normal(size=(50, 4)), rng.integers(3, size=50), 3)
