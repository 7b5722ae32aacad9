"""What is chosen and on which questions: tilts, prunings, folds, the plan file, directions."""

import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from expertcut.commands.prune import PruneSettings
from expertcut.data import Question, Quiz, Selection, load_quiz, prompt
from expertcut.data.sources import hash_lines
from expertcut.edits.calibrate import direction_quality, fit_directions, rescaling_at_answers
from expertcut.edits.criteria import ranked
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.plan import (
    BlockEdit,
    ChosenOn,
    EditPlan,
    PlanFile,
    PlanModel,
    hashes_sha256,
    load_hashes,
    load_plan,
    plan_text,
    save_plan,
    validate_edits,
)
from expertcut.edits.router_edits import Target, parse_target, reweight_draft, tilts
from expertcut.edits.selection import choose, keep_active
from expertcut.edits.splits import choosing_profile, draft_plan, questions_for, used_hashes
from expertcut.errors import PlanError, ProfileError, QuizError, SettingsError
from expertcut.profiling.schema import BlockInfo, quiz_info
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import Encoded, Pass, encode, packed_pass, prefix_pass
from expertcut.stats import HeldOutResult
from tests.conftest import SUBJECTS, make_tokenizer, open_model, write_quiz
from tests.support.hand_made import (
    block,
    gap,
    profile_info,
    random_chunk,
    random_profile,
    write_profile,
)

close = pytest.approx
Checkpoints = Callable[..., Path]
FIRST = "model.layers.0.mlp"


# Which expert, and by how much


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("12", Target(None, 12, None)),
        ("3:12", Target(3, 12, None)),
        ("0:0", Target(0, 0, None)),
        ("12=0.25", Target(None, 12, 0.25)),
        ("3:12=0.25", Target(3, 12, 0.25)),
        ("3:12=.5", Target(3, 12, 0.5)),
        ("3:12=-2", Target(3, 12, -2.0)),
        ("12=+1e-3", Target(None, 12, 0.001)),
        ("  7:1=2.  ", Target(7, 1, 2.0)),
    ],
)
def test_an_expert_is_named_by_number_layer_and_strength(text: str, target: Target):
    assert parse_target(text) == target


NO_TILTS = """
    a -1 3: :12 3:12:4 12= =1 12=x 12=0.2x 12=1.2.3 12=. 12=1e 1.5 3;12 12,13
    12=0 12=-0.0 12=1e999 12=nan 12=inf
"""


@pytest.mark.parametrize(
    "text",
    [*NO_TILTS.split(), "", " ", "3: 12", "12 = 1", "9" * 5000, "0:" + "9" * 5000],
    ids=lambda text: repr(text[:12]),
)
def test_what_names_no_expert_or_no_tilt_is_refused(text: str):
    with pytest.raises(SettingsError) as refused:
        parse_target(text)
    assert repr(text) in str(refused.value)


def gate_profile(folder: Path) -> Profile:
    """Two layers of four experts, top 2; in the last, expert 3 is just left out on average."""
    alpha_NLE = np.array(
        [
            [[0.4, 0.3, 0.2, 0.1], [0.90, 0.0300, 0.0282, 0.0282]],
            [[0.5, 0.3, 0.1, 0.1], [0.89, 0.0334, 0.0300, 0.0300]],
        ],
        dtype=np.float32,
    )
    chosen_NLK = np.array([[[0, 1], [0, 1]], [[1, 0], [1, 0]]], dtype=np.int16)
    blocks = [block(0, 4), block(1, 4)]
    chunk = random_chunk(0, 2, blocks) | {"alpha_NLE": alpha_NLE, "chosen_NLK": chosen_NLK}
    return write_profile(folder, profile_info(blocks, {"birds": 2}), [chunk])


def test_the_admission_gap_lifts_an_expert_to_the_last_one_let_in(tmp_path: Path):
    profile = gate_profile(tmp_path / "p")
    # Mean α of the second chosen is 0.0317, that of expert 3 is 0.0291.
    assert gap(profile, 1, 3) == close(0.08826, abs=5e-5)
    # Where α is the same for both questions: from odds of 1 : 9 to 3 : 7.
    assert gap(profile, 0, 3) == close(math.log(3 / 7 * 9), rel=1e-5)
    assert gap(profile, 0, 1) == close(0, abs=1e-6)  # it is the last one let in
    lifted = [1 / (1 + (1 / a - 1) * math.exp(-gap(profile, 0, 0))) for a in (0.4, 0.5)]
    assert sum(lifted) / 2 == close(0.3, rel=1e-6)


def test_the_gap_closes_on_the_logits_that_were_recorded(tmp_path: Path):
    info = profile_info([block(0, 8, 3), block(1, 6, 3)], {"birds": 50})
    profile = random_profile(tmp_path / "p", info, n_idle=1)
    (chunk,) = profile.chunks
    for layer, n_experts in ((0, 8), (1, 6)):
        for expert in range(n_experts - 1):
            last = lifted = 0.0
            for alpha, chosen in zip(chunk["alpha_NLE"], chunk["chosen_NLK"], strict=True):
                last += min(float(alpha[layer, e]) for e in chosen[layer])
                weights = [float(a) for a in alpha[layer]]
                weights[expert] *= math.exp(gap(profile, layer, expert))
                lifted += weights[expert] / sum(weights)
            assert lifted == close(last, rel=1e-5)


def test_boost_and_suppress_are_mirrors(tmp_path: Path):
    profile = gate_profile(tmp_path / "p")
    boosted, left = tilts(profile, ["3", "0:2=0.5"], [])
    assert (boosted.layer, boosted.expert, boosted.origin) == (1, 3, "its admission gap")
    assert boosted.bias == close(0.08826, abs=5e-5)
    assert (left.layer, left.block, left.bias, left.origin) == (
        0,
        "model.layers.0.mlp",
        0.5,
        "given",
    )
    down, given, signed = tilts(profile, [], ["0:0", "3=0.25", "1:0=-0.25"])
    assert down.bias == gap(profile, 0, 0) < 0  # it was let in
    assert (given.bias, given.layer) == (-0.25, 1)
    assert signed.bias == -0.25
    assert [t.verb for t in (boosted, left, down, given, signed)] == ["boost"] * 2 + [
        "suppress"
    ] * 3
    both = tilts(profile, ["3=0.25"], ["0:3=0.25"])
    assert [t.bias for t in both] == [0.25, -0.25]


