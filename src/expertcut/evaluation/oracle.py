"""What choosing a setting for each question could gain, beyond chance. Pure: sees answers alone.

The best of several settings per question always gains, because each flips some answers by chance.
So it is compared with noise variants: as many random changes, each of which flips as many answers
as the setting it stands for. What a reader of the router can gain that chooses beforehand, is
cross-fitted. N questions, S settings, B sets of variants, F figures of a question.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from expertcut.evaluation.logistic import fit_logistic
from expertcut.stats import LEVEL, Array, Comparison, bootstrap_ci95, compare

OracleVerdict = Literal["more than chance", "chance"]
_RIDGE = 1.0  # of the log-odds by standardised figures


@dataclass(frozen=True)
class OracleGain:
    """Gains in accuracy over the base of the best setting per question.

    `noise_gain_B` are those of the sets of variants, `excess` the gain beyond their mean, with its
    95 % interval over questions.
    """

    accuracy: float
    gain: float
    noise_gain_B: Array
    excess: float
    ci95: tuple[float, float]

    @property
    def p(self) -> float:
        """(1 + sets that gain at least as much) / (1 + sets)."""
        return float(1 + (self.noise_gain_B >= self.gain - 1e-12).sum()) / (
            1 + len(self.noise_gain_B)
        )

    @property
    def verdict(self) -> OracleVerdict:
        """Beyond chance where variants seldom gain as much, and the excess is above 0."""
        return "more than chance" if self.p < LEVEL and self.ci95[0] > 0 else "chance"


def oracle_gain(base_N: Array, right_SN: Array, noise_BSN: Array, seed: int = 0) -> OracleGain:
    """The best of the base and S settings for each question, against B sets of S variants."""
    best_N = base_N | right_SN.any(axis=0)
    noise_BN = base_N | noise_BSN.any(axis=1)
    excess_N = best_N.astype(float) - noise_BN.mean(axis=0)
    accuracy = float(base_N.mean())
    return OracleGain(
        accuracy=float(best_N.mean()),
        gain=float(best_N.mean()) - accuracy,
        noise_gain_B=noise_BN.mean(axis=1) - accuracy,
        excess=float(excess_N.mean()),
        ci95=bootstrap_ci95(excess_N, np.ones(len(excess_N)), seed, draws=2000),
    )


def reader_gain(base_N: Array, right_SN: Array, figures_NF: Array, fold_N: Array) -> Comparison:
    """The base against the setting that a logistic reader of some figures chooses beforehand.

    For each fold it is fitted on the others: per setting the log-odds of a right answer.
    """
    chosen_N = base_N.copy()
    all_SN = np.concatenate([base_N[None], right_SN])
    for fold in np.unique(fold_N):
        is_own_N = fold_N == fold
        odds_SN = np.empty((len(all_SN), is_own_N.sum()))
        for odds_N, right_N in zip(odds_SN, all_SN, strict=True):
            fitted = fit_logistic(figures_NF[~is_own_N], 1 * right_N[~is_own_N], 2, 2 * _RIDGE)
            odds_N[:] = np.diff(fitted.scores(figures_NF[is_own_N]))[:, 0]
        best_N = odds_SN.argmax(axis=0)  # of ties the base
        chosen_N[is_own_N] = all_SN[:, is_own_N][best_N, np.arange(len(best_N))]
    return compare(base_N, chosen_N)
