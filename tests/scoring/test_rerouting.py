"""Routing rules in running models, on every family of the tests."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from expertcut.data import Selection, load_quiz
from expertcut.data.corpus import TextSelection, load_corpus
from expertcut.errors import ContractError
from expertcut.models import kernels
from expertcut.models.find_blocks import find_blocks
from expertcut.models.gate_laws import check_gate
from expertcut.models.hooks import Routing, observe_routers, route
from expertcut.models.load import MoeModel
from expertcut.models.routing_rule import RoutingRule
from expertcut.profiling.findings import find
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.measure_text import TextMeasurement
from expertcut.profiling.recorder import Recorder
from expertcut.profiling.storage import load_profile
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import Encoded, Pass, encode
from expertcut.scoring.passes import PassObserver
from expertcut.scoring.rerouting import ExpertCounts, Rerouting, rerouted, rerouted_engine
from expertcut.scoring.router_bias import Tilts, tilted
from tests.conftest import FAMILIES, open_model
from tests.support.exact_models import REMOVED, constants_for, make_base, make_exact

Checkpoints = Callable[..., Path]
TOKENS = torch.arange(2, 42)[None]
IDENTITIES: dict[str, float] = {
    **{"top-k": 2, "skip": 0.0, "top-p": 1.0, "entropy": 1e9, "null": -math.inf, "fitted": 0.0},
    **{"grouped": 1, "smooth": 0.0, "dropout": 0.0, "odp": 0.0},
}
GROUPED = ("deepseek_v2", "deepseek_v3", "glm4_moe")  # and picks from one of two groups
DROP_ONLY = (*GROUPED, "phimoe")


@pytest.fixture(scope="module", params=FAMILIES)
def moe(request: pytest.FixtureRequest, checkpoint: Checkpoints) -> MoeModel:
    """A tiny model of each family, which every test leaves as it was."""
    return open_model(checkpoint(request.param))


@pytest.fixture
def olmoe(checkpoint: Checkpoints) -> MoeModel:
    return open_model(checkpoint("olmoe"))


def set_to(moe: MoeModel, rule: str, at: float, **options: Any) -> Rerouting:
    layers = [block.layer for block in moe.blocks]
    fit = {layer: ((1.0, 0.1),) for layer in layers}
    return Rerouting(RoutingRule(rule=rule, **options), dict.fromkeys(layers, at), fit)


@torch.inference_mode()
def logits(moe: MoeModel) -> Tensor:
    result: Tensor = moe.model(input_ids=TOKENS, use_cache=False).logits
    return result


def chunk(moe: MoeModel, quiz_folder: Path) -> Encoded:
    quiz = load_quiz(Selection(str(quiz_folder), split="test", shots=1))
    subject, questions = next(iter(quiz.questions.items()))
    return encode(moe.tokenizer, questions, quiz.shots_by_subject[subject])


def each(*begins: Callable[[Pass], None]) -> Callable[[Pass], None]:
    """Tells all of them of a pass."""

    def begin(step: Pass) -> None:
        for own in begins:
            own(step)

    return begin


def family_of(moe: MoeModel) -> str:
    return str(moe.model.config.model_type)


def test_an_identity_changes_no_bit_and_another_setting_does(moe: MoeModel) -> None:
    before = logits(moe)
    for rule, at in IDENTITIES.items():
        if rule in ("odp", "dropout") or (rule in ("grouped", "smooth") and is_drop_only(moe)):
            continue  # need a pass; or are refused
        with rerouted(moe.blocks, set_to(moe, rule, at)):
            assert torch.equal(logits(moe), before), rule
    for rule, at in (("skip", 0.9), ("top-k", 1), ("null", 9.0)):
        with rerouted(moe.blocks, set_to(moe, rule, at)):
            assert (logits(moe) - before).abs().max() > 1e-3
    assert torch.equal(logits(moe), before)  # what was put in is taken out


def is_drop_only(moe: MoeModel) -> bool:
    return family_of(moe) in DROP_ONLY


@pytest.mark.parametrize("k", [1, 3])
def test_another_k_is_the_routing_of_the_family_with_that_k(moe: MoeModel, k: int) -> None:
    if k > 2 and is_drop_only(moe):
        fault = "weights that are no function" if family_of(moe) == "phimoe" else "picks from 1"
        routing = set_to(moe, "top-k", k)
        with pytest.raises(ContractError, match=fault), rerouted(moe.blocks, routing):
            pass
        return
    for block in moe.blocks:
        router: Any = block.router
        with rerouted([block], set_to(moe, "top-k", k)):
            found = route(router, block.call)
        before, router.top_k = router.top_k, k
        try:
            expected = route(router, block.call)
        finally:
            router.top_k = before
        if family_of(moe) == "phimoe" and expected[2].shape[1] != k:
            continue  # its router always takes two
        found_TE, expected_TE = (by_expert(own, block.n_experts) for own in (found, expected))
        torch.testing.assert_close(found_TE, expected_TE, rtol=1e-5, atol=1e-6)
        assert (found[2] < block.n_experts).sum() == k * len(found[0])


def by_expert(routed: Any, n_experts: int) -> Tensor:
    """Gate weights (T, E)."""
    _, weights_TM, experts_TM = routed
    nothing_TE = torch.zeros(len(experts_TM), n_experts + 1)
    return nothing_TE.scatter_add(1, experts_TM, weights_TM.float())[:, :n_experts]


def test_who_is_skipped_never_runs(moe: MoeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    own_output, ran = kernels.own_output, set()

    def watched(experts: Any, expert: int, x_MD: Tensor) -> Tensor:
        ran.add((id(experts), expert))
        return own_output(experts, expert, x_MD)

    used: set[tuple[int, int]] = set()

    def see(routing: Routing) -> None:
        block = moe.blocks[routing.layer]
        used.update((id(block.experts), e) for e in routing.experts_TK.unique().tolist())

    monkeypatch.setattr(kernels, "own_output", watched)
    found = {}
    for at in (0.0, 1.0):
        ran.clear(), used.clear()
        with rerouted(moe.blocks, set_to(moe, "skip", at)), observe_routers(moe.blocks, see):
            moe.model(input_ids=TOKENS[:, :1], use_cache=False)
        found[at] = len(ran)
        nobody = {(id(block.experts), block.n_experts) for block in moe.blocks}
        assert ran == used - nobody
        assert nobody <= used or at == 0.0
    assert found[1.0] < found[0.0]


def test_nobody_gives_the_bits_of_weight_0() -> None:
    torch.manual_seed(0)
    x_TD, weight_TK = torch.randn(64, 3), torch.rand(64, 2)
    experts_TK = torch.stack([torch.randperm(6)[:2] for _ in range(64)])
    is_out_TK = torch.rand(64, 2) < 0.5
    weights_TK = weight_TK.masked_fill(is_out_TK, 0)
    n_rows: list[int] = []

    def own(expert: int, x_MD: Tensor) -> Tensor:
        n_rows.append(len(x_MD))
        return x_MD * (expert - 2.5)

    expected = kernels.by_expert(x_TD, experts_TK, weights_TK, 6, own)
    n_all = sum(n_rows)
    n_rows.clear()
    found = kernels.by_expert(x_TD, experts_TK.masked_fill(is_out_TK, 6), weights_TK, 6, own)
    assert torch.equal(found, expected) and sum(n_rows) < n_all
    nobody_TK = torch.full_like(experts_TK, 6)
    assert not kernels.by_expert(x_TD, nobody_TK, weights_TK, 6, own).any()


def test_every_implementation_of_experts_leaves_nobody_out(moe: MoeModel) -> None:
    """Those of transformers compute on a GPU; here they run on the CPU."""
    routing, found = set_to(moe, "skip", 0.7), {}
    try:
        for kind in ("eager", "grouped_mm", "batched_mm", kernels.BY_EXPERT):
            moe.model.set_experts_implementation(kind)
            with rerouted(moe.blocks, routing):
                found[kind] = logits(moe)
    finally:
        moe.model.set_experts_implementation(kernels.BY_EXPERT)
    expected = found.pop(kernels.BY_EXPERT)
    assert (expected - logits(moe)).abs().max() > 1e-3
    for own in found.values():
        assert (own - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not any(block.experts._is_expert_parallel for block in moe.blocks)


def naee(block: Any, beta: float, x_BTD: Tensor) -> Tensor:
    """NAEE's block for dynamic skipping (arXiv:2402.14800), written out: K is 2."""
    x_TD = x_BTD.flatten(0, 1)
    weights_TK, experts_TK = F.linear(x_TD, block.gate.weight).softmax(-1).topk(2, dim=-1)
    is_small_T = weights_TK[:, 1] < beta * weights_TK[:, 0]
    weights_TK[is_small_T, 1] = 0
    weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    y_TD = torch.zeros_like(x_TD)
    for t, (weights_K, experts_K) in enumerate(zip(weights_TK, experts_TK.tolist(), strict=True)):
        both = list(zip(weights_K, experts_K, strict=True))
        for weight, expert in both[:1] if is_small_T[t] else both:
            gate, up = (block.experts.gate_up_proj[expert] @ x_TD[t]).chunk(2)
            y_TD[t] += weight * (block.experts.down_proj[expert] @ (F.silu(gate) * up))
    return y_TD.view_as(x_BTD)


