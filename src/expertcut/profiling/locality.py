"""How local routing is: whether tokens near each other share experts, and what a cache then hits.

SRP and SCH are the measures of Liang et al. (2025), arXiv 2505.16056: of the experts that the
tokens of a segment use, how many a choice fixed for the segment serves (segment routing best
performance), and the hit rate of a cache that knows the next segment (segment cache best hit
rate).

S are sequences, T tokens, L MoE layers, K places of a token, E experts, R rows (one for each
sequence and layer), P policies of a cache, C its sizes or the places of a stack, M uses of an
expert in a segment of M − 1 tokens, D draws of a bootstrap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from expertcut.profiling import trace
from expertcut.profiling.expert_load import places, use_counts
from expertcut.stats import MIN_DOCUMENTS, Array

Policy = Literal["lru", "lfu", "belady"]
POLICIES: tuple[Policy, ...] = ("lru", "lfu", "belady")
DRAWS = 1000
_CELLS = 1 << 16  # of the stacks, or of the draws of a bootstrap, at once
_EMPTY = -1  # a place of a stack
_MOST_PASSES = 8  # over numbers that are faster to compare than to count


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
    policies = (*POLICIES, *segments)
    hits_PCSL = cache_hits(sequences, n_experts_L, policies, size_CL)
    static_CSL = [static_hits(halves, n_experts_L, size_L) for size_L in size_CL]
    hits_XSL = np.stack([x for c in range(len(caches)) for x in (*hits_PCSL[:, c], static_CSL[c])])
    names = [(policy, cache) for cache in caches for policy in (*policies, "static")]
    hits = dict(zip(names, rates(hits_XSL, choices_SL), strict=True))
    uses = segment_uses(sequences, n_experts_L, segments)
    srp = {m: _srp(*own, places_L) for m, own in zip(segments, uses, strict=True)}
    return Locality(srp, tuple(caches), size_CL, hits)


def rates(hits_XSL: Array, choices_SL: Array) -> list[Rate]:
    """Σ hits / Σ choices; NaN where nothing was chosen."""
    hits_SX, choices_S1 = hits_XSL.sum(2).T.astype(float), choices_SL.sum(1)[:, None].astype(float)
    with np.errstate(invalid="ignore"):
        ends = interval(lambda w_DS: (w_DS @ hits_SX) / (w_DS @ choices_S1), len(hits_SX))
        whole_X = hits_SX.sum(0) / choices_S1.sum()
        by_layer_XL = hits_XSL.sum(1) / choices_SL.sum(0)
    ends_X2 = np.full((len(hits_XSL), 2), np.nan) if ends is None else np.stack(ends, 1)
    cis = [None if np.isnan(pair).any() else tuple(pair.tolist()) for pair in ends_X2]
    return list(map(Rate, whole_X.tolist(), cis, by_layer_XL))


def rate(hits_SL: Array, choices_SL: Array) -> Rate:
    """The rate of one."""
    return rates(hits_SL[None], choices_SL)[0]


def _srp(uses_SM: Array, uses_LM: Array, places_L: Array) -> Srp:
    f1_L, size_L = best_f1(uses_LM)
    f1, size = best_f1(uses_SM.sum(0))
    uses_SM = uses_SM[uses_SM.any(1)].astype(float)
    ends = interval(lambda w_DS: best_f1(w_DS @ uses_SM)[0], len(uses_SM))
    ci95 = None if ends is None else (float(ends[0]), float(ends[1]))
    return Srp(float(f1), ci95, f1_L, float(size * places_L.mean()), size_L * places_L)


def segment_uses(
    sequences: Sequence[trace.Sequence], n_experts_L: Sequence[int], lengths: Sequence[int]
) -> list[tuple[Array, Array]]:
    """(S, M) and (L, M) by length: segments and experts used M times in them.

    Every token begins a segment that does not reach past its sequence.
    """
    shapes = (len(sequences), len(n_experts_L))
    found = [[np.zeros((n, m + 1), int) for n in shapes] for m in lengths]
    for s, sequence in enumerate(sequences):
        chosen_LTE = _chosen(sequence.experts_TLK, max(n_experts_L))
        for m, (uses_SM, uses_LM) in zip(lengths, found, strict=True):
            if m <= len(sequence):
                for uses_M, total_TE in zip(uses_LM, _window_sums(chosen_LTE, m), strict=True):
                    counts_M = _histogram(total_TE.reshape(-1), m)
                    uses_M += counts_M
                    uses_SM[s] += counts_M
    for m, (uses_SM, uses_LM) in zip(lengths, found, strict=True):
        n_windows_S = np.maximum([len(s) - m + 1 for s in sequences], 0)
        uses_SM[:, 0] = n_windows_S * sum(n_experts_L) - uses_SM[:, 1:].sum(1)
        uses_LM[:, 0] = n_windows_S.sum() * np.array(n_experts_L) - uses_LM[:, 1:].sum(1)
    return [(uses_SM, uses_LM) for uses_SM, uses_LM in found]


def _chosen(experts_TLK: Array, n_experts: int) -> Array:
    """(L, T, E) of 0 and 1; more columns, an even number, hold 0."""
    n_tokens, n_layers, _ = experts_TLK.shape
    width = n_experts + 2 - n_experts % 2
    chosen_LTE = np.zeros((n_layers, n_tokens, width), np.uint8)
    start_LT = width * np.arange(n_layers * n_tokens).reshape(n_layers, n_tokens)
    chosen_LTE.reshape(-1)[start_LT.T[..., None] + experts_TLK] = 1  # −1: a column too many
    chosen_LTE[..., n_experts:] = 0
    return chosen_LTE


def _window_sums(chosen_LTE: Array, length: int) -> Array:
    """Sums of `length` tokens from each on, by doubling."""
    total_LTE, n = chosen_LTE, 1
    for bit in f"{length:b}"[1:]:
        dtype = np.min_scalar_type(2 * n + 1)
        total_LTE, n = np.add(total_LTE[:, :-n], total_LTE[:, n:], dtype=dtype), 2 * n
        if bit == "1":
            total_LTE, n = total_LTE[:, :-1] + chosen_LTE[:, n:], n + 1
    return total_LTE


def _histogram(uses_X: Array, most: int) -> Array:
    """How often each number from 1 to `most` occurs, behind a place for 0."""
    if most <= _MOST_PASSES:
        return np.array([0, *(np.count_nonzero(uses_X == n) for n in range(1, most + 1))])
    if uses_X.itemsize > 1:
        return np.bincount(uses_X, minlength=most + 1)
    pairs = np.bincount(uses_X.view(np.uint16), minlength=(most + 1) << 8).reshape(-1, 256)
    return np.asarray(pairs.sum(0)[: most + 1] + pairs.sum(1))


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
    rng, size = np.random.default_rng(seed), max(1, _CELLS // n_sequences)
    whole = statistic(np.ones((1, n_sequences)))[0]
    found = []
    for start in range(0, DRAWS, size):
        drawn_DS = rng.integers(0, n_sequences, (min(size, DRAWS - start), n_sequences))
        drawn_DS += n_sequences * np.arange(len(drawn_DS))[:, None]
        weights_X = np.bincount(drawn_DS.ravel(), minlength=drawn_DS.size)
        found.append(statistic(weights_X.reshape(drawn_DS.shape).astype(float)))
    draws, n_outside = np.sort(np.concatenate(found), axis=0), round(DRAWS * 0.025)
    return 2 * whole - draws[DRAWS - n_outside], 2 * whole - draws[n_outside]


def choices(sequences: Sequence[trace.Sequence]) -> Array:
    """(S, L) choices of all tokens."""
    return np.stack([(s.experts_TLK >= 0).sum((0, 2)) for s in sequences])


def cache_hits(
    sequences: Sequence[trace.Sequence],
    n_experts_L: Sequence[int],
    policies: Sequence[Policy | int],
    size_CL: Array,
) -> Array:
    """(P, C, S, L) choices that a cache of each layer holds when their token comes.

    It starts empty. The experts of a token are loaded one after the other, each for the expert of
    least priority. `lru` keeps those used last, `lfu` those used most (ties: last), `belady` those
    used next; a number of tokens m those used most in the m tokens from this one on (ties: last):
    SCH of a segment of m. Source: moe-lrc 50_chr_calc.py, 41_sch_calc.py (`calc_fsf`).
    """
    n_layers, depth = len(n_experts_L), int(np.max(size_CL, initial=1))
    hits_PCSL = np.zeros((len(policies), len(size_CL), len(sequences), n_layers), np.int64)
    order = sorted(range(len(sequences)), key=lambda s: -len(sequences[s]))
    n_at_once = max(1, _CELLS // (depth * len(policies) * n_layers))
    for start in range(0, len(order), n_at_once):
        own = order[start : start + n_at_once]
        stacks = _Stacks([sequences[s] for s in own], max(n_experts_L), policies, depth)
        found_CPSL = stacks.run().reshape(-1, len(policies), len(own), n_layers)
        for c, layer in product(range(len(size_CL)), range(n_layers)):
            hits_PCSL[:, c, own, layer] = found_CPSL[size_CL[c][layer], :, :, layer]
    return hits_PCSL


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


class _Stacks:
    """Caches of every size, by all policies and of all rows at once, token by token.

    The first c places of a stack are what a cache of c experts holds, by any priority that does not
    depend on c (Mattson et al. 1970): the expert that is loaded goes on top, and of those above its
    old place the one of least priority sinks, place by place. A priority is a count times `_one`
    plus the time of the last use, from 1; Belady's is larger the sooner the next use.
    """

    def __init__(
        self,
        sequences: Sequence[trace.Sequence],
        n_experts: int,
        policies: Sequence[Policy | int],
        depth: int,
    ) -> None:
        self._key_TKR, self._active_T = _stacked(sequences, n_experts)
        n_tokens, n_places, n_rows = self._key_TKR.shape
        self._one = 1 << (n_tokens * n_places + n_experts).bit_length()
        dtype = np.int32 if (n_tokens + 1) * self._one < 1 << 31 else np.int64
        self._stack_CPR = np.full((depth, len(policies), n_rows), _EMPTY, dtype)
        # Of all experts, in the stack or not. One never used has no time, so it equals none there.
        self._priority_X = np.zeros(len(policies) * n_rows * (n_experts + 1), dtype)
        self._start_P1 = n_rows * (n_experts + 1) * np.arange(len(policies))[:, None]
        self._no_key = n_rows * n_experts  # keys from here on are of empty places
        self._segments = [(p, m) for p, m in enumerate(policies) if isinstance(m, int)]
        steps: dict[Policy | int, int] = {"lru": 0, "lfu": self._one, "belady": 0}
        self._step_P1 = np.array([[steps.get(p, -self._one)] for p in policies], dtype)
        self._belady = [p for p, policy in enumerate(policies) if policy == "belady"]
        if self._belady:
            end = n_tokens * n_places + n_experts
            self._soon_TKR = (end - _next_uses(self._key_TKR, n_experts)).astype(dtype)

    def run(self) -> Array:
        """(C + 1, P, R) choices held by caches of 0 to C experts when their token comes."""
        for p, m in self._segments:
            for t in range(m):
                self._enter(p, t)
        sunk_CPR = np.empty_like(self._stack_CPR)
        found_CPR = np.zeros((len(sunk_CPR) + 1, *sunk_CPR.shape[1:]), np.int32)
        n_before, own_CPR = 0, (self._stack_CPR, sunk_CPR)
        for t, n in enumerate(self._active_T.tolist()):
            if n != n_before:
                stack_CPR, sunk_CPR = (array[..., :n] for array in own_CPR)
                places = list(zip(sunk_CPR, stack_CPR[1:], sunk_CPR[1:], strict=False))
                n_before = n
            key_KPR = self._key_TKR[t, :, None, :n] + self._start_P1
            found_CPR[1:, :, :n] += (stack_CPR[:, None] == self._priority_X[key_KPR]).any(1)
            for k, key_PR in enumerate(key_KPR):
                old_PR, new_PR = self._load(stack_CPR[0], key_PR, t, k)
                np.copyto(stack_CPR, _EMPTY, where=stack_CPR == old_PR)
                sunk_CPR[0] = stack_CPR[0]
                for above_PR, here_PR, sunk_PR in places:
                    np.minimum(above_PR, here_PR, out=sunk_PR)
                np.maximum(stack_CPR[1:], sunk_CPR[:-1], out=stack_CPR[1:])
                stack_CPR[0] = new_PR
            for p, m in self._segments:
                self._enter(p, t + m)
        return np.asarray(found_CPR.cumsum(0))

    def _load(self, top_PR: Array, key_PR: Array, t: int, k: int) -> tuple[Array, Array]:
        """Priorities of the experts at place k of token t before and after their use.

        At an empty place those of what is on top already, which then stays there.
        """
        old_PR = self._priority_X[key_PR]
        new_PR = (old_PR & -self._one) + self._step_P1
        new_PR += t * self._key_TKR.shape[1] + k + 1
        if self._belady:
            new_PR[self._belady] = self._soon_TKR[t, k, : new_PR.shape[1]]
        self._priority_X[key_PR] = new_PR
        is_empty_R = key_PR[0] >= self._no_key
        if is_empty_R.any():
            old_PR, new_PR = (np.where(is_empty_R, top_PR, x) for x in (old_PR, new_PR))
        return old_PR, new_PR

    def _enter(self, policy: int, t: int) -> None:
        """Token t enters the segment of a policy: each of its experts is used once more."""
        if t < len(self._key_TKR):
            n = self._active_T[t]
            key_KR = self._key_TKR[t, :, :n] + self._start_P1[policy]
            old_KR, stack_CR = self._priority_X[key_KR], self._stack_CPR[:, policy, :n]
            self._priority_X[key_KR] = old_KR + self._one
            stack_CR += (stack_CR[:, None] == old_KR).any(1) * stack_CR.dtype.type(self._one)


def _stacked(sequences: Sequence[trace.Sequence], n_experts: int) -> tuple[Array, Array]:
    """Keys E · R + row (T, K, R) and the rows (T,) that still go on; the longest sequence is first.

    An empty place is expert number E.
    """
    n_layers, n_places = sequences[0].experts_TLK.shape[1:]
    n_rows = len(sequences) * n_layers
    key_TKR = np.full((len(sequences[0]), n_places, n_rows), n_experts)
    for n, s in enumerate(sequences):
        own_TKL = s.experts_TLK.transpose(0, 2, 1)
        key_TKR[: len(s), :, n * n_layers : (n + 1) * n_layers] = np.where(
            own_TKL < 0, n_experts, own_TKL
        )
    key_TKR *= n_rows
    key_TKR += np.arange(n_rows)
    lengths = np.array([len(s) for s in sequences])
    active_T = (lengths > np.arange(len(sequences[0]))[:, None]).sum(1) * n_layers
    return key_TKR, active_T


def _next_uses(key_TKR: Array, n_experts: int) -> Array:
    """(T, K, R): place in the sequence of the expert's next use; of none, behind all others."""
    n_tokens, n_places, n_rows = key_TKR.shape
    end = n_tokens * n_places
    next_X = np.arange(end, end + n_experts + 1).repeat(n_rows)
    next_TKR = np.empty_like(key_TKR)
    for t in reversed(range(n_tokens)):
        next_TKR[t] = next_X[key_TKR[t]]
        next_X[key_TKR[t]] = np.arange(t * n_places, (t + 1) * n_places)[:, None]
    return next_TKR
