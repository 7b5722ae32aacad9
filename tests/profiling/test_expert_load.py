"""Loads and transitions of made traces, against definitions in loops and planted truths."""

import numpy as np
import pytest

from expertcut.profiling import expert_load
from expertcut.profiling.trace import Sequence


def made(experts_TLK, token_T=None, **more) -> Sequence:
    experts_TLK = np.asarray(experts_TLK)
    token_T = np.zeros(len(experts_TLK), int) if token_T is None else np.asarray(token_T)
    return Sequence(experts_TLK, token_T, **more)


def random_sequence(rng, n_tokens, n_experts_L, top_k) -> Sequence:
    """Every layer draws `top_k` of its experts for every token; the ids say nothing."""
    layers = [rng.random((n_tokens, e)).argsort(1)[:, :top_k] for e in n_experts_L]
    return made(np.stack(layers, 1), rng.integers(0, 30, n_tokens))


def test_transitions_are_counted_as_by_hand(monkeypatch):
    rng, n_experts_L = np.random.default_rng(0), (5, 4, 6)
    sequences = [random_sequence(rng, n, n_experts_L, 2) for n in (7, 1, 12)]
    sequences[0].experts_TLK[3, 1, 1] = -1  # an empty place
    expected = [np.zeros((5, 4)), np.zeros((4, 6))]
    for sequence in sequences:
        for token_LK in sequence.experts_TLK:
            for layer, count_EF in enumerate(expected):
                for e in token_LK[layer]:
                    for f in token_LK[layer + 1]:
                        if e >= 0 and f >= 0:
                            count_EF[e, f] += 1
    for tokens_at_once in (8192, 4):
        monkeypatch.setattr(expert_load, "_TOKENS", tokens_at_once)
        counts = expert_load.transition_counts(sequences, n_experts_L)
        assert all(map(np.array_equal, counts, expected))


def test_mutual_information_of_layers_that_follow_each_other_is_the_entropy():
    assert expert_load.mutual_information(5 * np.eye(8)) == pytest.approx(np.log(8))
    assert expert_load.mutual_information(np.ones((8, 4))) == pytest.approx(0)
    assert expert_load.mutual_information(np.zeros((8, 4))) == 0
    groups = np.kron(np.eye(4), np.ones((3, 3)))  # the group is told, the expert in it is not
    assert expert_load.mutual_information(groups) == pytest.approx(np.log(4))
