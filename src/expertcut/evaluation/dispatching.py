"""Which model answers which category of questions, and what that gains: numpy alone.

Categories are subjects or skills. The choice of a model by category is Composition of Experts
(arXiv:2412.01868), recruiting by skill is Symbolic-MoE (arXiv:2503.05641). Axes: M models, N
questions, C choices, S categories. An answer that is not there is NaN and has no vote.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from expertcut.evaluation.cross_fit import FOLDS, deal
from expertcut.profiling.statistics import share
from expertcut.stats import Array, right_logprobs

DRAWS = 2000  # of the luck that an oracle has
Way = Literal["accuracy", "symbolic"]


@dataclass(frozen=True)
class Answered:
    """Log p of the choices by model, NaN without an answer; `group_N` tells repeats."""

    logprob_MNC: Array
    answer_N: Array
    subject_N: Array
    group_N: Array
    size_M: Array  # bytes

    @cached_property
    def is_answered_MN(self) -> Array:
        """Which model answered which question."""
        return np.asarray(~np.isnan(self.logprob_MNC).any(axis=2))

    @cached_property
    def right_MN(self) -> Array:
        """1 for a right answer, 0 for a wrong one, NaN for none."""
        best_MN = np.nan_to_num(self.logprob_MNC, nan=-np.inf).argmax(axis=2)
        return np.where(self.is_answered_MN, best_MN == self.answer_N, np.nan)

    @cached_property
    def chance(self) -> float:
        """The accuracy of guessing."""
        choices_MN = np.isfinite(self.logprob_MNC).sum(axis=2)
        return float((1 / choices_MN[self.is_answered_MN]).mean())

    def is_right(self, weight_MN: Array) -> Array:
        """Whether weighted votes, sums of log p, are right (N,); without a vote they are not."""
        votes_NC = np.zeros(self.logprob_MNC.shape[1:])
        for weight_N, logprob_NC in zip(weight_MN, self.logprob_MNC, strict=True):
            votes_N = weight_N > 0
            votes_NC[votes_N] += weight_N[votes_N, None] * logprob_NC[votes_N]
        return np.asarray((votes_NC.argmax(axis=1) == self.answer_N) & (weight_MN > 0).any(axis=0))


@dataclass(frozen=True)
class Rule:
    """How models are chosen.

    `accuracy`: the most accurate `most` (1) of each category vote by accuracy above chance.
    `symbolic`: all vote by their expected share of Symbolic-MoE's recruits, or the `most` largest.
    Of models with `max_bytes` in all; `kappa` replaces the estimate.
    """

    way: Way = "accuracy"
    most: int | None = None
    max_bytes: int | None = None
    kappa: float | None = None


@dataclass(frozen=True)
class Routes:
    """What was learned from answers: accuracy and right − wrong answers by category."""

    rule: Rule
    accuracy_MS: Array  # shrunk
    lead_MS: Array  # right − wrong
    overall_M: Array
    fits_M: Array  # alone within the bytes
    is_held_M: Array
    is_seen_S: Array
    chance: float
    kappa: float

    @property
    def single(self) -> int:
        """The most accurate model of those that fit alone."""
        return int(np.where(self.fits_M, self.overall_M, -np.inf).argmax())

    def single_weights(self, is_answered_MN: Array) -> Array:
        """That model, or the next best where it did not answer (M, N)."""
        return self._best(self.overall_M[:, None], is_answered_MN & self.fits_M[:, None])

    def equal_weights(self, is_answered_MN: Array) -> Array:
        """Equal votes of all models that are held (M, N)."""
        return 1.0 * (is_answered_MN & self.is_held_M[:, None])

    def weights(self, category_NS: Array, is_answered_MN: Array) -> Array:
        """The vote of each model (M, N); the best held model's alone where no category is known."""
        known_NS = category_NS * self.is_seen_S
        n_N, open_MN = known_NS.sum(axis=1), is_answered_MN & self.is_held_M[:, None]
        if self.rule.way == "symbolic":
            weight_MN = recruit(self.lead_MS @ known_NS.T, self.lead_MS.sum(axis=1), open_MN)
            weight_MN *= _top(weight_MN, self.rule.most or len(weight_MN))
            weight_MN = share(weight_MN, weight_MN.sum(axis=0), 0.0)
        else:
            score_MN = share(self.accuracy_MS @ known_NS.T, n_N, 0.0)
            weight_MN = self._votes(score_MN, open_MN)
        return np.where(n_N > 0, weight_MN, self._best(self.overall_M[:, None], open_MN))

    def _votes(self, score_MN: Array, open_MN: Array) -> Array:
        score_MN = np.where(open_MN, score_MN, -np.inf)
        if (most := self.rule.most or 1) == 1:
            return self._best(score_MN, open_MN)
        above_MN = np.maximum(score_MN - self.chance, 0) * _top(score_MN, most)
        total_N = above_MN.sum(axis=0)
        return np.where(total_N > 0, share(above_MN, total_N, 0.0), self._best(score_MN, open_MN))

    @staticmethod
    def _best(score_MN: Array, open_MN: Array) -> Array:
        score_MN = np.where(open_MN, score_MN, -np.inf)
        is_best_MN = np.arange(len(score_MN))[:, None] == score_MN.argmax(axis=0)
        return np.where(is_best_MN & open_MN, 1.0, 0.0)


