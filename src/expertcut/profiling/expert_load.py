"""How a trace loads its experts, and which experts of the next layer follow them.

T are tokens, L MoE layers, K places of a token, E experts of a layer, F those of the next, C
capacities, X tenths of a sequence, G figures of one token.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from expertcut.profiling import trace
from expertcut.stats import Array

_TOKENS = 8192  # in memory as one-hot rows at once; whole numbers of float32 stay exact

_POOL = 8  # batches whose tokens are dealt anew
_ITERATIONS = 12  # of the direction in which tokens differ most; a rough one orders them as well


@dataclass(frozen=True)
class Load:
    """Largest load / mean − 1 (MaxVio), coefficient of variation, and E Σ f p where it is known.

    f is an expert's share of the choices and p its mean share of the router's probability (with
    traced logits) or of the gate weight (with traced weights): the load-balancing loss of Switch
    Transformers, 1 where balanced.
    """

    max_vio_L: Array
    variation_L: Array
    balance_loss_L: Array | None


@dataclass(frozen=True)
class Drops:
    """Choices that do not fit an expert's capacity, by capacity, layer and tenth of a sequence."""

    capacities: tuple[float, ...]
    dropped_CLX: Array
    choices_LX: Array


def one_hot(experts_TK: Array, n_experts: int, dtype: type = np.float32) -> Array:
    """(T, E) of 0 and 1: whether a token chose an expert. Empty places choose none."""
    chosen_TE: Array = np.zeros((len(experts_TK), n_experts + 1), dtype)
    chosen_TE[np.arange(len(experts_TK))[:, None], experts_TK] = 1  # −1 is the last column
    return chosen_TE[:, :n_experts]


def transition_counts(
    sequences: Iterable[trace.Sequence], n_experts_L: Sequence[int]
) -> list[Array]:
    """n(l, e → l + 1, f): (E, F) in float64 for each pair of neighbours, L − 1 of them.

    A token counts once for each pair of its choices in the two layers.
    """
    counts = [np.zeros(pair) for pair in pairwise(n_experts_L)]
    for experts_TLK in _batches(sequences):
        before_TE = one_hot(experts_TLK[:, 0], n_experts_L[0])
        for layer, count_EF in enumerate(counts):
            after_TF = one_hot(experts_TLK[:, layer + 1], n_experts_L[layer + 1])
            count_EF += before_TE.T @ after_TF
            before_TE = after_TF
    return counts


def mutual_information(count_EF: Array) -> float:
    """I(e; f) in nats of a table of counts; 0 where an expert says nothing about the next."""
    joint_EF = count_EF / max(count_EF.sum(), 1)
    alone_EF = joint_EF.sum(1, keepdims=True) * joint_EF.sum(0)
    is_seen = joint_EF > 0
    return float((joint_EF[is_seen] * np.log(joint_EF[is_seen] / alone_EF[is_seen])).sum())


def _batches(sequences: Iterable[trace.Sequence]) -> Iterator[Array]:
    """Choices (T, L, K) of all sequences, in pieces of some thousand tokens."""
    held: list[Array] = []
    for sequence in sequences:
        held += np.array_split(sequence.experts_TLK, len(sequence) // _TOKENS + 1)
        while sum(map(len, held)) >= _TOKENS:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)


def places(sequences: Iterable[trace.Sequence]) -> Array:
    """(L,) the most experts that a token has in each layer."""
    most_SL = [(s.experts_TLK >= 0).sum(2).max(0, initial=0) for s in sequences]
    return np.asarray(np.max(most_SL, axis=0))


def use_counts(sequences: Iterable[trace.Sequence], n_layers: int, n_experts: int) -> Array:
    """(L, E) tokens that chose each expert, in all sequences."""
    counts_LE = np.zeros((n_layers, n_experts + 1), np.int64)
    layer_L1 = (n_experts + 1) * np.arange(n_layers)[:, None]
    for s in sequences:
        keys_TLK = s.experts_TLK.astype(np.int64) + 1 + layer_L1
        counts_LE += np.bincount(keys_TLK.ravel(), minlength=counts_LE.size).reshape(n_layers, -1)
    return counts_LE[:, 1:]


def load(sequences: Sequence[trace.Sequence], n_experts_L: Sequence[int]) -> Load:
    """Of all tokens, layer by layer; NaN where a layer routes none."""
    uses = use_counts(sequences, len(n_experts_L), max(n_experts_L))
    uses_by_layer = [uses_E[:n] for uses_E, n in zip(uses, n_experts_L, strict=True)]
    mean_L = np.array([uses_E.mean() or np.nan for uses_E in uses_by_layer])
    most_L, deviation_L = ([f(x) for x in uses_by_layer] for f in (np.max, np.std))
    shares = _probability(sequences, n_experts_L)
    losses = None
    if shares is not None:
        pairs = zip(uses_by_layer, shares, strict=True)
        losses = np.array([len(f_E) * (f_E @ p_E) / (f_E.sum() or np.nan) for f_E, p_E in pairs])
    return Load(np.array(most_L) / mean_L - 1, np.array(deviation_L) / mean_L, losses)


