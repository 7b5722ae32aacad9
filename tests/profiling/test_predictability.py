"""Predictability: planted routers that follow the token's id, the layer before, or nothing."""

import numpy as np
import pytest

from expertcut.profiling import predictability
from expertcut.profiling.expert_load import one_hot
from tests.profiling.test_expert_load import made, random_sequence


def halves_of(sequences):
    return sequences[::2], sequences[1::2]


def by_token(rng, n_sequences=20, n_experts=16, top_k=4) -> list:
    """A router that is a table by token id, through two layers."""
    table_VLK = np.stack([rng.random((30, n_experts)).argsort(1)[:, :top_k] for _ in range(2)], 1)
    ids = [rng.integers(0, 30, 60) for _ in range(n_sequences)]
    return [made(table_VLK[token_T], token_T) for token_T in ids]


def test_a_router_that_is_a_table_by_token_is_predicted_by_the_token_alone():
    sequences = by_token(np.random.default_rng(0))
    found = predictability.measure(halves_of(sequences), (16, 16))
    assert found.token_share.share_L == pytest.approx(1)
    assert np.abs(found.token_share.shuffled_L).max() < 0.01
    assert found.token_share.n_tokens == 1200 and found.token_share.n_ids == 30
    assert found.recall["token_id"].whole == 1 and found.recall["token_id"].ci95 == (1, 1)
    assert 0.2 < found.recall["popularity"].whole < 0.5
    assert found.recall["popularity"].whole < found.recall["layer_before"].whole < 1
    for batch in found.batches.values():
        assert (batch.grouped_L < batch.as_they_come_L).all()


def test_a_router_that_ignores_tokens_is_not_predicted_by_them():
    rng = np.random.default_rng(1)
    sequences = [random_sequence(rng, 100, (16, 8), 4) for _ in range(40)]
    found = predictability.measure(halves_of(sequences), (16, 8))
    assert np.abs(found.token_share.share_L).max() < 0.01
    assert found.token_share.share_L == pytest.approx(found.token_share.shuffled_L, abs=0.005)
    for rate in found.recall.values():  # K / E of a layer, and no more
        by_layer_L = rate.by_layer_L if len(rate.by_layer_L) > 1 else [np.nan, *rate.by_layer_L]
        assert by_layer_L[-1] == pytest.approx(1 / 2, abs=0.03)
    assert found.recall["popularity"].by_layer_L[0] == pytest.approx(1 / 4, abs=0.03)
    assert len(found.recall["layer_before"].by_layer_L) == 1


def test_the_share_is_that_of_entropies_as_defined():
    rng = np.random.default_rng(2)
    sequences = [random_sequence(rng, 600, (5,), 2), *by_token(rng, 1, 5, 2)]
    sequences[1] = made(sequences[1].experts_TLK[:, :1], sequences[1].token_T)
    experts_TK = np.concatenate([s.experts_TLK[:, 0] for s in sequences])
    token_T = np.concatenate([s.token_T for s in sequences])
    often = [v for v in np.unique(token_T) if (token_T == v).sum() >= 20]
    assert 0 < len(often) < len(np.unique(token_T))
    is_often_T = np.isin(token_T, often)
    chosen_TE, token_T = one_hot(experts_TK[is_often_T], 5), token_T[is_often_T]

    def entropy(x):  # Miller and Madow
        p = np.bincount(x.astype(int)) / len(x)
        p = p[p > 0]
        return -(p * np.log(p)).sum() + (len(p) - 1) / (2 * len(x))

    whole = sum(entropy(chosen_TE[:, e]) for e in range(5))
    given = sum(
        (token_T == v).mean() * entropy(chosen_TE[token_T == v, e]) for v in often for e in range(5)
    )
    share = predictability.token_share(sequences, (5,))
    assert share.share_L[0] == pytest.approx(1 - given / whole) and share.n_ids == len(often)


def test_layers_that_repeat_the_one_before_are_predicted_by_it():
    rng = np.random.default_rng(3)
    sequences = []
    for _ in range(20):
        group_TK = np.array([[0, 1], [2, 3], [4, 5]])[rng.integers(0, 3, 50)]
        sequences.append(made(np.stack([group_TK, group_TK], 1), rng.integers(0, 9, 50)))
    recall = predictability.recalls(halves_of(sequences), (6, 6))
    assert recall["layer_before"].whole == 1 and recall["token_id"].whole < 0.5


def test_shots_that_sequences_share_say_nothing():
    rng = np.random.default_rng(4)
    shots = by_token(rng, 1)[0]
    sequences = []
    for _ in range(20):
        own = random_sequence(rng, 30, (16, 16), 4)
        experts_TLK = np.concatenate([shots.experts_TLK, own.experts_TLK])
        token_T = np.concatenate([shots.token_T, own.token_T])
        sequences.append(made(experts_TLK, token_T, n_shared=len(shots)))
    found = predictability.measure(halves_of(sequences), (16, 16))
    assert np.abs(found.token_share.share_L).max() < 0.05
    assert found.recall["token_id"].whole == pytest.approx(0.25, abs=0.05)
    with_shots = [made(s.experts_TLK, s.token_T) for s in sequences]
    assert predictability.measure(halves_of(with_shots), (16, 16)).recall["token_id"].whole > 0.5


def test_ids_that_are_rare_or_one_sequence_alone_are_no_evidence():
    sequences = [random_sequence(np.random.default_rng(5), 15, (8,), 2)]
    found = predictability.measure(halves_of(sequences), (8,))
    assert found.token_share.n_tokens == 0 and np.isnan(found.token_share.share_L).all()
    assert found.batches == {}
