"""The integer program behind `compress`: optimal, within the budget, and its peers as defined."""

from itertools import product
from typing import Any

import numpy as np
import pytest

from expertcut.edits.allocation import (
    Allocation,
    allocate,
    pmq,
    pmq_scores,
    shuffled,
    smallest_size,
    uniform,
)
from expertcut.errors import SettingsError

L, E, O = 2, 4, 3  # noqa: E741 (layers, experts, options)
LAYER_U = np.repeat(np.arange(L), E)
Array = np.ndarray[Any, Any]


def table(seed: int, n_units: int = L * E, n_options: int = O) -> tuple[Array, Array]:
    """Errors over four orders of magnitude that fall with the bytes, which differ by unit."""
    rng = np.random.default_rng(seed)
    error_UO = -np.sort(-(10 ** rng.uniform(-6, -2, (n_units, n_options))), axis=1)
    bytes_UO = np.sort(rng.integers(100, 5000, (n_units, n_options)), axis=1)
    return error_UO, bytes_UO


def by_hand(error_UO: Array, bytes_UO: Array, budget: int, layer_U: Array | None = None) -> float:
    """The least error of all choices within the budget."""
    units, best = np.arange(len(error_UO)), np.inf
    layer_U = units if layer_U is None else layer_U
    for options in product(range(error_UO.shape[1]), repeat=int(layer_U.max()) + 1):
        choice_U = np.array(options)[layer_U]
        if bytes_UO[units, choice_U].sum() <= budget:
            best = min(best, error_UO[units, choice_U].sum())
    return float(best)


def budgets(error_UO: Array, bytes_UO: Array, n: int) -> list[int]:
    ends = smallest_size(error_UO, bytes_UO), bytes_UO.max(axis=1).sum()
    return [int(budget) for budget in np.linspace(*ends, n)]


def assert_is_sum(found: Allocation, error_UO: Array, bytes_UO: Array) -> None:
    units = np.arange(len(error_UO))
    assert found.error == pytest.approx(error_UO[units, found.choice_U].sum(), rel=1e-12)
    assert found.size == bytes_UO[units, found.choice_U].sum()


@pytest.mark.parametrize("layer_U", [None, LAYER_U], ids=["expert", "layer"])
@pytest.mark.parametrize("seed", range(3))
def test_program_equals_brute_force(seed: int, layer_U: Array | None):
    error_UO, bytes_UO = table(seed)
    error_UO[1, 0] = np.inf  # forbidden
    for budget in budgets(error_UO, bytes_UO, 4)[1:]:
        expected = by_hand(error_UO, bytes_UO, budget, layer_U)
        if expected == np.inf:
            continue
        found = allocate(error_UO, bytes_UO, budget, layer_U=layer_U)
        assert_is_sum(found, error_UO, bytes_UO)
        assert found.error == pytest.approx(expected, rel=1e-6)
        assert found.size <= budget
        assert found.status == "optimal" and found.gap <= 2e-6


def test_larger_budget_has_no_larger_error():
    error_UO, bytes_UO = table(7, 60, 5)
    found = [allocate(error_UO, bytes_UO, budget) for budget in budgets(error_UO, bytes_UO, 12)]
    errors = np.array([one.error for one in found])
    assert (errors[1:] <= errors[:-1] * (1 + 2e-6)).all()
    assert errors[-1] < errors[0] / 2  # the budgets matter


def test_sizes_of_terabytes_stay_below_the_budget_to_the_byte():
    # The solver takes 0.9999999 for 1, which is a megabyte here.
    for seed in range(4):
        error_UO, bytes_UO = table(seed, 12)
        bytes_UO = bytes_UO * 10**9 + np.random.default_rng(seed).integers(0, 10**6, (12, O))
        found = allocate(error_UO, bytes_UO, budgets(error_UO, bytes_UO, 3)[1])
        for _ in range(4):
            budget = found.size - 1
            found = allocate(error_UO, bytes_UO, budget)
            assert 0.9 * budget < found.size <= budget


