"""Routing rules as functions: the authors' definitions, and laws of all of them."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertcut.models.modeling_routed import (
    RULE_FUNCTIONS,
    SCORES,
    Gate,
    Options,
    Tokens,
    fill_empty_slots,
    log_shares,
    uniform,
)
from expertcut.models.routing_rule import RULE_KINDS, RoutingRule

N_EXPERTS, TOP_K = 12, 4
GATES = [Gate(scoring, is_renormalised, 1.5) for scoring in SCORES for is_renormalised in (0, 1)]
# Thresholds from the most to the fewest experts; the first is the identity with K experts.
THRESHOLDS: dict[str, tuple[float, ...]] = {
    "top-k": (4, 3, 2, 1),
    "skip": (0.0, 0.1, 0.4, 0.7, 1.0),
    "top-p": (1.0, 0.7, 0.4, 0.2, 0.0),
    "entropy": (1e9, 0.5, 0.3, 0.1, 0.0),
    "null": (-math.inf, -0.5, 0.0, 0.5, 1.0, 9.0),
    "odp": (0.0, 0.1, 0.4, 0.7, 1.0),
    "fitted": (-1e9, 0.1, 0.2, 0.4, 1e9),
    "dropout": (0.0, 0.2, 0.5, 0.9, 1.0),
}
IDENTITIES = {**{name: own[0] for name, own in THRESHOLDS.items()}, "grouped": 1, "smooth": 0.0}


def tokens(n_tokens: int = 400, gate: Gate = GATES[0], scale: float = 1.0, seed: int = 0) -> Tokens:
    """A router's output, in a random order of places."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(n_tokens, N_EXPERTS, generator=generator) * scale
    alpha_TE = SCORES[gate.scoring](logits_TE)
    weights_TK, experts_TK = alpha_TE.topk(TOP_K, dim=1)
    place_K = torch.randperm(TOP_K, generator=generator)
    weights_TK, experts_TK = weights_TK[:, place_K] * gate.factor, experts_TK[:, place_K]
    if gate.is_renormalised:
        weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True) * gate.factor
    return Tokens(
        gate,
        logits_TE,
        alpha_TE,
        weights_TK,
        experts_TK,
        input_TD=torch.randn(n_tokens, 8, generator=generator),
        attention_TT=torch.rand(n_tokens, n_tokens, generator=generator).tril().softmax(dim=1),
        key_T=torch.arange(n_tokens),
        fit_KK=torch.tensor([[0.5, 0.1, 0.0, 0.0], [0.4, 0.1, 0.1, 0.0], [0.3, 0.0, 0.1, 0.1]]),
    )


def used_sets(experts_TM: Tensor) -> list[set[int]]:
    return [set(row) - {N_EXPERTS} for row in experts_TM.tolist()]


def test_the_table_and_the_functions_name_the_same_rules() -> None:
    assert list(RULE_FUNCTIONS) == list(RULE_KINDS)
    assert set(IDENTITIES) == set(RULE_FUNCTIONS) - {"random", "contrast"}


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("weights", ["gate", "renormalised"])
@pytest.mark.parametrize("name", IDENTITIES)
def test_an_identity_changes_no_bit(name: str, gate: Gate, weights: str) -> None:
    found = tokens(gate=gate)
    for options in (Options(weights=weights), Options(weights=weights, shuffle=True)):  # type: ignore[arg-type]
        weights_TM, experts_TM = RULE_FUNCTIONS[name](found, IDENTITIES[name], options)
        assert torch.equal(weights_TM, found.weights_TK)
        assert torch.equal(experts_TM, found.experts_TK)


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("name", THRESHOLDS)
def test_what_is_dropped_has_no_weight_and_the_rest_the_gates_own(name: str, gate: Gate) -> None:
    found = tokens(gate=gate, scale=3.0)
    at = THRESHOLDS[name][-2]
    for options in (Options(), Options(weights="renormalised"), Options(shuffle=True)):
        weights_TM, experts_TM = RULE_FUNCTIONS[name](found, at, options)
        is_used_TM = experts_TM < N_EXPERTS
        assert not weights_TM[~is_used_TM].any() and (~is_used_TM).any() and is_used_TM.any()
        assert torch.equal(experts_TM[is_used_TM], found.experts_TK[is_used_TM])
        own_TM = found.weights_TK * is_used_TM
        if gate.is_renormalised or options.weights == "renormalised":
            total_T1 = found.weights_TK.sum(dim=1, keepdim=True)
            own_TM = (own_TM / own_TM.sum(dim=1, keepdim=True)).nan_to_num(0) * total_T1
        torch.testing.assert_close(weights_TM, own_TM)


