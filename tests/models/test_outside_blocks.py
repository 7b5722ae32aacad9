"""What a cut does to tensors that lie on disk outside of their block, and to layers for MTP."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expertcut.checkpoints.export import check_export
from expertcut.checkpoints.stock import outside_axes, without_further_tokens
from expertcut.edits.plan import BlockEdit, EditPlan
from expertcut.errors import ContractError
from expertcut.models.load import find_source
from expertcut.models.safetensors_index import read_headers
from tests.conftest import Commands
from tests.support.rewrites import Fitted, export

WEIGHTS = "model.safetensors"
BIAS = "model.layers.{}.moe.router.expert_bias"
Checkpoints = Callable[..., Path]


def draft(keep: tuple[int, ...], n_layers: int = 2, block: str = "mlp") -> EditPlan:
    edits = {f"model.layers.{i}.{block}": BlockEdit(keep=keep) for i in range(n_layers)}
    return EditPlan("cut", "a cut", "activations", "answer", edits, "stock", is_cut=True)


def changed(
    base: Path,
    folder: Path,
    change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None = None,
    **config: object,
) -> Path:
    """A copy with other tensors and more in its config."""
    shutil.copytree(base, folder)
    if change is not None:
        tensors = load_file(folder / WEIGHTS)
        save_file({**tensors, **change(tensors)}, folder / WEIGHTS, {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


# Tensors outside of their block


def test_a_selection_bias_outside_of_its_block_is_cut_with_it(
    checkpoint: Checkpoints, quiz_folder: Path, expertcut: Commands
) -> None:
    base = checkpoint("kolibri1")
    stored = load_file(base / WEIGHTS)
    assert all(BIAS.format(i) in stored for i in range(2))
    asked = ("--quiz", quiz_folder, "--shots", 0, "--limit", 3, "--threads", 1, "--split", "test")
    expertcut("profile", base, *asked, "--out", "p")
    printed = expertcut("prune", "--profile", "p", "--keep", 5, "--out", "cut")
    words = " ".join(printed.split())
    assert "the same removal as a mask: median 0.0000, largest 0.0000, 0 answers flipped" in words
    plan = json.loads(Path("cut/plan.json").read_text())
    for i, edit in enumerate(plan["blocks"].values()):
        kept = load_file(Path("cut") / WEIGHTS)[BIAS.format(i)]
        assert torch.equal(kept, stored[BIAS.format(i)][edit["keep"]])
    expertcut("merge", "--profile", "p", "--keep", 5, "--out", "merged", "--no-verify")
    assert load_file(Path("merged") / WEIGHTS)[BIAS.format(0)].shape == (5,)
    AutoModelForCausalLM.from_pretrained("merged")


def test_an_axis_that_only_happens_to_be_as_long_is_left_alone(checkpoint: Checkpoints) -> None:
    """Norms of heads are as wide as there are experts."""
    source = find_source(str(checkpoint("qwen3_moe")))
    headers = read_headers(source.path)
    assert headers["model.layers.0.self_attn.q_norm.weight"].shape == (8,)
    assert outside_axes(source, headers, draft((0, 1, 2)).edits) == {}


def test_a_cut_that_could_not_be_loaded_is_refused_before_it_is_written(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where an axis of experts is overlooked."""
    source = find_source(str(checkpoint("kolibri1")))
    monkeypatch.setattr("expertcut.checkpoints.stock.outside_axes", lambda *_: {})
    with pytest.raises(ContractError, match=r"would lack 2 .*e_score_correction_bias of shape \[5"):
        check_export(source, draft((0, 1, 2, 3, 4)), 8, tmp_path / "out")
    check_export(source, draft(tuple(range(8))), 8, tmp_path / "out")  # nothing is cut


@pytest.mark.parametrize("family", ["olmoe", "glm4_moe", "gpt_oss", "jamba", "kolibri1"])
def test_a_cut_that_can_be_loaded_is_let_through(
    checkpoint: Checkpoints, tmp_path: Path, family: str
) -> None:
    source = find_source(str(checkpoint(family)))
    block = {"jamba": "feed_forward"}.get(family, "mlp")
    check_export(source, draft((0, 1, 4, 5), block=block), 8, tmp_path / "out")