@torch.inference_mode()
def test_skip_is_the_dynamic_skipping_of_naee(checkpoint: Checkpoints) -> None:
    moe = open_model(checkpoint("mixtral"), dtype="float64")
    torch.manual_seed(0)
    x_BTD = torch.randn(2, 30, 32, dtype=torch.float64)
    for block in moe.blocks:
        plain, module = block.module(x_BTD), block.module
        with rerouted(moe.blocks, set_to(moe, "skip", 0.6)):
            found = module(x_BTD)
        assert (found - naee(module, 0.6, x_BTD)).abs().max() < 1e-6
        assert (found - plain).abs().max() > 1e-2


@contextmanager
def routings(moe: MoeModel) -> Iterator[list[Routing]]:
    seen: list[Routing] = []
    with observe_routers(moe.blocks, seen.append):
        yield seen


@pytest.mark.parametrize(
    ("rule", "at", "options"),
    [
        ("skip", 0.6, {}),
        ("top-p", 0.5, {"most": 4}),
        ("random", 0.0, {}),
        ("skip", 0.6, {"shuffle": True}),
    ],
)
def test_packs_change_neither_answers_nor_counts(
    olmoe: MoeModel, quiz_folder: Path, rule: str, at: float, options: Any
) -> None:
    asked, engine = chunk(olmoe, quiz_folder), Engine(olmoe, 300)
    assert engine.mode(asked) == "packed"
    plain_NC = engine.score(asked)
    found = []
    for mode in ("packed", "single"):
        engine.is_trusted = mode == "packed"
        counts = ExpertCounts(olmoe.blocks, len(asked))
        with (
            rerouted_engine(engine, set_to(olmoe, rule, at, **options)) as passes,
            counts.listening(),
            routings(olmoe) as seen,
        ):
            score_NC = engine.score(asked, each(passes, counts.begin))
        n_brute = sum(int((r.experts_TK < 8).sum()) for r in seen)  # no pads: every token is real
        n_tokens = sum(len(r.logits_TE) for r in seen)
        assert int(counts.used_NL.sum() + counts.prefix_used_L.sum()) == n_brute
        assert counts.per_token == pytest.approx(n_brute / n_tokens)
        found.append((score_NC, counts.used_NL + counts.prefix_used_L, counts))
    (packed_NC, packed_NL, packed), (single_NC, single_NL, single) = found
    assert (packed_NC - single_NC).abs().max() < 1e-4
    assert (packed_NC - plain_NC).abs().max() > 1e-3
    assert torch.equal(packed_NL, single_NL)
    assert packed.prefix_tokens > 0 and not single.prefix_used_L.any()
    assert torch.equal(packed.tokens_N + packed.prefix_tokens, single.tokens_N)


