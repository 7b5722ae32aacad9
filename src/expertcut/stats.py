"""Statistics of answers: intervals, comparison of two models, rank correlation.

N are questions, C choices, E experts, B rows that are ranked independently, X ranked values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from expertcut.documents import Record

Array = np.ndarray[Any, Any]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Z95 = 1.959963984540054  # the 97.5th percentile of the normal distribution
LEVEL = 0.05
MARGIN = 0.01  # a loss of accuracy that is accepted unless another is named
MIN_DOCUMENTS = 10
_DRAWN = 10**8  # documents of a bootstrap, in all draws
_Z90 = 1.2815515655446004
Verdict = Literal["better", "holds", "worse", "undecided"]


@dataclass(frozen=True)
class Accuracy:
    """Micro accuracy over questions; `stderr` is None where every subject has one question."""

    accuracy: float
    stderr: float | None
    ci95: tuple[float, float]
    n_questions: int
    by_subject: dict[str, tuple[float, int]]


def accuracy(is_correct_N: Array, subjects: Sequence[str]) -> Accuracy:
    """Accuracy over all questions and per subject, with Wilson's interval."""
    names, n = np.asarray(subjects), len(is_correct_N)
    by_subject = {
        str(name): (float(is_correct_N[names == name].mean()), int((names == name).sum()))
        for name in dict.fromkeys(subjects)
    }
    stderr = pooled_stderr(list(by_subject.values()))
    ci95 = wilson_interval(float(is_correct_N.sum()) / n, n)
    return Accuracy(float(is_correct_N.mean()), stderr, ci95, n, by_subject)


def pooled_stderr(subjects: Sequence[tuple[float, int]]) -> float | None:
    """√(Σ n p (1 − p) / ((N − S) N)) over (p, n) per subject, as lm-evaluation-harness pools."""
    total = sum(n for _, n in subjects)
    if total == len(subjects):
        return None
    within = sum(n * p * (1 - p) for p, n in subjects)
    return float(np.sqrt(within / ((total - len(subjects)) * total)))


def wilson(share_E: Array, n_E: Array) -> tuple[Array, Array]:
    """Wilson's 95 % interval of shares; n may be an effective, fractional number, NaN where 0."""
    n_E = np.where(n_E > 0, n_E, np.nan)
    z2 = Z95**2
    center_E = (share_E + z2 / (2 * n_E)) / (1 + z2 / n_E)
    variance_E = np.maximum(share_E * (1 - share_E), 0) / n_E + z2 / (4 * n_E * n_E)
    half_E = Z95 * np.sqrt(variance_E) / (1 + z2 / n_E)
    return np.maximum(0.0, center_E - half_E), np.minimum(1.0, center_E + half_E)


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of one share."""
    low, high = wilson(np.array(share), np.array(n))
    return float(low), float(high)


class Comparison(Record):
    """Paired comparison of two models on the same questions."""

    delta: float  # other minus base accuracy
    ci95: tuple[float, float]
    gained: Count  # questions that only the other model answers correctly
    lost: Count  # those that only the base does
    mcnemar_p: Share
    smallest_effect: float  # the smallest change that this many questions detect

    @property
    def is_significant(self) -> bool:
        """By the exact test, and by the interval, which earlier versions wrote too narrow."""
        return self.mcnemar_p < LEVEL and not self.ci95[0] <= 0 <= self.ci95[1]


def compare(base_N: Array, other_N: Array) -> Comparison:
    """Paired comparison of two models' correct answers (N,) bool."""
    n, (gained, lost) = len(base_N), gained_lost(base_N, other_N)
    return Comparison(
        delta=(gained - lost) / n,
        ci95=paired_interval(gained, lost, n),
        gained=gained,
        lost=lost,
        mcnemar_p=mcnemar(gained, lost),
        smallest_effect=smallest_effect(gained, lost, n),
    )


def chance(logprob_NC: Array) -> float:
    """Share of right answers by guessing: the mean of 1 / number of choices."""
    return float((1 / np.isfinite(logprob_NC).sum(axis=1)).mean())


