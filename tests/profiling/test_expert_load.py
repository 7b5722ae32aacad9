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


def test_loads_are_the_largest_over_the_mean_and_the_variation():
    sequence = made([[[0, 1], [0, 1]]] * 3 + [[[0, 2], [1, 2]]])
    load = expert_load.load([sequence], (4, 3))
    assert load.max_vio_L == pytest.approx([4 / 2 - 1, 4 / (8 / 3) - 1])
    assert load.variation_L[0] == pytest.approx(np.std([4, 3, 1, 0]) / 2)
    assert load.balance_loss_L is None
    balanced = made([[[e, (e + 1) % 6]] for e in range(6)])
    assert expert_load.load([balanced], (6,)).max_vio_L[0] == 0


def test_the_balance_loss_is_that_of_switch_transformers():
    rng = np.random.default_rng(1)
    logits_TLE = rng.normal(size=(50, 1, 6))
    experts_TLK = logits_TLE.argsort(2)[:, :, ::-1][:, :, :2]
    p_TE = np.exp(logits_TLE[:, 0]) / np.exp(logits_TLE[:, 0]).sum(1, keepdims=True)
    share_E = np.bincount(experts_TLK.ravel(), minlength=6) / 100
    load = expert_load.load([made(experts_TLK, logits_TLE=logits_TLE)], (6,))
    assert load.balance_loss_L[0] == pytest.approx(6 * (share_E * p_TE.mean(0)).sum())
    halves = made(experts_TLK, weights_TLK=np.full((50, 1, 2), 0.3))  # equal weights: p is f
    found = expert_load.load([halves], (6,)).balance_loss_L[0]
    assert found == pytest.approx(6 * (share_E**2).sum())


def test_drops_come_when_an_expert_is_full_and_never_to_the_first_token():
    rng, n_experts_L = np.random.default_rng(2), (8, 4)
    sequences = [random_sequence(rng, n, n_experts_L, 2) for n in (1, 7, 40, 40)]
    found = expert_load.drops(sequences, n_experts_L, (1, 2, 4))
    expected = np.zeros((3, 2, 10), int)
    for sequence in sequences:
        n = len(sequence)
        for c, layer in np.ndindex(3, 2):
            room = -(-(1, 2, 4)[c] * n * 2 // n_experts_L[layer])
            uses = np.zeros(8, int)
            for t, ids in enumerate(sequence.experts_TLK[:, layer]):
                uses[ids] += 1
                expected[c, layer, 10 * t // n] += (uses[ids] > room).sum()
    assert (found.dropped_CLX == expected).all() and expected[0].sum() > 0
    assert (expected[2, 0] == 0).all()  # c = E / K: an expert has room for every token
    assert found.choices_LX.sum() == 2 * 2 * 88
    same = made(np.tile([[[0, 1], [0, 1]]], (30, 1, 1)))
    always = expert_load.drops([same], n_experts_L, (1,))
    assert always.dropped_CLX[0, 0].tolist() == [0, 0, 2, *[6] * 7]  # room for 8 of 30


def test_batches_of_tokens_that_are_alike_use_fewer_experts():
    rng = np.random.default_rng(3)
    group_T = rng.integers(0, 4, 256)
    experts_TLK = (2 * group_T[:, None, None] + np.arange(2)).astype(int)
    order_T = expert_load.grouped(expert_load.one_hot(experts_TLK[:, 0], 8), np.arange(256), 16)
    assert sorted(order_T) == list(range(256))
    mixed = expert_load.distinct_experts(experts_TLK, 8, 16)[0]
    alike = expert_load.distinct_experts(experts_TLK[order_T], 8, 16)[0]
    assert mixed > 7 and alike < 4.5
    assert expert_load.distinct_experts(experts_TLK[group_T == 1], 8, 16)[0] == 2
    assert np.isnan(expert_load.distinct_experts(experts_TLK[:15], 8, 16)).all()