@pytest.mark.parametrize("family", ["olmoe", "lfm2_moe"])  # packed, and padded
@pytest.mark.parametrize(("rule", "at", "most"), [("skip", 0.6, None), ("top-p", 0.5, 4)])
def test_a_profile_under_a_rule_sums_to_what_is_used(
    checkpoint: Checkpoints, quiz_folder: Path, family: str, rule: str, at: float, most: int | None
) -> None:
    moe = open_model(checkpoint(family))
    asked, engine = chunk(moe, quiz_folder), Engine(moe, 400)
    routing = set_to(moe, rule, at, most=most)
    blocks = [replace(block, most=most) for block in moe.blocks]
    recorder, counts = Recorder(blocks, len(asked), "all"), ExpertCounts(blocks, len(asked))
    counts_too = ExpertCounts(blocks, len(asked))
    with rerouted(moe.blocks, routing) as passes:
        begin = each(passes, recorder.begin, counts.begin)
        watch = PassObserver(begin, recorder.undo, recorder.on_rows, keeps_all=True)
        with recorder.listening():
            score_NC = engine.score(asked, watch=watch)
        with counts_too.listening():
            plain_NC = engine.score(asked, each(passes, counts_too.begin))
    assert (score_NC - plain_NC).abs().max() < 1e-4
    arrays = recorder.arrays()
    n_used_L = counts_too.used_NL.sum(0) + counts_too.prefix_used_L
    found_LE = arrays["prefix_tokens_LE"] + arrays["question_tokens_LE"]
    assert found_LE.sum(axis=1).tolist() == n_used_L.tolist()
    n_tokens = int(counts.tokens_N.sum()) + counts.prefix_tokens
    assert (n_used_L != 2 * n_tokens).all()
    chosen_NLK, weight_NLK = arrays["chosen_NLK"], arrays["weight_NLK"]
    assert chosen_NLK.shape == (len(asked), 2, most or 2)
    assert np.array_equal(chosen_NLK < 0, weight_NLK == 0)
    assert (chosen_NLK == -1).any() and (chosen_NLK < 8).all() and (chosen_NLK >= -1).all()
    votes_LE = arrays["question_votes_LE"]
    assert np.isfinite(arrays["gap_N"]).all() and np.isfinite(votes_LE).all() and votes_LE.any()


