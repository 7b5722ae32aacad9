"""Criteria against brute force, one token at a time, and against the published definitions."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from expertcut.data import Quiz, Selection, load_quiz, prompt
from expertcut.edits import calibrate as calibration
from expertcut.edits.calibrate import RemovalTrial, sample_inputs
from expertcut.edits.criteria import (
    CRITERIA,
    positions_of,
    ranked,
    reconstruction,
    scores,
)
from expertcut.edits.layouts import Positions
from expertcut.errors import ProfileError, SettingsError
from expertcut.models.load import MoeModel
from expertcut.models.moe_block import MoeBlock
from expertcut.profiling.recorder import borda_points, shift
from expertcut.profiling.storage import Profile, load_profile
from expertcut.scoring.engine import Engine
from tests.conftest import FAMILIES, LETTERS, make_tokenizer, open_model, write_quiz
from tests.profiling.test_profile import profiled

Checkpoints = Callable[..., Path]
Array = np.ndarray[Any, Any]
SHOTS = 1
# Packed, in rows with pads (a sliding window), routed in groups by sigmoids, half the output added,
# the experts' sum doubled inside the block.
BRUTE: dict[str, dict[str, object]] = {
    "olmoe": {},
    "mixtral": {"sliding_window": 16},
    "deepseek_v3": {},
    "granitemoe": {},
    "minimax_m3_vl_text": {},
}
# What the sum of experts counts times, beside the block's input and the residual stream.
FACTORS = {"granitemoe": (1.0, 0.5), "minimax_m3_vl_text": (2.0, 2.0)}


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Quiz:
    folder = write_quiz(tmp_path_factory.mktemp("few"), {"dev": SHOTS, "test": 2, "val": 4}, seed=3)
    return load_quiz(Selection(str(folder), shots=SHOTS, subjects=("green_birds", "old_clocks")))


@dataclass
class Seen:
    """One block's tokens, in turn: what each read, and what each of its experts gave."""

    residual: list[Tensor] = field(default_factory=list)
    input: list[Tensor] = field(default_factory=list)
    experts: list[list[int]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    is_answer: list[bool] = field(default_factory=list)
    is_correct: list[bool] = field(default_factory=list)


def one_by_one(moe: MoeModel, quiz: Quiz) -> list[Seen]:
    """Every token of every prompt run alone through each of its experts; no cache, no packing."""
    blocks = [Seen() for _ in moe.blocks]
    streams: dict[int, Tensor] = {}
    handles = []
    for block, seen in zip(moe.blocks, blocks, strict=True):
        norm = moe.model.get_submodule(block.name.rpartition(".")[0]).post_attention_layernorm
        handles.append(norm.register_forward_pre_hook(_keep_stream(streams, block.layer)))
        handles.append(block.router.register_forward_hook(_note(block, seen, streams)))
    letters = [moe.tokenizer(f"x {letter}")["input_ids"][-1] for letter in LETTERS[:4]]
    for question in quiz:
        ids = moe.tokenizer(prompt(question, quiz.shots_by_subject[question.subject]))["input_ids"]
        with torch.no_grad():
            logits_V = moe.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        is_correct = int(logits_V[letters].argmax()) == question.answer
        for seen in blocks:
            seen.is_answer += [False] * (len(ids) - 1) + [True]
            seen.is_correct += [is_correct] * len(ids)
    for handle in handles:
        handle.remove()
    return blocks


def _keep_stream(streams: dict[int, Tensor], layer: int) -> Callable[..., None]:
    def hook(_module: object, args: tuple[Tensor, ...]) -> None:
        streams[layer] = args[0][0]

    return hook


def _note(block: MoeBlock, seen: Seen, streams: dict[int, Tensor]) -> Callable[..., None]:
    def hook(_module: object, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        x_TD = args[0].reshape(-1, args[0].shape[-1])
        for t, x_D in enumerate(x_TD):
            experts, weights = output[2][t].tolist(), output[1][t].tolist()
            own = [
                block.experts(x_D[None], torch.tensor([[e]]), torch.ones(1, 1))[0].double()
                for e in experts
            ]
            seen.residual.append(streams[block.layer][t].double())
            seen.input.append(x_D.double())
            seen.experts.append(experts)
            seen.weights.append(weights)
            seen.outputs.append(own)
            seen.logits.append(output[0][t].double())

    return hook


def cosine_shift(x_D: Tensor, y_D: Tensor) -> float:
    """max(1 − cos(x, x + y), 0) as EASY-EP has it."""
    return max(1 - float(torch.cosine_similarity(x_D, x_D + y_D, dim=0)), 0.0)


def votes(values: list[float]) -> list[float]:
    """K points for the largest, 1 for the smallest."""
    return [1 + sum(other < value for other in values) for value in values]


def expected(
    seen: Seen, n_experts: int, factors: tuple[float, float]
) -> dict[tuple[str, Positions], Array]:
    """All criteria by plain loops over tokens."""
    names = ("tokens", "weight", "norm", "weighted", "easy", "postnorm", "votes")
    total = {name: np.zeros(n_experts) for name in (*names, "asked", "mass", "alpha", "right")}
    for t, (experts, weights, outputs) in enumerate(
        zip(seen.experts, seen.weights, seen.outputs, strict=True)
    ):
        y_D = sum(w * f_D for w, f_D in zip(weights, outputs, strict=True))
        assert isinstance(y_D, Tensor)
        by_input, by_stream = factors
        easy = cosine_shift(seen.residual[t], by_stream * y_D)
        postnorm = cosine_shift(seen.input[t], by_input * y_D)
        parts = [w * float(f_D.norm()) for w, f_D in zip(weights, outputs, strict=True)]
        for e, w, f_D, part, vote in zip(
            experts, weights, outputs, parts, votes(parts), strict=True
        ):
            amounts = (1, w, float(f_D.norm()), part, part * easy, part * postnorm, vote)
            for name, amount in zip(names, amounts, strict=True):
                total[name][e] += amount
            if seen.is_answer[t]:
                total["asked"][e] += 1
                total["mass"][e] += w
    mean = {name: total[name] / total["tokens"].clip(1) for name in ("norm", "weighted")}
    return {
        ("activations", "answer"): total["asked"],
        ("activations", "all"): total["tokens"],
        ("gate_mass", "answer"): total["mass"],
        ("gate_mass", "all"): total["weight"],
        ("output_norm", "all"): total["norm"],
        ("output_norm_mean", "all"): mean["norm"],
        ("reap", "all"): mean["weighted"],
        ("easy_ep", "all"): total["easy"],
        ("easy_ep_postnorm", "all"): total["postnorm"],
        ("ranked_choice", "all"): total["votes"],
    }


def weighted_accuracy(seen: Seen, block: MoeBlock) -> Array:
    """Σ α·1(correct) / Σ α over the answers that chose each expert, −∞ where none did."""
    right, alpha = np.zeros(block.n_experts), np.zeros(block.n_experts)
    for t in np.flatnonzero(seen.is_answer):
        alpha_E = block.alpha(seen.logits[t][None])[0]
        for e in seen.experts[t]:
            alpha[e] += float(alpha_E[e])
            right[e] += float(alpha_E[e]) * seen.is_correct[t]
    return np.where(alpha == 0, -np.inf, right / np.where(alpha == 0, 1, alpha))


@pytest.fixture(scope="module")
def observed(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Profile, MoeModel, list[Seen]]]:
    """A family's profile, its model, and each block's tokens one by one, made once."""

    @cache
    def observe(family: str) -> tuple[Profile, MoeModel, list[Seen]]:
        path = checkpoint(family, **BRUTE.get(family, {}))
        moe = open_model(path)
        profile = profiled(path, quiz, tmp_path_factory.mktemp("observed") / "p")
        return profile, moe, one_by_one(moe, quiz)

    return observe


@pytest.mark.parametrize("family", BRUTE)
def test_every_criterion_agrees_with_brute_force_one_token_at_a_time(
    observed: Callable[[str], tuple[Profile, MoeModel, list[Seen]]], family: str
):
    profile, moe, blocks = observed(family)
    for block, seen in zip(moe.blocks, blocks, strict=True):
        wanted = expected(seen, block.n_experts, FACTORS.get(family, (1.0, 1.0)))
        wanted["weighted_accuracy", "answer"] = weighted_accuracy(seen, block)
        assert {by for by, _ in wanted} == {
            c.name for c in CRITERIA.values() if c.needs == "profile"
        }
        for (by, positions), score_E in wanted.items():
            found_E = scores(profile, by, positions)[block.layer]
            np.testing.assert_allclose(found_E, score_E, rtol=2e-5, atol=1e-6, err_msg=by)
            assert len(set(score_E.tolist())) > 1, by
    assert sum(seen.is_answer.count(False) for seen in blocks) > 1000


def reap_of_cerebras(seen: Seen, n_experts: int, *, is_renormalised: bool) -> Array:
    """The mean of norm · router weight over active tokens, from the softmax of the logits."""
    amounts: list[list[float]] = [[] for _ in range(n_experts)]
    for logits_E, experts, outputs in zip(seen.logits, seen.experts, seen.outputs, strict=True):
        weight_E = logits_E.softmax(dim=0)
        if is_renormalised:
            weight_E = weight_E / weight_E[experts].sum()
        for e, f_D in zip(experts, outputs, strict=True):
            amounts[e].append(float(f_D.norm() * weight_E[e]))
    return np.array([np.mean(own) if own else 0 for own in amounts])


def reap_of_llm_compressor(seen: Seen, n_experts: int) -> Array:
    """Sums and counts over (token, slot), with the weights that the experts are combined by."""
    total, count = np.zeros(n_experts), np.zeros(n_experts)
    index = np.array(seen.experts).T.ravel()
    gates = np.array(seen.weights).T.ravel()
    norms = np.array([[float(f.norm()) for f in own] for own in seen.outputs]).T.ravel()
    np.add.at(total, index, gates * norms)
    np.add.at(count, index, 1)
    return total / count.clip(1)


@pytest.mark.parametrize(
    ("family", "is_renormalised"), [("olmoe", False), ("qwen3_moe", True), ("deepseek_v3", None)]
)
def test_reap_and_output_norm_are_the_published_ones(
    observed: Callable[[str], tuple[Profile, MoeModel, list[Seen]]],
    family: str,
    is_renormalised: bool | None,
):
    profile, moe, blocks = observed(family)
    for block, seen in zip(moe.blocks, blocks, strict=True):
        n_experts = block.n_experts
        found_E = scores(profile, "reap", "all")[block.layer]
        np.testing.assert_allclose(found_E, reap_of_llm_compressor(seen, n_experts), rtol=2e-5)
        if is_renormalised is not None:  # REAP's own code knows no sigmoid
            published_E = reap_of_cerebras(seen, n_experts, is_renormalised=is_renormalised)
            np.testing.assert_allclose(found_E, published_E, rtol=2e-5)
        ean_E = np.zeros(n_experts)
        for experts, outputs in zip(seen.experts, seen.outputs, strict=True):
            for e, f_D in zip(experts, outputs, strict=True):
                ean_E[e] += math.dist(f_D.tolist(), [0] * len(f_D))
        found_E = scores(profile, "output_norm", "all")[block.layer]
        np.testing.assert_allclose(found_E, ean_E, rtol=2e-5)


# What weighs tokens and votes


def test_a_shift_is_one_less_the_cosine_also_where_it_is_tiny():
    torch.manual_seed(0)
    x_TD, y_TD = torch.randn(200, 64), torch.randn(200, 64)
    for scale in (1e-4, 1e-2, 1.0, 30.0):
        z_TD = x_TD.double() + scale * y_TD.double()
        wanted_T = 1 - torch.cosine_similarity(x_TD.double(), z_TD, dim=1)
        found_T = shift(x_TD, scale * y_TD)
        torch.testing.assert_close(found_T, wanted_T, rtol=2e-3, atol=1e-14)
    assert shift(x_TD, -2 * x_TD).allclose(torch.full((200,), 2.0, dtype=torch.float64))
    assert not shift(torch.zeros(3, 4), torch.ones(3, 4)).any()
    assert not shift(torch.ones(3, 4), -torch.ones(3, 4)).any()
    assert (shift(x_TD.bfloat16(), y_TD.bfloat16()) > 0).all()


def test_votes_are_bordas_points_and_equal_ones_share_theirs():
    weighted_TE = torch.tensor([[3.0, 0, 1, 2], [5, 5, 0, 0], [0, 0, 0, 4]], dtype=torch.float64)
    experts_TK = torch.tensor([[2, 0, 3], [1, 0, 2], [1, 2, 3]])
    assert borda_points(weighted_TE, experts_TK).tolist() == [
        [3, 0, 1, 2],
        [2.5, 2.5, 0, 0],
        [0, 0, 0, 3],
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_is_found_by_what_the_layer_does(checkpoint: Checkpoints, family: str):
    moe = open_model(checkpoint(family))
    names = {module: name for name, module in moe.model.named_modules()}
    for block in moe.blocks:
        residual = block.residual
        assert residual is not None
        assert names[residual.norm].startswith(block.name.rpartition(".")[0])
        assert residual.factor == (0.5 if family == "granitemoe" else 1.0)
        # It norms what its block gave before adding it.
        assert len(residual.steps) == (1 if family == "flex_olmo" else 0)


def test_a_family_with_several_streams_has_no_easy_ep_and_says_so(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path
):
    profile = profiled(checkpoint("hy_v4"), quiz, tmp_path / "p")
    assert not any("residual" in name for name in profile.chunks[0])
    with pytest.raises(ProfileError, match="take easy_ep_postnorm"):
        scores(profile, "easy_ep", "all")
    assert all((s > 0).any() for s in scores(profile, "easy_ep_postnorm", "all"))


def test_experts_of_another_width_have_no_easy_ep_postnorm_and_the_other_criteria(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path
):
    profile = profiled(checkpoint("nemotron_h"), quiz, tmp_path / "p")
    assert not any("input_shift" in name for name in profile.chunks[0])
    with pytest.raises(ProfileError, match="take another criterion"):
        scores(profile, "easy_ep_postnorm", "all")
    for by in ("easy_ep", "ranked_choice"):
        assert all((s > 0).any() for s in scores(profile, by, "all"))


@pytest.mark.parametrize(
    ("family", "factor"),
    [("laguna", 1.5), ("beam", 1.5), ("cohere2_moe", 0.5), ("axk1", None), ("nemotron_h", None)],
)
def test_what_a_block_does_to_the_sum_of_its_experts_is_found(
    checkpoint: Checkpoints, family: str, factor: float | None
):
    blocks = open_model(checkpoint(family)).blocks
    assert [block.output_factor for block in blocks] == [factor] * len(blocks)


# Criteria that ask the model


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_aimer_is_computed_from_the_weights_on_disk(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path, family: str
):
    path = checkpoint(family)
    profile = profiled(path, quiz, tmp_path / "p")
    found = scores(profile, "aimer", "all", Engine(open_model(path), 200))
    with safe_open(path / "model.safetensors", framework="numpy") as file:
        names = [name for name in file.keys() if ".experts." in name]  # noqa: SIM118
        assert len(names) == 2 * 8 * 3
        for layer, score_E in enumerate(found):
            for e in range(8):
                own = [n for n in names if f"layers.{layer}." in n and f".experts.{e}." in n]
                w = np.concatenate([file.get_tensor(n).ravel() for n in own]).astype(np.float64)
                assert score_E[e] == pytest.approx(-np.abs(w).mean() / np.sqrt((w**2).mean()))
    assert len({round(float(s), 9) for s in found[0]}) == 8


def test_an_expert_of_zeros_is_the_least_by_its_weights():
    weights = torch.randn(3, 4, 5)
    weights[1] = 0
    score_E = CRITERIA["aimer"].function([weights, weights.transpose(1, 2)])
    assert score_E.argmin() == 1 and score_E.max() < -0.5


def test_random_is_drawn_anew_for_each_layer_and_seed(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path
):
    profile = profiled(checkpoint("olmoe"), quiz, tmp_path / "p")
    first, second = (scores(profile, "random", "all", seed=seed) for seed in (0, 1))
    again = scores(profile, "random", "all", seed=0)
    assert [s.tolist() for s in first] == [s.tolist() for s in again]
    assert len({tuple(s) for s in (*first, *second)}) == 4


def without(block: MoeBlock, expert: int) -> Any:
    """A copy of a block in which an expert's rows are gone from every tensor."""
    import copy

    cut = copy.deepcopy(block.module)
    copied = dict(zip(block.module.modules(), cut.modules(), strict=True))
    rest = torch.tensor([e for e in range(block.n_experts) if e != expert])
    for owner, name, tensor, axis in block.expert_tensors():
        rows = tensor.detach().index_select(axis, rest)
        if isinstance(getattr(owner, name), torch.nn.Parameter):
            rows = torch.nn.Parameter(rows, requires_grad=False)
        setattr(copied[owner], name, rows)
    for module in (cut, *cut.modules()):
        for name in ("num_experts", "n_routed_experts", "num_local_experts"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, len(rest))
    return cut


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmoe", {}),
        ("qwen3_moe", {}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
        ("minimax_m2", {}),  # its router is given a bias besides
        ("afmoe", {}),  # and takes no tokens without a batch
        ("nemotron_h", {"n_group": 1, "topk_group": 1}),  # its experts work in another width
    ],
)
def test_the_first_step_of_reconstruction_is_exhaustive_leave_one_out_with_rerouting(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path, family: str, changes: dict[str, int]
):
    path = checkpoint(family, **changes)
    profile = profiled(path, quiz, tmp_path / "p")
    moe = open_model(path)
    engine = Engine(moe, 200)
    kept = sample_inputs(engine, quiz)
    found = scores(profile, "reconstruction", "all", engine)
    for block in moe.blocks:
        x_BTD = kept[block.layer][None]
        tried = RemovalTrial(block, kept[block.layer])
        losses = []
        with torch.inference_mode():
            whole = block.module(x_BTD)
            for e in range(block.n_experts):
                cut = without(block, e)(x_BTD)
                losses.append(float((cut - whole).double().square().sum(-1).mean()))
                assert tried.change((e,)) == pytest.approx(losses[-1], rel=1e-3)
        assert len({round(loss, 6) for loss in losses}) == block.n_experts
        assert int(np.argmin(losses)) == int(np.argmin(found[block.layer]))
        assert sorted(found[block.layer].tolist()) == list(range(block.n_experts))


def test_reconstruction_takes_the_least_change_again_and_again():
    worth = [5.0, 1.0, 4.0, 2.0, 8.0, 3.0]
    tried: list[tuple[int, ...]] = []

    def change(removed: tuple[int, ...]) -> float:
        tried.append(removed)
        # 1 and 3 stand in for each other: without both the change is large.
        return sum(worth[e] for e in removed) + (100 if {1, 3} <= set(removed) else 0)

    score_E = reconstruction(change, [range(6)], 2, range(6))
    assert score_E.tolist() == [3, 0, 2, 5, 4, 1]
    assert max(map(len, tried)) == 4  # two are left for the router
    grouped_E = reconstruction(change, [range(3), range(3, 6)], 2, range(6))
    # Either group can spare one alone.
    assert [int(e) for e in np.argsort(grouped_E)[:2]] == [1, 5]
    assert sorted(grouped_E.tolist()) == list(range(6))
    # Nothing changes whoever goes: the last of the order before goes first.
    assert reconstruction(lambda _: 0.0, [range(4)], 1, [2, 0, 3, 1]).tolist() == [2, 0, 3, 1]


def test_what_is_kept_of_a_calibration_pass_is_bounded(
    checkpoint: Checkpoints, quiz: Quiz, monkeypatch: pytest.MonkeyPatch
):
    engine = Engine(open_model(checkpoint("olmoe")), 200)
    every = sample_inputs(engine, quiz)[0]
    assert 50 < len(every) <= calibration.MOST_TOKENS
    monkeypatch.setattr(calibration, "MOST_TOKENS", 20)
    some = sample_inputs(engine, quiz)
    assert {layer: len(x_TD) for layer, x_TD in some.items()} == {0: 20, 1: 20}
    # The same tokens in every block: the second reads what follows from what the first read.
    for x_D in some[0]:
        assert (every == x_D).all(dim=1).any()
    monkeypatch.setattr(calibration, "KEPT_BYTES", 8 * 8 * 8 * 3)
    assert len(sample_inputs(engine, quiz)[1]) == 3


# Planted: experts that are never chosen


def plant_dead(path: Path, folder: Path, dead: list[int]) -> Path:
    """The model with biases that keep these experts from ever being chosen."""
    moe = open_model(path)
    for block in moe.blocks:
        bias_E = block.selection_bias()
        bias_E = block.router.bias if bias_E is None else bias_E
        assert isinstance(bias_E, Tensor)
        bias_E.data[dead] = -100
    moe.model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# Not ERNIE: there a softmax is biased, and cutting what is never chosen changes who else is.
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "minimax_m2"])
def test_dead_experts_rank_last_by_every_criterion_that_looks_at_data(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path, family: str
):
    dead = [1, 6]
    path = plant_dead(checkpoint(family), tmp_path / "model", dead)
    profile = profiled(path, quiz, tmp_path / "p")
    engine = Engine(open_model(path), 200)
    layers = profile.layers
    blind = {"aimer", "random"}
    for by in set(CRITERIA) - blind:
        own = positions_of(by, None)
        for positions in CRITERIA[by].positions:
            if (by, positions) == ("weighted_accuracy", "all"):
                continue  # of texts: a quiz has no next tokens
            found = scores(profile, by, positions, engine)
            for layer, score_E in zip(layers, found, strict=True):
                order = ranked(score_E, layer.alpha_mean_E)
                if own == "answer" and positions == "answer":  # others may be idle there too
                    assert set(score_E[dead]) == {score_E.min()}, by
                else:
                    assert set(order[-2:]) == set(dead), by
    assert all((layer.tokens_E > 0).sum() == 6 for layer in layers if layer.tokens_E is not None)