@pytest.mark.parametrize(
    "name", [name for name in RULE_FUNCTIONS if name not in ("grouped", "contrast")]
)
def test_no_rule_exceeds_the_most_experts(name: str) -> None:
    found, at = tokens(), 2 if name == "top-k" else IDENTITIES.get(name, 0.0)
    weights_TM, experts_TM = RULE_FUNCTIONS[name](found, at, Options(most=2))
    assert ((experts_TM < N_EXPERTS).sum(dim=1) == 2).all()
    assert torch.equal(weights_TM != 0, experts_TM < N_EXPERTS)
    if name in ("random", "smooth"):
        return
    best_Tk = found.score_TE.topk(2, dim=1).indices
    assert used_sets(experts_TM) == used_sets(best_Tk)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(THRESHOLDS)),
    gate=st.sampled_from(GATES),
    pair=st.tuples(*[st.floats(0, 1)] * 2),
    scale=st.sampled_from([0.03, 1.0, 3.0]),
    seed=st.integers(0, 1000),
    most=st.sampled_from([None, 2, 7]),
)
def test_a_stricter_threshold_never_uses_more_experts(
    name: str, gate: Gate, pair: tuple[float, float], scale: float, seed: int, most: int | None
) -> None:
    loose, *_, strict = THRESHOLDS[name]
    loose, strict = max(min(loose, 5), -5), max(min(strict, 5), -5)
    thresholds = [loose + share * (strict - loose) for share in sorted(pair)]
    if RULE_KINDS[name].is_whole:
        thresholds = [math.ceil(at) for at in thresholds]
    found = tokens(50, gate, scale, seed)
    n_used = [
        (RULE_FUNCTIONS[name](found, at, Options(most=most))[1] < N_EXPERTS).sum(dim=1)
        for at in thresholds
    ]
    assert (n_used[0] >= n_used[1]).all()


def test_fewer_and_more_experts_are_those_of_a_gate_with_another_k() -> None:
    for gate in GATES:
        found = tokens(gate=gate)
        for k in (1, 3, 4, 5, N_EXPERTS):
            weights_TM, experts_TM = RULE_FUNCTIONS["top-k"](found, k, Options())
            alpha_Tk, best_Tk = found.alpha_TE.topk(k, dim=1)
            if gate.is_renormalised:
                alpha_Tk = alpha_Tk / alpha_Tk.sum(dim=1, keepdim=True)
            nothing_TE = torch.zeros(400, N_EXPERTS + 1)
            expected_TE = nothing_TE.scatter(1, best_Tk, alpha_Tk * gate.factor)
            found_TE = nothing_TE.scatter_add(1, experts_TM, weights_TM)
            torch.testing.assert_close(found_TE, expected_TE)


def dynamic_moe(alpha_TE: Tensor, p: float) -> list[set[int]]:
    """The sets of Dynamic_MoE (modeling/modeling_moe.py): sorted, summed, cut behind the crossing.

    Behind the first sum above p all are left out; where no sum is, none.
    """
    sorted_TE, order_TE = torch.sort(alpha_TE, descending=True)
    is_above_TE = torch.cumsum(sorted_TE, dim=-1) > p
    first_T = is_above_TE.long().argmax(dim=-1)
    is_out_TE = is_above_TE.scatter(1, first_T[:, None], False)
    return [
        set(order_E[~is_out_E].tolist())
        for order_E, is_out_E in zip(order_TE, is_out_TE, strict=True)
    ]


