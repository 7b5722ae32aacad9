"""Layout `stock`: what is written is what the plan says, and plain transformers agrees."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expertcut.checkpoints.build import BuildOptions, build
from expertcut.checkpoints.output_dir import atomic_dir, check_writable
from expertcut.data import Selection, load_quiz
from expertcut.edits.calibrate import rescaling_at_answers
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.plan import load_hashes, load_plan
from expertcut.edits.router_edits import reweight_draft, tilts
from expertcut.edits.selection import choose
from expertcut.errors import OutputError, PlanError, ProfileError
from expertcut.models.load import LoadOptions
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.router_bias import Tilts, tilted
from tests.conftest import DENSE_FIRST, FAMILIES, STORAGE_FORMS, open_model, profiled, slow_but

Checkpoints = Callable[..., Path]
AS_IS = BuildOptions(LoadOptions())


def logprobs(path: Path, quiz_folder: Path, bias: dict[int, torch.Tensor]) -> torch.Tensor:
    moe = open_model(path)
    quiz = load_quiz(Selection(str(quiz_folder), split="test", shots=1))
    with tilted(moe.blocks, Tilts(bias)):
        return ask(Engine(moe, 1000), quiz)


def assert_cut_equals_mask(profile: Profile, folder: Path, within: float = 1e-5) -> None:
    """Profiled, pruned, written and loaded again: as if the router could not choose the removed."""
    pruning = choose(profile, CutSettings(keep=6, fold="off"))
    built = build(profile, pruning.draft, folder, AS_IS)
    assert built.proof is not None
    against_base, against_mask = built.proof.held_out
    assert against_base.max_abs_logprob_diff > 0.01
    assert against_mask.max_abs_logprob_diff < within
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    is_folding = any(block.inflates for block in profile.info.model.blocks)
    assert bool(rescaling_at_answers(profile, pruning.draft.edits)) == is_folding


# All families: `test_matrix`, by plain transformers.
@pytest.mark.parametrize("family", slow_but((*STORAGE_FORMS, "deepseek_v3", "jamba"), FAMILIES))
def test_a_stock_cut_without_a_fold_equals_the_mask(
    profile_of: Callable[..., Profile], tmp_path: Path, family: str
) -> None:
    assert_cut_equals_mask(profile_of(family), tmp_path / "out")


@pytest.mark.parametrize("family", slow_but(("qwen2_moe", "jamba"), DENSE_FIRST))
def test_a_cut_leaves_a_dense_first_layer_alone(
    profile_of: Callable[..., Profile], tmp_path: Path, family: str
) -> None:
    profile = profile_of(family, **{"num_hidden_layers": 3, **DENSE_FIRST[family]})
    # Rounding grows with layers: in float64 the difference is 0.
    assert_cut_equals_mask(profile, tmp_path / "out", within=1e-4)
    source = Path(profile.info.model.id)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out")
    )
    dense = [name for name in before if ".layers.0." in name]
    assert len(dense) > 5
    assert all(torch.equal(before[name], after[name]) for name in dense)


def test_folding_brings_a_cut_olmoe_closer_to_the_unedited_model(
    profile_of: Callable[..., Profile], quiz_folder: Path, tmp_path: Path
) -> None:
    profile = profile_of("olmoe", num_experts=16)
    pruning = choose(profile, CutSettings(keep=15, positions="all"))
    build(profile, pruning.draft, tmp_path / "out", AS_IS)
    base = logprobs(Path(profile.info.model.id), quiz_folder, {})
    folded = logprobs(tmp_path / "out", quiz_folder, {})
    mask = {}
    for layer, edit in enumerate(pruning.draft.edits.values()):
        mask[layer] = torch.full((16,), -torch.inf)
        mask[layer][list(edit.keep)] = 0
    sliced = logprobs(Path(profile.info.model.id), quiz_folder, mask)
    assert (folded - base).abs().median() < (sliced - base).abs().median()


def test_the_checkpoint_says_what_it_is_and_loads_anywhere(
    profile_of: Callable[..., Profile], tmp_path: Path
) -> None:
    profile = profile_of("olmoe")
    pruning = choose(profile, CutSettings(keep=5))
    build(profile, pruning.draft, tmp_path / "out", AS_IS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((Path(profile.info.model.id) / "config.json").read_text())
    assert config == {**original, "num_experts": 5}
    plan = load_plan(tmp_path / "out")
    assert len(load_hashes(tmp_path / "out", plan)) == plan.chosen_on.questions == 21
    assert plan.proof.held_out[0].questions == 33
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.model.layers[0].mlp.experts.down_proj.shape[0] == 5
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "plan.json"),
        *("chosen_on.txt", "tokenizer.json", "tokenizer_config.json"),
    }


def test_kept_experts_keep_their_weights_to_the_last_bit_but_for_the_fold(
    profile_of: Callable[..., Profile], checkpoint: Checkpoints, tmp_path: Path
) -> None:
    profile = profile_of("olmoe")
    pruning = choose(profile, CutSettings(keep=5))
    build(profile, pruning.draft, tmp_path / "out", AS_IS)
    base = open_model(Path(profile.info.model.id)).blocks
    folds = rescaling_at_answers(profile, pruning.draft.edits)
    for block, edited in zip(base, open_model(tmp_path / "out").blocks, strict=True):
        keep = list(pruning.draft.edits[block.name].keep)
        old, new = block.experts, edited.experts
        gates = (b.router.get_parameter("weight") for b in (block, edited))
        assert torch.equal(next(gates)[keep], next(gates))
        assert torch.equal(
            old.get_parameter("gate_up_proj")[keep], new.get_parameter("gate_up_proj")
        )
        ratio = new.get_parameter("down_proj") / old.get_parameter("down_proj")[keep]
        fold_E11 = torch.tensor(folds[block.layer])[:, None, None]
        torch.testing.assert_close(ratio.double(), fold_E11.expand_as(ratio), rtol=1e-5, atol=0)
        assert (folds[block.layer] < 1).all()


def test_a_boost_in_the_gate_row_comes_close_to_the_exact_bias(
    profile_of: Callable[..., Profile], tmp_path: Path
) -> None:
    profile = profile_of("olmoe", hidden_size=64, num_experts=16)
    appearances_E = profile.layers[0].appearances_E
    often = int(np.argmin(np.abs(appearances_E - 0.5)))
    found = tilts(profile, ["3=2.0"], [f"0:{often}=1.0"])
    built = build(profile, reweight_draft(profile, found), tmp_path / "out", AS_IS)
    assert [fit.layer for fit in built.fits] == [0, 1]
    against_base, against_exact = built.proof.held_out
    assert against_exact.median_abs_logprob_diff < against_base.median_abs_logprob_diff / 2
    boosted, suppressed = built.proof.share(1, 3), built.proof.share(0, often)
    assert boosted.base < boosted.edited
    assert boosted.base < boosted.exact
    assert suppressed.edited < suppressed.base
    gates = [
        b.router.get_parameter("weight")
        for path in (Path(profile.info.model.id), tmp_path / "out")
        for b in open_model(path).blocks
    ]
    changed = [
        sorted(set((old != new).nonzero()[:, 0].tolist()))
        for old, new in zip(gates[:2], gates[2:], strict=True)
    ]
    assert changed == [[often], [3]]


def test_a_router_with_a_bias_of_its_own_carries_a_boost_exactly(
    profile_of: Callable[..., Profile], tmp_path: Path
) -> None:
    profile = profile_of("gpt_oss")
    found = tilts(profile, ["3=1.0"], [])
    built = build(profile, reweight_draft(profile, found), tmp_path / "out", AS_IS)
    against_base, against_exact = built.proof.held_out
    assert against_base.max_abs_logprob_diff > 0.01
    assert against_exact.max_abs_logprob_diff < 1e-5


def test_a_plan_that_moves_nothing_writes_the_same_model(
    profile_of: Callable[..., Profile], tmp_path: Path
) -> None:
    profile = profile_of("olmoe")
    pruning = choose(profile, CutSettings(keep=8))
    built = build(profile, pruning.draft, tmp_path / "out", AS_IS)
    assert [d.max_abs_logprob_diff for d in built.proof.held_out] == [0.0, 0.0]


def test_nothing_appears_when_the_build_fails(
    profile_of: Callable[..., Profile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = profile_of("olmoe")
    pruning = choose(profile, CutSettings(keep=5))

    def breaks(*_: object) -> None:
        raise PlanError("no")

    monkeypatch.setattr("expertcut.checkpoints.build.score_edited", breaks)
    with pytest.raises(PlanError):
        build(profile, pruning.draft, tmp_path / "outs" / "out", AS_IS)
    assert not list((tmp_path / "outs").iterdir())


def test_an_output_folder_in_use_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(OutputError, match="not empty"), atomic_dir(tmp_path / "taken"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_folder_that_another_run_fills_in_the_last_moment_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_run(folder: Path) -> None:
        if folder != tmp_path:  # after the last look at the name, before it is taken
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()

    monkeypatch.setattr("expertcut.checkpoints.output_dir.sync_folder", other_run)
    with pytest.raises(OutputError, match="not empty"), atomic_dir(tmp_path / "out") as folder:
        (folder / "ours").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_working_directory_is_free_and_a_full_one_is_spared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_writable(Path())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        check_writable(Path())
    with pytest.raises(OutputError, match="so --force spares it"):
        check_writable(Path(), is_forced=True)


def test_a_model_that_changed_since_it_was_profiled_is_refused(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("olmoe"), folder)
    profile = profiled(folder, quiz_folder, tmp_path / "p")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    pruning = choose(profile, CutSettings(keep=5))
    with pytest.raises(ProfileError, match="another model"):
        build(profile, pruning.draft, tmp_path / "out", AS_IS)
    assert not (tmp_path / "out").exists()


def test_half_precision_weights_stay_as_they_are_stored(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bf16"
    model = AutoModelForCausalLM.from_pretrained(checkpoint("olmoe"), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in checkpoint("olmoe").glob("tokenizer*"):
        shutil.copy(file, folder)
    profile = profiled(folder, quiz_folder, tmp_path / "p")
    assert profile.info.settings.dtype == "float32"
    pruning = choose(profile, CutSettings(keep=5))
    build(profile, pruning.draft, tmp_path / "out", AS_IS)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert stored.dtype == torch.bfloat16
    assert np.isfinite(load_plan(tmp_path / "out").proof.held_out[0].max_abs_logprob_diff)
