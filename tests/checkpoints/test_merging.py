"""Merged experts against merging written out, planted clones, and what a checkpoint cannot keep."""

import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertcut.checkpoints import shards
from expertcut.checkpoints.merge_edit import Experts, unedited_routers
from expertcut.checkpoints.tensor_names import find_disk_blocks
from expertcut.data import round_robin
from expertcut.edits.edit_settings import CutSettings, MergeMethod, MergeSettings
from expertcut.edits.merging import (
    METHODS,
    Neurons,
    gather_evidence,
    judge_rows,
    matching,
    merge_edits,
    merged_rows,
)
from expertcut.edits.plan import BlockEdit, PlanFile, load_plan, plan_text
from expertcut.edits.router_edits import tilts
from expertcut.edits.selection import choose
from expertcut.edits.splits import questions_for
from expertcut.errors import PlanError
from expertcut.models.expert_matrices import is_interleaved
from expertcut.models.hooks import registered, replaced_forward
from expertcut.models.safetensors_index import read_headers
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine
from tests.conftest import STORAGE_FORMS, open_model
from tests.support.merged_models import (
    AS_IS,
    UNASKED,
    averaged_by_hand,
    block_output,
    groups_of,
    hc_smoe_by_hand,
    m_smoe_by_hand,
    measured,
    merged,
    rewritten,
    router_inputs,
    routings,
    with_clones,
)

Checkpoints = Callable[..., Path]
Profiles = Callable[[Path], Profile]
THREE = ("olmoe", "mixtral", "deepseek_v3")  # the last routes in two groups of four
RENORMALISING = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")
IDS = range(8)
FIRST = "model.layers.0.mlp"


