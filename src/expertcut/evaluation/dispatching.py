"""Which model answers which category of questions, and what that gains: numpy alone.

Categories are subjects or skills. The choice of a model by category is Composition of Experts
(arXiv:2412.01868), recruiting by skill is Symbolic-MoE (arXiv:2503.05641). Axes: M models, N
questions, C choices, S categories. An answer that is not there is NaN and has no vote.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from expertcut.evaluation.cross_fit import FOLDS, deal
from expertcut.evaluation.logistic import fit_logistic
from expertcut.profiling.statistics import share
from expertcut.stats import Array, right_logprobs

DRAWS = 2000  # of the oracle by chance alone
DispatchMethod = Literal["accuracy", "symbolic"]


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
class SelectionOptions:
    """How models are chosen.

    `accuracy`: the most accurate `most` (1) of each category vote by accuracy above chance.
    `symbolic`: all vote by their expected share of Symbolic-MoE's recruits, or the `most` largest.
    Of models with `max_bytes` in all; `kappa` replaces the estimate.
    """

    method: DispatchMethod = "accuracy"
    most: int | None = None
    max_bytes: int | None = None
    kappa: float | None = None


@dataclass(frozen=True)
class Routes:
    """What was learned from answers: accuracy and right − wrong answers by category."""

    options: SelectionOptions
    accuracy_MS: Array  # shrunk
    lead_MS: Array  # right − wrong
    total_M: Array  # of all categories
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
        if self.options.method == "symbolic":
            weight_MN = recruit(self.lead_MS @ known_NS.T, self.total_M, open_MN)
            weight_MN *= _top(weight_MN, self.options.most or len(weight_MN))
            weight_MN = share(weight_MN, weight_MN.sum(axis=0), 0.0)
        else:
            score_MN = share(self.accuracy_MS @ known_NS.T, n_N, 0.0)
            weight_MN = self._votes(score_MN, open_MN)
        return np.where(n_N > 0, weight_MN, self._best(self.overall_M[:, None], open_MN))

    def _votes(self, score_MN: Array, open_MN: Array) -> Array:
        score_MN = np.where(open_MN, score_MN, -np.inf)
        if (most := self.options.most or 1) == 1:
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


def impute(right_MN: Array) -> Array:
    """`right_MN` with what the models are expected to give where they did not answer.

    By least squares a right answer is the sum of what the question and what the model adds, so that
    models are compared on questions that several answered: one that answered only easy questions
    is not the better for it. Where no chain of common questions joins two models, they are equal.
    """
    is_answered_MN = np.isfinite(right_MN)
    if is_answered_MN.all():
        return right_MN
    one_MN, n_N = 1.0 * is_answered_MN, is_answered_MN.sum(axis=0)
    right_MN = np.nan_to_num(right_MN)
    mean_N = share(right_MN.sum(axis=0), n_N, 0.0)
    gain_M = (one_MN * (right_MN - mean_N)).sum(axis=1)
    laplacian_MM = np.diag(one_MN.sum(axis=1)) - share(one_MN, n_N, 0.0) @ one_MN.T
    model_M = np.linalg.lstsq(laplacian_MM, gain_M, rcond=1e-9)[0]
    question_N = mean_N - share(model_M @ one_MN, n_N, 0.0)
    return np.where(is_answered_MN, right_MN, question_N + model_M[:, None])


def fit(
    right_MN: Array, category_NS: Array, size_M: Array, options: SelectionOptions, chance: float
) -> Routes:
    """The routes that answers teach.

    Accuracy in a category is shrunk to the model's overall: (right + κ·overall) / (n + κ). All are
    accuracies on the same questions, of which n were answered by this model and another.
    """
    n_S, n_MS = category_NS.sum(axis=0), compared(right_MN) @ category_NS
    right_MS = np.column_stack(
        [impute(right_MN[:, own_N > 0]).sum(axis=1) for own_N in category_NS.T]
    )
    imputed_MN = impute(right_MN)
    overall_M = imputed_MN.mean(axis=1)
    kappa = shrinkage(right_MN, category_NS) if options.kappa is None else options.kappa
    own_MS = np.where(n_MS > 0, n_MS / np.maximum(n_MS + kappa, 1), 0.0)  # 0 for κ = ∞
    accuracy_MS = own_MS * share(right_MS, n_S, 0.0) + (1 - own_MS) * overall_M[:, None]
    fits_M, is_held_M = np.ones(len(size_M), dtype=bool), np.ones(len(size_M), dtype=bool)
    if options.max_bytes is not None:
        fits_M = size_M <= options.max_bytes
        is_held_M = best_set(accuracy_MS * n_S, size_M, options.max_bytes)
        if is_held_M.sum() == 1:  # nothing is chosen, so it is the best single one of equals
            is_held_M = np.arange(len(size_M)) == np.where(fits_M, overall_M, -np.inf).argmax()
    is_answered_MS: Array = np.isfinite(right_MN) @ category_NS > 0
    return Routes(
        options=options,
        accuracy_MS=accuracy_MS,
        lead_MS=np.where(is_answered_MS, 2 * right_MS - n_S, 0.0),
        total_M=(2 * imputed_MN @ category_NS - n_S).sum(axis=1),
        overall_M=overall_M,
        fits_M=fits_M,
        is_held_M=is_held_M,
        is_seen_S=np.any(is_answered_MS, axis=0),
        chance=chance,
        kappa=kappa,
    )


def compared(right_MN: Array) -> Array:
    """Which answers are to questions that another model answered too."""
    is_answered_MN = np.isfinite(right_MN)
    return np.asarray(is_answered_MN & (is_answered_MN.sum(axis=0) > 1))


def shrinkage(right_MN: Array, category_NS: Array) -> float:
    """κ = variance within / variance between categories, by moments; ∞ without the latter.

    That of a beta-binomial, of the differences of each model from the mean of all on the same
    question: categories that are hard for all models do not count as differences between models.
    """
    is_compared_MN, right_MN = compared(right_MN), impute(right_MN)
    mean_N = right_MN.sum(axis=0) / len(right_MN)
    gain_MN = np.where(is_compared_MN, right_MN - mean_N, 0.0)
    n_MS, sum_MS = is_compared_MN @ category_NS * 1.0, gain_MN @ category_NS
    n_M1, mean_MS = n_MS.sum(axis=1, keepdims=True), share(sum_MS, n_MS, 0.0)
    mean_M1 = share(sum_MS.sum(axis=1, keepdims=True), n_M1, 0.0)
    n_free = float((n_M1 - (n_MS > 0).sum(axis=1, keepdims=True)).sum())
    squares = float((gain_MN**2 @ category_NS).sum() - (n_MS * mean_MS**2).sum())
    within = max(squares, 0.0) / n_free if n_free > 0 else 0.0
    k_M = np.maximum((n_MS > 0).sum(axis=1) - 1, 0)
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
    predicted_N: Array | None  # with predicted categories


def cross_fit_routes(
    answered: Answered,
    category_NS: Array,
    options: SelectionOptions,
    seed: int = 0,
    predicted_NS: Array | None = None,
) -> CrossFitted:
    """Chooses on four folds and answers the fifth, for each of five; repeats share a fold."""
    n = len(answered.answer_N)
    rights = {name: np.zeros(n, dtype=bool) for name in ("chosen", "single", "votes", "predicted")}
    fold_N = folds_of(answered, seed)
    for fold in range(FOLDS):
        own_N = fold_N == fold
        if not own_N.any():
            continue
        seen = answered.right_MN[:, ~own_N], category_NS[~own_N]
        routes = fit(*seen, answered.size_M, options, answered.chance)
        is_answered_MN = answered.is_answered_MN
        weights = {
            "chosen": routes.weights(category_NS, is_answered_MN),
            "single": routes.single_weights(is_answered_MN),
            "votes": routes.equal_weights(is_answered_MN),
        }
        if predicted_NS is not None:
            weights["predicted"] = routes.weights(predicted_NS, is_answered_MN)
        for name, weight_MN in weights.items():
            rights[name][own_N] = answered.is_right(weight_MN)[own_N]
    predicted_N = None if predicted_NS is None else rights["predicted"]
    return CrossFitted(rights["chosen"], rights["single"], rights["votes"], predicted_N)


def folds_of(answered: Answered, seed: int) -> Array:
    """The fold of each question, as `reweight --cross-fit` deals them."""
    return deal(answered.subject_N.tolist(), answered.group_N.tolist(), seed)


def most_right(answered: Answered, routes: Routes) -> int:
    """The most right answers of a model that fits: its own, else those of the best single one."""
    is_open_MN = answered.is_answered_MN & routes.fits_M[:, None]
    other_N = answered.is_right(routes.single_weights(answered.is_answered_MN))
    right_MN = np.where(is_open_MN, answered.right_MN, other_N)
    return int(right_MN[routes.fits_M].sum(axis=1).max())


def oracle_null(answered: Answered, routes: Routes, seed: int = 0) -> tuple[float, float]:
    """95 % range of an oracle's accuracy if the models that fit differed by chance alone.

    One list of answers for each model, drawn from the choice probabilities of the best single one;
    the odds of its right choices are multiplied so that each list is as accurate as its model on
    the questions that it answered, and has answers to these alone.
    """
    from scipy.special import expit, logit  # not needed to start

    single_N = routes.single_weights(answered.is_answered_MN).argmax(axis=0)
    logprob_NC = answered.logprob_MNC[single_N, np.arange(len(single_N))]
    right_N = np.exp(right_logprobs(np.nan_to_num(logprob_NC, nan=np.log(0.5)), answered.answer_N))
    odds_N = logit(np.clip(right_N, 1e-9, 1 - 1e-9))
    missed_N = np.ones(len(odds_N))
    for m in np.flatnonzero(routes.fits_M):
        own_N = answered.is_answered_MN[m]
        accuracy, low, high = answered.right_MN[m, own_N].mean(), -100.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2
            below = expit(odds_N[own_N] + middle).mean() < accuracy
            low, high = (middle, high) if below else (low, middle)
        missed_N[own_N] *= 1 - expit(odds_N[own_N] + high)
    rng = np.random.default_rng(seed)
    drawn = [(rng.random(len(missed_N)) >= missed_N).mean() for _ in range(DRAWS)]
    least, most = np.quantile(drawn, [0.025, 0.975])
    return float(least), float(most)


def predict_labels(feature_NX: Array, label_N: Array, fold_N: Array, ridge: float = 1.0) -> Array:
    """The label (N,) that a logistic regression predicts, fitted without the question's fold."""
    predicted_N, n_labels = np.zeros_like(label_N), int(label_N.max()) + 1
    for fold in np.unique(fold_N):
        own_N = fold_N == fold
        fitted = fit_logistic(feature_NX[~own_N], label_N[~own_N], n_labels, ridge)
        predicted_N[own_N] = fitted.scores(feature_NX[own_N]).argmax(axis=1)
    return predicted_N