def test_random_experts_are_the_routers_own_where_all_are_alike(olmoe: MoeModel) -> None:
    own = logits(olmoe)
    routing = set_to(olmoe, "random", 0.0)

    def scored(seed: int) -> Tensor:
        rule = routing.rule.model_copy(update={"seed": seed})
        with rerouted(olmoe.blocks, replace(routing, rule=rule)) as passes:
            passes.key_T = torch.arange(TOKENS.shape[1])
            return logits(olmoe)

    assert (scored(0) - own).abs().max() > 0.1
    assert (scored(0) - scored(1)).abs().max() > 0.1
    for block in olmoe.blocks:
        for parameter in block.experts.parameters():
            parameter.copy_(parameter[:1].clone().expand_as(parameter))
    own = logits(olmoe)
    assert (scored(0) - own).abs().max() < 1e-5 * own.abs().max()


@pytest.mark.parametrize(
    ("rule", "at", "options"),
    [
        ("random", 0.0, {}),
        ("dropout", 0.5, {}),
        ("skip", 0.7, {"shuffle": True, "level": "prompt"}),
    ],
)
def test_equal_tokens_of_two_prompts_draw_experts_of_their_own(
    olmoe: MoeModel, rule: str, at: float, options: Any
) -> None:
    """Which tokens came before decides, so draws of prompts of one length are independent."""
    prompts = ((5, 6, 7, *range(20, 60)), (5, 6, 8, *range(20, 60)))
    asked, engine = Encoded(prompts, ((1, 2),) * 2, ("a", "b")), Engine(olmoe, 400)
    with rerouted_engine(engine, set_to(olmoe, rule, at, **options)) as passes:
        keys = []

        def begin(step: Pass) -> None:
            passes(step)
            if not step.is_prefix:
                own_T, other_T = (passes.keys(layer, len(step.question_T)) for layer in (0, 1))
                assert (own_T != other_T).all(), "each layer draws anew"
                keys.extend(own_T.view(len(step.questions), -1))

        engine.score(asked, begin)
        one, other = keys
        engine.is_trusted = False
        keys.clear()
        engine.score(asked, begin)
    assert len(one) == 41 and (one != other).all() and len({*one.tolist()}) == 41
    for packed, alone in zip((one, other), keys, strict=True):
        assert torch.equal(packed, alone[2:])
    assert torch.equal(keys[0][:2], keys[1][:2]), "what came before is the same there"