# Layers that predict further tokens


def glm_layers(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        if name.startswith("model.layers.1."):
            yield name.replace("layers.1.", "layers.2."), tensor.clone()
    yield "model.layers.2.eh_proj.weight", torch.zeros(32, 64)


@pytest.mark.parametrize("field", ["num_nextn_predict_layers", None])
def test_config_counts_no_layer_that_was_left_out(
    checkpoint: Checkpoints,
    quiz_folder: Path,
    tmp_path: Path,
    expertcut: Commands,
    field: str | None,
) -> None:
    glm = checkpoint("glm4_moe")
    base = changed(glm, tmp_path / "glm", lambda t: dict(glm_layers(t)))
    content = {k: v for k, v in config_of(base).items() if "nextn" not in k and "mtp" not in k}
    content |= {field: 1} if field else {}
    (base / "config.json").write_text(json.dumps(content))
    asked = ("--quiz", quiz_folder, "--shots", 0, "--limit", 3, "--threads", 1, "--split", "test")
    expertcut("profile", base, *asked, "--out", "p")
    expertcut("prune", "--profile", "p", "--keep", 6, "--out", "cut", "--no-verify")
    assert config_of(Path("cut"))[field or "num_nextn_predict_layers"] == 0
    assert not any("layers.2." in name for name in load_file(Path("cut") / WEIGHTS))
    assert AutoModelForCausalLM.from_pretrained("cut").config.num_mtp_layers == 0
    # No expert goes here, so nothing does.
    expertcut("reweight", "--profile", "p", "--scale", "0=0.5", "--out", "t", "--no-verify")
    assert config_of(Path("t")) == content
    assert "model.layers.2.eh_proj.weight" in load_file(Path("t") / WEIGHTS)


def test_every_name_of_the_count_and_every_list_by_layer_follows() -> None:
    before = {
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 2,
        "mtp_num_hidden_layers": 2,
        "num_mtp_modules": 2,
        "mtp_loss_factor": 0.5,
        "use_mtp": True,
        "layer_types": ["full"] * 5,
        "compress_ratios": [1, 2, 3, 4, 5],
        "eos_token_id": [1, 2, 3, 4, 5],
        "sliding": [1, 2, 3],
        "mtp_config": {"num_nextn_predict_layers": 2},
    }
    after = without_further_tokens(before)
    assert after == {
        **before,
        "num_nextn_predict_layers": 0,
        "mtp_num_hidden_layers": 0,
        "num_mtp_modules": 0,
        "use_mtp": False,
        "layer_types": ["full"] * 3,
        "compress_ratios": [1, 2, 3],
        "mtp_config": {"num_nextn_predict_layers": 0},
    }
    nested = {"text_config": {"num_hidden_layers": 3, "mtp_num_hidden_layers": 1, "x": [1] * 4}}
    assert without_further_tokens(nested)["text_config"] == {
        "num_hidden_layers": 3,
        "mtp_num_hidden_layers": 0,
        "x": [1] * 3,
    }
    assert without_further_tokens({"num_hidden_layers": 3})["num_nextn_predict_layers"] == 0


def test_a_module_for_further_tokens_goes_whole(
    checkpoint: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Qwen3-Next: `mtp.layers.0` with experts, and projections beside it."""

    def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        layer = {n: t for n, t in tensors.items() if n.startswith("model.layers.1.")}
        made = {n.replace("model.layers.1.", "mtp.layers.0."): t.clone() for n, t in layer.items()}
        return {**made, "mtp.fc.weight": torch.zeros(32, 64), "mtp.norm.weight": torch.ones(32)}

    base = changed(checkpoint("qwen3_next"), tmp_path / "q", add, mtp_num_hidden_layers=1)
    source, out = find_source(str(base)), tmp_path / "out"
    out.mkdir()
    check_export(source, draft((0, 1, 2, 3)), 8, out)
    export(source, draft((0, 1, 2, 3)), 8, Fitted(), out)
    assert not any(name.startswith("mtp.") for name in load_file(out / WEIGHTS))
    assert config_of(out)["mtp_num_hidden_layers"] == 0
    assert "serve the checkpoint without MTP" in caplog.text