# Which positions, and what is missing


def test_positions_are_the_criterions_own_unless_it_has_a_choice():
    assert {by: positions_of(by, None) for by in CRITERIA} == {
        by: "answer" if by in ("activations", "gate_mass", "weighted_accuracy") else "all"
        for by in CRITERIA
    }
    for by in ("activations", "gate_mass", "weighted_accuracy"):
        assert positions_of(by, "all") == "all" and positions_of(by, "answer") == "answer"
    assert positions_of("reap", "all") == "all"
    for by, asked in (("reap", "answer"), ("random", "answer")):
        with pytest.raises(SettingsError, match="leave --tokens out"):
            positions_of(by, asked)  # type: ignore[arg-type]


def test_what_a_profile_lacks_is_said_in_one_line(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path
):
    path = checkpoint("olmoe")
    answers = profiled(path, quiz, tmp_path / "answer", stats="answer")
    for by in ("output_norm", "output_norm_mean", "reap", "easy_ep", "ranked_choice"):
        with pytest.raises(ProfileError, match="profile with --stats all"):
            scores(answers, by, "all")
    assert scores(answers, "weighted_accuracy", "answer")
    old = aged(profiled(path, quiz, tmp_path / "p"), slice(None))
    half = aged(load_profile(old.path), slice(1, None))  # begun by an older version
    with pytest.raises(ProfileError, match="profile again"):
        scores(half, "ranked_choice", "all")
    assert all((s >= 0).any() for s in scores(old, "reap", "all"))
    for by in ("easy_ep", "easy_ep_postnorm", "ranked_choice"):
        with pytest.raises(ProfileError, match=f"{by}: the profile was made before.*profile again"):
            scores(old, by, "all")
    for by in (c.name for c in CRITERIA.values() if c.needs_model):
        with pytest.raises(SettingsError, match=f"{by} needs the model itself"):
            scores(old, by, "all")


