"""Which option each unit gets under a budget of bytes: an integer program, and what it is held to.

U units are experts or layers, O options. An infinite error forbids an option. PMQ is that of MC-MoE
(arXiv 2410.06270).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array, eye_array, kron

from expertcut.errors import SettingsError
from expertcut.stats import Array

GAP = 1e-6
TIME_LIMIT_S = 60.0
PMQ_POWERS = (1.0, 1.5, 2.0)  # of tokens, gate weights and ε; the authors' code has ε^1
_LARGEST_COST = 1e4  # in the program, so that the solver's absolute tolerances are small beside it
_HALVINGS = 120  # of the interval that holds the price of a byte
_STATUS = {0: "optimal", 1: "time limit"}


@dataclass(frozen=True)
class Allocation:
    """The option of each unit; the sums of errors and bytes; how far a better one may be."""

    choice_U: Array
    error: float
    size: int
    gap: float = 0.0
    status: str = "optimal"
    seconds: float = 0.0


def _allocation(choice_U: Array, error_UO: Array, bytes_UO: Array) -> Allocation:
    units = np.arange(len(choice_U))
    error, size = error_UO[units, choice_U].sum(), bytes_UO[units, choice_U].sum()
    return Allocation(choice_U.astype(int), float(error), int(size))


def allocate(
    error_UO: Array,
    bytes_UO: Array,
    budget: int,
    *,
    layer_U: Array | None = None,
    least: Mapping[int, int] | None = None,
    fixed: int = 0,
    time_limit: float = TIME_LIMIT_S,
) -> Allocation:
    """The least sum of errors within `budget` − `fixed` bytes, to a gap of 1e-6.

    With `layer_U` the units of a layer get one option. `least` is how many units an option gets at
    least. Of two options with equal errors a unit gets the smaller. `size` is without `fixed`.

    Raises SettingsError: the budget is below the smallest size, which is named.
    """
    started = time.perf_counter()
    if layer_U is not None:
        _, member_U = np.unique(layer_U, return_inverse=True)
        errors, sizes = (np.zeros((member_U.max() + 1, part.shape[1])) for part in 2 * [error_UO])
        np.add.at(errors, member_U, error_UO)
        np.add.at(sizes, member_U, bytes_UO)
        merged = allocate(
            errors, sizes.astype(np.int64), budget, least=least, fixed=fixed, time_limit=time_limit
        )
        return replace(merged, choice_U=merged.choice_U[member_U])
    _check_budget(error_UO, bytes_UO, budget, fixed)
    floor_U1 = error_UO.min(axis=1, keepdims=True)
    choice_U, bound, status = _solve(
        error_UO - floor_U1, bytes_UO, budget - fixed, least or {}, time_limit
    )
    found = _allocation(
        _smallest_equals(choice_U, error_UO, bytes_UO, least or {}), error_UO, bytes_UO
    )
    gap = max(found.error - bound - floor_U1.sum(), 0) / found.error if found.error else 0.0
    seconds = time.perf_counter() - started
    return replace(found, gap=float(gap), status=status, seconds=seconds)


def smallest_size(error_UO: Array, bytes_UO: Array) -> int:
    """Bytes of the units if each gets the smallest option that is allowed."""
    return int(_smallest_U(error_UO, bytes_UO).sum())


def _smallest_U(error_UO: Array, bytes_UO: Array) -> Array:
    largest = np.iinfo(np.int64).max
    return np.asarray(np.where(np.isfinite(error_UO), bytes_UO, largest).min(axis=1))


def _check_budget(error_UO: Array, bytes_UO: Array, budget: int, fixed: int) -> None:
    if not np.isfinite(error_UO).any(axis=1).all():
        unit = int(np.argmin(np.isfinite(error_UO).any(axis=1)))
        raise SettingsError(f"unit {unit} is allowed none of the options: name one more")
    smallest = fixed + smallest_size(error_UO, bytes_UO)
    if smallest > budget:
        raise SettingsError(
            f"a budget of {budget:,} bytes is too small: the smallest size that these options "
            f"allow is {smallest:,} bytes"
        )


def _relax(cost_UO: Array, bytes_UO: Array, budget: int) -> tuple[Array, float, Array]:
    """A choice (U,), a lower bound of the cost of all, and what may stand in a better one (U, O).

    Each unit takes what is best at a price of a byte, the lowest that keeps the budget; then single
    units use up the rest. A better choice has no option that costs more at that price than the gap.
    """
    units, is_allowed_UO = np.arange(len(cost_UO)), np.isfinite(cost_UO)
    smallest_U = _smallest_U(cost_UO, bytes_UO)
    size_UO, limit = bytes_UO - smallest_U[:, None], budget - smallest_U.sum()

    def best_U(price: float) -> Array:
        return np.asarray((cost_UO + price * size_UO).argmin(axis=1))

    low, price = 0.0, 0.0
    if size_UO[units, best_U(0.0)].sum() > limit:
        step = size_UO[is_allowed_UO & (size_UO > 0)].min()
        price = (2 * float(cost_UO[is_allowed_UO].max()) or 1) / step
        for _ in range(_HALVINGS):
            middle = (low + price) / 2
            if size_UO[units, best_U(middle)].sum() > limit:
                low = middle
            else:
                price = middle
    choice_U, priced_UO = best_U(price), cost_UO + price * size_UO
    bound = float(priced_UO.min(axis=1).sum() - price * limit)
    while True:
        now_U = size_UO[units, choice_U]
        fits_UO = size_UO - now_U[:, None] <= limit - now_U.sum()
        gain_UO = np.where(fits_UO, cost_UO[units, choice_U][:, None] - cost_UO, 0)
        unit, option = np.unravel_index(gain_UO.argmax(), gain_UO.shape)
        if gain_UO[unit, option] <= 0:
            break
        choice_U[unit] = option
    gap = float(cost_UO[units, choice_U].sum()) - bound
    over_UO = priced_UO - priced_UO.min(axis=1, keepdims=True)
    return choice_U, bound, over_UO <= gap * (1 + 1e-9)


class _Program:
    """Σ cost·x over binary x (U, O); costs and bytes count from each unit's smallest."""

    def __init__(self, error_UO: Array, bytes_UO: Array, least: Mapping[int, int]) -> None:
        self.is_allowed_UO = np.isfinite(error_UO)
        floor_U1 = np.where(self.is_allowed_UO, error_UO, np.inf).min(axis=1, keepdims=True)
        smallest_U1 = _smallest_U(error_UO, bytes_UO)[:, None]
        self.cost_UO = np.where(self.is_allowed_UO, error_UO - floor_U1, 0)
        extra_UO = np.where(self.is_allowed_UO, bytes_UO - smallest_U1, 0)
        self.step = int(np.gcd.reduce(extra_UO, axis=None)) or 1
        self.extra_UO = extra_UO // self.step
        self.floor, self.smallest = float(floor_U1.sum()), int(smallest_U1.sum())
        self.unit = float(self.cost_UO.max() or 1) / _LARGEST_COST
        self.least = least

    def solve(self, budget: int, time_limit: float) -> tuple[Array | None, float, str]:
        """The choice (U,), a lower bound of its error, and how the solver ended."""
        limit, units = (budget - self.smallest) // self.step, np.arange(len(self.cost_UO))
        bound = np.inf
        while True:
            result = self._run(limit, time_limit)
            status = _STATUS.get(result.status, "infeasible")
            if result.x is None:
                return None, -np.inf, status
            choice_U = result.x.reshape(self.cost_UO.shape).argmax(axis=1)
            over = int(self.extra_UO[units, choice_U].sum()) - limit
            bound = min(bound, self.floor + (result.mip_dual_bound or 0) * self.unit)
            if over <= 0:
                return choice_U, bound, status
            limit -= max(over, int(self.extra_UO.max()) // 10**6)  # x are whole to 1e-6 alone

    def _run(self, limit: int, time_limit: float) -> OptimizeResult:
        n_units, n_options = self.cost_UO.shape
        extra_1X = csr_array(self.extra_UO.ravel()[None].astype(float))
        constraints = [
            LinearConstraint(kron(eye_array(n_units), np.ones((1, n_options)), "csr"), 1, 1),
            LinearConstraint(extra_1X, -np.inf, limit),
        ]
        for option, count in self.least.items():
            row_1X = csr_array(np.tile(np.eye(n_options)[option], n_units)[None])
            constraints.append(LinearConstraint(row_1X, count, np.inf))
        return milp(
            self.cost_UO.ravel() / self.unit,
            integrality=np.ones(self.cost_UO.size, dtype=int),
            bounds=Bounds(0, self.is_allowed_UO.ravel().astype(float)),
            constraints=constraints,
            options={"time_limit": time_limit, "mip_rel_gap": GAP},
        )


def _solve(
    cost_UO: Array, bytes_UO: Array, budget: int, least: Mapping[int, int], time_limit: float
) -> tuple[Array, float, str]:
    """The choice (U,), a lower bound of its cost, and how the solver ended."""
    if least:
        choice_U, bound, status = _Program(cost_UO, bytes_UO, least).solve(budget, time_limit)
        if choice_U is None:
            raise SettingsError(
                f"no allocation within {budget:,} bytes gives {len(least)} options to an expert "
                f"each ({status}): raise the budget, or take --by error"
            )
        return choice_U, bound, status
    relaxed_U, bound, is_near_UO = _relax(cost_UO, bytes_UO, budget)
    relaxed = _allocation(relaxed_U, cost_UO, bytes_UO).error
    if relaxed - bound <= GAP * relaxed:
        return relaxed_U, bound, "optimal"
    near_UO = np.where(is_near_UO, cost_UO, np.inf)
    choice_U, near_bound, status = _Program(near_UO, bytes_UO, {}).solve(budget, time_limit)
    if choice_U is None or _allocation(choice_U, cost_UO, bytes_UO).error > relaxed:
        choice_U = relaxed_U
    return choice_U, max(bound, min(near_bound, relaxed)), status


def _smallest_equals(
    choice_U: Array, error_UO: Array, bytes_UO: Array, least: Mapping[int, int]
) -> Array:
    """For each unit the smallest option with no larger error, as long as `least` holds."""
    choice_U, count_O = choice_U.copy(), np.bincount(choice_U, minlength=error_UO.shape[1])
    for unit, option in enumerate(choice_U):
        is_as_good_O = error_UO[unit] <= error_UO[unit, option]
        smaller = np.where(is_as_good_O, bytes_UO[unit], np.inf).argmin()
        if bytes_UO[unit, smaller] < bytes_UO[unit, option] and count_O[option] > least.get(
            int(option), 0
        ):
            count_O[option] -= 1
            count_O[smaller] += 1
            choice_U[unit] = smaller
    return choice_U


def pmq(
    error_UO: Array,
    bytes_UO: Array,
    budget: int,
    *,
    layer_U: Array,
    tokens_U: Array,
    weight_U: Array,
    fixed: int = 0,
    time_limit: float = TIME_LIMIT_S,
) -> Allocation:
    """Pre-Loading Mixed-Precision Quantization: every layer for itself, by `pmq_scores`.

    A layer's budget is its share of the largest size. Of three options and more, each of the two
    largest is given to an expert of each layer at least. `error` is that of `error_UO`; the gap is
    the largest of a layer, the time limit that of a layer.
    """
    _check_budget(error_UO, bytes_UO, budget, fixed)
    score_UO, largest_U = pmq_scores(error_UO, tokens_U, weight_U, layer_U), bytes_UO.max(axis=1)
    allowed = np.flatnonzero(np.isfinite(error_UO).all(axis=0)).tolist()
    allowed.sort(key=lambda option: bytes_UO[:, option].sum())
    least = dict.fromkeys(allowed[max(len(allowed) - 2, 1) :], 1)
    choice_U, parts = np.zeros(len(error_UO), int), []
    for layer in np.unique(layer_U):
        is_in_U = layer_U == layer
        share = largest_U[is_in_U].sum() / largest_U.sum()
        part = allocate(
            score_UO[is_in_U],
            bytes_UO[is_in_U],
            int((budget - fixed) * share),
            least=least,
            time_limit=time_limit,
        )
        choice_U[is_in_U] = part.choice_U
        parts.append(part)
    return replace(
        _allocation(choice_U, error_UO, bytes_UO),
        gap=max(part.gap for part in parts),
        status=max(part.status for part in parts),  # "time limit" if any
        seconds=sum(part.seconds for part in parts),
    )


def pmq_scores(error_UO: Array, tokens_U: Array, weight_U: Array, layer_U: Array) -> Array:
    """φ^α · w^β · ε^γ (U, O), φ and w as shares of the layer, ε the root of the error.

    α = 1, β = 1.5 and γ = 2 as in the paper. The authors' code parses γ but raises ε to α.
    """
    _, member_U = np.unique(layer_U, return_inverse=True)
    alpha, beta, gamma = PMQ_POWERS
    shares = []
    for value_U in (tokens_U, weight_U):
        total_U = np.bincount(member_U, weights=value_U)[member_U]
        shares.append(np.divide(value_U, total_U, out=np.zeros(len(total_U)), where=total_U > 0))
    factor_U = shares[0] ** alpha * shares[1] ** beta
    allowed_UO = np.where(np.isfinite(error_UO), error_UO, 0)
    score_UO = factor_U[:, None] * allowed_UO ** (gamma / 2)
    return np.asarray(np.where(np.isfinite(error_UO), score_UO, np.inf))


def uniform(error_UO: Array, bytes_UO: Array, budget: int, *, fixed: int = 0) -> Allocation:
    """The one option for all units that fits and has the least error.

    Raises SettingsError: none fits.
    """
    sizes_O = fixed + bytes_UO.sum(axis=0)
    is_allowed_O = np.isfinite(error_UO).all(axis=0)
    fits_O = is_allowed_O & (sizes_O <= budget)
    if not fits_O.any():
        smallest = sizes_O[is_allowed_O].min() if is_allowed_O.any() else np.inf
        raise SettingsError(
            f"no option fits in {budget:,} bytes for all experts alike, the smallest takes "
            f"{smallest:,}: raise the budget or take another --by"
        )
    total_O = np.where(fits_O, error_UO.sum(axis=0), np.inf)
    best = int(np.lexsort((sizes_O, total_O))[0])
    return _allocation(np.full(len(error_UO), best), error_UO, bytes_UO)


def shuffled(choice_U: Array, error_UO: Array, bytes_UO: Array, seed: int) -> Allocation:
    """The same options dealt out at random among units of equal sizes: the control."""
    rng, dealt_U = np.random.default_rng(seed), choice_U.copy()
    allowed_bytes = np.where(np.isfinite(error_UO), bytes_UO, -1)
    _, kind_U = np.unique(allowed_bytes, axis=0, return_inverse=True)
    for kind in range(kind_U.max() + 1):
        is_in_U = kind_U == kind
        dealt_U[is_in_U] = rng.permutation(choice_U[is_in_U])
    return _allocation(dealt_U, error_UO, bytes_UO)