def _top(score_MN: Array, most: int) -> Array:
    """Which are among the `most` largest of each question; the first of equals."""
    rank_MN = np.argsort(np.argsort(-score_MN, axis=0, kind="stable"), axis=0, kind="stable")
    return np.asarray(rank_MN < most)


def recruit(lead_MN: Array, total_M: Array, open_MN: Array) -> Array:
    """The expected share of each model (M, N) among the recruits of Symbolic-MoE.

    A model's `lead` (right − wrong answers in the skills of a question) times its strength: the
    square of its `total` lead, shifted to 1 or more where one is negative. Of leads only positive
    ones count, or all, shifted in the same way, where none is.
    """
    shifted_M = total_M - min(total_M.min(), 0) + (total_M.min() < 0)
    strength_M1 = share(shifted_M**2, (shifted_M**2).sum(), 1 / len(total_M))[:, None]
    least_N = np.where(open_MN, lead_MN, lead_MN.max()).min(axis=0)
    has_positive_N = (open_MN & (lead_MN > 0)).any(axis=0)
    lead_MN = np.where(has_positive_N, np.maximum(lead_MN, 0), lead_MN - least_N + 1)
    weight_MN = np.where(open_MN, lead_MN * strength_M1, 0.0)
    weight_MN = np.where(weight_MN.any(axis=0), weight_MN, open_MN)
    return share(weight_MN, weight_MN.sum(axis=0), 0.0)


def fit(right_MN: Array, category_NS: Array, size_M: Array, rule: Rule, chance: float) -> Routes:
    """The routes that answers teach.

    Accuracy in a category is shrunk to the model's overall: (right + κ·overall) / (n + κ).
    """
    is_answered_MN, right_or_0_MN = np.isfinite(right_MN), np.nan_to_num(right_MN)
    n_MS, right_MS = is_answered_MN @ category_NS, right_or_0_MN @ category_NS
    overall_M = share(right_or_0_MN.sum(axis=1), is_answered_MN.sum(axis=1), 0.0)
    kappa = shrinkage(right_MN, category_NS) if rule.kappa is None else rule.kappa
    own_MS = np.where(n_MS > 0, n_MS / np.maximum(n_MS + kappa, 1), 0.0)  # 0 for κ = ∞
    accuracy_MS = own_MS * share(right_MS, n_MS, 0.0) + (1 - own_MS) * overall_M[:, None]
    fits_M, is_held_M = np.ones(len(size_M), dtype=bool), np.ones(len(size_M), dtype=bool)
    if rule.max_bytes is not None:
        fits_M = size_M <= rule.max_bytes
        value_MS = accuracy_MS * category_NS.sum(axis=0)
        is_held_M = best_set(value_MS, size_M, rule.max_bytes)
    return Routes(
        rule=rule,
        accuracy_MS=accuracy_MS,
        lead_MS=2 * right_MS - n_MS,
        overall_M=overall_M,
        fits_M=fits_M,
        is_held_M=is_held_M,
        is_seen_S=n_MS.sum(axis=0) > 0,
        chance=chance,
        kappa=kappa,
    )