@pytest.mark.parametrize("rule", ["smooth", "odp", "random"])
def test_rules_of_whole_prompts_run_one_at_a_time(
    olmoe: MoeModel, quiz_folder: Path, rule: str
) -> None:
    asked, engine = chunk(olmoe, quiz_folder), Engine(olmoe, 300)
    options = {"odp": {"share": 0.2}, "random": {"level": "prompt"}}.get(rule, {})
    routing = set_to(olmoe, rule, {"smooth": 0.5, "odp": 0.8}.get(rule, 0.0), **options)
    plain_NC = engine.score(asked)
    with rerouted(olmoe.blocks, routing, olmoe.model) as passes, pytest.raises(ContractError):
        engine.score(asked, passes)
    with rerouted_engine(engine, routing) as passes, routings(olmoe) as seen:
        found_NC = engine.score(asked, passes)
    assert (found_NC - plain_NC).abs().max() > 1e-3
    assert engine.is_trusted and torch.equal(engine.score(asked), plain_NC)
    assert olmoe.model.config._attn_implementation == "sdpa"
    if rule == "random":  # one set for a prompt, others for others
        sets = [{tuple(sorted(row)) for row in r.experts_TK.tolist()} for r in seen if not r.layer]
        assert all(len(own) == 1 for own in sets) and len(set.union(*sets)) > 3


def test_odp_lies_between_the_router_and_skip(olmoe: MoeModel, quiz_folder: Path) -> None:
    asked, engine = chunk(olmoe, quiz_folder), Engine(olmoe, 300)
    used = {}
    for share in (0.0, 0.2, 1.0):
        counts = ExpertCounts(olmoe.blocks, len(asked))
        with (
            rerouted_engine(engine, set_to(olmoe, "odp", 0.8, share=share)) as passes,
            counts.listening(),
        ):
            engine.score(asked, each(passes, counts.begin))
        used[share] = counts.used_NL
    assert (used[1.0] == 2 * counts.tokens_N[:, None]).all()
    n_all = torch.ceil(0.2 * counts.tokens_N)[:, None]
    gained_NL = used[0.2] - used[0.0]
    assert (gained_NL >= 0).all() and (gained_NL <= n_all).all() and gained_NL.any()


def test_a_control_of_odp_leaves_out_as_many_experts_but_others(
    olmoe: MoeModel, quiz_folder: Path
) -> None:
    asked, engine = chunk(olmoe, quiz_folder), Engine(olmoe, 300)
    found = []
    for is_shuffled in (False, True):
        routing = set_to(olmoe, "odp", 0.8, shuffle=is_shuffled)
        counts = ExpertCounts(olmoe.blocks, len(asked))
        with rerouted_engine(engine, routing) as passes, counts.listening():
            found.append((engine.score(asked, each(passes, counts.begin)), counts.used_NL[:, 0]))
    (own_NC, own_N), (shuffled_NC, shuffled_N) = found
    assert torch.equal(own_N, shuffled_N), "in the first layer, which sees the same tokens"
    assert (own_N < 2 * counts.tokens_N).all() and (own_NC - shuffled_NC).abs().max() > 1e-3


