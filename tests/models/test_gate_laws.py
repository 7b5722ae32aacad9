"""A gate is believed only when it is explained: routers and blocks that nobody has seen before."""

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from expertcut.data import Selection, load_quiz
from expertcut.errors import ContractError
from expertcut.models.find_blocks import find_blocks
from expertcut.models.gate_laws import EXCEPTIONS
from expertcut.models.hooks import observe_routers
from expertcut.models.load import MoeModel
from expertcut.models.moe_block import MoeBlock
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import encode
from expertcut.scoring.router_bias import Tilts, tilted
from tests.conftest import open_model

Checkpoints = Callable[..., Path]
Routed = tuple[Tensor, Tensor, Tensor]
Route = Callable[[Any, Tensor], Routed]
TOKENS = torch.arange(16)[None]
BIAS_E = torch.tensor([0.3, -0.2, 0.1, 0.4, -0.1, 0.0, 0.2, -0.3])


def logits_of(router: Any, x: Tensor) -> Tensor:
    return F.linear(x.reshape(-1, x.shape[-1]), router.weight)


def renormalised(score_TE: Tensor, by_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    experts_TK = by_TE.topk(k, dim=-1).indices
    weights_TK = score_TE.gather(1, experts_TK)
    return weights_TK / weights_TK.sum(dim=-1, keepdim=True), experts_TK


def scored(score: Callable[[Tensor], Tensor], *, is_renormalised: bool = True) -> Route:
    def route(router: Any, x: Tensor) -> Routed:
        z_TE = logits_of(router, x)
        weights_TK, experts_TK = renormalised(score(z_TE), score(z_TE), router.top_k)
        if not is_renormalised:
            weights_TK = score(z_TE).gather(1, experts_TK)
        return z_TE, weights_TK, experts_TK

    return route


def with_bias(router: Any, x: Tensor) -> Routed:
    z_TE = logits_of(router, x)
    return z_TE, *renormalised(z_TE.sigmoid(), z_TE.sigmoid() + BIAS_E, router.top_k)


def with_bias_on_logits(router: Any, x: Tensor) -> Routed:
    z_TE = logits_of(router, x)
    return z_TE, *renormalised(z_TE.sigmoid(), z_TE + BIAS_E, router.top_k)


def chosen_before_bias(router: Any, x: Tensor) -> Routed:
    """The bias is there, and used for the weights instead of the choice."""
    z_TE = logits_of(router, x)
    score_TE = z_TE.sigmoid()
    return z_TE, *renormalised(score_TE + BIAS_E + 1, score_TE, router.top_k)


def chosen_without_its_bias(router: Any, x: Tensor) -> Routed:
    z_TE = logits_of(router, x)
    return z_TE, *renormalised(z_TE.sigmoid(), z_TE.sigmoid(), router.top_k)


def cooled(router: Any, x: Tensor) -> Routed:
    """A temperature behind the logits that are returned."""
    z_TE = logits_of(router, x)
    return z_TE, *renormalised((z_TE / 1.5).softmax(-1), z_TE, router.top_k)


def cooled_before(router: Any, x: Tensor) -> Routed:
    z_TE = logits_of(router, x) / 1.5
    return z_TE, *renormalised(z_TE.softmax(-1), z_TE, router.top_k)


def capped(router: Any, x: Tensor) -> Routed:
    z_TE = 2 * torch.tanh(logits_of(router, x) / 2)
    return z_TE, *renormalised(z_TE.sigmoid(), z_TE, router.top_k)


def noisy(router: Any, x: Tensor) -> Routed:
    z_TE = logits_of(router, x)
    noisy_TE = z_TE + torch.randn_like(z_TE)
    return z_TE, *renormalised(z_TE.softmax(-1), noisy_TE, router.top_k)


def noisy_logits(router: Any, x: Tensor) -> Routed:
    z_TE = logits_of(router, x) + torch.randn(8)
    return z_TE, *renormalised(z_TE.softmax(-1), z_TE, router.top_k)


def worst(router: Any, x: Tensor) -> Routed:
    z_TE = logits_of(router, x)
    return z_TE, *renormalised(z_TE.softmax(-1), -z_TE, router.top_k)


def second_best(router: Any, x: Tensor) -> Routed:
    z_TE = logits_of(router, x)
    experts_TK = z_TE.topk(router.top_k + 1, dim=-1).indices[:, 1:]
    weights_TK = z_TE.softmax(-1).gather(1, experts_TK)
    return z_TE, weights_TK / weights_TK.sum(-1, keepdim=True), experts_TK


def scaled_by_token(router: Any, x: Tensor) -> Routed:
    """Weights that are proportional to α within a token, and neither plain nor renormalised."""
    z_TE = logits_of(router, x)
    weights_TK, experts_TK = renormalised(z_TE.softmax(-1), z_TE, router.top_k)
    return z_TE, weights_TK * (1 + z_TE.std(dim=-1, keepdim=True)), experts_TK


def equal_weights(router: Any, x: Tensor) -> Routed:
    z_TE = logits_of(router, x)
    experts_TK = z_TE.topk(router.top_k, dim=-1).indices
    return z_TE, torch.full(experts_TK.shape, 0.5), experts_TK


def by_matrix_product(router: Any, x: Tensor) -> Routed:
    z_TE = x.reshape(-1, x.shape[-1]) @ router.weight.T
    return z_TE, *renormalised(z_TE.softmax(-1), z_TE, router.top_k)


def by_einsum(router: Any, x: Tensor) -> Routed:
    z_TE = torch.einsum("td,ed->te", x.reshape(-1, x.shape[-1]), router.weight)
    return z_TE, *renormalised(z_TE.softmax(-1), z_TE, router.top_k)


def unseen(router: Any, x: Tensor) -> Routed:
    """Right in all it gives, and no operation of it can be watched."""
    with torch._C.DisableTorchFunction():
        return by_matrix_product(router, x)


def twice(router: Any, x: Tensor) -> Routed:
    """What it returns is not what it chooses by."""
    z_TE = logits_of(router, x)
    hidden_TE = x.reshape(-1, x.shape[-1]) @ router.weight.T
    return z_TE, *renormalised(hidden_TE.softmax(-1), hidden_TE, router.top_k)


RIGHT: dict[str, tuple[Route, str, bool, str]] = {
    # route, scoring, whether the weights are renormalised, what the bias is added to
    "softmax": (scored(lambda z: z.softmax(-1)), "softmax", True, "score"),
    "plain softmax": (
        scored(lambda z: z.softmax(-1), is_renormalised=False),
        "softmax",
        False,
        "score",
    ),
    "sigmoid": (scored(torch.sigmoid), "sigmoid", True, "score"),
    "plain sigmoid": (scored(torch.sigmoid, is_renormalised=False), "sigmoid", False, "score"),
    "square root of softplus": (
        scored(lambda z: F.softplus(z).sqrt()),
        "sqrtsoftplus",
        True,
        "score",
    ),
    "bias on the score": (with_bias, "sigmoid", True, "score"),
    "bias on the logits": (with_bias_on_logits, "sigmoid", True, "logits"),
    "temperature before the logits": (cooled_before, "softmax", True, "score"),
    "cap": (capped, "sigmoid", True, "score"),
    "matrix product": (by_matrix_product, "softmax", True, "score"),
    "einsum": (by_einsum, "softmax", True, "score"),
}
WRONG: dict[str, tuple[Route, str]] = {
    "softplus": (scored(F.softplus), "weights"),
    "tanh": (scored(lambda z: z.tanh() + 1.5), "weights"),
    "exponential of a square": (scored(lambda z: (z * z.abs()).exp()), "weights"),
    "temperature after the logits": (cooled, "weights"),
    "scaled by token": (scaled_by_token, "weights"),
    "equal weights": (equal_weights, "weights"),
    "bias on the weights": (chosen_before_bias, "weights"),
    "bias that is not used": (chosen_without_its_bias, "choice"),
    "worst experts": (worst, "choice"),
    "second best experts": (second_best, "choice"),
    "noise on the choice": (noisy, "repeatable"),
    "noise on the logits": (noisy_logits, "repeatable"),
}


def planted(checkpoint: Checkpoints, route: Route, **options: str) -> MoeModel:
    """An OLMoE whose routers route in another way; two are given a selection bias to use or not."""
    moe = open_model(checkpoint("olmoe", num_experts=8), **options)
    for block in moe.blocks:
        block.router.forward = MethodType(route, block.router)  # type: ignore[method-assign]
        if route in (with_bias, with_bias_on_logits, chosen_before_bias, chosen_without_its_bias):
            block.router.register_buffer("e_score_correction_bias", BIAS_E.clone())
    return moe


def found(moe: MoeModel) -> tuple[MoeBlock, ...]:
    return find_blocks(moe.model, TOKENS)


@pytest.mark.parametrize("name", RIGHT)
def test_a_router_that_obeys_the_laws_is_read_rightly(checkpoint: Checkpoints, name: str) -> None:
    route, scoring, is_renormalised, selection = RIGHT[name]
    for block in found(planted(checkpoint, route)):
        assert block.weights is not None
        assert (block.scoring, block.selection) == (scoring, selection)
        assert block.weights.is_renormalised == is_renormalised
        assert block.inflates == (scoring == "softmax" and not is_renormalised)
        assert block.weights.factor == pytest.approx(1, abs=1e-4)
        assert block.logits_op is not None


@pytest.mark.parametrize("name", WRONG)
def test_a_router_that_breaks_a_law_is_refused_by_block_and_law(
    checkpoint: Checkpoints, name: str
) -> None:
    route, law = WRONG[name]
    moe = planted(checkpoint, route)
    with pytest.raises(
        ContractError, match=rf"model\.layers\.0\.mlp breaks the law of {law} "
    ) as e:
        found(moe)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", [n for n in RIGHT if n != "bias on the logits"])
def test_masks_and_biases_act_on_whatever_the_router_chooses_by(
    checkpoint: Checkpoints, name: str
) -> None:
    moe = planted(checkpoint, RIGHT[name][0])
    blocks = found(moe)
    seen: list[Any] = []
    with torch.inference_mode(), observe_routers(blocks, seen.append):
        moe.model(input_ids=TOKENS, use_cache=False)
        block = blocks[0]
        expert = int(seen[0].experts_TK.flatten().mode().values)
        bias_E = torch.zeros(8)
        bias_E[expert], bias_E[(expert + 1) % 8] = -torch.inf, 1.5
        with tilted(blocks, Tilts({0: bias_E})):
            moe.model(input_ids=TOKENS, use_cache=False)
        moe.model(input_ids=TOKENS, use_cache=False)
    before, after, later = (r for r in seen if r.layer == block.layer)
    assert (before.experts_TK == expert).any() and not (after.experts_TK == expert).any()
    torch.testing.assert_close(after.logits_TE, before.logits_TE + bias_E)
    assert torch.equal(later.logits_TE, before.logits_TE)
    assert torch.equal(later.weights_TK, before.weights_TK)


@pytest.mark.parametrize("route", [unseen, twice])
@pytest.mark.parametrize("value", [-torch.inf, 1.0])
def test_a_router_that_no_change_reaches_can_be_watched_and_not_changed(
    checkpoint: Checkpoints, route: Route, value: float
) -> None:
    moe = planted(checkpoint, route)
    blocks = found(moe)
    assert [block.scoring for block in blocks] == ["softmax", "softmax"]
    bias_E = torch.zeros(8)
    bias_E[3] = value
    with (
        pytest.raises(ContractError, match="biases and masks cannot act"),
        tilted(blocks, Tilts({0: bias_E})),
    ):
        pass


@pytest.mark.parametrize("value", [-torch.inf, 1.0])
def test_a_router_that_stops_heeding_changes_is_found_before_its_numbers_are(
    checkpoint: Checkpoints, value: float
) -> None:
    moe = open_model(checkpoint("olmoe"))
    moe.blocks[0].router.forward = MethodType(unseen, moe.blocks[0].router)  # type: ignore[method-assign]
    bias_E = torch.zeros(8)
    bias_E[3] = value
    with pytest.raises(ContractError), tilted(moe.blocks, Tilts({0: bias_E})):
        pass


@pytest.mark.parametrize("kind", ["renormalised", "plain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_peaked_router_is_read_as_what_it_is(
    checkpoint: Checkpoints, kind: str, dtype: str
) -> None:
    """Where the chosen hold nearly all of α, renormalising changes nothing on real tokens."""
    moe = open_model(checkpoint("olmoe", norm_topk_prob=kind == "renormalised"), dtype=dtype)
    for block in moe.blocks:
        block.router.get_parameter("weight").mul_(100)
    assert [b.inflates for b in found(moe)] == [kind == "plain"] * 2


@pytest.mark.parametrize(
    ("family", "scoring"), [("deepseek_v3", "sigmoid"), ("mixtral", "softmax")]
)
def test_with_one_expert_a_token_the_scoring_is_still_found(
    checkpoint: Checkpoints, family: str, scoring: str
) -> None:
    for block in open_model(checkpoint(family, num_experts_per_tok=1)).blocks:
        assert (block.scoring, block.top_k, block.inflates) == (scoring, 1, False)


def rerouted(block: MoeBlock, change: Callable[..., Tensor]) -> None:
    forward = block.module.forward
    block.module.forward = lambda x, *more: change(block, forward, x, *more)  # type: ignore[method-assign]


BLOCKS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "router run twice": (lambda b, f, x: (b.router(x), f(x))[1], "once"),
    "experts run twice": (lambda b, f, x: (f(x) + f(x)) / 2, "once"),
    "a norm of the sum": (lambda b, f, x: F.layer_norm(f(x), x.shape[-1:]), "sum"),
    "experts that are not used": (lambda b, f, x: x + 0 * f(x), "sum"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_around_the_router_that_breaks_a_law_is_refused(
    checkpoint: Checkpoints, name: str
) -> None:
    change, law = BLOCKS[name]
    moe = open_model(checkpoint("olmoe"))
    rerouted(moe.blocks[1], change)
    with pytest.raises(ContractError, match=rf"model\.layers\.1\.mlp breaks the law of {law} "):
        found(moe)


def test_experts_that_give_another_sum_than_one_by_one_are_refused(checkpoint: Checkpoints) -> None:
    moe = open_model(checkpoint("olmoe"))
    experts = moe.blocks[0].experts
    experts.register_forward_hook(lambda m, args, y_TD: y_TD * 1.01)
    with pytest.raises(ContractError, match=r"breaks the law of sum .* one by one"):
        found(moe)


def test_two_blocks_with_the_same_experts_are_refused(checkpoint: Checkpoints) -> None:
    moe = open_model(checkpoint("olmoe"))
    moe.blocks[1].experts.down_proj = moe.blocks[0].experts.down_proj
    with pytest.raises(
        ContractError, match=r"layers\.1\.mlp breaks the law of storage .*layers\.0"
    ):
        found(moe)


def test_blocks_that_route_to_different_numbers_of_experts_are_refused(
    checkpoint: Checkpoints,
) -> None:
    moe = open_model(checkpoint("olmoe"))
    moe.blocks[1].router.top_k = 3
    with pytest.raises(ContractError, match="breaks the law of arrays"):
        found(moe)


def test_a_gate_that_changes_its_rule_on_real_tokens_is_found_there(
    checkpoint: Checkpoints, quiz_folder: Path
) -> None:
    moe = open_model(checkpoint("olmoe"))
    quiz = load_quiz(Selection(str(quiz_folder), split="test", shots=1))
    subject, questions = next(iter(quiz.questions.items()))
    encoded = encode(moe.tokenizer, questions, quiz.shots_by_subject[subject])
    Engine(moe, 1000).check(encoded)
    router = moe.blocks[1].router
    right = router.forward

    def only_short(x: Tensor) -> Routed:
        logits_TE, weights_TK, experts_TK = right(x)
        return logits_TE, weights_TK if len(x) <= 16 else weights_TK.roll(1, dims=1), experts_TK

    router.forward = only_short  # type: ignore[method-assign]
    with pytest.raises(ContractError, match=r"model\.layers\.1\.mlp breaks the law of weights "):
        Engine(moe, 1000).check(encoded)


def test_exceptions_say_what_is_not_claimed(checkpoint: Checkpoints) -> None:
    assert {law for law, _ in EXCEPTIONS} <= {"weights", "sum"}
    assert open_model(checkpoint("phimoe")).blocks[0].weights is None
    moe = open_model(checkpoint("phimoe"))
    moe.model.config.model_type = "another"
    with pytest.raises(ContractError, match="breaks the law of weights"):
        found(moe)


def test_a_cap_and_a_factor_are_more_than_a_gate_matrix(checkpoint: Checkpoints) -> None:
    for route, is_linear in ((capped, False), (cooled_before, False), (by_einsum, True)):
        assert {b.is_linear for b in found(planted(checkpoint, route))} == {is_linear}
