"""DeepSeek-V4: layers whose experts a table of token ids chooses are measured and never cut."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expertcut.edits.plan import load_plan
from expertcut.profiling.storage import Profile, load_profile
from tests.conftest import Commands, open_model

Checkpoints = Callable[..., Path]
HASHED = 0


@pytest.fixture
def profiled(profile_of: Callable[..., Profile]) -> Path:
    return profile_of("deepseek_v4").path


def test_its_alpha_is_its_own_score_and_its_tables_layer_is_told(
    expertcut: Commands, checkpoint: Checkpoints, profiled: Path, tmp_path: Path
) -> None:
    profile = load_profile(profiled)
    blocks = profile.info.model.blocks
    assert [block.scoring for block in blocks] == ["sqrtsoftplus"] * 3
    assert [block.is_hashed for block in blocks] == [True, False, False]
    plain = AutoModelForCausalLM.from_pretrained(checkpoint("deepseek_v4")).eval()
    moe = open_model(checkpoint("deepseek_v4"))
    seen = []
    handles = [
        plain.get_submodule(block.name).gate.register_forward_hook(
            lambda _module, _args, output: seen.append([t[-1].numpy() for t in output])
        )
        for block in blocks
    ]
    from expertcut.data import Selection, load_quiz, prompt

    quiz = load_quiz(Selection(profile.info.quiz.id, split="val", shots=1))
    question = next(iter(quiz))
    ids = torch.tensor(
        [moe.tokenizer(prompt(question, quiz.shots_by_subject[question.subject]))["input_ids"]]
    )
    with torch.inference_mode():
        plain(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    alpha_LE = profile.array("alpha_NLE")[0]
    for layer, (logits_E, weights_K, experts_K) in enumerate(seen):
        score_E = F.softplus(torch.tensor(logits_E)).sqrt().numpy()
        np.testing.assert_allclose(alpha_LE[layer], score_E, atol=1e-4)
        assert set(profile.array("chosen_NLK")[0, layer]) == set(experts_K)
        np.testing.assert_allclose(
            sorted(profile.array("weight_NLK")[0, layer]), sorted(weights_K), atol=1e-4
        )
    shown = " ".join(expertcut(f"show {profiled} --tables").split())
    assert "Hash-routed: layers 0 choose their experts by a table of token ids" in shown
    assert '"selection":"table"' in (profiled / "profile.json").read_text().replace(" ", "")


@pytest.mark.parametrize(
    "command",
    [
        "prune --keep 6",
        "prune --keep-active",
        "prune --sweep 0.5 --by reap",
        "merge --keep 6",
        "reweight --boost 0:3=2",
    ],
)
def test_what_would_cut_or_boost_there_is_refused_in_one_line(
    expertcut: Commands, profiled: Path, tmp_path: Path, command: str
) -> None:
    said = expertcut(f"{command} --profile {profiled}", status=2)
    assert said.count("\n") == 1 and "layers.0" in said and "table of token ids" in said
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "sweeps").exists()


def test_an_audit_removes_experts_of_the_other_layers_alone(
    expertcut: Commands, profiled: Path, tmp_path: Path
) -> None:
    said = expertcut(f"audit --profile {profiled} --sample 4 --questions 6 --by reap --out a")
    assert said
    text = (tmp_path / "a" / "audit.json").read_text()
    assert '"layer":1' in text.replace(" ", "") and '"layer":0' not in text.replace(" ", "")


def test_layout_exact_keeps_the_tables_layer_whole_and_cuts_the_others_as_if_they_gave_zero(
    expertcut: Commands, checkpoint: Checkpoints, profiled: str, tmp_path: Path
) -> None:
    words = f"prune --profile {profiled} --keep 6 --by reap --layout exact --removed zero"
    expertcut(f"{words} --no-verify --out cut")
    keep = [edit.keep for edit in load_plan(tmp_path / "cut").blocks.values()]
    assert list(map(len, keep)) == [8, 6, 6]
    before, after = (
        load_file(path / "model.safetensors")
        for path in (checkpoint("deepseek_v4"), tmp_path / "cut")
    )
    hashed = {name for name in before if ".layers.0." in name}
    assert hashed and all(torch.equal(before[name], after[name]) for name in hashed)
    assert {name for name in before if name not in after} == {
        name
        for layer in (1, 2)
        for name in before
        for e in {*range(8)} - {*keep[layer]}
        if f".layers.{layer}." in name and f".experts.{e}." in name
    }
    plain = AutoModelForCausalLM.from_pretrained(checkpoint("deepseek_v4")).eval()
    ids = torch.arange(2, 60)[None]
    with torch.inference_mode():
        untouched = plain(input_ids=ids, use_cache=False).logits
        for block, kept in zip(open_model(checkpoint("deepseek_v4")).blocks, keep, strict=True):
            experts = plain.get_submodule(block.name).experts
            for e in {*range(8)} - {*kept}:
                experts.down_proj[e] = 0
        wanted = plain(input_ids=ids, use_cache=False).logits
        cut = open_model(tmp_path / "cut").model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(cut, wanted, rtol=1e-4, atol=1e-4)
    assert (cut - untouched).abs().max() > 1e-2