def aged(profile: Profile, which: slice) -> Profile:
    """As it would be without the sums that came later in some chunks."""
    assert len(profile.chunks) == 2
    for chunk in profile.chunks[which]:
        for name in [n for n in chunk if n.endswith(("votes_LE", "shift_LE"))]:
            del chunk[name]
    return profile


def test_the_page_has_a_section_and_a_row_for_every_criterion():
    page = (Path(__file__).parents[2] / "docs" / "criteria.md").read_text(encoding="utf-8")
    heads = [line for line in page.splitlines() if line.startswith("## ")]
    first_table, *_ = page.partition("\n## ")
    rows = [line.split("|") for line in first_table.splitlines() if line.startswith("| `")]
    assert [row[1].strip(" `") for row in rows] == list(CRITERIA)
    for by, row in zip(CRITERIA, rows, strict=True):
        assert any(by in head.split() for head in heads), by
        own = CRITERIA[by]
        assert (row[5].strip() == "no") == (not own.needs_model)
        takes = {("answer", "all"): "answer (default) or all", (): "none"}
        assert row[3].strip() == takes.get(own.positions, own.default_positions)
        section = next(s for s in page.split("\n## ") if by in s.partition("\n")[0].split())
        for word in (*own.aliases, *([own.paper] if own.paper else [])):
            assert word in section, (by, word)
        assert (own.function.__doc__ or "").strip().partition("\n")[0].endswith("."), by