@pytest.fixture(scope="session")
def profile_of(quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Profiles:
    made: dict[Path, Profile] = {}

    def find(model: Path) -> Profile:
        if model not in made:
            made[model] = measured(model, quiz_folder, tmp_path_factory.mktemp("p") / "profile")
        return made[model]

    return find


# Which experts become one


@pytest.mark.parametrize("family", THREE)
def test_m_smoe_groups_are_those_of_logits_one_token_at_a_time(
    checkpoint: Checkpoints, profile_of: Profiles, family: str
) -> None:
    profile = profile_of(checkpoint(family))
    moe, tuning = open_model(checkpoint(family)), questions_for(profile, is_fitting=True).tuning
    evidence = gather_evidence(profile, Engine(moe, 400), tuning, "m_smoe")
    edits = merge_edits(profile.info.model.blocks, evidence, 4, "m_smoe")
    logits: dict[int, list[Tensor]] = {0: [], 1: []}
    counts = np.zeros((2, 8))
    for routing in routings(moe, tuning, is_repeating=False):
        logits[routing.layer].append(routing.logits_TE)
    for routing in routings(moe, tuning, is_repeating=True):
        counts[routing.layer] += routing.experts_TK.flatten().bincount(minlength=8).numpy()
    size = 8 // moe.blocks[0].n_groups
    for block in moe.blocks:
        logits_TE = torch.cat(logits[block.layer])
        wanted = [
            m_smoe_by_hand(logits_TE, counts[block.layer], IDS[i : i + size], 4 * size // 8)
            for i in range(0, 8, size)
        ]
        edit = edits[block.name]
        assert groups_of(edit) == set().union(*wanted)
        for dominant, shares in (edit.merged or {}).items():
            own = counts[block.layer, list(shares)]
            assert list(shares.values()) == pytest.approx((own / own.sum()).tolist())
            assert own[0] == own.max() and dominant == next(iter(shares))
    assert any(edit.merged for edit in edits.values())


@pytest.mark.parametrize("family", THREE)
def test_hc_smoe_groups_are_those_of_outputs_one_token_at_a_time(
    checkpoint: Checkpoints, profile_of: Profiles, family: str
) -> None:
    profile = profile_of(checkpoint(family))
    moe, questions = open_model(checkpoint(family)), questions_for(profile, is_fitting=True)
    tuning = round_robin(questions.tuning, 1)
    evidence = gather_evidence(profile, Engine(moe, 400), tuning, "hc_smoe")
    edits = merge_edits(profile.info.model.blocks, evidence, 4, "hc_smoe")
    sums, n_tokens = np.zeros((2, 8, 32)), [0, 0]
    with torch.inference_mode():
        for routing in routings(moe, tuning, is_repeating=False):
            experts = moe.blocks[routing.layer].experts
            for x_D in routing.input_TD:
                for e in IDS:
                    own = experts(x_D[None], torch.tensor([[e]]), torch.ones(1, 1))
                    sums[routing.layer, e] += own[0].numpy()
            n_tokens[routing.layer] += len(routing.input_TD)
    size = 8 // moe.blocks[0].n_groups
    for block in moe.blocks:
        mean_ED = sums[block.layer] / n_tokens[block.layer]
        np.testing.assert_allclose(evidence[block.layer].measured_EX, mean_ED, atol=1e-5)
        wanted = [
            hc_smoe_by_hand(mean_ED, IDS[i : i + size], 4 * size // 8) for i in range(0, 8, size)
        ]
        assert groups_of(edits[block.name]) == set().union(*wanted)


def test_pads_are_no_tokens(checkpoint: Checkpoints, profile_of: Profiles) -> None:
    profile = profile_of(checkpoint("jamba"))
    moe, tuning = open_model(checkpoint("jamba")), questions_for(profile, is_fitting=True).tuning
    evidence = gather_evidence(profile, Engine(moe, 2048), tuning, "hc_smoe")
    outputs = []
    with torch.inference_mode():
        for routing in routings(moe, tuning, is_repeating=True):
            if routing.layer == 0:
                x_TD, n = routing.input_TD, len(routing.input_TD)
                ids = torch.full((n, 1), 3)
                outputs.append(moe.blocks[0].experts(x_TD, ids, torch.ones(n, 1)))
    mean_D = torch.cat(outputs).double().mean(dim=0).numpy()
    np.testing.assert_allclose(evidence[0].measured_EX[3], mean_D, atol=1e-5)


def test_the_settings_and_the_papers_know_the_same_methods() -> None:
    assert set(get_args(MergeMethod)) == set(METHODS)


# What they become


def test_a_matching_is_the_best_of_all_permutations() -> None:
    torch.manual_seed(0)
    for _ in range(5):
        first, second = ([torch.randn(5, 3), torch.randn(5, 7)] for _ in range(2))

        def likeness(order: Any, a: Any = first, b: Any = second) -> float:
            return sum(float((x * y[list(order)]).sum()) for x, y in zip(a, b, strict=True))

        best = max(permutations(range(5)), key=likeness)
        assert matching(first, second).tolist() == list(best)


@pytest.mark.parametrize(
    "neurons",
    [
        Neurons(0),
        Neurons(1),
        Neurons(0, 2),
        Neurons(1, 2),
        Neurons(0, 2, True),
        Neurons(1, 2, True),
    ],
)
def test_reordering_moves_whole_neurons(neurons: Neurons) -> None:
    tensor, order_I = torch.randn(12, 12), torch.randperm(12 // neurons.n_parts)
    moved = neurons.reordered(tensor, order_I)
    assert not torch.equal(moved, tensor)
    assert torch.equal(neurons.rows(moved), neurons.rows(tensor)[order_I])


@pytest.mark.parametrize(("family", "by"), [("mixtral", "hc_smoe"), ("gpt_oss", "m_smoe")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_on_disk_are_the_averages_by_frequency(
    checkpoint: Checkpoints,
    quiz_folder: Path,
    tmp_path: Path,
    family: str,
    by: str,
    dtype: torch.dtype,
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in checkpoint(family).iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    rewritten(base, lambda w: w.update({n: t.to(dtype) for n, t in w.items()}))
    profile = measured(base, quiz_folder, tmp_path / "p")
    merged(profile, tmp_path / "out", MergeSettings(keep=5, by=by, align=False), UNASKED)
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    plan = load_plan(tmp_path / "out")
    found = find_disk_blocks(read_headers(tmp_path / "out"))
    n_merged = 0
    for name, block in find_disk_blocks(read_headers(base)).items():
        edit = next(e for n, e in plan.blocks.items() if n.split(".")[2] == name.split(".")[2])
        for place, expert in enumerate(edit.keep):
            shares = (edit.merged or {}).get(expert, {expert: 1.0})
            n_merged += len(shares) > 1
            if block.fused:
                for fused in block.fused:
                    wanted = sum(before[fused][e].double() * s for e, s in shares.items())
                    assert torch.equal(after[fused][place], wanted.to(dtype))  # type: ignore[union-attr]
                continue
            for kind, average in averaged_by_hand(
                before, [block.by_expert[0], *block.by_expert][1:], shares
            ).items():
                assert torch.equal(after[found[name].by_expert[place][kind]], average.to(dtype))
    assert n_merged > 1
    others = set(before) & set(after) - {n for n in after if "mlp" in n or "moe" in n}
    assert others and all(torch.equal(before[n], after[n]) for n in others)


# Clones


@pytest.mark.parametrize("family", (*STORAGE_FORMS, "deepseek_v3", "ernie4_5_moe"))
def test_clones_merge_without_a_trace_under_the_unedited_router(
    checkpoint: Checkpoints, profile_of: Profiles, tmp_path: Path, family: str
) -> None:
    """Equal weights in another order, any routers: the law of merging, in every storage form."""
    pairs = [(0, 2), (5, 7)]
    base = with_clones(checkpoint(family), tmp_path / "base", pairs, is_shuffled=True)
    profile = profile_of(base)
    is_asked = family in THREE
    how = AS_IS if is_asked else UNASKED
    done = merged(profile, tmp_path / "out", MergeSettings(keep=6, by="hc_smoe", align=True), how)
    wanted = {frozenset(pair) for pair in pairs}
    for edit in done.draft.edits.values():
        assert {group for group in groups_of(edit) if len(group) > 1} == wanted
    if is_asked:
        assert done.built.proof is not None
        assert done.built.proof.held_out[2].max_abs_logprob_diff < 1e-4
    moe, new = open_model(base), open_model(tmp_path / "out")
    inputs = router_inputs(moe, questions_for(profile, is_fitting=True).tuning)
    routers = unedited_routers(moe.blocks, done.draft.edits)
    for before, after in zip(moe.blocks, new.blocks, strict=True):
        y_TD = block_output(before, inputs[before.layer])
        with registered(replaced_forward(b.router, routers[b.name]) for b in new.blocks):
            difference = block_output(after, inputs[before.layer]) - y_TD
        assert difference.abs().max() <= 1e-5 * max(1, float(y_TD.abs().max()))
        assert y_TD.abs().max() > 1e-3
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


def silence(base: Path, family: str, expert: int, clone_of: int) -> Path:
    """No token chooses the expert, nor gives it mass: a clone that is dead."""

    def change(weights: dict[str, Tensor]) -> None:
        for name, tensor in weights.items():
            if name.endswith(("router.bias", "e_score_correction_bias")):
                tensor[expert] = -30
            elif family in ("qwen3_moe", "mixtral"):
                # A channel that nothing writes to is positive in every router's input.
                if name.endswith("embed_tokens.weight"):
                    tensor[:, 0] = 0.5
                elif name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):
                    tensor[0] = 0
                elif name.endswith("gate.weight"):
                    tensor[:, 0] = torch.where(tensor[:, 0] < -30, tensor[:, 0], 0)
                    tensor[expert] = tensor[clone_of]
                    tensor[expert, 0] = -2000

    return rewritten(base, change)


@pytest.mark.parametrize("family", RENORMALISING)
def test_a_clone_that_is_never_chosen_merges_without_a_trace_in_a_checkpoint(
    checkpoint: Checkpoints, profile_of: Profiles, tmp_path: Path, family: str
) -> None:
    pairs = [(1, 3), (4, 6)]
    base = with_clones(checkpoint(family), tmp_path / "base", pairs, is_shuffled=False)
    for first, second in pairs:
        silence(base, family, second, first)
    profile = profile_of(base)
    is_asked = family == "mixtral"
    how = AS_IS if is_asked else UNASKED
    done = merged(profile, tmp_path / "out", MergeSettings(keep=6, by="hc_smoe"), how)
    moe, new = open_model(base), open_model(tmp_path / "out")
    inputs = router_inputs(moe, questions_for(profile, is_fitting=True).tuning)
    for before, after in zip(moe.blocks, new.blocks, strict=True):
        assert done.draft.edits[before.name].merged == {1: {1: 1, 3: 0}, 4: {4: 1, 6: 0}}
        y_TD = block_output(before, inputs[before.layer])
        assert (block_output(after, inputs[before.layer]) - y_TD).abs().max() <= 1e-5
        assert y_TD.abs().max() > 0.1
    if is_asked:
        assert done.built.proof is not None
        assert done.built.proof.held_out[0].max_abs_logprob_diff <= 1e-4


def test_clones_with_one_row_act_as_one_expert_of_their_mass(
    checkpoint: Checkpoints, profile_of: Profiles, tmp_path: Path
) -> None:
    """Where both are chosen they leave a place: the checkpoint equals a base that chooses K + 1.

    The router's own bias carries ln 2; a router without one only comes near.
    """

    def twin(weights: dict[str, Tensor]) -> None:
        for name, tensor in weights.items():
            if ".router." in name:
                tensor[3] = tensor[1]

    base = with_clones(checkpoint("gpt_oss"), tmp_path / "base", [(1, 3)], is_shuffled=True)
    profile = profile_of(rewritten(base, twin))
    merged(profile, tmp_path / "out", MergeSettings(keep=7, by="hc_smoe", align=True), UNASKED)
    moe, new = open_model(base), open_model(tmp_path / "out")
    inputs = router_inputs(moe, questions_for(profile, is_fitting=True).tuning)
    n_one_more, n_same = 0, 0
    for before, after in zip(moe.blocks, new.blocks, strict=True):
        x_TD = inputs[before.layer]
        logits_TE = before.router(x_TD)[0]
        found_TD, usual_TD = block_output(after, x_TD), block_output(before, x_TD)
        before.router.top_k = 3
        more_TD = block_output(before, x_TD)
        is_in_T = (logits_TE.topk(3).indices == 1).any(1) & (logits_TE.topk(3).indices == 3).any(1)
        second_T = logits_TE.topk(2).values[:, 1]
        is_out_T = logits_TE[:, 1] + 0.694 < second_T
        assert (found_TD - more_TD)[is_in_T].abs().max() <= 1e-5
        assert (found_TD - usual_TD)[is_out_T].abs().max() <= 1e-5
        assert (more_TD - usual_TD)[is_in_T].abs().max() > 0.01
        n_one_more, n_same = n_one_more + int(is_in_T.sum()), n_same + int(is_out_T.sum())
    assert min(n_one_more, n_same) > 50


# What the router says


def test_a_fitted_row_keeps_more_of_the_mass_than_a_mean_or_a_members_own(
    checkpoint: Checkpoints, profile_of: Profiles
) -> None:
    profile = profile_of(checkpoint("olmoe", num_experts=16))
    questions = questions_for(profile, is_fitting=True)
    engine = Engine(open_model(checkpoint("olmoe", num_experts=16)), 2048)
    evidence = gather_evidence(profile, engine, questions.tuning, "m_smoe")
    edits = merge_edits(profile.info.model.blocks, evidence, 8, "m_smoe")
    quality = {
        kind: judge_rows(
            engine, questions.held_out, edits, merged_rows(engine, questions.tuning, edits, kind)
        )
        for kind in ("fitted", "mean", "dominant")
    }
    for fitted, mean, dominant in zip(*quality.values(), strict=True):
        assert fitted.quality > max(mean.quality, dominant.quality)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_a_fitted_row_is_the_ridge_solution(
    checkpoint: Checkpoints, profile_of: Profiles, family: str
) -> None:
    profile, moe = profile_of(checkpoint(family)), open_model(checkpoint(family))
    tuning = questions_for(profile, is_fitting=True).tuning
    edits = {
        block.name: BlockEdit(
            keep=(0, 1, 2, 3, 4), merged={1: {1: 0.5, 5: 0.3, 6: 0.2}, 4: {4: 1, 7: 0}}
        )
        for block in moe.blocks
    }
    rows = merged_rows(Engine(moe, 2048), tuning, edits, "fitted")
    h_TD, logits_TE, chosen_TK = [], [], []
    for routing in routings(moe, tuning, is_repeating=False):
        if routing.layer == 1:
            h_TD.append(routing.input_TD.double().numpy())
            logits_TE.append(routing.logits_TE.double().numpy())
            chosen_TK.extend(routing.experts_TK.tolist())
    h, logits = np.concatenate(h_TD), np.concatenate(logits_TE)
    bias_E = moe.blocks[1].selection_bias()
    selection = np.zeros(8) if bias_E is None else bias_E.numpy()
    for expert, shares in (edits[moe.blocks[1].name].merged or {}).items():
        ids, weights = list(shares), list(shares.values())
        target = [
            target_by_hand(family, row, set(chosen), ids, selection)
            for row, chosen in zip(logits, chosen_TK, strict=True)
        ]
        rest = np.array(target) - logits[:, ids] @ weights
        centre = h.mean(0) if family == "gpt_oss" else 0  # it has a bias, so an intercept
        x, y = h - centre, rest - (rest.mean() if family == "gpt_oss" else 0)
        ridge = 1e-6 * np.trace(x.T @ x) / x.shape[1]
        wanted = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
        np.testing.assert_allclose(rows[1].added[expert].numpy(), wanted, atol=1e-6)
        if family == "gpt_oss":
            wanted_offset = rest.mean() - centre @ wanted
            assert rows[1].offsets[expert] == pytest.approx(wanted_offset, abs=1e-6)
    assert bool(rows[1].offsets) == (family == "gpt_oss")


def target_by_hand(
    family: str, logits_E: Any, chosen: set[int], members: list[int], selection_E: Any
) -> float:
    """The logit of the members whose mass was used."""
    if family == "deepseek_v3":
        score = {e: 1 / (1 + np.exp(-logits_E[e])) + selection_E[e] for e in members}
        return float(logits_E[max(members, key=lambda e: score[e])])
    count = members if family == "olmoe" else [e for e in members if e in chosen]
    count = count or [max(members, key=lambda e: logits_E[e])]
    return float(np.log(sum(np.exp(logits_E[e]) for e in count)))


def test_a_selection_bias_lifts_a_group_as_its_best_member_was_lifted(
    checkpoint: Checkpoints, profile_of: Profiles
) -> None:
    profile, moe = profile_of(checkpoint("deepseek_v3")), open_model(checkpoint("deepseek_v3"))
    tuning = questions_for(profile, is_fitting=True).tuning
    edit = BlockEdit(
        keep=(0, 1, 4, 5), merged={1: {1: 0.5, 2: 0.3, 3: 0.2}, 5: {5: 0.6, 6: 0.2, 7: 0.2}}
    )
    rows = merged_rows(Engine(moe, 2048), tuning, {b.name: edit for b in moe.blocks}, "fitted")
    bias_E = moe.blocks[0].selection_bias()
    assert bias_E is not None
    for group, members in ((1, [1, 2, 3]), (5, [5, 6, 7])):
        lifted = []
        for routing in routings(moe, tuning, is_repeating=False):
            for logits_E, chosen in zip(
                routing.logits_TE, routing.experts_TK.tolist(), strict=True
            ):
                if routing.layer == 0 and set(chosen) & set(members):
                    best = max(members, key=lambda e: float(logits_E[e].sigmoid() + bias_E[e]))
                    lifted.append(float(bias_E[best]))
        assert rows[0].selection[group] == pytest.approx(np.mean(lifted), abs=1e-5)


# The plan, and what is made of a merged checkpoint


def test_a_plan_says_who_joined_whom_and_older_ones_still_read(
    checkpoint: Checkpoints, profile_of: Profiles, tmp_path: Path
) -> None:
    profile = profile_of(checkpoint("olmoe"))
    merged(profile, tmp_path / "out", MergeSettings(keep=4, by="m_smoe"))
    plan = load_plan(tmp_path / "out")
    assert (plan.removal, plan.layout, plan.fold) == ("merge", "stock", None)
    for edit in plan.blocks.values():
        members = [e for group in groups_of(edit) for e in group]
        assert sorted(members) == list(IDS) and len(edit.keep) == 4
        assert all(sum(s.values()) == pytest.approx(1) for s in (edit.merged or {}).values())
    assert PlanFile.model_validate_json(plan_text(plan)) == plan
    line = next(ln for ln in plan_text(plan).splitlines() if FIRST in ln)
    assert '"merged": {"' in line  # one line per block
    (pruned,) = [e.model_dump(mode="json", exclude_none=True) for e in [BlockEdit(keep=(0, 1))]]
    assert pruned == {"keep": [0, 1], "bias": {}, "scale": {}}
    assert {row["layer"] for row in plan.proof.rows} == {0, 1}
    assert plan.proof.held_out[0].against == "the unedited base"


def test_a_merged_checkpoint_is_profiled_pruned_and_merged_by_the_first_numbers(
    checkpoint: Checkpoints, profile_of: Profiles, quiz_folder: Path, tmp_path: Path
) -> None:
    profile = profile_of(checkpoint("olmoe"))
    merged(profile, tmp_path / "m6", MergeSettings(keep=6, by="hc_smoe"), UNASKED)
    first = load_plan(tmp_path / "m6").blocks[FIRST]
    again = measured(tmp_path / "m6", quiz_folder, tmp_path / "p6")
    pruning = choose(again, CutSettings(keep=4, positions="all"))
    assert pruning.draft.numbers is not None
    kept = pruning.draft.numbers.kept(FIRST, pruning.draft.edits[FIRST].keep)
    assert set(kept) < set(first.keep)
    (tilt,) = tilts(again, [f"0:{first.keep[-1]}=0.5"], [])
    assert tilt.expert == 5
    with pytest.raises(PlanError, match="there it keeps"):
        tilts(again, [f"0:{min(set(IDS) - set(first.keep))}=0.5"], [])
    merged(again, tmp_path / "m4", MergeSettings(keep=4, by="hc_smoe"), UNASKED)
    second = load_plan(tmp_path / "m4").blocks[FIRST]
    assert second.rows == first.keep
    assert {e for group in groups_of(second) for e in group} == set(first.keep)
    assert json.loads((tmp_path / "m4" / "config.json").read_text())["num_experts"] == 4


def test_no_more_than_one_projection_of_one_expert_is_read_at_a_time(
    checkpoint: Checkpoints,
    profile_of: Profiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = checkpoint("granitemoe")
    profile = profile_of(base)
    sizes: list[int] = []
    usual = shards.read_ranges

    def watched(source: Any, ranges: Any) -> bytearray:
        content = usual(source, ranges)
        sizes.append(len(content))
        return content

    monkeypatch.setattr(shards, "read_ranges", watched)
    merged(profile, tmp_path / "out", MergeSettings(keep=4, by="m_smoe"), UNASKED)
    one = max(
        tensor.read().nbytes
        for name, block in find_disk_blocks(read_headers(base)).items()
        for tensor in Experts(read_headers(base), block, is_interleaved=False).tensors(0).values()
    )
    assert max(sizes) <= one and len(sizes) > 20


@pytest.mark.parametrize(("family", "expected"), [("gpt_oss", True), ("granitemoe", False)])
def test_gate_and_up_in_turn_are_told_by_what_they_do(
    checkpoint: Checkpoints, family: str, expected: bool
) -> None:
    blocks = open_model(checkpoint(family)).blocks
    assert [is_interleaved(block.experts) for block in blocks] == [expected] * 2