def drops(
    sequences: Iterable[trace.Sequence], n_experts_L: Sequence[int], capacities: Sequence[float]
) -> Drops:
    """First come, first served: an expert takes ⌈c n K / E⌉ of the n tokens of a sequence."""
    sequences, n_layers, most = list(sequences), len(n_experts_L), max(n_experts_L)
    places_L = places(sequences)
    dropped_CLX = np.zeros((len(capacities), n_layers, 10), np.int64)
    choices_LX = np.zeros((n_layers, 10), np.int64)
    for s in sequences:
        flat_XK = s.experts_TLK.reshape(-1, s.experts_TLK.shape[2])
        chosen_TLE = one_hot(flat_XK, most, np.int32).reshape(len(s), n_layers, most)
        place_TLE = chosen_TLE.cumsum(0)  # in the queue of the expert, from 1
        starts_X = np.ceil(np.arange(10) * len(s) / 10).astype(int)
        choices_LX += _by_tenth(chosen_TLE.sum(2), starts_X)
        for c, capacity in enumerate(capacities):
            share_L = capacity * places_L / np.asarray(n_experts_L)
            room_L1 = np.ceil(len(s) * share_L - 1e-9)[:, None]
            is_dropped_TLE = (place_TLE > room_L1) & (chosen_TLE > 0)
            dropped_CLX[c] += _by_tenth(is_dropped_TLE.sum(2), starts_X)
    return Drops(tuple(capacities), dropped_CLX, choices_LX)


def _by_tenth(count_TL: Array, starts_X: Array) -> Array:
    """(L, X) sums over the tokens of each tenth, which may have none."""
    before_TL = np.concatenate([np.zeros_like(count_TL[:1]), count_TL.cumsum(0)])
    return np.diff(before_TL[[*starts_X, len(count_TL)]], axis=0).T


def distinct_experts(experts_TLK: Array, n_experts: int, batch: int) -> Array:
    """(L,) distinct experts that a batch of `batch` tokens uses, on average; NaN without one."""
    n_batches, n_layers = len(experts_TLK) // batch, experts_TLK.shape[1]
    if not n_batches:
        return np.full(n_layers, np.nan)
    flat_XK = experts_TLK[: n_batches * batch].reshape(-1, experts_TLK.shape[2])
    chosen = one_hot(flat_XK, n_experts, np.bool_).reshape(n_batches, batch, n_layers, n_experts)
    return np.asarray(chosen.any(1).sum(2).mean(0))


def grouped(figures_VG: Array, id_T: Array, batch: int) -> Array:
    """An order (T,) of tokens in which those of a batch are alike, within pools of 8 batches.

    `figures_VG` are those of each token id. A pool is halved at the middle of the direction in
    which its tokens differ most, and so on down to batches. ExpertFlow (arXiv 2410.17954) deals
    tokens by their predicted routes likewise.
    """
    order = []
    for start in range(0, len(id_T), _POOL * batch):
        figures_TG = figures_VG[id_T[start : start + _POOL * batch]].astype(np.float32)
        order.append(start + _halved(np.arange(len(figures_TG)), figures_TG, batch))
    return np.concatenate(order)


def _halved(tokens: Array, figures_TG: Array, batch: int) -> Array:
    if len(tokens) <= batch:
        return tokens
    centred_TG = figures_TG[tokens] - figures_TG[tokens].mean(0)
    direction_G = centred_TG[(centred_TG**2).sum(1).argmax()]
    for _ in range(_ITERATIONS):
        direction_G = centred_TG.T @ (centred_TG @ direction_G)
        direction_G /= max(float(np.linalg.norm(direction_G)), 1e-30)
    ordered = tokens[np.argsort(centred_TG @ direction_G, kind="stable")]
    middle = math.ceil(len(tokens) / batch / 2) * batch
    parts = (ordered[:middle], ordered[middle:])
    return np.concatenate([_halved(part, figures_TG, batch) for part in parts])


def _probability(
    sequences: Sequence[trace.Sequence], n_experts_L: Sequence[int]
) -> list[Array] | None:
    """Mean share (E,) of the router's probability or gate weight, by layer; None if not traced."""
    sums, n_tokens = [np.zeros(n) for n in n_experts_L], 0
    for s in sequences:
        if s.logits_TLE is None and s.weights_TLK is None:
            return None
        n_tokens += len(s)
        for layer, sum_E in enumerate(sums):
            sum_E += _shares(s, layer, len(sum_E)).sum(0)
    return [sum_E / n_tokens for sum_E in sums]


def _shares(s: trace.Sequence, layer: int, n_experts: int) -> Array:
    if s.logits_TLE is not None:
        logits_TE = s.logits_TLE[:, layer, :n_experts].astype(float)
        shares_TE = np.exp(logits_TE - logits_TE.max(1, keepdims=True))
    else:
        assert s.weights_TLK is not None
        shares_TE = np.zeros((len(s), n_experts + 1))
        weights_TK = np.where(s.experts_TLK[:, layer] < 0, 0, s.weights_TLK[:, layer])
        np.put_along_axis(shares_TE, s.experts_TLK[:, layer].astype(int), weights_TK, 1)
        shares_TE = shares_TE[:, :n_experts]
    return np.asarray(shares_TE / np.maximum(shares_TE.sum(1, keepdims=True), 1e-30))