def test_of_options_with_equal_errors_a_unit_gets_the_smallest():
    error_UO = np.tile([1, 0.5, 0.5, 0.5], (20, 1))
    bytes_UO = np.tile([100, 500, 200, 300], (20, 1))
    assert (allocate(error_UO, bytes_UO, 10**6).choice_U == 2).all()
    found = allocate(error_UO, bytes_UO, 10**6, least={3: 2, 1: 1}).choice_U
    assert np.bincount(found).tolist() == [0, 1, 17, 2]


def test_units_without_any_error_get_the_smallest_option():
    bytes_UO = np.tile([500, 100, 300], (9, 1))
    assert (allocate(np.zeros((9, O)), bytes_UO, 1000).choice_U == 1).all()
    assert (allocate(np.zeros((9, O)), bytes_UO, 10**6).choice_U == 1).all()


def test_layer_grain_gives_a_layer_one_option():
    error_UO, bytes_UO = table(3)
    budget = budgets(error_UO, bytes_UO, 3)[1]
    free = allocate(error_UO, bytes_UO, budget).choice_U.reshape(L, E)
    alike = allocate(error_UO, bytes_UO, budget, layer_U=LAYER_U).choice_U.reshape(L, E)
    assert (alike == alike[:, :1]).all()
    assert not (free == free[:, :1]).all()


def test_unit_without_error_gets_the_smallest_option_and_the_worst_hit_the_largest():
    # The planted expert no token chooses, and one that low widths ruin, at every budget.
    error_UO, bytes_UO = table(5, 12, 4)
    bytes_UO[:] = [100, 200, 300, 500]
    error_UO[4], error_UO[9] = 0, 1e3 * error_UO[9] * np.array([1, 1, 1, 0])
    for budget in budgets(error_UO, bytes_UO, 9)[1:]:
        choice_U = allocate(error_UO, bytes_UO, budget).choice_U
        assert choice_U[4] == 0
        assert choice_U[9] == choice_U.max()


def test_solver_keeps_small_errors_apart_beside_large_ones():
    error_UO, bytes_UO = table(11)
    error_UO[0] = [1e6, 1e5, 1e4]  # ten orders above the others
    for budget in budgets(error_UO, bytes_UO, 6)[2:]:
        found = allocate(error_UO, bytes_UO, budget)
        expected = by_hand(error_UO, bytes_UO, budget)
        assert found.error - error_UO[0].min() == pytest.approx(
            expected - error_UO[0].min(), rel=1e-6, abs=1e-9
        )


def test_budget_below_the_smallest_size_is_refused_with_that_size():
    error_UO, bytes_UO = table(0)
    smallest = smallest_size(error_UO, bytes_UO)
    assert allocate(error_UO, bytes_UO, smallest + 50, fixed=50).size == smallest
    with pytest.raises(SettingsError, match=f"{smallest + 50:,}"):
        allocate(error_UO, bytes_UO, smallest + 49, fixed=50)
    error_UO[2] = np.inf
    with pytest.raises(SettingsError, match="unit 2"):
        allocate(error_UO, bytes_UO, 10**9)


