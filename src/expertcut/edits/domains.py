"""What each domain of several keeps under a cut; the blend whose worst domain keeps most.

A domain's saliencies count as shares of their layer's sum (`selection.normalised`), so that domains
and layers compare; what a domain keeps is its mean share of the kept experts over the layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

from expertcut.edits.plan import ids_text
from expertcut.errors import PlanError
from expertcut.stats import Array, spearman

_DIGITS = 9  # of a fraction of an expert in a solution of the linear program


class Limit(NamedTuple):
    """`least` to `most` of these experts (layer, id) stay."""

    experts: Sequence[tuple[int, int]]
    least: int
    most: int


class Relaxed(NamedTuple):
    """A solution of the linear program; experts may stay in part."""

    weights_D: Array  # of the domains' shares, they sum to 1
    kept_LE: list[Array]  # fraction of each expert that stays, per layer
    worst: float  # what the worst domain keeps: no cut within the limits keeps more


def kept_shares(shares: Sequence[Array], keep: Sequence[Sequence[int]]) -> Array:
    """What each domain keeps (D,) of its shares (D, E) per layer, the mean over the layers."""
    kept = [s_DE[:, list(ids)].sum(axis=1) for s_DE, ids in zip(shares, keep, strict=True)]
    return np.asarray(np.mean(kept, axis=0))


def maxmin(
    shares: Sequence[Array], limits: Sequence[Limit], stay: Sequence[Sequence[int]]
) -> Relaxed:
    """Maximises what the worst domain keeps, as a linear program over fractions of experts.

    `shares` are (D, E) per layer; experts in `stay`, by layer, stay whole. The weights are the dual
    values of the domains: the kept experts are those with the largest weighted shares, but for at
    most as many as there are domains and shared limits, of which a fraction stays. Raises
    PlanError: the limits contradict each other.
    """
    from scipy.optimize import linprog  # slow import

    n_domains, sizes = len(shares[0]), [share_DE.shape[1] for share_DE in shares]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    n_experts = int(starts[-1])
    # Variables: the fraction of each expert, then what the worst domain keeps.
    at_least_DX = np.hstack(
        [-np.concatenate(shares, axis=1) / len(shares), np.ones((n_domains, 1))]
    )
    rows, ends = [at_least_DX], [np.zeros(n_domains)]
    equal_rows: list[Array] = []
    equal_ends: list[float] = []
    for experts, least, most in limits:
        row = np.zeros((1, n_experts + 1))
        row[0, [starts[layer] + expert for layer, expert in experts]] = 1
        if least == most:
            equal_rows.append(row)
            equal_ends.append(most)
        else:
            rows += [row, -row]
            ends += [np.array([most]), np.array([-least])]
    is_whole_X = np.zeros(n_experts + 1, dtype=bool)
    for layer, ids in enumerate(stay):
        is_whole_X[[starts[layer] + expert for expert in ids]] = True
    found = linprog(
        np.append(np.zeros(n_experts), -1.0),
        A_ub=np.vstack(rows),
        b_ub=np.concatenate(ends),
        A_eq=np.vstack(equal_rows) if equal_rows else None,
        b_eq=equal_ends or None,
        bounds=[(float(is_whole), 1.0) for is_whole in is_whole_X],
        method="highs-ds",  # a vertex, in which few experts stay in part
    )
    if found.x is None or found.status != 0:
        named = ", ".join(f"{i}: {ids_text(tuple(ids))}" for i, ids in enumerate(stay) if ids)
        raise PlanError(f"no cut of this size keeps what must stay ({named or 'nothing'})")
    dual_D = np.maximum(-np.asarray(found.ineqlin.marginals)[:n_domains], 0)
    total = dual_D.sum()
    weights_D = dual_D / total if total > 0 else np.full(n_domains, 1 / n_domains)
    kept_X = np.round(found.x[:-1], _DIGITS)
    return Relaxed(weights_D, np.split(kept_X, starts[1:-1]), float(found.x[-1]))


@dataclass(frozen=True)
class Overlap:
    """Saliencies of one model in several domains, and the cut of each domain by its own."""

    names: tuple[str, ...]
    scores: Mapping[str, Sequence[Array]]  # (E,) per layer
    shares: Sequence[Array]  # (D, E) per layer
    keep: Mapping[str, Sequence[frozenset[int]]]  # of each domain's own cut, per layer

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        """Every two domains."""
        return combinations(self.names, 2)

    def correlations(self, a: str, b: str) -> list[float]:
        """Spearman's rank correlation of two domains by layer, NaN if one is constant."""
        return [spearman(x, y) for x, y in zip(self.scores[a], self.scores[b], strict=True)]

    def jaccards(self, a: str, b: str) -> list[float]:
        """Experts that both cuts keep, of those that either keeps, by layer."""
        pairs = zip(self.keep[a], self.keep[b], strict=True)
        return [len(x & y) / len(x | y) for x, y in pairs]

    def kept(self, domain: str, cut: str) -> list[float]:
        """What a domain keeps under a domain's cut, by layer."""
        d = self.names.index(domain)
        pairs = zip(self.shares, self.keep[cut], strict=True)
        return [float(share_DE[d, sorted(ids)].sum()) for share_DE, ids in pairs]