def shrinkage(right_MN: Array, category_NS: Array) -> float:
    """κ = variance within / variance between categories, by moments; ∞ without the latter.

    That of a beta-binomial, of the differences of each model from the mean of all on the same
    question: categories that are hard for all models do not count as differences between models.
    """
    is_answered_MN, right_or_0_MN = np.isfinite(right_MN), np.nan_to_num(right_MN)
    mean_N = share(right_or_0_MN.sum(axis=0), is_answered_MN.sum(axis=0), 0.0)
    gain_MN = np.where(is_answered_MN, right_or_0_MN - mean_N, 0.0)
    n_MS, sum_MS = is_answered_MN @ category_NS * 1.0, gain_MN @ category_NS
    n_M1, mean_MS = n_MS.sum(axis=1, keepdims=True), share(sum_MS, n_MS, 0.0)
    mean_M1 = share(sum_MS.sum(axis=1, keepdims=True), n_M1, 0.0)
    n_free = float((n_M1 - (n_MS > 0).sum(axis=1, keepdims=True)).sum())
    squares = float((gain_MN**2 @ category_NS).sum() - (n_MS * mean_MS**2).sum())
    within = max(squares, 0.0) / n_free if n_free > 0 else 0.0
    k_M = (n_MS > 0).sum(axis=1) - 1
    spread = float((n_M1[:, 0] - share((n_MS**2).sum(axis=1), n_M1[:, 0], 0.0)).sum())
    excess = float((n_MS * (mean_MS - mean_M1) ** 2).sum() - k_M.sum() * within)
    return within * spread / excess if excess > 1e-9 * max(spread, 1.0) else np.inf


def best_set(value_MS: Array, size_M: Array, max_bytes: int) -> Array:
    """The models (M,) of at most `max_bytes` in all with the largest Σ of each category's best.

    Facility location, as an integer program; a model that is the best of no category is left out.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # not needed to start

    n_models, n_categories = value_MS.shape
    takes = np.tile(np.eye(n_categories), n_models)  # by model, then category
    opens = np.repeat(np.eye(n_models), n_categories, axis=0)
    none = np.zeros((n_categories, n_models))
    rules = np.block([[none, takes], [-opens, np.eye(n_models * n_categories)]])
    low = np.r_[np.ones(n_categories), np.full(n_models * n_categories, -np.inf)]
    high = np.r_[np.ones(n_categories), np.zeros(n_models * n_categories)]
    sizes = np.r_[size_M / max_bytes, np.zeros(n_models * n_categories)][None]
    is_whole = np.r_[np.ones(n_models), np.zeros(n_models * n_categories)]
    scale = max(float(np.abs(value_MS).max()), 1e-300)
    for most in (1.0, 1 - 1e-5):  # a solver's sum may be above 1 by its tolerance
        found = milp(
            c=np.r_[np.zeros(n_models), -value_MS.ravel() / scale],
            integrality=is_whole,
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(rules, low, high),
                LinearConstraint(sizes, -np.inf, most),
            ],
            options={"mip_rel_gap": 0},
        )
        assert found.x is not None, "a model fits: the caller has checked"
        is_open_M = found.x[:n_models] > 0.5
        if size_M[is_open_M].sum() <= max_bytes:
            break
    is_held_M = np.zeros(n_models, dtype=bool)
    is_held_M[np.where(is_open_M[:, None], value_MS, -np.inf).argmax(axis=0)] = True
    return is_held_M


@dataclass(frozen=True)
class CrossFitted:
    """Right answers (N,) of each procedure, chosen without the question's fold."""

    chosen_N: Array
    single_N: Array
    votes_N: Array
    told_N: Array | None  # with categories that routing tells


def cross_fit_routes(
    answered: Answered,
    category_NS: Array,
    rule: Rule,
    seed: int = 0,
    told_NS: Array | None = None,
) -> CrossFitted:
    """Chooses on four folds and answers the fifth, for each of five; repeats share a fold."""
    n = len(answered.answer_N)
    rights = {name: np.zeros(n, dtype=bool) for name in ("chosen", "single", "votes", "told")}
    fold_N = folds_of(answered, seed)
    for fold in range(FOLDS):
        own_N = fold_N == fold
        if not own_N.any():
            continue
        seen = answered.right_MN[:, ~own_N], category_NS[~own_N]
        routes = fit(*seen, answered.size_M, rule, answered.chance)
        is_answered_MN = answered.is_answered_MN
        weights = {
            "chosen": routes.weights(category_NS, is_answered_MN),
            "single": routes.single_weights(is_answered_MN),
            "votes": routes.equal_weights(is_answered_MN),
        }
        if told_NS is not None:
            weights["told"] = routes.weights(told_NS, is_answered_MN)
        for name, weight_MN in weights.items():
            rights[name][own_N] = answered.is_right(weight_MN)[own_N]
    told_N = None if told_NS is None else rights["told"]
    return CrossFitted(rights["chosen"], rights["single"], rights["votes"], told_N)