@pytest.mark.parametrize("p", [0.3, 0.5, 0.9])
def test_top_p_takes_the_experts_of_dynamic_moe(p: float) -> None:
    found = tokens(10_000, Gate("softmax"), scale=2.0)
    weights_TM, experts_TM = RULE_FUNCTIONS["top-p"](found, p, Options(most=N_EXPERTS))
    expected = dynamic_moe(found.logits_TE.softmax(dim=-1), p)
    assert used_sets(experts_TM) == expected
    assert len({len(own) for own in expected}) > 2
    alpha_TE = torch.nn.functional.pad(found.alpha_TE, (0, 1))  # its weights are α itself
    torch.testing.assert_close(weights_TM, alpha_TE.gather(1, experts_TM))
    capped = used_sets(RULE_FUNCTIONS["top-p"](found, p, Options(most=2))[1])
    assert [len(own) for own in capped] == [min(len(own), 2) for own in expected]


@pytest.mark.parametrize(("n_null", "is_equal"), [(TOP_K, True), (TOP_K + 3, True), (1, False)])
def test_null_is_a_router_with_null_experts_of_one_logit(n_null: int, is_equal: bool) -> None:
    """As AdaMoE's block: top K of all, weights renormalised over the true experts."""
    found, logit = tokens(2000, Gate("softmax", is_renormalised=True)), 0.6
    logits_TX = torch.cat([found.logits_TE, torch.full((2000, n_null), logit)], dim=1)
    weights_TK, experts_TK = logits_TX.softmax(dim=1).topk(TOP_K, dim=1)
    weights_TK = weights_TK * (experts_TK < N_EXPERTS)
    weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True).clamp(min=1e-30)
    places_TK = experts_TK.clamp(max=N_EXPERTS)
    expected_TE = torch.zeros(2000, N_EXPERTS + 1).scatter_add(1, places_TK, weights_TK)
    weights_TM, experts_TM = RULE_FUNCTIONS["null"](found, logit, Options())
    found_TE = torch.zeros(2000, N_EXPERTS + 1).scatter_add(1, experts_TM, weights_TM)
    is_same_T = torch.isclose(found_TE, expected_TE, atol=1e-6).all(dim=1)
    assert bool(is_same_T.all()) == is_equal
    assert 0 < (experts_TM == N_EXPERTS).all(dim=1).sum() < 2000  # some tokens use none


def test_entropy_and_fitted_count_as_they_say() -> None:
    found = tokens(gate=Gate("sigmoid"), scale=3.0)
    _, experts_TM = RULE_FUNCTIONS["entropy"](found, 0.3, Options(most=7))
    p_TE = found.alpha_TE.double() / found.alpha_TE.double().sum(dim=1, keepdim=True)
    h_T = -(p_TE * p_TE.log()).sum(dim=1)
    expected = [min(max(math.ceil(0.3 * math.exp(h)), 1), 7) for h in h_T.tolist()]
    assert [len(own) for own in used_sets(experts_TM)] == expected and len(set(expected)) > 1

    assert found.fit_KK is not None
    fit, counts = found.fit_KK.tolist(), []
    for weights in found.weights_TK.tolist():
        ranked = sorted(weights, reverse=True)
        logs = [1.0, *(math.log(g / ranked[0]) for g in ranked[1:])]
        errors = [sum(c * x for c, x in zip(row, logs, strict=True)) for row in fit]
        counts.append(next((k for k, y in enumerate(errors, 1) if y <= 0.2), TOP_K))
    _, experts_TM = RULE_FUNCTIONS["fitted"](found, 0.2, Options())
    assert [len(own) for own in used_sets(experts_TM)] == counts and len(set(counts)) > 1
    assert log_shares(torch.zeros(1, 3)).isfinite().all()