def gained_lost(base_N: Array, other_N: Array) -> tuple[int, int]:
    """Questions that only the other model answers correctly, and those that only the base does."""
    return int((~base_N & other_N).sum()), int((base_N & ~other_N).sum())


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test, 1 where nothing changed."""
    from scipy.special import bdtr  # not needed to start

    return min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))


def paired_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """95 % score interval of the change in accuracy (gained − lost) / n.

    Tango (1998), Statistics in Medicine 17:891. The questions are one sample: subjects play no
    part, so the interval is as wide for one question a subject as for a thousand.
    """
    return -_upper_end(lost, gained, n), _upper_end(gained, lost, n)


def _upper_end(gained: int, lost: int, n: int) -> float:
    """The largest change that the score test does not reject, by bisection."""
    inside, outside = (gained - lost) / n, 1.0
    if _score_accepts(outside, gained, lost, n):
        return outside
    for _ in range(60):  # halvings: an end is then exact to a float's last bits
        middle = (inside + outside) / 2
        if _score_accepts(middle, gained, lost, n):
            inside = middle
        else:
            outside = middle
    return inside


def _score_accepts(change: float, gained: int, lost: int, n: int) -> bool:
    """|gained − lost − n·change| within 1.96 standard deviations, were `change` the true one.

    The rate of lost answers is its maximum-likelihood estimate under that change.
    """
    b = (2 * n - gained + lost) * change - gained - lost
    c = lost * change * (1 - change)
    lost_rate = (math.sqrt(max(0.0, b * b + 8 * n * c)) - b) / (4 * n)
    variance = 2 * lost_rate + change * (1 - change)  # of one question
    return (gained - lost - n * change) ** 2 <= Z95**2 * n * variance


def bootstrap_ci95(
    sum_N: Array, weight_N: Array, seed: int = 0, draws: int = 10_000
) -> tuple[float, float]:
    """95 % percentile interval of Σ sum / Σ weight, by redrawing the N documents with replacement.

    Efron (1979). Paired: `sum_N` are differences of two models on the same documents.
    """
    n, rng = len(sum_N), np.random.default_rng(seed)
    rows = max(1, 2**22 // n)  # draws in memory at once
    ratios = []
    for start in range(0, draws, rows):
        drawn_BN = rng.integers(0, n, (min(rows, draws - start), n))
        ratios.append(sum_N[drawn_BN].sum(axis=1) / weight_N[drawn_BN].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios), [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def document_ci95(sum_D: Array, weight_D: Array) -> tuple[float, float] | None:
    """The same over documents of texts, without those of no weight; None of fewer than 10.

    Of fewer documents a bootstrap is too narrow.
    """
    counts_D = weight_D > 0
    n = int(counts_D.sum())
    if n < MIN_DOCUMENTS:
        return None
    draws = min(10_000, max(1000, _DRAWN // n))
    return bootstrap_ci95(sum_D[counts_D], weight_D[counts_D], draws=draws)


def smallest_effect(gained: int, lost: int, n: int) -> float:
    """2.8 standard errors of the paired difference (80 % power at 5 %), and no less than 3/N.

    3/N is the rule of three: what no change at all in N questions still leaves possible.
    """
    delta = (gained - lost) / n
    return max(3 / n, 2.8 * math.sqrt(max(0.0, (gained + lost) / n**2 - delta**2 / n)))


def verdict(gained: int, lost: int, n: int, margin: float) -> Verdict:
    """Non-inferiority within a margin (a share of the n questions), by the paired 95 % interval.

    `holds` asks that the interval lies above −margin even with one question more lost: without
    this correction for counts, up to 2.9 % of evaluations with a true loss of the margin held.
    """
    low, high = paired_interval(gained, lost, n)
    if low > 0:
        return "better"
    if paired_interval(gained, min(lost + 1, n - gained), n)[0] > -margin:
        return "holds"
    return "worse" if high < 0 else "undecided"


def interval_verdict(ci95: tuple[float, float], margin: float | None) -> Verdict:
    """The same from an interval alone; without a margin nothing holds, it is undecided."""
    low, high = ci95
    if low > 0:
        return "better"
    if margin is not None and low > -margin:
        return "holds"
    return "worse" if high < 0 else "undecided"


def unpaired_z(
    base: tuple[float, float | None], other: tuple[float, float | None]
) -> tuple[float | None, float | None]:
    """Two-sided z test of two (mean, standard error), as if their documents were not the same.

    What lm-evaluation-harness's model_comparator does; None where no error is known.
    """
    if base[1] is None or other[1] is None or not (base[1] or other[1]):
        return None, None
    z = (other[0] - base[0]) / math.hypot(base[1], other[1])
    return z, math.erfc(abs(z) / math.sqrt(2))


def questions_to_hold(gained: int, lost: int, n: int, margin: float) -> int:
    """Questions, to two digits upwards, with which an edit without effect holds 9 times in 10.

    From the share of questions with other answers, one more than was seen, for few questions show
    few. Near none, the interval is as wide as if a share `margin` had other answers.
    """
    discordance = (gained + lost + 1) / (n + 1)
    width = Z95 * math.sqrt(max(discordance, margin)) + _Z90 * math.sqrt(discordance)
    questions = (width / margin) ** 2 + 2 / margin
    unit = 10 ** (math.floor(math.log10(questions)) - 1)
    return int(math.ceil(questions / unit) * unit)


def logprob_shift(a_NC: Array, b_NC: Array, dtype: Any = None) -> tuple[float, float]:
    """Max and median |Δ log p| over the choices (N, C) that both have; the others are −∞.

    An even number of choices has the mean of two as its median, rounded to `dtype` or the arrays'.
    """
    is_choice_NC = np.isfinite(a_NC) & np.isfinite(b_NC)
    shift_X = np.abs(a_NC[is_choice_NC] - b_NC[is_choice_NC])
    return float(shift_X.max()), float(np.median(shift_X.astype(dtype or shift_X.dtype)))


def right_logprobs(logprob_NC: Array, answer_N: Array) -> Array:
    """Log p (N,) of the right choices."""
    return np.asarray(logprob_NC[np.arange(len(answer_N)), answer_N])


def centred_ranks(values_BX: Array) -> Array:
    """Ranks in each row, ties at their mean rank, as distances from the row's mean."""
    from scipy.stats import rankdata  # not needed to start

    ranks_BX: Array = rankdata(values_BX, axis=1)
    return np.asarray(ranks_BX - ranks_BX.mean(axis=1, keepdims=True))