def folds_of(answered: Answered, seed: int) -> Array:
    """The fold of each question, as `reweight --cross-fit` deals them."""
    return deal(answered.subject_N.tolist(), answered.group_N.tolist(), seed)


def luck(answered: Answered, routes: Routes, seed: int = 0) -> tuple[float, float]:
    """95 % range of an oracle's accuracy if the models that fit differed by chance alone.

    One list of answers for each model, drawn from the choice probabilities of the best single one;
    the odds of its right choices are multiplied so that each list is as accurate as its model.
    """
    from scipy.special import expit, logit  # not needed to start

    logprob_NC = answered.logprob_MNC[routes.single]
    right_N = np.exp(right_logprobs(np.nan_to_num(logprob_NC, nan=np.log(0.5)), answered.answer_N))
    odds_N = logit(np.clip(right_N, 1e-9, 1 - 1e-9))
    missed_N = np.ones(len(odds_N))
    for accuracy in routes.overall_M[routes.fits_M]:
        low, high = -100.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2
            below = expit(odds_N + middle).mean() < accuracy
            low, high = (middle, high) if below else (low, middle)
        missed_N *= 1 - expit(odds_N + high)
    rng = np.random.default_rng(seed)
    drawn = [(rng.random(len(missed_N)) >= missed_N).mean() for _ in range(DRAWS)]
    least, most = np.quantile(drawn, [0.025, 0.975])
    return float(least), float(most)


def read_labels(feature_NX: Array, label_N: Array, fold_N: Array, ridge: float = 1.0) -> Array:
    """The label (N,) that a linear reader of the features tells, fitted without their fold.

    Multinomial logistic regression, penalty ½·ridge·‖W‖² on standardised features.
    """
    told_N = np.zeros_like(label_N)
    for fold in np.unique(fold_N):
        own_N = fold_N == fold
        mean_X, std_X = feature_NX[~own_N].mean(axis=0), feature_NX[~own_N].std(axis=0)
        scaled_NX = (feature_NX - mean_X) / np.where(std_X > 1e-12, std_X, 1)
        told_N[own_N] = _reader(scaled_NX[~own_N], label_N[~own_N], ridge)(scaled_NX[own_N])
    return told_N


def _reader(feature_NX: Array, label_N: Array, ridge: float) -> Callable[[Array], Array]:
    """The most likely label of features, by a fitted softmax; the last weight is the intercept."""
    from scipy.optimize import minimize  # not needed to start
    from scipy.special import log_softmax

    classes, at_N = np.unique(label_N, return_inverse=True)
    one_NX = np.column_stack([feature_NX, np.ones(len(feature_NX))])
    is_label_NS = at_N[:, None] == np.arange(len(classes))
    is_free_X1 = np.r_[np.ones(feature_NX.shape[1]), 0][:, None]  # no penalty on the intercept

    def loss(flat: Array) -> tuple[float, Array]:
        weight_XS = flat.reshape(one_NX.shape[1], -1)
        log_NS = log_softmax(one_NX @ weight_XS, axis=1)
        penalised_XS = ridge * is_free_X1 * weight_XS
        value = 0.5 * float((penalised_XS * weight_XS).sum()) - float(log_NS[is_label_NS].sum())
        slope_XS = one_NX.T @ (np.exp(log_NS) - is_label_NS) + penalised_XS
        return value, slope_XS.ravel()

    start = np.zeros(one_NX.shape[1] * len(classes))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200})
    weight_XS = np.asarray(found.x).reshape(one_NX.shape[1], -1)
    return lambda own_NX: classes[(own_NX @ weight_XS[:-1] + weight_XS[-1]).argmax(axis=1)]
