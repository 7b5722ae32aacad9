"""How far a trace's choices follow from the token's id, from popularity, from the layer before.

S are sequences, T tokens, L MoE layers, K places of a token, E experts, F those of the next layer,
V token ids. Shots that sequences share are left out: the same tokens with the same choices, in
every sequence, would be predicted perfectly.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from expertcut.profiling import locality, trace
from expertcut.profiling.expert_load import (
    distinct_experts,
    grouped,
    one_hot,
    places,
    transition_counts,
)
from expertcut.profiling.locality import Rate
from expertcut.stats import Array

MIN_SEEN = 20  # tokens of an id, as moe-lrc's `vocab_min_freq`
BATCHES = (8, 64)
_SHUFFLES = 5
_GROUPED_TOKENS = 16_384  # of a half


@dataclass(frozen=True)
class TokenShare:
    """I(expert; token id) / H(expert), and what ids shuffled over the tokens leave of it."""

    share_L: Array
    shuffled_L: Array
    n_tokens: int  # of ids seen at least 20 times
    n_ids: int


@dataclass(frozen=True)
class BatchExperts:
    """Distinct experts (L,) that a batch uses: as tokens come, and dealt by predicted routes."""

    as_they_come_L: Array
    grouped_L: Array


@dataclass(frozen=True)
class Predictability:
    """`recall` of a token-id table, of popularity and of the layer before, by these names."""

    token_share: TokenShare
    recall: dict[str, Rate]
    batches: dict[int, BatchExperts]


def measure(
    halves: Sequence[Sequence[trace.Sequence]], n_experts_L: Sequence[int]
) -> Predictability:
    """All of them; each half is predicted by what was counted on the other."""
    own = [[own_tokens(s) for s in half] for half in halves]
    share = token_share([s for half in own for s in half], n_experts_L)
    return Predictability(share, recalls(own, n_experts_L), batch_experts(own, n_experts_L))


def own_tokens(s: trace.Sequence) -> trace.Sequence:
    """Without the shots."""
    return trace.Sequence(s.experts_TLK[s.n_shared :], s.token_T[s.n_shared :])


def token_share(
    sequences: Sequence[trace.Sequence], n_experts_L: Sequence[int], seed: int = 0
) -> TokenShare:
    """Σ_e I(e; id) / Σ_e H(e), e being whether an expert is chosen, over ids seen 20 times or more.

    1 if the id alone decides, 0 if it says nothing, for any number of experts per token. Entropies
    are corrected by Miller and Madow; NaN where nothing was seen often enough.
    """
    experts_TLK = np.concatenate([s.experts_TLK for s in sequences])
    _, id_T, seen_V = _vocabulary(sequences)
    is_often_T = seen_V[id_T] >= MIN_SEEN
    experts_TLK, (_, id_T) = (
        experts_TLK[is_often_T],
        np.unique(id_T[is_often_T], return_inverse=True),
    )
    seen_V, rng = np.bincount(id_T), np.random.default_rng(seed)
    shuffled = [rng.permutation(id_T) for _ in range(_SHUFFLES)]
    share_L, shuffled_L = np.full((2, len(n_experts_L)), np.nan)
    for layer, n_experts in enumerate(n_experts_L if len(id_T) else ()):
        chosen_TK = experts_TLK[:, layer]
        share_L[layer] = _share(_id_counts(id_T, chosen_TK, n_experts), seen_V)
        null = [_share(_id_counts(ids, chosen_TK, n_experts), seen_V) for ids in shuffled]
        shuffled_L[layer] = np.mean(null)
    return TokenShare(share_L, shuffled_L, len(id_T), len(seen_V))


def _vocabulary(sequences: Sequence[trace.Sequence]) -> tuple[Array, Array, Array]:
    """Ids (V,), their number (T,) for each token, and how often each is seen (V,)."""
    token_T = np.concatenate([s.token_T for s in sequences])
    ids_V, id_T, seen_V = np.unique(token_T, return_inverse=True, return_counts=True)
    return ids_V, id_T, seen_V


def _id_counts(id_T: Array, experts_TK: Array, n_experts: int, n_ids: int = 0) -> Array:
    """(V, E) tokens of an id that chose an expert."""
    n_ids, width = n_ids or int(id_T.max(initial=-1)) + 1, n_experts + 1
    keys_TK = id_T[:, None] * width + experts_TK.astype(np.int64) + 1
    return np.bincount(keys_TK.ravel(), minlength=n_ids * width).reshape(n_ids, width)[:, 1:]


def _share(chosen_VE: Array, seen_V: Array) -> float:
    n, seen_V1 = seen_V.sum(), seen_V[:, None]
    chosen_E = chosen_VE.sum(0)
    entropy_E = _entropy(chosen_E / n) + ((chosen_E > 0) & (chosen_E < n)) / (2 * n)
    is_both_VE = (chosen_VE > 0) & (chosen_VE < seen_V1)
    left_E = (seen_V @ _entropy(chosen_VE / seen_V1) + is_both_VE.sum(0) / 2) / n
    return float(1 - left_E.sum() / entropy_E.sum()) if entropy_E.sum() else np.nan


def _entropy(p: Array) -> Array:
    """Of a coin that shows heads with probability p, in nats."""
    return np.asarray(-sum(x * np.log(np.where(x > 0, x, 1)) for x in (p, 1 - p)))


def recalls(
    halves: Sequence[Sequence[trace.Sequence]], n_experts_L: Sequence[int]
) -> dict[str, Rate]:
    """Share of the choices among the K experts that each predictor ranks first.

    An id that the other half lacks is predicted by popularity, which also breaks ties.
    """
    sequences = [s for half in halves for s in half]
    choices_SL, places_L = locality.choices(sequences), places(sequences)
    hits = {name: np.zeros_like(choices_SL) for name in ("token_id", "popularity", "layer_before")}
    first = len(halves[0])
    for own, fit, rows in (
        (halves[0], halves[1], slice(0, first)), (halves[1], halves[0], slice(first, None)),
    ):  # fmt: skip
        if own and fit:
            starts_S = np.cumsum([0, *(len(s) for s in own)])[:-1]
            for name, hits_TL in _hits(own, fit, n_experts_L, places_L).items():
                hits[name][rows] = np.add.reduceat(hits_TL, starts_S, axis=0)
    hits["layer_before"], later_SL = hits["layer_before"][:, 1:], choices_SL[:, 1:]
    found = {name: locality.rate(hits[name], choices_SL) for name in ("token_id", "popularity")}
    if len(n_experts_L) > 1:
        found["layer_before"] = locality.rate(hits["layer_before"], later_SL)
    return found


def _hits(
    own: Sequence[trace.Sequence],
    fit: Sequence[trace.Sequence],
    n_experts_L: Sequence[int],
    places_L: Array,
) -> dict[str, Array]:
    """Choices (T, L) of `own` that are predicted right by what was counted on `fit`."""
    experts_TLK = np.concatenate([s.experts_TLK for s in own])
    tables = _tables(own, fit, n_experts_L)
    id_T, counts = _ids(own, fit)[0], transition_counts(fit, n_experts_L)
    names = ("token_id", "popularity", "layer_before")
    hits = {name: np.zeros(experts_TLK.shape[:2], np.int64) for name in names}
    for layer, ((table_VE, popularity_E), k) in enumerate(zip(tables, places_L, strict=True)):
        chosen_TK = experts_TLK[:, layer]
        hits["token_id"][:, layer] = _right(_first(table_VE, k)[id_T], chosen_TK)
        is_popular_E = _first(popularity_E[None], k)[0]
        hits["popularity"][:, layer] = np.append(is_popular_E, False)[chosen_TK].sum(1)
        if layer:
            before_TE = one_hot(experts_TLK[:, layer - 1], n_experts_L[layer - 1])
            count_EF = counts[layer - 1]
            follows_EF = count_EF / np.maximum(_uses(fit, layer - 1, len(count_EF))[:, None], 1)
            score_TF = before_TE @ follows_EF.astype(np.float32)
            score_TF += 1e-4 * popularity_E / max(popularity_E.max(), 1)
            hits["layer_before"][:, layer] = _right(_first(score_TF, k), chosen_TK)
    return hits


def _ids(own: Sequence[trace.Sequence], fit: Sequence[trace.Sequence]) -> tuple[Array, Array, int]:
    """Numbers of the ids of both halves, and how many ids there are."""
    ids_V, id_T, _ = _vocabulary([*own, *fit])
    n_own = sum(map(len, own))
    return id_T[:n_own], id_T[n_own:], len(ids_V)


def _tables(
    own: Sequence[trace.Sequence], fit: Sequence[trace.Sequence], n_experts_L: Sequence[int]
) -> Iterator[tuple[Array, Array]]:
    """Of each layer scores (V, E) by token id, popularity behind the point, and popularity (E,)."""
    _, id_T, n_ids = _ids(own, fit)
    experts_TLK = np.concatenate([s.experts_TLK for s in fit])
    for layer, n_experts in enumerate(n_experts_L):
        counts_VE = _id_counts(id_T, experts_TLK[:, layer], n_experts, n_ids)
        popularity_E = counts_VE.sum(0).astype(float)
        behind_E = popularity_E / (popularity_E.max() + 1)
        yield (counts_VE + behind_E).astype(np.float32), popularity_E


def _uses(fit: Sequence[trace.Sequence], layer: int, n_experts: int) -> Array:
    chosen = np.concatenate([s.experts_TLK[:, layer].ravel() for s in fit]).astype(int)
    return np.bincount(chosen + 1, minlength=n_experts + 1)[1:]


def _first(score_XE: Array, k: int) -> Array:
    """(X, E) whether an expert is among the k of the largest scores; ties by number."""
    first_XK = np.argsort(-score_XE, axis=1, kind="stable")[:, :k]
    return one_hot(first_XK, score_XE.shape[1], np.bool_)


def _right(is_predicted_TE: Array, chosen_TK: Array) -> Array:
    is_right_TK = np.take_along_axis(is_predicted_TE, np.maximum(chosen_TK, 0).astype(int), 1)
    return np.asarray((is_right_TK & (chosen_TK >= 0)).sum(1))


def batch_experts(
    halves: Sequence[Sequence[trace.Sequence]], n_experts_L: Sequence[int]
) -> dict[int, BatchExperts]:
    """By batch size: consecutive tokens, and the same tokens dealt by routes told by their ids."""
    most, places_L = max(n_experts_L), places([s for half in halves for s in half])
    found: dict[int, list[tuple[Array, Array]]] = {batch: [] for batch in BATCHES}
    for own, fit in (halves, halves[::-1]):
        if not (own and fit):
            continue
        experts_TLK = np.concatenate([s.experts_TLK for s in own])[:_GROUPED_TOKENS]
        id_T = _ids(own, fit)[0][:_GROUPED_TOKENS]
        pairs = zip(_tables(own, fit, n_experts_L), places_L, strict=True)
        routes_VG = np.concatenate([_first(table_VE, k) for (table_VE, _), k in pairs], 1)
        for batch, pair in found.items():
            order_T = grouped(routes_VG, id_T, batch)
            pair.append((distinct_experts(experts_TLK, most, batch),
                         distinct_experts(experts_TLK[order_T], most, batch)))  # fmt: skip
    means = {batch: np.mean(pairs, axis=0) for batch, pairs in found.items() if pairs}
    return {batch: BatchExperts(*mean) for batch, mean in means.items() if not np.isnan(mean).any()}