@pytest.mark.parametrize(
    ("boost", "suppress", "error", "reason"),
    [
        (["2:0"], [], PlanError, "no layer 2: the model has MoE layers 0 to 1"),
        (["4"], [], PlanError, "no expert 4 in layer 1: it has experts 0 to 3"),
        (["3", "1:3=2"], [], PlanError, "expert 1:3 is named twice"),
        (["3"], ["3=1"], PlanError, "expert 1:3 is named twice"),
        (["3=-1"], [], PlanError, "use --suppress"),
        (["0:0"], [], PlanError, "admitted on average already .*--boost 0:0=0.5"),
        ([], ["0:3"], PlanError, "left out on average already .*--suppress 0:3=0.5"),
    ],
)
def test_a_tilt_that_makes_no_sense_is_refused(
    tmp_path: Path, boost: list[str], suppress: list[str], error: type[Exception], reason: str
):
    with pytest.raises(error, match=reason):
        tilts(gate_profile(tmp_path / "p"), boost, suppress)


def test_an_expert_of_probability_zero_has_no_gap_to_close(tmp_path: Path):
    profile = gate_profile(tmp_path / "p")
    profile.chunks[0]["alpha_NLE"][:, 1, 3] = 0
    with pytest.raises(PlanError, match="give the strength"):
        tilts(profile, ["3"], [])
    with pytest.raises(PlanError, match="give the strength"):
        tilts(profile, [], ["3"])


def test_a_tilt_keeps_every_expert_and_says_what_it_does(tmp_path: Path):
    profile = gate_profile(tmp_path / "p")
    draft = reweight_draft(profile, tilts(profile, ["3=0.25"], ["1:0=2"]))
    assert [edit.keep for edit in draft.edits.values()] == [(0, 1, 2, 3)] * 2
    assert [edit.bias for edit in draft.edits.values()] == [{}, {3: 0.25, 0: -2.0}]
    assert draft.action == "reweight --boost 1:3=0.25 --suppress 1:0=2"
    assert draft.is_fitting
    assert not replace(draft, edits={"x": BlockEdit(keep=(0, 1))}).is_fitting


# Which experts stay


@dataclass(frozen=True)
class Layer:
    """What a choice is made from, by plain loops."""

    count: list[int]
    alpha: list[float]
    tokens: list[float]

    @property
    def active(self) -> list[int]:
        return [e for e, n in enumerate(self.count) if n]

    def best(self, experts: list[int], score: list[float]) -> list[int]:
        return sorted(experts, key=lambda e: (-score[e], -self.alpha[e], e))


def counted(profile: Profile) -> list[Layer]:
    layers = []
    for layer, its in enumerate(profile.info.model.blocks):
        count, alpha, tokens = ([0.0] * its.experts for _ in range(3))
        for chunk in profile.chunks:
            n = len(chunk["row_N"])
            for e in range(its.experts):
                count[e] += sum(e in chosen for chosen in chunk["chosen_NLK"][:, layer].tolist())
                alpha[e] += sum(chunk["alpha_NLE"][:, layer, e].tolist())
                tokens[e] += (
                    n * chunk["prefix_tokens_LE"][layer, e] + chunk["question_tokens_LE"][layer, e]
                )
        layers.append(Layer([int(c) for c in count], alpha, tokens))
    return layers


def uneven_profile(folder: Path, seed: int = 0, *, has_tokens: bool = True) -> Profile:
    """Three layers with 3, 6 and 4 active experts of 10, top 2; equal scores abound."""
    blocks = [block(layer, 10) for layer in range(3)]
    rng = np.random.default_rng(seed)
    active = [rng.permutation(10)[:n_active] for n_active in (3, 6, 4)]
    alpha_LE = rng.integers(1, 3, (3, 10)) / 32
    chunks = [random_chunk(seed, 6, blocks), random_chunk(seed + 100, 6, blocks)]
    for chunk in chunks:
        chunk["alpha_NLE"][:] = alpha_LE
        for layer, its in enumerate(active):
            turns = [(2 * n % len(its), (2 * n + 1) % len(its)) for n in range(6)]
            chunk["chosen_NLK"][:, layer] = its[turns]
        for name in ("prefix_tokens_LE", "question_tokens_LE"):
            chunk[name] = np.tril(rng.integers(0, 2, (10, 10)))[6:9].astype(np.float64)
    if not has_tokens:
        chunks = [{k: v for k, v in c.items() if not k.endswith("_LE")} for c in chunks]
    return write_profile(folder, profile_info(blocks, {"birds": 6, "trees": 6}), chunks)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("has_tokens", [True, False])
def test_keep_active_fills_up_to_one_count_by_tokens_else_by_alpha(
    tmp_path: Path, seed: int, has_tokens: bool
):
    profile = uneven_profile(tmp_path / "p", seed)
    layers = counted(profile)
    if not has_tokens:
        profile = uneven_profile(tmp_path / "answer", seed, has_tokens=False)
    pruning = keep_active(profile, CutSettings())
    assert [len(layer.active) for layer in layers] == [3, 6, 4]
    for its, layer in zip(profile.info.model.blocks, layers, strict=True):
        idle = [e for e in range(10) if e not in layer.active]
        fillers = layer.best(idle, layer.tokens if has_tokens else layer.alpha)
        fillers = sorted(fillers[: 6 - len(layer.active)])
        assert pruning.draft.edits[its.name].keep == tuple(sorted(layer.active + fillers))
        assert pruning.fillers[its.name] == tuple(fillers)
        assert pruning.n_active[its.name] == len(layer.active)
    assert not pruning.draft.is_fitting


def test_keep_active_over_all_tokens_counts_every_token(tmp_path: Path):
    profile = uneven_profile(tmp_path / "p")
    layers = counted(profile)
    pruning = keep_active(profile, CutSettings(positions="all"))
    active = [[e for e in range(10) if layer.tokens[e]] for layer in layers]
    most = max(map(len, active))
    assert {len(a) for a in active} != {most} and most < 10
    for edit, its in zip(pruning.draft.edits.values(), active, strict=True):
        assert len(edit.keep) == most and set(its) <= set(edit.keep)
    with pytest.raises(ProfileError, match="--stats all"):
        keep_active(
            uneven_profile(tmp_path / "answer", has_tokens=False), CutSettings(positions="all")
        )


