"""How local routing is: whether tokens near each other share experts, and what a cache then hits.

SRP and SCH are the measures of Liang et al. (2025), arXiv 2505.16056: of the experts that the
tokens of a segment use, how many a choice fixed for the segment serves (segment routing best
performance), and the hit rate of a cache that knows the next segment (segment cache best hit
rate).

S are sequences, T tokens, L MoE layers, K places of a token, E experts, R rows (one for each
sequence and layer), C experts that a cache holds, M uses of an expert in a segment of M − 1 tokens,
D draws of a bootstrap.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from expertcut.profiling import trace
from expertcut.profiling.expert_load import one_hot, places, use_counts
from expertcut.stats import MIN_DOCUMENTS, Array

Policy = Literal["lru", "lfu", "belady"]
POLICIES: tuple[Policy, ...] = ("lru", "lfu", "belady")
DRAWS = 1000
_ROWS = 2048  # of a simulation at once
_MOST_PASSES = 40  # over small numbers, which are faster to compare than to count as indices
_HIGH = 1 << 32  # a priority: a count in the upper half, the time of the last use in the lower
_MOST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Rate:
    """A share of the whole model, with its interval over sequences, and of each layer (L,)."""

    whole: float
    ci95: tuple[float, float] | None
    by_layer_L: Array


@dataclass(frozen=True)
class Srp(Rate):
    """SRP, and the caches that it implies in experts of a layer: on average, and of each layer."""

    size: float
    size_L: Array


@dataclass(frozen=True)
class Locality:
    """SRP by segment length, hit rates by policy (SCH: by segment length) and cache size.

    Cache sizes are multiples of the experts per token; `size_CL` are experts of each layer.
    """

    srp: dict[int, Srp]
    caches: tuple[float, ...]
    size_CL: Array
    hits: dict[tuple[str | int, float], Rate]


def measure(
    halves: Sequence[Sequence[trace.Sequence]],
    n_experts_L: Sequence[int],
    segments: Sequence[int],
    caches: Sequence[float],
) -> Locality:
    """All of them; segments longer than every sequence are left out."""
    sequences = [s for half in halves for s in half]
    places_L, choices_SL = places(sequences), choices(sequences)
    segments = [m for m in segments if m <= max(map(len, sequences))]
    size_CL = np.minimum(np.ceil(np.outer(caches, places_L)), n_experts_L).astype(int)
    hits: dict[tuple[str | int, float], Rate] = {}
    for cache, size_L in zip(caches, size_CL, strict=True):
        for policy in (*POLICIES, *segments):
            hits_SL = cache_hits(sequences, n_experts_L, policy, size_L)
            hits[policy, cache] = rate(hits_SL, choices_SL)
        hits["static", cache] = rate(static_hits(halves, n_experts_L, size_L), choices_SL)
    srp = {m: _srp(segment_uses(sequences, n_experts_L, m), places_L) for m in segments}
    return Locality(srp, tuple(caches), size_CL, hits)


def rate(hits_SL: Array, choices_SL: Array) -> Rate:
    """Σ hits / Σ choices; NaN where nothing was chosen."""
    hits_S, choices_S = hits_SL.sum(1).astype(float), choices_SL.sum(1).astype(float)
    with np.errstate(invalid="ignore"):
        ends = interval(lambda w_DS: (w_DS @ hits_S) / (w_DS @ choices_S), len(hits_S))
        whole, by_layer_L = hits_S.sum() / choices_S.sum(), hits_SL.sum(0) / choices_SL.sum(0)
    is_known = ends is not None and not np.isnan(ends).any()
    ci95 = (float(ends[0]), float(ends[1])) if ends is not None and is_known else None
    return Rate(float(whole), ci95, by_layer_L)


def _srp(uses_SLM: Array, places_L: Array) -> Srp:
    f1_L, size_L = best_f1(uses_SLM.sum(0))
    f1, size = best_f1(uses_SLM.sum((0, 1)))
    uses_SM = uses_SLM[uses_SLM.any((1, 2))].sum(1).astype(float)
    ends = interval(lambda w_DS: best_f1(w_DS @ uses_SM)[0], len(uses_SM))
    ci95 = None if ends is None else (float(ends[0]), float(ends[1]))
    return Srp(float(f1), ci95, f1_L, float(size * places_L.mean()), size_L * places_L)


def segment_uses(
    sequences: Sequence[trace.Sequence], n_experts_L: Sequence[int], length: int
) -> Array:
    """(S, L, M): segments of `length` tokens and experts used M times in them, in each sequence.

    Every token begins a segment that does not reach past its sequence.
    """
    n_layers = len(n_experts_L)
    uses_SLM = np.zeros((len(sequences), n_layers, length + 1), np.int32)
    # Differences of running counts: exact also where those pass the largest number of their type.
    dtype = np.uint8 if length < 256 else np.uint32
    for uses_LM, sequence in zip(uses_SLM, sequences, strict=True):
        if len(sequence) < length:
            continue
        for layer, n_experts in enumerate(n_experts_L):
            before_TE = np.zeros((len(sequence) + 1, n_experts), dtype)
            chosen_TE = one_hot(sequence.experts_TLK[:, layer], n_experts, dtype)
            np.cumsum(chosen_TE, axis=0, dtype=dtype, out=before_TE[1:])
            uses_LM[layer] = _histogram(before_TE[length:] - before_TE[:-length], length)
    return uses_SLM


def _histogram(uses_TE: Array, most: int) -> Array:
    """How often each number from 0 to `most` occurs."""
    largest = int(uses_TE.max())
    if largest > _MOST_PASSES:
        return np.bincount(uses_TE.ravel(), minlength=most + 1)
    counts_M = np.zeros(most + 1, int)
    for n in range(1, largest + 1):
        counts_M[n] = np.count_nonzero(uses_TE == n)
    counts_M[0] = uses_TE.size - counts_M.sum()
    return counts_M


def best_f1(uses_XM: Array) -> tuple[Array, Array]:
    """SRP (X,) and the cache it implies, in multiples of the experts per token.

    Experts with at least c uses in a segment are served to all its tokens; c is the best one for
    the F1 of the choices: 2 Σ_{n≥c} n / (m #{n≥c} + Σ n). As moe-lrc 31_srp_refine.py.
    """
    length = uses_XM.shape[-1] - 1
    uses_XM = uses_XM.astype(float)

    def at_least(values_XM: Array) -> Array:
        return np.asarray(values_XM[..., ::-1].cumsum(-1)[..., ::-1])

    served_XM = at_least(uses_XM * np.arange(length + 1))
    offered_XM = length * at_least(uses_XM)
    all_X1 = served_XM[..., :1]
    f1_XM = 2 * served_XM / np.maximum(offered_XM + all_X1, 1)
    best_X1 = f1_XM.argmax(-1, keepdims=True)
    offered_X1 = np.take_along_axis(offered_XM, best_X1, -1)
    size_X1 = offered_X1 * (all_X1 > 0) / np.maximum(all_X1, 1)
    return np.take_along_axis(f1_XM, best_X1, -1)[..., 0], size_X1[..., 0]


def interval(
    statistic: Callable[[Array], Array], n_sequences: int, seed: int = 0
) -> tuple[Array, Array] | None:
    """95 % interval of a statistic by redrawing the sequences, as moe-lrc: 2θ − quantile.

    `statistic` takes how often each sequence counts (D, S) and returns (D, …). None of fewer than
    10 sequences, of which a bootstrap is too narrow.
    """
    if n_sequences < MIN_DOCUMENTS:
        return None
    drawn_DS = np.random.default_rng(seed).integers(0, n_sequences, (DRAWS, n_sequences))
    drawn_DS += n_sequences * np.arange(DRAWS)[:, None]
    weights_DS = np.bincount(drawn_DS.ravel(), minlength=drawn_DS.size).reshape(drawn_DS.shape)
    whole = statistic(np.ones((1, n_sequences)))[0]
    draws = np.sort(statistic(weights_DS.astype(float)), axis=0)
    n_outside = round(DRAWS * 0.025)
    return 2 * whole - draws[DRAWS - n_outside], 2 * whole - draws[n_outside]


def choices(sequences: Sequence[trace.Sequence]) -> Array:
    """(S, L) choices of all tokens."""
    return np.stack([(s.experts_TLK >= 0).sum((0, 2)) for s in sequences])


def cache_hits(
    sequences: Sequence[trace.Sequence],
    n_experts_L: Sequence[int],
    policy: Policy | int,
    size_L: Sequence[int],
) -> Array:
    """(S, L) choices that a cache of each layer holds when their token comes; it starts empty.

    The experts of a token are loaded one after the other, each for the expert of least priority.
    `lru` keeps those used last, `lfu` those used most (ties: last), `belady` those used next; a
    number of tokens m those used most in the m tokens from this one on (ties: last): SCH of a
    segment of m. Source: moe-lrc 50_chr_calc.py, 41_sch_calc.py (`calc_fsf`).
    """
    hits_SL = np.zeros((len(sequences), len(n_experts_L)), np.int64)
    order = sorted(range(len(sequences)), key=lambda s: -len(sequences[s]))
    for rows in _pieces(order, max(1, _ROWS // len(n_experts_L))):
        experts_TRK, active_T = _stacked([sequences[s] for s in rows], max(n_experts_L))
        size_R = np.tile(size_L, len(rows))
        hits_R = _Simulation(experts_TRK, active_T, max(n_experts_L)).run(policy, size_R)
        hits_SL[rows] = hits_R.reshape(len(rows), -1)
    return hits_SL


def static_hits(
    halves: Sequence[Sequence[trace.Sequence]], n_experts_L: Sequence[int], size_L: Sequence[int]
) -> Array:
    """(S, L), first half first: hits of the experts used most in the other half; ties by number."""
    most = max(n_experts_L)
    hits = []
    for own, other in zip(halves, halves[::-1], strict=True):
        is_held_LE = np.zeros((len(n_experts_L), most + 1), bool)
        for layer, (size, uses_E) in enumerate(
            zip(size_L, use_counts(other, len(n_experts_L), most), strict=True)
        ):
            is_held_LE[layer, np.argsort(-uses_E, kind="stable")[:size]] = True
        layers_L1 = np.arange(len(n_experts_L))[:, None]
        hits += [is_held_LE[layers_L1, s.experts_TLK].sum((0, 2)) for s in own]
    return np.stack(hits)


def _pieces(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    ends = [*range(0, len(order), size), len(order)]
    yield from (order[start:end] for start, end in pairwise(ends))


def _stacked(sequences: Sequence[trace.Sequence], n_experts: int) -> tuple[Array, Array]:
    """Experts (T, R, K) and the rows (T,) that still go on; the longest sequence comes first.

    An empty place is expert number E.
    """
    n_layers, n_places = sequences[0].experts_TLK.shape[1:]
    shape = (len(sequences[0]), len(sequences) * n_layers, n_places)
    experts_TRK = np.full(shape, n_experts, np.int64)
    for n, s in enumerate(sequences):
        own = s.experts_TLK.astype(np.int64)
        rows = slice(n * n_layers, (n + 1) * n_layers)
        experts_TRK[: len(s), rows] = np.where(own < 0, n_experts, own)
    lengths = np.array([len(s) for s in sequences])
    active_T = (lengths > np.arange(len(sequences[0]))[:, None]).sum(1) * n_layers
    return experts_TRK, active_T


class _Simulation:
    """Caches of all rows at once, token by token."""

    def __init__(self, experts_TRK: Array, active_T: Array, n_experts: int) -> None:
        self.experts_TRK, self.active_T, self.n_experts = experts_TRK, active_T, n_experts
        self.row_R = np.arange(experts_TRK.shape[1])

    def run(self, policy: Policy | int, size_R: Array) -> Array:
        """Hits (R,) of caches of `size_R` experts."""
        n_tokens, n_rows, n_places = self.experts_TRK.shape
        width, most = self.n_experts + 2, int(size_R.max(initial=1))
        # Slot `most` belongs to the empty place, and what an empty slot holds is the last expert.
        slot_RE = np.full((n_rows, width), -1)
        slot_RE[:, self.n_experts] = most
        held_RC = np.full((n_rows, most + 1), width - 1)
        priority_RC = np.where(np.arange(most + 1) < size_R[:, None], -_MOST, _MOST)
        slots, held, priorities = slot_RE.reshape(-1), held_RC.reshape(-1), priority_RC.reshape(-1)
        priority_TRK = self._priorities(policy)
        hits_R = np.zeros(n_rows, np.int64)
        for t in range(n_tokens):
            row_R = self.row_R[: self.active_T[t]]
            key_RK = self.experts_TRK[t, : len(row_R)] + width * row_R[:, None]
            hits_R[: len(row_R)] += (slots[key_RK] >= 0).sum(1)
            for k in range(n_places):
                key_R = key_RK[:, k]
                slot_R = slots[key_R]
                if len(missed := np.flatnonzero(slot_R < 0)):
                    slot_R[missed] = victim = priority_RC[missed].argmin(1)
                    place = victim + (most + 1) * missed
                    slots[held[place] + width * missed] = -1
                    held[place] = self.experts_TRK[t, missed, k]
                    slots[key_R[missed]] = victim
                priorities[slot_R + (most + 1) * row_R] = priority_TRK[t, : len(row_R), k]
            if isinstance(policy, int) and t + policy < n_tokens:  # a token enters the segment
                row_R = self.row_R[: self.active_T[t + policy]]
                slot_RK = slots[self.experts_TRK[t + policy, : len(row_R)] + width * row_R[:, None]]
                is_held = (slot_RK >= 0) & (slot_RK < most)
                priorities[(slot_RK + (most + 1) * row_R[:, None])[is_held]] += _HIGH
        is_active_TR1 = (self.row_R < self.active_T[:, None])[..., None]
        empty_R = (self.experts_TRK == self.n_experts).sum((0, 2), where=is_active_TR1)
        return np.asarray(hits_R - empty_R)

    def _priorities(self, policy: Policy | int) -> Array:
        """(T, R, K) of an expert once its token has come; the empty place is never given up."""
        n_tokens, _, n_places = self.experts_TRK.shape
        time_TK = np.arange(n_tokens * n_places).reshape(n_tokens, 1, n_places) + 1
        if policy == "lru":
            value_TRK = np.broadcast_to(time_TK, self.experts_TRK.shape)
        elif policy == "lfu":
            value_TRK = self._uses(0, n_tokens) * _HIGH + time_TK
        elif policy == "belady":
            value_TRK = -self._next_uses()
        else:
            value_TRK = self._uses(policy, policy) * _HIGH + time_TK
        return np.where(self.experts_TRK == self.n_experts, _MOST, value_TRK)

    def _uses(self, n_ahead: int, n_tokens: int) -> Array:
        """(T, R, K): uses of the expert in the `n_tokens` before token T + `n_ahead`.

        Of all before and this one for `n_ahead` 0; of this one's segment, but for this one.
        """
        count_RE = np.zeros((len(self.row_R), self.n_experts + 1), np.int64)
        uses_TRK = np.empty_like(self.experts_TRK)
        row_R1, first = self.row_R[:, None], n_ahead - 1 if n_ahead else 0
        for t in range(first):
            if t < len(self.experts_TRK):
                count_RE[row_R1, self.experts_TRK[t]] += 1
        for t, experts_RK in enumerate(self.experts_TRK):
            if t + first < len(self.experts_TRK):
                count_RE[row_R1, self.experts_TRK[t + first]] += 1
            if n_ahead:
                count_RE[row_R1, experts_RK] -= 1
            uses_TRK[t] = count_RE[row_R1, experts_RK]
        return uses_TRK

    def _next_uses(self) -> Array:
        """(T, R, K): place in the sequence of the expert's next use; of none, behind all others."""
        n_tokens, n_rows, n_places = self.experts_TRK.shape
        end = n_tokens * n_places
        next_RE = np.tile(np.arange(end, end + self.n_experts + 1), (n_rows, 1))
        next_TRK, row_R1 = np.empty_like(self.experts_TRK), self.row_R[:, None]
        for t in reversed(range(n_tokens)):
            next_TRK[t] = next_RE[row_R1, self.experts_TRK[t]]
            next_RE[row_R1, self.experts_TRK[t]] = np.arange(t * n_places, (t + 1) * n_places)
        return next_TRK
