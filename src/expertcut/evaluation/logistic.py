"""Logistic regression with a ridge: what figures of a question tell beforehand. numpy and scipy.

Axes: N questions, X figures, S labels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from expertcut.errors import ProfileError
from expertcut.stats import Array

_STEPS = 2000
_RIDGE_OF_CONSTANT = 1e-6  # keeps it finite where a label is absent


@dataclass(frozen=True)
class LogisticRegression:
    """A fitted softmax over labels; the last row of `weight_XS` is the constant."""

    mean_X: Array
    scale_X: Array
    weight_XS: Array

    def scores(self, figure_NX: Array) -> Array:
        """Log p of each label (N, S), up to a constant of each question."""
        return np.asarray(_with_one((figure_NX - self.mean_X) / self.scale_X) @ self.weight_XS)


def fit_logistic(
    figure_NX: Array, label_N: Array, n_labels: int, ridge: float = 1.0
) -> LogisticRegression:
    """Multinomial logistic regression on standardised figures, penalty ½·ridge·‖W‖².

    With two labels this is the usual binary regression of half the ridge. Raises ProfileError where
    the optimiser does not converge.
    """
    from scipy.optimize import minimize  # not needed to start
    from scipy.special import log_softmax

    n, mean_X, scale_X = len(label_N), figure_NX.mean(axis=0), figure_NX.std(axis=0)
    scale_X = np.where(scale_X > 1e-12, scale_X, 1.0)
    one_NX = _with_one((figure_NX - mean_X) / scale_X)
    is_label_NS = label_N[:, None] == np.arange(n_labels)
    ridge_X1 = np.r_[np.full(figure_NX.shape[1], ridge), _RIDGE_OF_CONSTANT][:, None]

    def loss(flat: Array) -> tuple[float, Array]:
        weight_XS = flat.reshape(-1, n_labels)
        log_NS = log_softmax(one_NX @ weight_XS, axis=1)
        penalised_XS = ridge_X1 * weight_XS
        value = 0.5 * float((penalised_XS * weight_XS).sum()) - float(log_NS[is_label_NS].sum())
        slope_XS = one_NX.T @ (np.exp(log_NS) - is_label_NS) + penalised_XS
        return value / n, slope_XS.ravel() / n

    start = np.zeros(one_NX.shape[1] * n_labels)
    until: Any = {"maxiter": _STEPS, "ftol": 1e-12, "gtol": 1e-7}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=until)
    if not found.success and np.abs(found.jac).max() > 1e-5:  # else at the precision of floats
        raise ProfileError(
            f"the logistic regression on {figure_NX.shape[1]:,} figures of {n:,} questions did not "
            f"converge ({found.message}): read fewer layers, or ask more questions"
        )
    return LogisticRegression(mean_X, scale_X, found.x.reshape(-1, n_labels))


def _with_one(figure_NX: Array) -> Array:
    return np.column_stack([figure_NX, np.ones(len(figure_NX))])