@pytest.mark.parametrize("positions", ["answer", "all"])
@pytest.mark.parametrize("n_keep", range(2, 11))
def test_keep_n_takes_the_best_ties_by_alpha_then_by_the_lower_id(
    tmp_path: Path, n_keep: int, positions: Any
):
    profile = uneven_profile(tmp_path / "p", seed=n_keep)
    pruning = choose(profile, CutSettings(keep=n_keep, positions=positions))
    for layer, edit in zip(counted(profile), pruning.draft.edits.values(), strict=True):
        score = layer.tokens if positions == "all" else [float(n) for n in layer.count]
        assert len(set(score)) < 10  # some are equal
        assert edit.keep == tuple(sorted(layer.best(list(range(10)), score)[:n_keep]))
    fillers = [layer.active for layer in counted(profile)]
    if positions == "answer":
        for edit, kept_idle, active in zip(
            pruning.draft.edits.values(), pruning.fillers.values(), fillers, strict=True
        ):
            assert kept_idle == tuple(e for e in edit.keep if e not in active)


def test_ranking_is_by_score_then_alpha_then_the_lower_id():
    score_E = np.array([1, 3, 1, 3, 1, 0])
    alpha_E = np.array([0.2, 0.1, 0.2, 0.4, 0.3, 0.9])
    assert ranked(score_E, alpha_E) == [3, 1, 4, 0, 2, 5]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (CutSettings(keep_active=True), 6),
        (CutSettings(keep=5), 5),
        (CutSettings(keep_fraction=0.5), 5),
        (CutSettings(keep_fraction=1.0), 10),
        (CutSettings(keep_fraction=0.24), 2),
    ],
)
def test_how_many_is_said_in_one_of_three_ways(tmp_path: Path, keep: CutSettings, expected: int):
    pruning = choose(uneven_profile(tmp_path / "p"), keep, CutSettings())
    assert {len(edit.keep) for edit in pruning.draft.edits.values()} == {expected}


@pytest.mark.parametrize(
    ("keep", "error", "reason"),
    [
        (CutSettings(), SettingsError, "only one of them"),
        (CutSettings(keep_active=True, keep=4), SettingsError, "only one of them"),
        (CutSettings(keep=4, keep_fraction=0.5), SettingsError, "only one of them"),
        (CutSettings(keep_fraction=0.0), SettingsError, "--keep-fraction 0 must be above 0"),
        (CutSettings(keep_fraction=1.01), SettingsError, "at most 1"),
        (CutSettings(keep=1), PlanError, "routes each token to 2 of 10 experts: keep 2 to 10"),
        (CutSettings(keep=11), PlanError, "keep 2 to 10"),
        (CutSettings(keep_fraction=0.1), PlanError, "--keep 1 does not fit model.layers.0.mlp"),
    ],
)
def test_how_many_is_refused_where_it_makes_no_sense(
    tmp_path: Path, keep: CutSettings, error: type[Exception], reason: str
):
    with pytest.raises(error, match=reason):
        choose(uneven_profile(tmp_path / "p"), keep, CutSettings())


def grouped_profile(folder: Path, chosen: list[list[int]], **more: int) -> Profile:
    """Two layers of 16 experts in 4 groups of 4, 2 of which a token may use, top 2."""
    gate = {"groups": 4, "top_groups": 2, "inflates": False, "scoring": "sigmoid", **more}
    blocks = [block(layer, 16, len(chosen[0]), **gate) for layer in range(2)]
    chunk = random_chunk(0, len(chosen), blocks)
    chunk["chosen_NLK"][:] = np.array(chosen)[:, None]
    return write_profile(folder, profile_info(blocks, {"birds": len(chosen)}), [chunk])