def test_odp_keeps_all_experts_of_the_tokens_that_later_ones_read() -> None:
    found = tokens(50)
    assert found.attention_TT is not None and found.input_TD is not None
    importance = [
        sum(abs(x) for x in found.input_TD[j].tolist())
        * sum(float(found.attention_TT[i, j]) for i in range(j, 50))
        / (50 - j)
        for j in range(50)
    ]
    first = sorted(range(50), key=lambda j: -importance[j])[:5]  # ⌈0.09 · 50⌉
    skipped = used_sets(RULE_FUNCTIONS["skip"](found, 0.7, Options())[1])
    kept = used_sets(RULE_FUNCTIONS["odp"](found, 0.7, Options(share=0.09))[1])
    own = used_sets(found.experts_TK)
    assert kept == [own[j] if j in first else skipped[j] for j in range(50)]
    assert kept != skipped
    assert used_sets(RULE_FUNCTIONS["odp"](found, 0.7, Options(share=0))[1]) == skipped
    assert used_sets(RULE_FUNCTIONS["odp"](found, 0.7, Options(share=1))[1]) == own


def test_groups_get_equally_many_experts_and_their_best() -> None:
    found = tokens()
    weights_TM, experts_TM = RULE_FUNCTIONS["grouped"](found, 2, Options())
    for row, alpha_E in zip(experts_TM.tolist(), found.alpha_TE, strict=True):
        for half in (range(6), range(6, 12)):
            best = sorted(half, key=lambda e: -float(alpha_E[e]))[:2]
            assert {e for e in row if e in half} == set(best)
    expected_TM = found.gate.factor * found.alpha_TE.gather(1, experts_TM)
    torch.testing.assert_close(weights_TM, expected_TM)


def test_smooth_scores_are_shared_with_similar_earlier_tokens() -> None:
    found = tokens(20)
    assert found.input_TD is not None
    x, alpha = found.input_TD.double(), found.alpha_TE.double()
    weights_TM, experts_TM = RULE_FUNCTIONS["smooth"](found, 0.3, Options(temperature=0.5))
    for i in range(20):
        near = torch.stack([torch.cosine_similarity(x[i], x[j], dim=0) for j in range(i + 1)])
        mixed_E = 0.7 * alpha[i] + 0.3 * ((near / 0.5).softmax(dim=0) @ alpha[: i + 1])
        best_K = mixed_E.topk(TOP_K)
        assert set(best_K.indices.tolist()) == set(experts_TM[i].tolist())
        torch.testing.assert_close(weights_TM[i].double(), 1.5 * best_K.values, rtol=1e-5, atol=0)
    assert used_sets(experts_TM) != used_sets(found.experts_TK)


def test_random_experts_are_distinct_alike_and_a_function_of_the_seed() -> None:
    found = tokens(6000)
    weights_TM, experts_TM = RULE_FUNCTIONS["random"](found, 0, Options())
    assert torch.equal(weights_TM, found.weights_TK)
    assert all(len(own) == TOP_K for own in used_sets(experts_TM))
    share_E = experts_TM.flatten().bincount(minlength=N_EXPERTS) / 6000
    assert (share_E - TOP_K / N_EXPERTS).abs().max() < 0.03
    first_E = experts_TM[:, 0].bincount(minlength=N_EXPERTS) / 6000
    assert (first_E - 1 / N_EXPERTS).abs().max() < 0.02
    assert torch.equal(experts_TM, RULE_FUNCTIONS["random"](found, 0, Options())[1])
    assert not torch.equal(experts_TM, RULE_FUNCTIONS["random"](found, 0, Options(seed=1))[1])
    chance_TE = uniform(found, 3)
    assert chance_TE.min() >= 0 and chance_TE.max() < 1
    assert abs(float(chance_TE.mean()) - 0.5) < 0.01 and abs(float(chance_TE.var()) - 1 / 12) < 0.01
    n_left_out = (
        TOP_K - sum(map(len, used_sets(RULE_FUNCTIONS["dropout"](found, 0.3, Options())[1]))) / 6000
    )
    assert abs(n_left_out - 0.3 * (TOP_K - 1)) < 0.05


