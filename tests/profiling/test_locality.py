"""SRP, SCH and caches: equal to moe-lrc's scripts, to definitions in loops, and planted truths.

`moe_lrc.json` was written by `benchmarks.against_moe_lrc --write`, which runs the authors' code.
"""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from expertcut.profiling import locality
from tests.profiling.test_expert_load import made, random_sequence

GROUPS = json.loads((Path(__file__).parent / "moe_lrc.json").read_text())
POLICIES = (*locality.POLICIES, 4, 16)  # as in the vectors


def hits_of(sequences, n_experts_L, policy, size) -> int:
    sizes = np.full((1, len(n_experts_L)), size)
    return int(locality.cache_hits(sequences, n_experts_L, [policy], sizes).sum())


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: f"{g['n_experts']} experts")
def test_srp_and_the_hits_of_every_policy_and_size_are_those_of_moe_lrc(group):
    n_experts = group["n_experts"]
    sequences = [made(np.array(experts_TK)[:, None]) for experts_TK in group["experts"]]
    assert len(sequences) == 10
    uses = locality.segment_uses(sequences, [n_experts], (4, 16))
    for (uses_SM, _), (f1, size) in zip(uses, group["srp"], strict=True):
        assert np.array(locality.best_f1(uses_SM.sum(0))) == pytest.approx([f1, size], abs=1e-6)
    sizes_C1 = np.arange(1, n_experts + 1)[:, None]
    hits_PCSL = locality.cache_hits(sequences, [n_experts], POLICIES, sizes_C1)
    assert hits_PCSL[..., 0].transpose(2, 0, 1).tolist() == group["hits"]


def mixed(rng) -> list:
    """Sequences of several lengths through layers of several sizes, some with empty places."""
    sequences = []
    for n in (1, 33, 12, 50):
        layers = [rng.random((n, e)).argsort(1)[:, :3] for e in (7, 12)]
        experts_TLK = np.stack(layers, 1)
        experts_TLK[:, 0, 2] = -1  # a layer of two experts a token
        experts_TLK[n // 2, 1, 1:] = -1
        sequences.append(made(experts_TLK))
    return sequences


@pytest.mark.parametrize("policy", POLICIES)
def test_layers_and_sequences_are_simulated_as_if_each_were_alone(policy):
    sequences = mixed(np.random.default_rng(1))
    sizes = np.array([(5, 3), (2, 6)])
    together = locality.cache_hits(sequences, (7, 12), POLICIES, sizes)[POLICIES.index(policy), 1]
    for (s, sequence), (layer, (n_experts, size)) in product(
        enumerate(sequences), enumerate([(7, 2), (12, 6)])
    ):
        alone = made(sequence.experts_TLK[:, [layer]])
        assert hits_of([alone], [n_experts], policy, size) == together[s, layer]
    assert together.sum() > 0


def test_uses_in_segments_are_counted_as_by_hand():
    sequences = mixed(np.random.default_rng(2))
    lengths = (1, 4, 13, 33)
    for m, found in zip(lengths, locality.segment_uses(sequences, (7, 12), lengths), strict=True):
        expected = np.zeros((len(sequences), 2, m + 1), int)
        for s, sequence in enumerate(sequences):
            for start in range(len(sequence) - m + 1):
                for layer, n_experts in enumerate((7, 12)):
                    ids = sequence.experts_TLK[start : start + m, layer].ravel()
                    for n in np.bincount(ids[ids >= 0], minlength=n_experts):
                        expected[s, layer, n] += 1
        assert all(map(np.array_equal, found, (expected.sum(1), expected.sum(0))))


def test_belady_is_never_worse_and_a_cache_of_all_experts_misses_first_uses_alone():
    sequences = mixed(np.random.default_rng(3))
    distinct = sum(
        len(np.unique(s.experts_TLK[:, layer][s.experts_TLK[:, layer] >= 0]))
        for s, layer in product(sequences, range(2))
    )
    n_choices = int(locality.choices(sequences).sum())
    belady = [hits_of(sequences, (7, 12), "belady", size) for size in range(3, 13)]
    assert belady == sorted(belady) and belady[0] < belady[-1] == n_choices - distinct
    for policy in ("lru", "lfu", 1, 4, 1000):
        hits = [hits_of(sequences, (7, 12), policy, size) for size in range(3, 13)]
        assert all(h <= b for h, b in zip(hits, belady, strict=True)) and hits != belady
        assert hits[-1] == n_choices - distinct


def test_a_sticky_trace_hits_as_by_hand():
    """Runs of 5 tokens with the same 2 experts, then 2 others, over 8: a run misses 2 of 10."""
    groups = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])
    sequence = made(np.tile(groups.repeat(5, axis=0), (3, 1))[:, None])
    assert [hits_of([sequence], [8], policy, 2) for policy in ("lru", "belady", 5)] == [96] * 3
    # Twelve runs in a circle of four: LRU always drops the pair that comes next, Belady does not.
    assert hits_of([sequence], [8], "lru", 6) == 96 < hits_of([sequence], [8], "belady", 6)
    assert hits_of([sequence], [8], "lru", 8) == 112
    (_, five_LM), (_, one_LM) = locality.segment_uses([sequence], [8], (5, 1))
    assert five_LM[0, 5] == 12 * 2  # a segment in each run has its experts five times
    assert locality.best_f1(one_LM)[0] == 1


def test_static_hits_are_of_the_experts_used_most_in_the_other_half():
    often, rarely = made([[[0, 1]]] * 9 + [[[2, 3]]]), made([[[2, 3]]] * 9 + [[[0, 1]]])
    assert locality.static_hits([[often], [rarely]], [4], [2]).tolist() == [[2], [2]]
    assert locality.static_hits([[often], [often]], [4], [2]).tolist() == [[18], [18]]
    assert locality.static_hits([[often], [rarely]], [4], [4]).tolist() == [[20], [20]]


def test_the_interval_of_a_bootstrap_holds_the_truth_and_needs_ten_sequences():
    rng = np.random.default_rng(4)
    sequences = [random_sequence(rng, 40, (8,), 2) for _ in range(60)]
    [(uses_SM, _)] = locality.segment_uses(sequences, [8], [4])
    ends = locality.interval(lambda w_DS: locality.best_f1(w_DS @ uses_SM)[0], 60)
    assert ends is not None
    many = [random_sequence(rng, 40, (8,), 2) for _ in range(2000)]
    [(_, many_LM)] = locality.segment_uses(many, [8], [4])
    truth, _ = locality.best_f1(many_LM[0])
    assert ends[0] < truth < ends[1] and ends[1] - ends[0] < 0.05
    assert locality.interval(lambda w_DS: w_DS.sum(1), 9) is None