def test_a_layer_without_attention_weights_is_refused(checkpoint: Checkpoints) -> None:
    moe = open_model(checkpoint("qwen3_next"))
    with (
        pytest.raises(ContractError, match=r"layers\.0\.mlp: its layer gives no attention weights"),
        rerouted(moe.blocks, set_to(moe, "odp", 0.5), moe.model),
    ):
        pass
    assert moe.model.config._attn_implementation == "sdpa"


def test_an_untold_pass_is_refused(olmoe: MoeModel) -> None:
    with (
        rerouted(olmoe.blocks, set_to(olmoe, "dropout", 0.5)),
        pytest.raises(ContractError, match="was not told of a pass"),
    ):
        logits(olmoe)


@pytest.mark.parametrize(
    ("rule", "at", "options", "fault"),
    [
        ("top-k", 9, {}, "has 8 experts, rule top-k asks for 9"),
        ("top-p", 0.5, {"most": 9}, "has 8 experts, rule top-p asks for 9"),
        ("grouped", 2, {"most": 1}, "leave out the limit of 1"),
        ("grouped", 4, {}, "takes 2 of 8 experts: 4 groups do not divide both"),
        ("top-p", 0.5, {"most": 4, "shuffle": True}, "leaves out none to shuffle"),
    ],
)
def test_what_a_block_cannot_route_is_refused(
    olmoe: MoeModel, rule: str, at: float, options: Any, fault: str
) -> None:
    with (
        pytest.raises(ContractError, match=fault),
        rerouted(olmoe.blocks, set_to(olmoe, rule, at, **options)),
    ):
        pass


def test_biases_act_before_a_rule_and_masks_hold(olmoe: MoeModel) -> None:
    bias_E = torch.zeros(8)
    bias_E[0], bias_E[1] = -torch.inf, 5.0
    tilts = Tilts({0: bias_E, 1: bias_E}, {0: torch.linspace(1, 2, 8)})
    found = []
    for is_rule_first in (True, False):
        routing = set_to(olmoe, "top-p", 0.7, most=5)
        inner, outer = rerouted(olmoe.blocks, routing), tilted(olmoe.blocks, tilts)
        first, second = (inner, outer) if is_rule_first else (outer, inner)
        with first, second, routings(olmoe) as seen:
            logits(olmoe)
        assert all((r.experts_TK != 0).all() and (r.experts_TK == 8).any() for r in seen)
        found.append(seen[0].experts_TK)
    assert torch.equal(*found)


@torch.inference_mode()
def test_constant_experts_take_part_in_a_rule(tmp_path: Path) -> None:
    constants = constants_for(REMOVED, is_zero=False)
    base = make_base(tmp_path / "base", "olmoe")
    moe = open_model(make_exact(base, tmp_path / "exact", constants))
    before = logits(moe)
    with rerouted(moe.blocks, set_to(moe, "skip", 0.0)):
        assert torch.equal(logits(moe), before)
    with rerouted(moe.blocks, set_to(moe, "top-k", 1)), routings(moe) as seen:
        found = logits(moe)
    assert all((r.experts_TK == 8).sum() == len(r.logits_TE) for r in seen)
    for block in moe.blocks:
        block.router.top_k = 1  # type: ignore[assignment]
    torch.testing.assert_close(found, logits(moe), rtol=1e-5, atol=1e-5)