def per_group(keep: tuple[int, ...]) -> list[int]:
    return [sum(e // 4 == group for e in keep) for group in range(4)]


@pytest.mark.parametrize(
    ("chosen", "top_groups", "count"),
    [
        ([[0, 4], [1, 5], [2, 4], [8, 12]], 2, 3),  # three of the first group fire
        ([[0, 4], [8, 12]], 2, 2),  # one of each fires, but a group is ranked by its best two
        ([[0, 4, 5], [8, 12, 0]], 1, 3),  # three must fit into the one group that is used
        ([[0, 1], [2, 3]], 2, 4),  # a whole group: nothing goes
    ],
)
def test_where_routing_is_in_groups_each_keeps_equally_many(
    tmp_path: Path, chosen: list[list[int]], top_groups: int, count: int
):
    profile = grouped_profile(tmp_path / "p", chosen, top_groups=top_groups)
    pruning = keep_active(profile, CutSettings())
    active = {e for row in chosen for e in row}
    for edit in pruning.draft.edits.values():
        assert per_group(edit.keep) == [count] * 4
        assert active <= set(edit.keep)


def test_keep_n_in_groups_is_a_multiple_of_them(tmp_path: Path):
    profile = grouped_profile(tmp_path / "p", [[0, 4], [1, 5], [2, 4], [8, 12]])
    for edit in choose(
        profile,
        CutSettings(
            keep=12,
        ),
    ).draft.edits.values():
        assert per_group(edit.keep) == [3, 3, 3, 3]
        assert {0, 1, 2, 4, 5, 8, 12} <= set(edit.keep)
    with pytest.raises(PlanError, match="keep a multiple of 4, not 10"):
        choose(
            profile,
            CutSettings(
                keep=10,
            ),
        )
    with pytest.raises(PlanError, match="keep equally many in each, at least 2"):
        choose(
            profile,
            CutSettings(
                keep=4,
            ),
        )


BLOCKS = [block(0, 8), block(1, 8)]
GROUPED = [block(0, 8, 4, groups=2, top_groups=1)]


def edits(*keeps: tuple[int, ...], **more: Any) -> dict[str, BlockEdit]:
    """Changes as commands make them, from edits that hold."""
    made = {f"model.layers.{i}.mlp": BlockEdit(keep=keep) for i, keep in enumerate(keeps)}
    return {name: edit.model_copy(update=more) for name, edit in made.items()}


@pytest.mark.parametrize(
    ("blocks", "asked", "reason"),
    [
        (BLOCKS, edits((0, 1)), "names 1 blocks, the model has 2"),
        (BLOCKS, dict(reversed(edits((0, 1), (0, 1)).items())), "in order"),
        (
            BLOCKS,
            {"model.layers.0.mlp": BlockEdit(keep=(0, 1)), "x": BlockEdit(keep=(0, 1))},
            "in order",
        ),
        (BLOCKS, edits((0, 1), (0, 8)), "layers.1.mlp keeps expert 8 but has experts 0 to 7"),
        (BLOCKS, edits((0,), (0,)), "keeps 1 experts but routes each token to 2"),
        (BLOCKS, edits((), ()), "keeps 0 experts"),
        (BLOCKS, edits((0, 1), (0, 1, 2)), r"one count for all layers, found \[2, 3\]"),
        (BLOCKS, edits((0, 1), (0, 1), bias={2: 0.5}), "expert 2 has a bias or scale but is not"),
        (BLOCKS, edits((0, 1), (0, 1), scale={-1: 0.5}), "expert -1 has a bias or scale"),
        (GROUPED, edits((0, 1, 2, 3, 4)), r"keeps \[4, 1\] of them: keep equally many in each"),
        (GROUPED, edits((0, 1, 4, 5)), "keep equally many in each, at least 4"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(
    blocks: list[BlockInfo], asked: dict[str, BlockEdit], reason: str
):
    with pytest.raises(PlanError, match=reason):
        validate_edits(asked, blocks, "stock")


@pytest.mark.parametrize("keep", [(1, 0), (1, 1, 2), (-1, 1)])
def test_experts_to_keep_are_ascending_numbers(keep: tuple[int, ...]):
    with pytest.raises(ValidationError):
        BlockEdit(keep=keep)
    assert BlockEdit(keep=(0, 1, 2)).keep == (0, 1, 2)


def test_a_plan_that_fits_is_taken():
    validate_edits(edits((0, 1), (3, 7)), BLOCKS, "stock")
    validate_edits(
        edits(tuple(range(8)), tuple(range(8)), bias={7: -1.0}, scale={0: 0.5}), BLOCKS, "stock"
    )
    validate_edits(edits(tuple(range(8))), GROUPED, "stock")


# Folding the inflation back


@pytest.mark.parametrize("is_leaving_out", [False, True])
def test_the_fold_is_the_mean_of_what_remains_where_an_expert_was_chosen(
    tmp_path: Path, is_leaving_out: bool
):
    blocks = [block(0), block(1, inflates=False), block(2), block(3)]
    profile = random_profile(tmp_path / "p", profile_info(blocks, {"birds": 40, "trees": 30}))
    keep = (0, 2, 3, 5, 7)  # 6 and 7 are idle
    left_out = {("trees", row) for row in range(10)} | {("birds", 3)} if is_leaving_out else set()
    asked = edits(keep, keep, tuple(range(8)), keep)
    factors = rescaling_at_answers(profile, asked, left_out)
    assert set(factors) == {0, 3}  # not where weights are renormalised, nor where nothing goes
    for layer, factor in factors.items():
        assert factor.tolist() == close(naive_fold(profile, layer, keep, left_out), rel=1e-6)
        assert factor.min() < 0.9 and factor.max() < 1
    if is_leaving_out:
        assert not np.allclose(factors[0], rescaling_at_answers(profile, asked)[0])


def naive_fold(
    profile: Profile, layer: int, keep: tuple[int, ...], left_out: set[tuple[str, int]]
) -> list[float]:
    remains: list[float] = []
    remains_of: dict[int, list[float]] = {e: [] for e in keep}
    for (_, subject, _), chunk in zip(profile.info.chunks(), profile.chunks, strict=True):
        for n, row in enumerate(chunk["row_N"].tolist()):
            if (subject, row) in left_out:
                continue
            alpha = chunk["alpha_NLE"][n, layer].tolist()
            remains.append(1 - sum(a for e, a in enumerate(alpha) if e not in keep))
            for e in set(keep) & set(chunk["chosen_NLK"][n, layer].tolist()):
                remains_of[e].append(remains[-1])
    assert not remains_of[7] and remains_of[0]
    chosen_or_all = [remains_of[e] or remains for e in keep]
    return [sum(values) / len(values) for values in chosen_or_all]


def test_the_fold_undoes_the_inflation_where_it_is_always_the_same(tmp_path: Path):
    # Sliced to experts 0 and 1, a softmax of 0.45, 0.3, 0.15, 0.1 gives 0.6, 0.4: a third more.
    alpha_NLE = np.tile(np.array([0.45, 0.3, 0.15, 0.1], dtype=np.float32), (3, 1, 1))
    chosen_NLK = np.tile(np.array([0, 1], dtype=np.int16), (3, 1, 1))
    blocks = [block(0, 4)]
    chunk = random_chunk(0, 3, blocks) | {"alpha_NLE": alpha_NLE, "chosen_NLK": chosen_NLK}
    profile = write_profile(tmp_path / "p", profile_info(blocks, {"birds": 3}), [chunk])
    sliced = torch.tensor([0.45, 0.3]).log().softmax(-1)
    factor = rescaling_at_answers(profile, edits((0, 1)))[0]
    assert (sliced * torch.tensor(factor)).tolist() == close([0.45, 0.3])


# plan.json


def plan(**changes: Any) -> PlanFile:
    fields: dict[str, Any] = {
        "model": PlanModel(id="tiny \u2028 model", revision=None, fingerprint="f" * 64),
        "action": "prune --keep 2\nof 8",
        "criterion": "activations",
        "positions": "answer",
        "removal": "reroute",
        "layout": "stock",
        "chosen_on": ChosenOn(quiz="birds", split="val", questions=3, sha256="0" * 64),
        "proof": {"held_out_hashes": ["a" * 16], "fits": [{"layer": 0, "fit": 0.0}], "later": 1},
        "blocks": edits((0, 1), (2, 7), bias={7: 0.1 + 0.2}) | edits((0, 3), scale={3: 1 / 3}),
    }
    return PlanFile(**{**fields, **changes})


def test_a_plan_is_json_with_one_line_per_block():
    text = plan_text(plan())
    found = json.loads(text)
    for name, edit in found["blocks"].items():
        (line,) = [line for line in text.splitlines() if f'"{name}"' in line]
        assert json.loads("{" + line.strip().rstrip(",") + "}") == {name: edit}
    assert len(text.splitlines()) == len(found) + 2 + len(found["blocks"]) + 1
    assert text.endswith("}\n")


def test_a_plan_survives_the_trip_to_disk(tmp_path: Path):
    questions = {"b" * 16, "a" * 16}
    chosen = ChosenOn(quiz="birds", split="val", questions=2, sha256=hashes_sha256(questions))
    written = plan(chosen_on=chosen)
    save_plan(tmp_path / "p", written, questions)
    assert load_plan(tmp_path / "p") == load_plan(tmp_path / "p" / "plan.json") == written
    assert list(load_plan(tmp_path / "p").blocks) == list(written.blocks)
    assert load_hashes(tmp_path / "p", written) == questions
    assert (tmp_path / "p" / "chosen_on.txt").read_text() == "a" * 16 + "\n" + "b" * 16 + "\n"
    assert plan_text(load_plan(tmp_path / "p")) == plan_text(written)


SHIFT = (
    '{"against": "base", "questions": 3, "max_abs_logprob_diff": 0.30000000000000004, '
    '"median_abs_logprob_diff": 1e-07, "flipped": 1}'
)


@pytest.mark.parametrize(
    "proof",
    [
        "{}",
        '{"fits": []}',
        f'{{"held_out": [{SHIFT}], "shares": [{{"layer": 1, "expert": 2, "base": 0.0, '
        '"exact": 0.5, "edited": 0.25}]}',  # of the first version
        f'{{"held_out_split": "val", "held_out_used": "were not used", "held_out": [{SHIFT}], '
        '"held_out_hashes": ["ab cd"], "shares": [], "alone": null, "agreement": [], '
        '"outcomes": [{"form": "healed", "questions": 3, "accuracy": 1.0, '
        '"right_logprob": -0.25, "flipped": 0}]}',
        '{"fits": [{"layer": 1, "quality": 0.75}], "rows": [{"layer": 0, "groups": 2}], '
        '"of a later version": {"x": [1, 2.0, null]}}',
    ],
)
def test_the_proof_of_any_version_is_written_as_it_was_read(tmp_path: Path, proof: str):
    text = plan_text(plan(proof=HeldOutResult()))
    assert ' "proof": {},\n' in text
    text = text.replace(' "proof": {},\n', f' "proof": {proof},\n')
    (tmp_path / "plan.json").write_text(text)
    assert plan_text(load_plan(tmp_path)) == text


@pytest.mark.parametrize(
    ("proof", "place"),
    [
        ({"held_out": "good"}, "proof.held_out"),
        ({"held_out": [{"against": "x"}]}, "proof.held_out.0.questions"),
        ({"held_out_hashes": [1]}, "proof.held_out_hashes.0"),
        ({"held_out_used": 1}, "proof.held_out_used"),
    ],
)
def test_a_proof_of_another_form_is_refused(tmp_path: Path, proof: dict[str, Any], place: str):
    content = json.loads(plan_text(plan()))
    (tmp_path / "plan.json").write_text(json.dumps({**content, "proof": proof}))
    with pytest.raises(PlanError, match=re.escape(f"{place}: ")):
        load_plan(tmp_path)


def test_the_list_of_questions_must_be_the_one_that_the_plan_names(tmp_path: Path):
    questions = {"b" * 16, "a" * 16}
    chosen = ChosenOn(quiz="birds", split="val", questions=2, sha256=hashes_sha256(questions))
    written = plan(chosen_on=chosen)
    save_plan(tmp_path, written, questions)
    file = tmp_path / "chosen_on.txt"
    for content in (b"", file.read_bytes()[17:], file.read_bytes() + b"c\n", b"\xff\n"):
        file.write_bytes(content)
        with pytest.raises(PlanError, match="is not the list"):
            load_hashes(tmp_path, written)
    file.unlink()
    with pytest.raises(PlanError, match="cannot be read"):
        load_hashes(tmp_path, written)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2),
        (("layout",), "fancy"),
        (("removal",), "vanish"),
        (("positions",), "some"),
        (("model",), "tiny"),
        (("chosen_on", "questions"), "many"),
        (("comment",), "by hand"),
        (("blocks",), {}),
        (("blocks",), []),
        (("blocks", FIRST), [0, 1]),
        (("blocks", FIRST, "keep"), "all"),
        (("blocks", FIRST, "keep"), None),
        (("blocks", FIRST, "keep"), [0, 1.5]),
        (("blocks", FIRST, "keep"), [0, [1]]),
        (("blocks", FIRST, "kept"), [0, 1]),
        (("blocks", FIRST, "bias"), {"x": 1.0}),
        (("blocks", FIRST, "bias"), {"1": "much"}),
    ],
)
def test_hand_edited_nonsense_is_refused_by_its_place(
    tmp_path: Path, path: tuple[str, ...], value: object
):
    fields = json.loads(plan_text(plan()))
    (tmp_path / "plan.json").write_text(json.dumps(fields))
    load_plan(tmp_path)  # else anything would be refused
    *parents, last = path
    inner = fields
    for key in parents:
        inner = inner[key]
    inner[last] = value
    (tmp_path / "plan.json").write_text(json.dumps(fields))
    with pytest.raises(PlanError, match=r"plan\.json is not a valid plan: ") as refused:
        load_plan(tmp_path)
    assert ".".join(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path):
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path)
    text = plan_text(plan())
    for content in ("", "[]", "{}", text[: len(text) // 2], text + "}"):
        (tmp_path / "plan.json").write_text(content)
        with pytest.raises(PlanError, match="is not a valid plan"):
            load_plan(tmp_path)


# Which questions


def profile_of(folder: Path | str, split: str = "test", **selection: Any) -> Profile:
    """A profile's description of a quiz, without anything measured."""
    asked = Selection(str(folder), split, **{"shots": 0, **selection})
    quiz = load_quiz(asked)
    info = profile_info([block(0)], {"x": 1})
    return Profile(
        Path("profiles/p"), info.model_copy(update={"quiz": quiz_info(quiz, asked.limit)})
    )


def folder_of(tmp_path: Path, **counts: int) -> Path:
    return write_quiz(tmp_path / "quiz", {"dev": 5, **counts})


@pytest.mark.parametrize(
    ("profiled", "is_fitting", "tuning", "held_out"),
    [
        ("test", False, "test", "val"),
        ("test", True, "val", "val"),  # a fifth that fitting leaves out
        ("val", False, "val", "test"),
        ("val", True, "val", "test"),
        ("validation", True, "val", "test"),
        ("dev", False, "dev", "val"),
    ],
)
def test_questions_are_held_out_from_a_split_that_was_not_used(
    tmp_path: Path, profiled: str, is_fitting: bool, tuning: str, held_out: str
):
    folder = folder_of(tmp_path, val=30, test=40)
    found = questions_for(profile_of(folder, profiled, shots=2), is_fitting=is_fitting)
    assert found.tuning.split == tuning
    assert found.held_out.split == held_out
    assert not hash_lines(found.tuning) & hash_lines(found.held_out)
    assert not hash_lines(found.profiled) & hash_lines(found.held_out)
    both = len(found.tuning) + len(found.held_out)
    if tuning == held_out:
        whole = load_quiz(Selection(str(folder), tuning, 2))
        assert both == len(whole) == 90
        assert 90 / 10 < len(found.held_out) < 90 / 3
    else:
        assert both == len(load_quiz(Selection(str(folder), tuning, 0))) + len(
            load_quiz(Selection(str(folder), held_out, 0))
        )
    assert found.held_out.shots == 2
    assert set(found.held_out.questions) == set(SUBJECTS)


def test_at_most_256_are_held_out_equally_many_of_each_subject(tmp_path: Path):
    folder = folder_of(tmp_path, val=100, test=2)
    held_out = questions_for(profile_of(folder), is_fitting=False).held_out
    assert sorted(map(len, held_out.questions.values())) == [85, 85, 86]


def test_held_out_questions_are_of_the_profiled_subjects(tmp_path: Path):
    folder = folder_of(tmp_path, val=10, test=10)
    for is_fitting in (False, True):
        profile = profile_of(folder, subjects=SUBJECTS[:2], limit=3)
        found = questions_for(profile, is_fitting=is_fitting)
        assert len(found.profiled) == 6
        assert set(found.held_out.questions) <= set(SUBJECTS[:2])
        assert set(found.tuning.questions) <= set(SUBJECTS[:2])
        assert len(found.held_out) > 0


def write_file(path: Path, n: int, start: int = 0) -> Path:
    rows = [
        {"question": f"{i}?", "choices": ["a", "b"], "answer": i % 2}
        for i in range(start, start + n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def part_of(profile: Profile, held_out: float | None = None) -> Profile:
    """What may choose, of a profile of answer positions."""
    settings = profile.info.settings.model_copy(update={"stats": "answer"})
    info = profile.info.model_copy(update={"settings": settings})
    return choosing_profile(Profile(profile.path, info), held_out)[0]


@pytest.mark.parametrize("is_fitting", [False, True])
@pytest.mark.parametrize("limit", [None, 200])
def test_of_a_single_file_a_fifth_is_held_out(tmp_path: Path, is_fitting: bool, limit: int | None):
    file = write_file(tmp_path / "pub.jsonl", 400)
    whole = profile_of(file, limit=limit)
    found = questions_for(part_of(whole), is_fitting=is_fitting)
    total = limit or 400
    assert hash_lines(found.profiled) == hash_lines(found.tuning)
    assert len(found.tuning) + len(found.held_out) == total
    assert not hash_lines(found.tuning) & hash_lines(found.held_out)
    assert total / 10 < len(found.held_out) < total / 3
    for every in (whole, part_of(whole, 0)):  # where all of them choose, none judges
        found = questions_for(every, is_fitting=is_fitting)
        assert (len(found.profiled), len(found.tuning), len(found.held_out)) == (total, total, 0)
        assert f"all {total} test questions of {file}" in found.why_unscored


@pytest.mark.parametrize("held_out", [0.3, 1.0, -0.2])
def test_a_profile_keeps_sums_of_a_fifth_alone(held_out: float):
    with pytest.raises(ValueError, match=r"must be 0\.2 or 0, .* a fifth of its questions apart"):
        PruneSettings(keep=3, held_out=held_out)


def test_with_another_split_all_choose_and_that_split_judges(tmp_path: Path):
    profile = profile_of(folder_of(tmp_path, val=30, test=40))
    whole, asked = part_of(profile), part_of(profile, 0)
    for chooses in (whole, asked):
        found = questions_for(chooses, is_fitting=False)
        assert len(found.profiled) == 120 and found.held_out.split == "val"
    assert len(questions_for(whole, is_fitting=True).tuning) < 90
    found = questions_for(asked, is_fitting=True)  # then val fits, and nothing is left to judge
    assert (len(found.tuning), len(found.held_out)) == (90, 0)


@pytest.mark.parametrize("is_fitting", [False, True])
@pytest.mark.parametrize("val", ["missing", "a copy of test"])
def test_without_another_split_a_fifth_is_held_out(tmp_path: Path, is_fitting: bool, val: str):
    folder = tmp_path / "quiz"
    for split in ("test", "val") if val != "missing" else ("test",):
        write_quiz(folder, {split: 50}, seed=3)  # the seed alone says what is asked
    found = questions_for(part_of(profile_of(folder)), is_fitting=is_fitting)
    assert (found.tuning.split, found.held_out.split) == ("test", "test")
    assert len(found.tuning) + len(found.held_out) == 150
    assert hash_lines(found.profiled) == hash_lines(found.tuning)
    assert not hash_lines(found.tuning) & hash_lines(found.held_out)
    assert 150 / 10 < len(found.held_out) < 150 / 3


def test_the_fifth_is_chosen_by_content_not_by_place(tmp_path: Path):
    whole = questions_for(
        part_of(profile_of(write_file(tmp_path / "a.jsonl", 200))), is_fitting=True
    ).held_out
    other = questions_for(
        part_of(profile_of(write_file(tmp_path / "b.jsonl", 150, start=50))), is_fitting=True
    ).held_out
    late = {q.text for q in whole if int(q.text[:-1]) >= 50}
    assert {q.text for q in other} == late
    assert len(late) > 10


def test_too_few_questions_to_hold_any_out_is_said(tmp_path: Path):
    profile = profile_of(write_file(tmp_path / "a.jsonl", 1))
    with pytest.raises(QuizError, match=r"too few questions to hold any out: it has 1: .*-out 0"):
        part_of(profile)
    assert len(questions_for(part_of(profile, 0), is_fitting=False).profiled) == 1


def repeat(folder: Path, n: int) -> list[str]:
    """Puts the first questions of one subject's test split into another's val split too."""
    source = folder / "test" / f"{SUBJECTS[0]}_test.csv"
    lines = source.read_text().splitlines(keepends=True)[:n]
    with (folder / "val" / f"{SUBJECTS[1]}_val.csv").open("a", newline="") as file:
        file.writelines(lines)
    return lines


def test_what_repeats_a_used_question_is_dropped_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = folder_of(tmp_path, val=30, test=40)
    repeat(folder, 4)  # of 94, which is 4.3 %
    found = questions_for(profile_of(folder), is_fitting=True)
    assert not hash_lines(found.profiled) & (hash_lines(found.tuning) | hash_lines(found.held_out))
    assert len(found.tuning) + len(found.held_out) == 90
    assert f"4 of 94 val questions stand in test too and are left out, first {SUBJECTS[1]}:30" in (
        caplog.text
    )
    caplog.clear()
    held_out = questions_for(profile_of(folder, "val"), is_fitting=True).held_out
    assert len(held_out) == 120 - 4
    assert "4 of 120 test questions stand in val too" in caplog.text


def test_above_five_per_cent_of_repeats_is_refused(tmp_path: Path):
    folder = folder_of(tmp_path, val=30, test=40)
    repeat(folder, 5)  # of 95, which is 5.3 %
    for is_fitting in (False, True):
        with pytest.raises(QuizError, match=r"5 of 95 val questions .* at most 5 % may"):
            questions_for(profile_of(folder), is_fitting=is_fitting)


def test_real_repeats_are_left_out(real_mmlu: Path, caplog: pytest.LogCaptureFixture):
    profile = profile_of(real_mmlu, subjects=(), shots=5)
    found = questions_for(profile, is_fitting=True)
    assert len(found.profiled) == 14_042
    assert (
        len(found.tuning) + len(found.held_out) == 1_531 - 28
    )  # one of them has another apostrophe or space
    assert not hash_lines(found.profiled) & hash_lines(found.held_out)
    assert "28 of 1531 val questions stand in test too" in caplog.text


def test_a_quiz_that_changed_since_it_was_profiled_is_refused(tmp_path: Path):
    folder = folder_of(tmp_path, val=30, test=40)
    profile = profile_of(folder)
    questions_for(profile, is_fitting=False)
    file = folder / "test" / f"{SUBJECTS[0]}_test.csv"
    before = file.read_text()
    file.write_text(before[:-2] + ("A" if before[-2] != "A" else "B") + "\n")  # one right answer
    later = Profile(profile.path, profile.info)  # of another command
    with pytest.raises(ProfileError, match="its questions changed"):
        questions_for(later, is_fitting=False)


@pytest.mark.parametrize("is_fitting", [False, True])
def test_a_plan_lists_every_question_that_was_looked_at(tmp_path: Path, is_fitting: bool):
    profile = profile_of(folder_of(tmp_path, val=30, test=40))
    bias = {1: 0.5} if is_fitting else {}
    draft = EditPlan(
        "slug", "action", "activations", "answer", {FIRST: BlockEdit(keep=(0, 1), bias=bias)}
    )
    questions = questions_for(profile, is_fitting=is_fitting)
    made = draft_plan(profile, draft, questions)
    used = used_hashes(draft, questions)
    assert used >= hash_lines(questions.profiled)
    assert (used >= hash_lines(questions.tuning)) and not used & hash_lines(questions.held_out)
    assert made.chosen_on.sha256 == hashes_sha256(used)
    assert (made.chosen_on.split, made.chosen_on.questions) == ("test", 120)
    fitted = ("val", len(questions.tuning)) if is_fitting else (None, 0)
    assert (made.chosen_on.fitted_split, made.chosen_on.fitted_questions) == fitted
    assert made.blocks == draft.edits and made.model.fingerprint == "f" * 64
    save_plan(tmp_path / "plan", made, used)
    assert load_hashes(tmp_path / "plan", load_plan(tmp_path / "plan")) == used


# The direction v


class Router(nn.Module):
    """A router that says what it was given to say."""

    def forward(self, h_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = torch.zeros(len(h_TD), 4)
        return logits_TE, logits_TE[:, :2], torch.zeros(len(h_TD), 2, dtype=torch.long)


@dataclass
class Synthetic:
    """Stands in for an engine: its router reads common·(1, …, 1) + noise, one row per token."""

    common: float
    width: int = 16

    def __post_init__(self) -> None:
        self.seen: list[np.ndarray] = []
        self.is_answer: list[bool] = []
        self.generator = torch.Generator().manual_seed(0)
        self.router = Router()
        blocks = [SimpleNamespace(layer=3, router=self.router, is_linear=True)]
        self.moe = SimpleNamespace(tokenizer=make_tokenizer(), blocks=blocks)

    def encode_all(self, quiz: Quiz) -> Iterator[Encoded]:
        for subject, questions in quiz.questions.items():
            yield encode(self.moe.tokenizer, questions, quiz.shots_by_subject[subject])

    def score(self, encoded: Encoded, on_pass: Callable[[Pass], None]) -> Tensor:
        n_prefix = encoded.shared_prefix()
        middle = len(encoded) // 2
        packs = (tuple(range(middle)), tuple(range(middle, len(encoded))))
        for step in self.passes(encoded, n_prefix, packs):
            n_tokens = step.input_ids.shape[1]
            noise_TD = torch.randn(1, n_tokens, self.width, generator=self.generator)
            h_TD = self.common + noise_TD
            on_pass(step)
            self.router(h_TD)
            self.seen += list(h_TD[0].double().numpy())
            answers = set(step.answers_N.tolist())
            self.is_answer += [i in answers for i in range(n_tokens)]
        return torch.zeros(len(encoded), 4)

    def passes(
        self, encoded: Encoded, n_prefix: int, packs: tuple[tuple[int, ...], ...]
    ) -> Iterator[Pass]:
        yield prefix_pass(encoded.prompts[0][:n_prefix])
        for pack in packs:
            yield packed_pass(encoded, pack, n_prefix)


def small_quiz(n: int) -> Quiz:
    questions = {
        s: tuple(Question(s, f"{s} {i}?", ("a", "b", "c", "d"), 0, i) for i in range(n))
        for s in SUBJECTS
    }
    return Quiz("q", None, "val", 0, questions, dict.fromkeys(SUBJECTS, ()))


def ridge(h_TD: np.ndarray) -> np.ndarray:
    """argmin Σ(1 − v·h)² + T·λ|v|² with λ = 1e-4 of the mean eigenvalue, then mean v·h = 1."""
    n_tokens, width = h_TD.shape
    weight = 1e-4 * np.linalg.eigvalsh(h_TD.T @ h_TD / n_tokens).mean()
    rows = np.vstack([h_TD, np.sqrt(n_tokens * weight) * np.eye(width)])
    target = np.concatenate([np.ones(n_tokens), np.zeros(width)])
    v_D = np.linalg.lstsq(rows, target, rcond=None)[0]
    return v_D / (h_TD @ v_D).mean()


def test_a_strong_common_component_is_found():
    engine: Any = Synthetic(common=4.0)
    v_D = fit_directions(engine, small_quiz(20), [3])[3]
    h_TD = np.array(engine.seen)
    assert len(h_TD) > 1000
    assert v_D.dtype == torch.float64
    assert v_D.numpy() == close(ridge(h_TD), rel=1e-6)
    product_T = h_TD @ v_D.numpy()
    assert product_T.mean() == close(1)
    assert product_T.std() < 0.1  # noise of 1 against 4·√16
    assert v_D.numpy() == close(np.full(16, 1 / 64), rel=0.2)
    fresh: Any = Synthetic(common=4.0)
    fresh.generator.manual_seed(1)
    (fit,) = direction_quality(fresh, small_quiz(20), {3: v_D})
    assert fit.mean_elsewhere == close(1, abs=0.01) and fit.quality > 0.99


def test_without_a_common_component_the_fit_says_so():
    engine: Any = Synthetic(common=0.0)
    v_D = fit_directions(engine, small_quiz(20), [3])[3]
    (fit,) = direction_quality(engine, small_quiz(20), {3: v_D})
    assert fit.quality < 0.5


@pytest.mark.parametrize("apply_at", ["all", "answer"])
def test_a_fit_is_judged_by_the_target_that_it_was_fitted_for(apply_at: Any):
    engine: Any = Synthetic(common=1.0)
    v_D = torch.linspace(0, 0.1, 16, dtype=torch.float64)
    (fit,) = direction_quality(engine, small_quiz(7), {3: v_D}, apply_at)
    product_T = np.array(engine.seen) @ v_D.numpy()
    is_answer_T = np.array(engine.is_answer)
    assert is_answer_T.sum() == 21
    at, elsewhere = product_T[is_answer_T], product_T[~is_answer_T]
    for part_T, mean, std in (
        (at, fit.mean_answer, fit.std_answer),
        (elsewhere, fit.mean_elsewhere, fit.std_elsewhere),
    ):
        n = len(part_T)
        assert mean == close(sum(part_T) / n)
        assert std == close(math.sqrt(sum((x - sum(part_T) / n) ** 2 for x in part_T) / n))
    loss_at = sum((1 - x) ** 2 for x in at) / len(at)
    loss_all = sum((1 - x) ** 2 for x in product_T) / len(product_T)
    loss_0 = sum(x**2 for x in elsewhere) / len(elsewhere)
    assert fit.quality_answer == close(1 - loss_at)
    assert fit.quality == close(1 - (loss_all if apply_at == "all" else (loss_at + loss_0) / 2))
    assert fit.layer == 3 and fit.mean_elsewhere != fit.mean_answer


def test_a_direction_for_answers_is_a_ridge_in_which_both_kinds_of_tokens_weigh_the_same():
    engine: Any = Synthetic(common=1.0)
    v_D = fit_directions(engine, small_quiz(20), [3], "answer")[3].numpy()
    h_TD, is_answer_T = np.array(engine.seen), np.array(engine.is_answer)
    n_each = np.where(is_answer_T, is_answer_T.sum(), (~is_answer_T).sum())
    outer_DD = (h_TD / n_each[:, None]).T @ h_TD
    penalty_DD = 1e-4 * np.trace(outer_DD) / 16 * np.eye(16)
    w_D = np.linalg.solve(outer_DD + penalty_DD, h_TD[is_answer_T].mean(axis=0))
    assert v_D == close(w_D / (h_TD[is_answer_T] @ w_D).mean(), rel=1e-6)
    assert v_D != close(fit_directions(engine, small_quiz(20), [3])[3].numpy(), rel=0.01)


@pytest.mark.parametrize("way", ["packed", "padded"])
def test_a_direction_is_fitted_on_every_token_of_a_model(
    checkpoint: Checkpoints, quiz_folder: Path, way: str
):
    changes = {"sliding_window": 16} if way == "padded" else {}
    moe = open_model(checkpoint("mixtral", **changes))
    quiz = load_quiz(Selection(str(quiz_folder), "val", shots=1))
    engine = Engine(moe, 300 if way == "packed" else 5000)  # several packs; several rows with pads
    heard: list[Tensor] = []
    handle = moe.blocks[1].router.register_forward_hook(lambda m, a, out: heard.append(a[0]))
    inputs = []
    for subject, questions in quiz.questions.items():
        prompts = [
            moe.tokenizer(prompt(q, quiz.shots_by_subject[subject]))["input_ids"] for q in questions
        ]
        n_prefix = Encoded(tuple(map(tuple, prompts)), ()).shared_prefix()
        assert n_prefix > 50 and len(set(map(len, prompts))) > 1
        assert engine.mode(Encoded(tuple(map(tuple, prompts)), ())) == way
        for i, ids in enumerate(prompts):
            heard.clear()
            with torch.no_grad():
                moe.model(torch.tensor([ids]), use_cache=False)
            h_TD = heard[0].reshape(-1, 32)
            assert len(h_TD) == len(ids)
            # A packed prefix runs once, so each of its tokens counts once.
            inputs.append(h_TD if way == "padded" or i == 0 else h_TD[n_prefix:])
    handle.remove()
    found = fit_directions(engine, quiz, [1])
    assert list(found) == [1]
    assert found[1].numpy() == close(ridge(torch.cat(inputs).double().numpy()), rel=1e-3, abs=1e-5)


def test_at_most_512_questions_are_used_to_fit(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.ERROR)
    engine: Any = Synthetic(common=1.0, width=2)
    fit_directions(engine, small_quiz(200), [3])
    assert sum(engine.is_answer) == 512