def pearson(a_BX: Array, b_BX: Array) -> Array:
    """Correlation (B,) of centred values; NaN where one does not vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        scale_B = np.sqrt((a_BX**2).sum(axis=1) * (b_BX**2).sum(axis=1))
        return np.asarray((a_BX * b_BX).sum(axis=1) / scale_B)


def spearman(a_E: Array, b_E: Array) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where either is constant."""
    return float(pearson(centred_ranks(a_E[None]), centred_ranks(b_E[None]))[0])


class _Measured(Record):
    """Part of `proof` in plan.json: keys of other versions stay, and absent ones stay absent."""

    model_config = ConfigDict(extra="allow")

    @model_serializer(mode="wrap")
    def _unless_silent(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in values(self).items() if k in self.model_fields_set}


class LogprobShift(_Measured):
    """|Δ log p| between two models over all choices, and answers that differ (`flipped`)."""

    against: str
    questions: int
    max_abs_logprob_diff: float
    median_abs_logprob_diff: float
    flipped: int


class ExpertShares(_Measured):
    """Share of questions that an expert serves: unedited, plan at run time, checkpoint."""

    layer: int
    expert: int
    base: float
    exact: float
    edited: float


class BitExactCheck(_Measured):
    """Questions scored one at a time: no bit changes if no token chose a removed expert."""

    questions: int
    untouched: int  # questions without such a token, shots included
    bit_equal: int  # untouched questions that came out equal


class RoutingAgreement(_Measured):
    """One layer: share of positions that choose the same experts, and of experts in common."""

    layer: int
    same_answer: float
    overlap_answer: float
    same_all: float
    overlap_all: float


class FormResult(_Measured):
    """Answers of one form of the model; `flipped` ones differ from the first form's."""

    form: str
    questions: int
    accuracy: float
    right_logprob: float
    flipped: int


class HeldOutAccuracy(_Measured):
    """Accuracy of the unedited model, and the paired change to the checkpoint."""

    base: Share
    change: Comparison


class TextChange(_Measured):
    """A model against a base on the documents of one source; losses are −log p in nats a token.

    `kl` is KL(base ‖ model), `acceptance` Σ min(p, q), both over the base's likeliest tokens, the
    others as one. `ci95` is that of `delta_loss`, a paired bootstrap over documents.
    """

    against: str
    source: str
    documents: int
    tokens: int
    perplexity: float
    base_perplexity: float
    kl: float
    top1_agreement: float
    acceptance: float
    delta_loss: float
    ci95: tuple[float, float] | None  # None of fewer than 10 documents
    has_bounds: bool = False  # `kl` is a lower bound, `acceptance` an upper one


class HeldOutResult(_Measured):
    """`proof` in plan.json: the checkpoint against the unedited model on questions of a split."""

    model_config = ConfigDict(allow_inf_nan=True)

    fits: tuple[dict[str, int | float], ...] = ()  # figures of fitted directions, by name
    held_out_split: str = ""
    held_out_used: str = ""  # how healing used the questions
    held_out: tuple[LogprobShift, ...] = ()
    answered: HeldOutAccuracy | None = None
    chance: Share | None = None  # the accuracy of guessing; older plans lack it
    held_out_hashes: tuple[str, ...] = ()  # hash lines of the questions
    shares: tuple[ExpertShares, ...] = ()
    alone: BitExactCheck | None = None  # where layout exact only removes experts
    agreement: tuple[RoutingAgreement, ...] = ()  # where layout stock carries biases
    outcomes: tuple[FormResult, ...] = ()  # where any layout carries biases
    rows: tuple[dict[str, int | float], ...] = ()  # figures of router rows, by name
    text: tuple[TextChange, ...] = ()  # where texts judge

    def share(self, layer: int, expert: int) -> ExpertShares:
        """The shares of one expert, by its number before earlier cuts."""
        return next(s for s in self.shares if (s.layer, s.expert) == (layer, expert))