@cache
def routed_class(base: Any) -> Any:
    """A router as a checkpoint with a rule brings it: its family's, and one place more."""

    def forward(self: Any, x_TD: Tensor) -> Any:
        logits_TE, weights_TK, experts_TK = self.family_forward(x_TD)
        experts_TM = F.pad(experts_TK.masked_fill(weights_TK < 0.2, 8), (0, 1), value=8)
        return logits_TE, F.pad(weights_TK.masked_fill(weights_TK < 0.2, 0), (0, 1)), experts_TM

    body = {"family_forward": base.forward, "forward": forward, "n_places": 3}
    return type("Routed", (base,), body)


def test_a_router_with_a_rule_is_known_by_its_familys_gate(
    olmoe: MoeModel, quiz_folder: Path
) -> None:
    for block in olmoe.blocks:
        block.router.__class__ = routed_class(type(block.router))
    blocks = find_blocks(olmoe.model, torch.arange(16)[None])
    for block, before in zip(blocks, olmoe.blocks, strict=True):
        assert (block.n_places, block.top_k) == (3, 2)
        assert block.weights is not None and block.weights.factor == pytest.approx(1.0)
        assert block.logits_op == before.logits_op and block.selection == before.selection
    engine = Engine(replace(olmoe, blocks=blocks), 300)
    asked = chunk(olmoe, quiz_folder)
    engine.check(asked)
    assert engine.is_trusted
    block, seen = blocks[0], []
    with observe_routers([block], seen.append):
        block.router(*block.call.args)
    check_gate(block, seen[0])
    broken = replace(block, weights=replace(block.weights, factor=2.0))  # type: ignore[type-var]
    with pytest.raises(ContractError, match="law of weights"):
        check_gate(broken, seen[0])
    recorder = Recorder(blocks, len(asked), "answer")
    with recorder.listening():
        engine.score(asked, watch=PassObserver(recorder.begin, recorder.undo, recorder.on_rows))
    assert (recorder.chosen_NLK[..., 2] == -1).all() and (recorder.chosen_NLK[..., 0] >= 0).any()


@pytest.mark.parametrize("kind", ["quiz", "texts"])
def test_a_profile_of_a_model_with_a_rule_holds_empty_places(
    olmoe: MoeModel, quiz_folder: Path, tmp_path: Path, kind: str
) -> None:
    for block in olmoe.blocks[1:]:  # in one of two layers
        block.router.__class__ = routed_class(type(block.router))
    moe = replace(olmoe, blocks=find_blocks(olmoe.model, torch.arange(16)[None]))
    quiz = load_quiz(Selection(str(quiz_folder), split="test", shots=1))
    if kind == "texts":
        lines = [json.dumps({"text": question.text * 3}) for question in quiz]
        (tmp_path / "own.jsonl").write_text("\n".join(lines))
        chosen = TextSelection((str(tmp_path / "own.jsonl"),), max_tokens=2_000)
        measured: Any = TextMeasurement(moe, load_corpus(chosen, moe.tokenizer), MeasureOptions())
    else:
        measured = Measurement(moe, quiz, None, MeasureOptions())
    list(measured.run(tmp_path / "profile"))
    profile = load_profile(tmp_path / "profile")
    assert [block.n_places for block in profile.info.model.blocks] == [2, 3]
    assert profile.info.model.blocks[0].top_k == 2
    for layer in profile.layers:
        assert layer.alpha_mean_E.sum() == pytest.approx(1.0)
        assert layer.tokens_E is not None and layer.tokens_E.sum() > 0
    if kind == "quiz":
        chosen_NLK = profile.array("chosen_NLK")
        assert (chosen_NLK[..., 2] == -1).all() and (chosen_NLK[:, 1, :2] == -1).any()
        for i, layer in enumerate(profile.layers):
            own = [set(row) - {-1} for row in chosen_NLK[:, i].tolist()]
            assert [set(np.flatnonzero(row)) for row in layer.is_activated_NE] == own
            assert np.allclose(layer.weight_E.sum(), profile.array("weight_NLK")[:, i].sum())
            assert np.isfinite(layer.rank_probability_NK).all()
        margins = find(profile).margins
        assert [m.undefined[:14] for m in margins] == ["", "a routing rule"]