def test_shuffled_rules_leave_out_as_many_experts_but_others() -> None:
    found = tokens()
    plain, shuffled = (
        used_sets(RULE_FUNCTIONS["skip"](found, 0.6, Options(shuffle=is_shuffled))[1])
        for is_shuffled in (False, True)
    )
    assert list(map(len, plain)) == list(map(len, shuffled)) and plain != shuffled


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("rank", [0, 2, 7])  # 7: none that the router chose
def test_the_weak_run_is_one_expert_with_the_weights_of_all(gate: Gate, rank: int) -> None:
    found = tokens(gate=gate)
    weights_TM, experts_TM = RULE_FUNCTIONS["contrast"](found, rank, Options())
    assert torch.equal(experts_TM[:, 0], found.score_TE.sort(dim=1, descending=True)[1][:, rank])
    assert (experts_TM[:, 1:] == N_EXPERTS).all() and not weights_TM[:, 1:].any()
    torch.testing.assert_close(weights_TM[:, 0], found.weights_TK.sum(dim=1))


def test_a_mask_of_experts_is_kept_where_a_rule_takes_more() -> None:
    found = tokens()
    logits_TE = found.logits_TE.clone()
    logits_TE[:, :3] = -torch.inf
    bias_E = torch.zeros(N_EXPERTS)
    bias_E[0] = 9.0  # a selection bias ranks the masked expert first
    alpha_TE = logits_TE.softmax(dim=1)
    masked = replace(found, logits_TE=logits_TE, score_TE=alpha_TE + bias_E)
    masked = replace(masked, experts_TK=logits_TE.topk(TOP_K, dim=1).indices)
    thresholds = {"top-k": 11, "top-p": 0.99, "random": 0, "smooth": 0.5, "contrast": 9}
    for name, at in thresholds.items():
        _, experts_TM = RULE_FUNCTIONS[name](masked, at, Options(most=11))
        assert experts_TM.min() >= 3, name


def test_nobody_becomes_an_expert_that_the_token_does_not_use() -> None:
    weights_TM, experts_TM = RULE_FUNCTIONS["skip"](tokens(), 0.6, Options())
    idle_weights_TM, idle_TM = fill_empty_slots(weights_TM, experts_TM, N_EXPERTS)
    assert torch.equal(weights_TM, idle_weights_TM) and idle_TM.max() < N_EXPERTS
    is_nobody_TM = experts_TM == N_EXPERTS
    assert is_nobody_TM.any() and torch.equal(experts_TM[~is_nobody_TM], idle_TM[~is_nobody_TM])
    for used, own, is_nobody_M in zip(used_sets(experts_TM), idle_TM, is_nobody_TM, strict=True):
        assert not used & set(own[is_nobody_M].tolist())


@pytest.mark.parametrize(
    ("rule", "at", "fault"),
    [
        ("skip", 1.5, "1.5 is not a threshold of rule skip (share of the largest gate weight): "),
        ("top-k", 1.5, " rule top-k (experts per token): take a whole number from 1 to 65535"),
        ("random", 1.0, "it has none"),
    ],
)
def test_a_wrong_threshold_is_refused(rule: str, at: float, fault: str) -> None:
    with pytest.raises(ValueError, match=rule) as refused:
        RoutingRule(rule=rule).check_threshold(at)
    assert fault in str(refused.value)


def test_a_wrong_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="'best' is not a rule: take top-k, skip, "):
        RoutingRule(rule="best")
    with pytest.raises(ValueError, match="none can be shuffled"):
        RoutingRule(rule="smooth", shuffle=True)
