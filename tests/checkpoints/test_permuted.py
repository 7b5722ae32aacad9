"""A checkpoint whose experts lie in another order answers as before, and can be put back."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expertcut.checkpoints.build import BuildOptions, Built, build, permute_checkpoint
from expertcut.checkpoints.edit import TensorChanges
from expertcut.checkpoints.export import edits_of
from expertcut.checkpoints.permute_edit import moved_sentence
from expertcut.checkpoints.shared_experts import expert_pieces
from expertcut.data import Selection, load_quiz
from expertcut.data.corpus import TextSelection, load_corpus
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.plan import expert_ids, find_row, load_plan
from expertcut.edits.router_edits import reweight_draft, tilts
from expertcut.edits.selection import choose
from expertcut.edits.splits import traced_profile
from expertcut.errors import ContractError, PlanError, ProfileError
from expertcut.hub.provenance import verified
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import LoadOptions, find_source
from expertcut.profiling.measure import MeasureOptions
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.storage import NEAR_TIE, Profile
from expertcut.profiling.trace import Trace, load_trace
from expertcut.profiling.trace_recorder import QuizTracing, TextTracing, TraceOptions
from tests.conftest import FAMILIES, STORAGE_FORMS, open_model, profiled, slow_but
from tests.support.exact_models import declared

Profiles = Callable[..., Profile]
AS_IS = BuildOptions(LoadOptions())
UNSCORED = BuildOptions(LoadOptions(), is_verified=False)
BACKWARD = [list(range(7, -1, -1))] * 2


@pytest.fixture
def measured(quiz_folder: Path) -> Callable[[Path], Profile]:
    return lambda folder: profiled(folder, quiz_folder, folder.with_name(f"profile-{folder.name}"))


def shuffled(blocks: Sequence[BlockInfo], seed: int = 0) -> list[list[int]]:
    """An order of ids for each block, groups moved as wholes."""
    chance, orders = np.random.default_rng(seed), []
    for block in blocks:
        ids_GE = np.arange(block.experts).reshape(block.groups, -1)
        ids_GE = chance.permuted(ids_GE, axis=1)[chance.permutation(block.groups)[::-1]]
        orders.append(ids_GE.ravel().tolist())
    assert orders != [sorted(order) for order in orders]
    return orders


def assert_same_answers(built: Built) -> None:
    """Same choices but for near-ties, on questions that were not used."""
    assert built.proof is not None and built.scored_on is not None
    assert built.scored_on.used == 0
    (against_base,) = built.proof.held_out
    assert against_base.questions == 33
    assert against_base.max_abs_logprob_diff <= 1e-4
    assert moved_sentence(built.proof)
    assert [row["layer"] for row in built.proof.rows] == list(range(len(built.plan.blocks)))
    for row in built.proof.rows:
        assert row["tokens"] > 500
        assert row["moved"] < 5 and row["largest_gap"] < NEAR_TIE


# Each form of storage, groups, recurrent layers, and layers whose experts a table chooses.
QUICK = (*STORAGE_FORMS, "deepseek_v3", "jamba", "deepseek_v4")


@pytest.mark.parametrize("family", slow_but(QUICK, [*FAMILIES, "deepseek_v4"]))
def test_experts_in_another_order_answer_as_before_and_go_back_to_every_byte(
    profile_of: Profiles, measured: Callable[[Path], Profile], tmp_path: Path, family: str
) -> None:
    profile = profile_of(family)
    source, blocks = Path(profile.info.model.id), profile.info.model.blocks
    orders = shuffled(blocks)
    built = permute_checkpoint(profile, orders, tmp_path / "out", AS_IS)
    assert_same_answers(built)
    plan = load_plan(tmp_path / "out")
    assert [list(edit.order) for edit in plan.blocks.values()] == orders
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    before, after = (load_file(p / "model.safetensors") for p in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert read_config(source) == read_config(tmp_path / "out")
    as_they_were = [sorted(order) for order in orders]
    permute_checkpoint(measured(tmp_path / "out"), as_they_were, tmp_path / "back", UNSCORED)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == back.keys()
    assert all(torch.equal(before[name], back[name]) for name in before)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_back_in_their_order_every_byte_is_as_if_nothing_had_been_done(
    profile_of: Profiles, measured: Callable[[Path], Profile], tmp_path: Path, family: str
) -> None:
    profile = profile_of(family)
    orders = shuffled(profile.info.model.blocks)
    as_they_are = [sorted(order) for order in orders]
    permute_checkpoint(profile, orders, tmp_path / "out", UNSCORED)
    moved = measured(tmp_path / "out")
    back = permute_checkpoint(moved, as_they_are, tmp_path / "back", UNSCORED)
    assert all(edit.order is None for edit in back.plan.blocks.values())
    assert "another order" in " ".join(described(back))
    same = permute_checkpoint(profile, as_they_are, tmp_path / "same", UNSCORED)
    assert not described(same)
    moved_bytes, back_bytes, same_bytes = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "back", "same")
    )
    assert moved_bytes != back_bytes == same_bytes
    again = measured(tmp_path / "back")
    assert expert_ids(again).rows == {}


def described(built: Built) -> list[str]:
    return [s for edit in edits_of(built.plan) for s in edit.describe(8) if "order" in s]


def down(folder: Path, layer: int) -> torch.Tensor:
    weight = open_model(folder).blocks[layer].experts.get_parameter("down_proj")
    return weight.detach().clone()


def test_later_edits_of_it_call_experts_by_their_first_ids(
    profile_of: Profiles, measured: Callable[[Path], Profile], tmp_path: Path
) -> None:
    profile = profile_of("olmoe")
    source, orders = Path(profile.info.model.id), shuffled(profile.info.model.blocks)
    permute_checkpoint(profile, orders, tmp_path / "moved", UNSCORED)
    moved = measured(tmp_path / "moved")
    assert [*expert_ids(moved).rows.values()] == [tuple(order) for order in orders]
    assert find_row(moved, 1, orders[1][3]) == 3
    with pytest.raises(PlanError, match="it has experts 0 to 7"):
        find_row(moved, 1, 8)

    tilted = build(
        moved, reweight_draft(moved, tilts(moved, ["0:5=1.5"], [])), tmp_path / "tilted", UNSCORED
    )
    block = tilted.plan.blocks["model.layers.0.mlp"]
    assert (block.bias, block.keep) == ({5: 1.5}, tuple(range(8)))
    assert block.order == block.rows == tuple(orders[0])
    assert not described(tilted)
    gates = [
        open_model(f).blocks[0].router.get_parameter("weight")
        for f in (tmp_path / "moved", tmp_path / "tilted")
    ]
    assert set((gates[0] != gates[1]).nonzero()[:, 0].tolist()) == {orders[0].index(5)}

    cut = choose(moved, CutSettings(keep=5, fold="off"))
    built = build(moved, cut.draft, tmp_path / "cut", UNSCORED)
    plain = choose(profile, CutSettings(keep=5, fold="off")).draft
    for layer, (name, edit) in enumerate(built.plan.blocks.items()):
        assert edit.keep == plain.edits[name].keep
        assert edit.order == tuple(e for e in orders[layer] if e in edit.keep)
        assert edit.rows == tuple(orders[layer])
        assert torch.equal(
            down(tmp_path / "cut", layer), down(source, layer)[list(edit.order or edit.keep)]
        )
    again = measured(tmp_path / "cut")
    assert expert_ids(again).rows == {n: e.order for n, e in built.plan.blocks.items()}
    assert verified(tmp_path / "cut").plan == load_plan(tmp_path / "cut")
    assert expert_pieces(find_source(str(tmp_path / "cut"))) <= expert_pieces(
        find_source(str(source))
    )


def test_plans_without_another_order_stay_as_they_were(
    profile_of: Profiles, tmp_path: Path
) -> None:
    profile = profile_of("olmoe")
    built = build(profile, choose(profile, CutSettings(keep=5)).draft, tmp_path / "a", UNSCORED)
    assert "order" not in (tmp_path / "a" / "plan.json").read_text()
    assert built.plan.blocks.keys() == {"model.layers.0.mlp", "model.layers.1.mlp"}


def test_an_exact_cut_is_put_in_another_order_with_its_constants(
    profile_of: Profiles, measured: Callable[[Path], Profile], tmp_path: Path, modules_cache: None
) -> None:
    profile = profile_of("olmoe")
    cut = choose(profile, CutSettings(keep=5, layout="exact"))
    built = build(profile, cut.draft, tmp_path / "cut", UNSCORED)
    trusted = BuildOptions(LoadOptions(trust_remote_code=True))
    moved = permute_checkpoint(measured(tmp_path / "cut"), BACKWARD, tmp_path / "out", trusted)
    assert_same_answers(moved)
    for name, edit in load_plan(tmp_path / "out").blocks.items():
        assert edit.keep == built.plan.blocks[name].keep
        assert edit.order == tuple(range(7, -1, -1))
    config = read_config(tmp_path / "out")
    assert declared(config) == {
        name.split(".")[2]: sorted(7 - e for e in edit.removed(8))
        for name, edit in built.plan.blocks.items()
    }
    assert verified(tmp_path / "out").plan.layout == "exact"
    again = measured(tmp_path / "out")
    assert (
        expert_ids(again).kept(*first_block(again)) == built.plan.blocks[first_block(again)[0]].keep
    )


def first_block(profile: Profile) -> tuple[str, tuple[int, ...]]:
    block = profile.info.model.blocks[0]
    return block.name, tuple(range(block.experts))


def test_what_no_device_could_hold_is_refused(
    profile_of: Profiles, measured: Callable[[Path], Profile], tmp_path: Path
) -> None:
    grouped = profile_of("deepseek_v3")
    with pytest.raises(PlanError, match=r"2 groups of 4 experts.*whole groups"):
        permute_checkpoint(grouped, [[0, 4, 1, 5, 2, 6, 3, 7]] * 2, tmp_path / "out", UNSCORED)
    profile = profile_of("olmoe")
    for wrong in ([0] * 8, [*range(7)], [*range(9)], [*range(1, 9)]):
        with pytest.raises(PlanError, match="each of its 8 experts once"):
            permute_checkpoint(profile, [wrong] * 2, tmp_path / "out", UNSCORED)
    with pytest.raises(PlanError, match="1 layers does not fit 2 MoE layers"):
        permute_checkpoint(profile, BACKWARD[:1], tmp_path / "out", UNSCORED)
    uneven = choose(profile, CutSettings(keep=4, layout="exact", budget="global", by="reap"))
    counts = {len(edit.keep) for edit in uneven.draft.edits.values()}
    assert len(counts) == 2
    build(profile, uneven.draft, tmp_path / "uneven", UNSCORED)
    with pytest.raises(ContractError, match="no device would hold equally many"):
        permute_checkpoint(measured(tmp_path / "uneven"), BACKWARD, tmp_path / "out", UNSCORED)
    assert not (tmp_path / "out").exists()


def test_an_order_that_misses_a_tensor_is_found(
    profile_of: Profiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorChanges, "keep_rows", lambda *_: None)  # routers stay
    with pytest.raises(ContractError, match="did not reach every tensor"):
        permute_checkpoint(profile_of("olmoe"), BACKWARD, tmp_path / "out", AS_IS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reads", ["quiz", "texts"])
def test_a_trace_says_model_and_questions_and_its_other_half_judges(
    checkpoint: Callable[..., Path], quiz_folder: Path, tmp_path: Path, reads: str
) -> None:
    moe, kept = open_model(checkpoint("olmoe")), TraceOptions(tokens=900)
    if reads == "quiz":
        quiz = load_quiz(Selection(str(quiz_folder), split="val", shots=0))
        list(QuizTracing(moe, quiz, None, MeasureOptions(), kept).run(tmp_path / "t"))
    else:
        lines = [json.dumps({"text": f"{n} birds " * 9}) for n in range(31)]
        (tmp_path / "texts.jsonl").write_text("\n".join(lines))
        corpus = load_corpus(TextSelection((str(tmp_path / "texts.jsonl"),), 64), moe.tokenizer)
        list(TextTracing(moe, corpus, MeasureOptions(), kept).run(tmp_path / "t"))
    trace = load_trace(tmp_path / "t")
    first, second = map(len, trace.halves())
    profile = traced_profile(trace)
    built = permute_checkpoint(profile, BACKWARD, tmp_path / "out", AS_IS, action="place x")
    assert built.plan.action == "place x" and built.scored_on is not None
    assert built.plan.chosen_on.questions == (16 if reads == "texts" else first)
    assert built.scored_on.questions == (15 if reads == "texts" else second)
    assert built.scored_on.used == 0 and built.proof is not None
    if reads == "quiz":
        assert first + second < 21  # of as many questions as the tokens allow
        assert built.proof.held_out[0].max_abs_logprob_diff <= 1e-4
    else:
        (change,) = built.proof.text
        assert change.kl < 1e-6 and change.top1_agreement == 1.0
    model = tmp_path / "model"
    shutil.copytree(trace.info.model.id, model)
    other = trace.info.called(str(model))
    (model / "config.json").write_text(json.dumps(read_config(model) | {"rope_theta": 7.0}))
    with pytest.raises(ProfileError, match="is a trace of another model"):
        permute_checkpoint(
            traced_profile(Trace(trace.path, other)), BACKWARD, tmp_path / "no", UNSCORED
        )