def test_pmq_is_the_program_of_mc_moe():
    """precision_solver.py: per block the least Σ c·x within Σ bits, one expert of 2 and of 3."""
    rng = np.random.default_rng(0)
    error_UO = -np.sort(-rng.uniform(0, 1, (L * E, 3)), axis=1)
    tokens_U, weight_U = rng.integers(1, 90, L * E), rng.uniform(0.1, 1, L * E)
    bytes_UO = np.tile([1, 2, 3], (L * E, 1))
    for bits in (7, 8, 10):
        found = pmq(
            error_UO, bytes_UO, L * bits, layer_U=LAYER_U, tokens_U=tokens_U, weight_U=weight_U
        )
        assert_is_sum(found, error_UO, bytes_UO)
        for layer in range(L):
            own = slice(layer * E, layer * E + E)
            phi_E, w_E = tokens_U[own] / tokens_U[own].sum(), weight_U[own] / weight_U[own].sum()
            loss_EO = (phi_E * w_E**1.5)[:, None] * np.sqrt(error_UO[own]) ** 2
            allowed = [
                widths
                for widths in product((1, 2, 3), repeat=E)
                if sum(widths) <= bits and 2 in widths and 3 in widths
            ]
            best = min(allowed, key=lambda w: sum(loss_EO[e, w[e] - 1] for e in range(E)))
            assert tuple(found.choice_U[own] + 1) == best


def test_pmq_without_room_for_its_two_largest_options_is_refused():
    error_UO, _ = table(1)
    bytes_UO, uses = np.tile([1, 2, 3], (L * E, 1)), np.ones(L * E)
    known = {"layer_U": LAYER_U, "tokens_U": uses, "weight_U": uses}
    assert pmq(error_UO, bytes_UO, L * (E + 3), **known).size == L * (E + 3)
    with pytest.raises(SettingsError, match="no allocation within 6 bytes gives 2 options"):
        pmq(error_UO, bytes_UO, L * (E + 2), **known)
    error_UO[:, 2] = np.inf  # of two options one is left to the program
    assert (pmq(error_UO, bytes_UO, L * (E + 1), **known).choice_U == 1).sum() == L


def test_pmq_scores_are_shares_of_a_layer_and_forbid_what_errors_forbid():
    error_UO, _ = table(2)
    error_UO[3, 1] = np.inf
    tokens_U, weight_U = np.arange(L * E), np.arange(L * E) / 7
    score_UO = pmq_scores(error_UO, tokens_U, weight_U, LAYER_U)
    assert np.isinf(score_UO[3, 1]) and np.isfinite(np.delete(score_UO, 3, axis=0)).all()
    assert (score_UO[0] == 0).all()
    np.testing.assert_allclose(score_UO[6], (6 / 22) ** 2.5 * error_UO[6])
    assert (pmq_scores(error_UO, 0 * tokens_U, weight_U, LAYER_U)[4:] == 0).all()


def test_uniform_is_the_best_single_option_that_fits():
    error_UO, bytes_UO = table(4)
    sizes_O = bytes_UO.sum(axis=0)
    for option in range(O):
        found = uniform(error_UO, bytes_UO, int(sizes_O[option]) + 10, fixed=10)
        assert (found.choice_U == option).all()
        assert_is_sum(found, error_UO, bytes_UO)
        assert allocate(error_UO, bytes_UO, int(sizes_O[option])).error <= found.error * (1 + 1e-6)
    error_UO[0, 1] = np.inf
    assert (uniform(error_UO, bytes_UO, int(sizes_O[1])).choice_U == 0).all()
    with pytest.raises(SettingsError, match=f"{sizes_O[0]:,}"):
        uniform(error_UO, bytes_UO, int(sizes_O[0]) - 1)


def test_shuffled_deals_the_same_options_within_the_same_bytes():
    error_UO, bytes_UO = table(6, 40, 3)
    bytes_UO[:20], bytes_UO[20:] = [10, 20, 30], [12, 22, 38]  # layers of two widths
    found = allocate(error_UO, bytes_UO, budgets(error_UO, bytes_UO, 3)[1])
    control = shuffled(found.choice_U, error_UO, bytes_UO, seed=1)
    assert control.size == found.size
    assert_is_sum(control, error_UO, bytes_UO)
    for own in (slice(20), slice(20, 40)):
        np.testing.assert_array_equal(sorted(control.choice_U[own]), sorted(found.choice_U[own]))
    assert control.error > found.error
    again = shuffled(found.choice_U, error_UO, bytes_UO, seed=2)
    assert (again.choice_U != control.choice_U).any()
