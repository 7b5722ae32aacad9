"""One plan in three forms: exact, stock, and at run time in the unedited model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from expertcut.checkpoints.build import BuildOptions, build
from expertcut.checkpoints.size import size
from expertcut.checkpoints.tilt_edit import ScaleEdit
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.plan import BlockEdit, load_plan
from expertcut.edits.router_edits import reweight_draft, tilts
from expertcut.edits.selection import Pruning, choose
from expertcut.errors import ContractError
from expertcut.hub.provenance import verified
from expertcut.models.hooks import Routing, observe_routers
from expertcut.models.load import LoadOptions, MoeModel
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import Profile, load_profile
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.packing import encode
from expertcut.stats import BitExactCheck
from tests.conftest import open_model
from tests.support.exact_models import declared

Checkpoints = Callable[..., Path]
Profiles = Callable[..., Profile]
EXACT = CutSettings(layout="exact")
AS_IS = BuildOptions(LoadOptions())


@pytest.fixture
def held_out(quiz_folder: Path) -> Quiz:
    return load_quiz(Selection(str(quiz_folder), split="test", shots=1))


def base_of(profile: Profile) -> MoeModel:
    return open_model(Path(profile.info.model.id))


def scored(moe: MoeModel, quiz: Quiz) -> Tensor:
    return ask(Engine(moe, 2048), quiz)


def zeroed_after_top_k(moe: MoeModel, pruning: Pruning) -> MoeModel:
    """Gate weights of removed experts become zero, the others stay as they are."""
    for block in moe.blocks:
        removed = torch.tensor(pruning.draft.edits[block.name].removed(block.n_experts))

        def drop(_m: object, args: tuple[Tensor, ...], removed: Tensor = removed) -> Any:
            x_TD, experts_TK, weights_TK = args
            return x_TD, experts_TK, weights_TK * ~torch.isin(experts_TK, removed)

        block.experts.register_forward_pre_hook(drop)
    return moe


def masked_before_top_k(moe: MoeModel, pruning: Pruning) -> MoeModel:
    """Logits of removed experts become −∞, by the rule of OLMoE written out."""
    for block in moe.blocks:
        gone = list(pruning.draft.edits[block.name].removed(block.n_experts))

        def route(x_TD: Tensor, block: Any = block, gone: list[int] = gone) -> Any:
            x_TD = x_TD.reshape(-1, x_TD.shape[-1])
            logits_TE = x_TD @ block.router.weight.T
            logits_TE[:, gone] = -torch.inf
            weights_TK, experts_TK = logits_TE.softmax(-1).topk(block.top_k)
            return logits_TE, weights_TK, experts_TK

        block.router.forward = route
    return moe


@pytest.mark.parametrize("n_keep", [5, 3, 1])
def test_exact_equals_weights_that_are_zeroed_after_top_k(
    profile_of: Profiles, held_out: Quiz, tmp_path: Path, n_keep: int
) -> None:
    profile = profile_of("olmoe")
    pruning = choose(profile, EXACT.updated(keep=n_keep))
    build(profile, pruning.draft, tmp_path / "out", AS_IS)
    base = scored(base_of(profile), held_out)
    wanted = scored(zeroed_after_top_k(base_of(profile), pruning), held_out)
    found = scored(open_model(tmp_path / "out"), held_out)
    assert (wanted - base).abs().max() > 0.1
    assert (wanted - found).abs().max() <= 1e-6


def test_stock_without_a_fold_equals_logits_that_are_masked_before_top_k(
    profile_of: Profiles, held_out: Quiz, tmp_path: Path
) -> None:
    profile = profile_of("olmoe")
    pruning = choose(profile, CutSettings(keep=5, fold="off"))
    built = build(profile, pruning.draft, tmp_path / "out", AS_IS)
    # In float32 the last bit of log p is worth as much here.
    paths = (Path(profile.info.model.id), tmp_path / "out")
    base, reference, found = (open_model(p, dtype="float64") for p in (paths[0], *paths))
    wanted = scored(masked_before_top_k(reference, pruning), held_out)
    assert (wanted - scored(base, held_out)).abs().max() > 0.1
    assert (wanted - scored(found, held_out)).abs().max() <= 1e-6
    assert built.proof and built.proof.held_out[1].max_abs_logprob_diff <= 2e-6
    assert load_plan(tmp_path / "out").fold == "off"


@pytest.mark.parametrize("fold", ["answer", "all"])
def test_each_fold_brings_a_stock_cut_closer_to_the_unedited_model(
    profile_of: Profiles, held_out: Quiz, tmp_path: Path, fold: Any
) -> None:
    profile = profile_of("olmoe", num_experts=16)
    base = scored(base_of(profile), held_out)
    medians = []
    for used in (fold, "off"):
        pruning = choose(profile, CutSettings(keep=15, positions="all", fold=used))
        build(profile, pruning.draft, tmp_path / used, AS_IS)
        moved = (scored(open_model(tmp_path / used), held_out) - base).abs()
        medians.append(float(moved.median()))
    assert medians[0] < medians[1]


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])  # with a shared expert
def test_each_layer_keeps_its_own_number_and_quiet_questions_keep_every_bit(
    profile_of: Profiles, tmp_path: Path, family: str
) -> None:
    profile = profile_of(family, num_experts=48)
    pruning = choose(profile, CutSettings(keep_active=True, positions="all", layout="exact"))
    built = build(profile, pruning.draft, tmp_path / "out", AS_IS)
    tokens_LE = profile.token_sum("tokens")
    assert tokens_LE is not None
    counts = [len(edit.keep) for edit in pruning.draft.edits.values()]
    assert counts == (tokens_LE > 0).sum(axis=1).tolist() and max(counts) < 48
    assert built.proof and built.proof.alone
    alone = built.proof.alone
    assert alone.questions == 33 and 0 < alone.untouched == alone.bit_equal
    stated = declared(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert [48 - len(ids) for ids in stated.values()] == counts


def quiet_by_hand(profile: Profile, quiz: Quiz, pruning: Pruning) -> int:
    """Questions, run alone in the unedited model, none of whose tokens chose a removed expert."""
    moe = base_of(profile)
    removed = {b.layer: set(pruning.draft.edits[b.name].removed(b.n_experts)) for b in moe.blocks}
    hits: list[bool] = []

    def see(routing: Routing) -> None:
        hits.append(bool(removed[routing.layer] & set(routing.experts_TK.flatten().tolist())))

    n_quiet = 0
    with observe_routers(moe.blocks, see), torch.inference_mode():
        for subject, questions in quiz.questions.items():
            for question in questions:
                encoded = encode(moe.tokenizer, [question], quiz.shots_by_subject[subject])
                hits.clear()
                moe.model(input_ids=torch.tensor([encoded.prompts[0]]), use_cache=False)
                n_quiet += not any(hits)
    return n_quiet


def test_quiet_questions_are_those_that_chose_no_removed_expert(
    profile_of: Profiles, held_out: Quiz, tmp_path: Path
) -> None:
    profile = profile_of("olmoe", num_experts=48)
    pruning = choose(profile, CutSettings(keep=28, positions="all", layout="exact"))
    built = build(profile, pruning.draft, tmp_path / "out", AS_IS)
    n_quiet = quiet_by_hand(profile, held_out, pruning)
    assert 0 < n_quiet < len(held_out)
    alone = {"questions": 33, "untouched": n_quiet, "bit_equal": n_quiet}
    assert built.proof and built.proof.alone == BitExactCheck(**alone)
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["proof"]["alone"] == alone


def test_a_checkpoint_that_changes_quiet_questions_is_found_out(
    profile_of: Profiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = profile_of("olmoe", num_experts=48)
    pruning = choose(profile, CutSettings(keep_active=True, positions="all", layout="exact"))
    first = pruning.draft.edits["model.layers.0.mlp"].keep[0]
    worse = {"model.layers.0.mlp": BlockEdit(keep=pruning.draft.edits["model.layers.0.mlp"].keep,
                                        scale={first: 1.01})}  # fmt: skip
    honest = "expertcut.checkpoints.build.export"
    export = __import__("expertcut.checkpoints.export", fromlist=["export"]).export

    def spoil(source: Any, draft: Any, n_experts: int, edits: Any, folder: Path) -> None:
        spoilt = ScaleEdit({**draft.edits, **worse})
        export(source, draft, n_experts, [spoilt, *edits], folder)

    monkeypatch.setattr(honest, spoil)
    built = build(profile, pruning.draft, tmp_path / "out", AS_IS)
    assert built.proof and built.proof.alone
    assert built.proof.alone.bit_equal < built.proof.alone.untouched


def test_removed_experts_can_give_their_mean_output(profile_of: Profiles, tmp_path: Path) -> None:
    profile = profile_of("olmoe")
    moved = {}
    for removed in ("zero", "mean"):
        pruning = choose(profile, CutSettings(keep=5, layout="exact", removed=removed))
        built = build(profile, pruning.draft, tmp_path / removed, AS_IS)
        assert built.proof
        against_base, against_reference = built.proof.held_out
        assert against_reference.max_abs_logprob_diff < 1e-5
        moved[removed] = against_base.max_abs_logprob_diff
        assert load_plan(tmp_path / removed).removed == removed
    assert moved["zero"] != moved["mean"]
    constants = [
        t for n, t in load_file(tmp_path / "mean/model.safetensors").items() if "approx" in n
    ]
    assert len(constants) == 6 and all(bool(value_D.any()) for value_D in constants)


def test_an_exact_boost_is_the_bias_itself(profile_of: Profiles, tmp_path: Path) -> None:
    profile = profile_of("olmoe")
    found = tilts(profile, ["1:3=2.0"], ["0:1=0.5"])
    built = build(profile, reweight_draft(profile, found, "exact"), tmp_path / "out", AS_IS)
    assert built.fits == []
    assert built.proof and built.proof.alone is None
    against_base, against_exact = built.proof.held_out
    assert against_base.max_abs_logprob_diff > 0.01
    assert against_exact.max_abs_logprob_diff == 0.0
    plan = load_plan(tmp_path / "out")
    assert (plan.layout, plan.removal, plan.chosen_on.fitted_split) == ("exact", "constant", None)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_cut_of_another_family_is_what_was_simulated(
    profile_of: Profiles, tmp_path: Path, family: str
) -> None:
    """Blocks of another name on disk, and experts in one tensor."""
    profile = profile_of(family)
    pruning = choose(profile, EXACT.updated(keep=5))
    built = build(profile, pruning.draft, tmp_path / "out", AS_IS)
    assert built.proof is not None
    against_base, against_cut = built.proof.held_out
    assert against_base.max_abs_logprob_diff > 0.01 > 1e-5 > against_cut.max_abs_logprob_diff
    checked = verified(tmp_path / "out")
    assert [len(edit.keep) for edit in checked.plan.blocks.values()] == [5, 5]


def test_an_exact_checkpoint_can_be_profiled_and_not_be_cut_again(
    profile_of: Profiles, held_out: Quiz, tmp_path: Path
) -> None:
    profile = profile_of("olmoe")
    pruning = choose(profile, EXACT.updated(keep=5))
    build(profile, pruning.draft, tmp_path / "out", AS_IS)
    moe = open_model(tmp_path / "out")
    list(Measurement(moe, held_out, None, MeasureOptions()).run(tmp_path / "again"))
    again = load_profile(tmp_path / "again")
    assert [block.experts for block in again.info.model.blocks] == [8, 8]
    tokens_LE = again.token_sum("tokens")
    assert tokens_LE is not None
    removed = list(pruning.draft.edits["model.layers.0.mlp"].removed(8))
    assert tokens_LE[0, removed].sum() > 0  # they are chosen still, and give a constant
    with pytest.raises(ContractError, match="layout exact already"):
        build(again, choose(again, EXACT.updated(keep=5)).draft, tmp_path / "new", AS_IS)


def test_the_size_of_an_exact_checkpoint_is_what_it_holds(
    profile_of: Profiles, tmp_path: Path
) -> None:
    profile = profile_of("olmoe")
    base = size(base_of(profile))
    for n_keep in (5, 1):
        pruning = choose(profile, EXACT.updated(keep=n_keep))
        build(profile, pruning.draft, tmp_path / str(n_keep), AS_IS)
        found = size(open_model(tmp_path / str(n_keep)))
        per_expert, n_gone = 3 * 32 * 16, 2 * (8 - n_keep)
        assert found.parameters == base.parameters - n_gone * (per_expert - 32)
        too_few = 2 * max(0, 2 - n_keep) * per_expert  # a token chooses 2
        assert found.active_parameters == base.active_parameters - too_few
