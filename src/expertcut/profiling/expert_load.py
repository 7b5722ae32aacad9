"""How a trace loads its experts, and which experts of the next layer follow them.

T are tokens, L MoE layers, K places of a token, E experts of a layer, F those of the next.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from expertcut.profiling import trace
from expertcut.stats import Array

_TOKENS = 8192  # in memory as one-hot rows at once; whole numbers of float32 stay exact


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
