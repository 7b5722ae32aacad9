"""A LoRA adapter of the unpruned model, cut to fit: base and adapter, cut, are the cut with its."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from expertcut.checkpoints.lora import adapter_cut, read_adapter
from expertcut.edits.layouts import Layout
from expertcut.edits.plan import BlockEdit, EditPlan, load_plan
from expertcut.errors import ExpertcutError
from expertcut.models.load import find_source
from tests.conftest import DIFFERENT, Commands, open_model
from tests.support.adapters import (
    EXPERTS,
    N_EXPERTS,
    RANK,
    ROUTERS,
    cut,
    logits,
    make_adapter,
    merged,
    one_by_one,
    opened,
    peft_quietly,
    saved,
    with_adapter,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model.model.layers.0."
SAME = ((0, 1, 2, 4, 5, 7), (1, 2, 3, 4, 6, 7))  # equally many in both groups of four
UNEQUAL = ((1, 2, 5), (0, 2, 3, 4, 6, 7))
TOLERANCE = 1e-6
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def made(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`made("olmoe")`: a folder with a `base` and an `adapter` of all that it may adapt."""
    found: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in found:
            folder = found[family] = tmp_path_factory.mktemp(family)
            saved(opened(checkpoint(family)), folder / "base")
            make_adapter(folder / "base", folder / "adapter", [*EXPERTS, *ROUTERS])
        return found[family]

    return find


def edits_of(base: Path, kept: tuple[tuple[int, ...], ...], **more: Any) -> dict[str, BlockEdit]:
    blocks = open_model(base).blocks
    return {b.name: BlockEdit(keep=keep, **more) for b, keep in zip(blocks, kept, strict=True)}


def check_the_law(folder: Path, out: Path, edits: dict[str, BlockEdit], layout: Layout) -> None:
    """With factors of all outputs, which the adapter's last projections must follow."""
    folds = None
    if layout == "stock":
        folds = {
            layer: np.linspace(1.7, 0.3, len(e.keep)) for layer, e in enumerate(edits.values())
        }
    of = {"adapter": folder / "adapter", "folds": folds}
    pruned = cut(folder / "base", edits, out / "pruned", layout, **of)
    both = merged(folder / "base", folder / "adapter", out / "merged")
    wanted = logits(opened(cut(both, edits, out / "wanted", layout, folds=folds)))
    found = logits(with_adapter(pruned, pruned / "adapter"))
    assert (found - wanted).abs().max() < TOLERANCE
    assert (logits(opened(pruned)) - wanted).abs().max() > 1  # the adapter matters
    assert (logits(opened(both)) - wanted).abs().max() > 1  # and so does the cut


@pytest.mark.parametrize("family", DIFFERENT)
def test_base_and_adapter_cut_together_are_the_cut_base_with_the_cut_adapter(
    made: Make, tmp_path: Path, family: str
) -> None:
    folder = made(family)
    check_the_law(folder, tmp_path, edits_of(folder / "base", SAME, scale={4: 1.5}), "stock")


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_so_they_are_in_layout_exact_where_each_layer_keeps_its_own_number(
    made: Make, tmp_path: Path, family: str
) -> None:
    folder = made(family)
    edits = edits_of(folder / "base", UNEQUAL, scale={2: 1.5}, bias={2: 0.5})
    check_the_law(folder, tmp_path, edits, "exact")


def test_layout_exact_is_the_adapted_model_whose_removed_experts_give_nothing(
    made: Make, tmp_path: Path
) -> None:
    """The same law without our own export on the other side."""
    folder = made("olmoe")
    edits = edits_of(folder / "base", UNEQUAL)
    pruned = cut(folder / "base", edits, tmp_path / "cut", "exact", adapter=folder / "adapter")
    model = with_adapter(folder / "base", folder / "adapter").merge_and_unload()
    before = logits(model)
    for name, edit in edits.items():
        removed = list(edit.removed(N_EXPERTS))
        model.get_submodule(f"{name}.experts").down_proj.data[removed] = 0
    assert (logits(model) - before).abs().max() > 1
    found = logits(with_adapter(pruned, pruned / "adapter"))
    assert (found - logits(model)).abs().max() < TOLERANCE


@pytest.mark.parametrize("layout", ["stock", "exact"])
def test_an_adapter_with_layers_of_each_expert_is_cut_too(
    made: Make, tmp_path: Path, layout: Layout
) -> None:
    folder = made("olmoe")
    one_by_one(folder / "adapter", tmp_path / "adapter")
    shutil.copytree(folder / "base", tmp_path / "base")
    same = logits(with_adapter(folder / "base", folder / "adapter"))
    assert (logits(with_adapter(tmp_path / "base", tmp_path / "adapter")) - same).abs().max() < 1e-9
    edits = edits_of(folder / "base", SAME, scale={4: 1.5})
    (tmp_path / "out").mkdir()
    check_the_law(tmp_path, tmp_path / "out", edits, layout)
    biased = edits_of(folder / "base", SAME, bias={4: 0.5})
    assert "as transformers 4 has" in refusal(
        tmp_path / "base", tmp_path / "adapter", biased, "exact"
    )


def test_ranks_of_their_own_and_routers_trained_whole_go_along(made: Make, tmp_path: Path) -> None:
    base = made("olmoe") / "base"
    (tmp_path / "base").symlink_to(base)
    own = {"rank_pattern": {r".*experts\.down_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    make_adapter(base, tmp_path / "adapter", EXPERTS, modules_to_save=["gate"], **own)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert tensors[f"{PREFIX}mlp.experts.lora_A.weight"].shape == (2 * N_EXPERTS, 16)
    tensors[f"{PREFIX}mlp.gate.weight"] += 0.1 * torch.randn(N_EXPERTS, 32)
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    (tmp_path / "out").mkdir()
    check_the_law(tmp_path, tmp_path / "out", edits_of(base, SAME), "stock")


def test_each_expert_keeps_its_own_delta_and_attention_its_bytes(
    made: Make, tmp_path: Path
) -> None:
    folder = made("olmoe")
    edits = edits_of(folder / "base", SAME)
    pruned = cut(folder / "base", edits, tmp_path / "cut", adapter=folder / "adapter")
    before, after = load_file(folder / "adapter" / WEIGHTS), load_file(pruned / "adapter" / WEIGHTS)
    assert before.keys() == after.keys()
    same = [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    assert len(same) == len([n for n in before if "self_attn" in n or "gate.lora_A" in n]) == 10
    for module in ("experts", "experts.base_layer"):
        a, b = (f"{PREFIX}mlp.{module}.lora_{side}.weight" for side in "AB")
        assert after[a].shape[0] == RANK * len(SAME[0]) < before[a].shape[0]
        for position, expert in enumerate(SAME[0]):
            rows = slice(expert * RANK, (expert + 1) * RANK)
            delta = before[b][:, expert::N_EXPERTS] @ before[a][rows]
            rows = slice(position * RANK, (position + 1) * RANK)
            found = after[b][:, position :: len(SAME[0])] @ after[a][rows]
            assert torch.equal(found, delta)


def test_values_keep_their_type(made: Make, tmp_path: Path) -> None:
    folder = made("olmoe")
    shutil.copytree(folder / "adapter", tmp_path / "half")
    tensors = load_file(tmp_path / "half" / WEIGHTS)
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(half, tmp_path / "half" / WEIGHTS)
    edits = edits_of(folder / "base", SAME, scale={4: 1.5})
    pruned = cut(folder / "base", edits, tmp_path / "cut", adapter=tmp_path / "half")
    after = load_file(pruned / "adapter" / WEIGHTS)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    b = f"{PREFIX}mlp.experts.lora_B.weight"
    scaled = (half[b][:, 4::N_EXPERTS].double() * 1.5).bfloat16()
    assert torch.equal(after[b][:, SAME[0].index(4) :: len(SAME[0])], scaled)


def test_magnitudes_of_dora_go_along_outside_of_experts_only(made: Make, tmp_path: Path) -> None:
    base = made("olmoe") / "base"
    (tmp_path / "base").symlink_to(base)
    make_adapter(base, tmp_path / "adapter", None, target_modules=["q_proj"], use_dora=True)
    assert any("magnitude" in name for name in load_file(tmp_path / "adapter" / WEIGHTS))
    edits = edits_of(base, SAME)
    pruned = cut(base, edits, tmp_path / "cut", adapter=tmp_path / "adapter")
    before, after = (load_file(f / "adapter" / WEIGHTS) for f in (tmp_path, pruned))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    change(tmp_path / "adapter", f"{PREFIX}mlp.experts.3.up_proj.lora_magnitude_vector", (16,))
    said = refusal(base, tmp_path / "adapter", edits)
    assert "neither lora_A nor lora_B" in said and "no DoRA" in said


def change(adapter: Path, name: str, shape: tuple[int, ...] | None) -> None:
    """Puts a tensor of that shape into an adapter, or takes it out."""
    tensors = load_file(adapter / WEIGHTS)
    tensors.pop(name, None)
    if shape is not None:
        tensors[name] = torch.zeros(shape)
    save_file(tensors, adapter / WEIGHTS)


def refusal(
    base: Path, adapter: Path, edits: dict[str, BlockEdit], layout: Layout = "stock"
) -> str:
    draft = EditPlan("cut", "a cut", "activations", "answer", edits, layout, is_cut=True)
    with pytest.raises(ExpertcutError) as refused:
        adapter_cut(adapter, find_source(str(base)), draft, adapter.parent / "out")
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def adapter(made: Make, tmp_path: Path) -> Path:
    """A copy, to do things to."""
    return Path(shutil.copytree(made("olmoe") / "adapter", tmp_path / "lora"))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("self_attn.q_proj.lora_A.weight", (4, 64), "adapt 64 → 32, but model.layers.0.self_attn"),
        ("self_attn.q_proj.lora_B.weight", None, "has no lora_B.weight"),
        ("self_attn.q_proj.lora_B.weight", (32, 5), "must meet in one rank"),
        ("self_attn.q_proj.lora_B.weight", (32,), "must meet in one rank"),
        ("mlp.gate.lora_B.weight", (16, 4), "adapt 32 → 16, but model.layers.0.mlp.gate.weight is"),
        ("mlp.experts.lora_B.weight", (64, 32), "has 8 experts of 32 → 32 and 16 → 32"),
        ("mlp.experts.gate_up_proj", (8, 32, 32), "neither lora_A nor lora_B"),
        ("mlp.gate.bias", (8,), "neither lora_A nor lora_B"),
        ("mlp.gate.weight", (9, 32), "is (9, 32), in the model (8, 32)"),
        ("mlp.experts.lora_A.weight", (32, 16, 1), "what it adapts has 2 axes"),
        ("mlp.experts.lora_B.weight", (32, 32, 1), "what it adapts has 2 axes"),
        ("mlp.gate.lora_A.weight", (4, 32, 1), "what it adapts has 2 axes"),
        ("mlp.gate.lora_B.weight", (8, 4, 1), "what it adapts has 2 axes"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    made: Make, adapter: Path, name: str, shape: tuple[int, ...] | None, words: str
) -> None:
    base = made("olmoe") / "base"
    change(adapter, PREFIX + name, shape)
    said = refusal(base, adapter, edits_of(base, SAME))
    assert words in said and PREFIX.split(".")[2] in said


def test_an_adapter_of_an_older_peft_is_not_called_one_of_another_model(
    made: Make, adapter: Path
) -> None:
    """Its in and out of experts are exchanged, which peft 0.21 does not load either."""
    base = made("olmoe") / "base"
    (n_a, n_in), (n_out, n_b) = (
        tuple(load_file(adapter / WEIGHTS)[f"{PREFIX}mlp.experts.{side}.weight"].shape)
        for side in ("lora_A", "lora_B")
    )
    assert (n_in, n_out) == (16, 32)  # the down projection's
    change(adapter, f"{PREFIX}mlp.experts.lora_A.weight", (n_a, n_out))
    change(adapter, f"{PREFIX}mlp.experts.lora_B.weight", (n_in, n_b))
    said = refusal(base, adapter, edits_of(base, SAME))
    assert "an older peft saved it, with in and out of experts exchanged" in said
    assert "another model" not in said


def test_an_adapter_of_a_model_with_more_experts_or_layers_is_refused(
    made: Make, checkpoint: Make, tmp_path: Path
) -> None:
    base = made("olmoe") / "base"
    edits = edits_of(base, SAME)
    for n_experts, rank, words in (
        (16, 4, "rank 8 for each of 8"),
        (12, 2, "rank 3 for each of 8"),
    ):
        other = checkpoint("olmoe", num_experts=n_experts)
        found = make_adapter(other, tmp_path / f"{n_experts}", EXPERTS, r=rank)
        said = refusal(base, found, edits)
        assert f"{words} experts, its config says {rank}: the adapter was trained on" in said
    deeper = checkpoint("olmoe", num_hidden_layers=3)
    found = make_adapter(deeper, tmp_path / "deeper", None)
    assert "adapts what the model does not have" in refusal(base, found, edits)


def test_a_router_trained_whole_does_not_go_with_a_bias(made: Make, tmp_path: Path) -> None:
    base = made("olmoe") / "base"
    found = make_adapter(base, tmp_path / "lora", None, modules_to_save=["gate"])
    edits = edits_of(base, SAME, bias={4: 0.5})
    for layout in ("stock", "exact"):
        assert "--boost or --suppress" in refusal(base, found, edits, layout)


def test_an_expert_that_the_config_names_by_its_number_is_refused_where_numbers_change(
    made: Make, tmp_path: Path
) -> None:
    folder = made("olmoe")
    found = one_by_one(folder / "adapter", tmp_path / "lora")
    set_config(found, target_modules=[r".*experts\.3\.down_proj"])
    edits = edits_of(folder / "base", SAME)
    assert "names an expert by its number" in refusal(folder / "base", found, edits)
    draft = EditPlan("cut", "a cut", "activations", "answer", edits, "exact", is_cut=True)
    assert adapter_cut(found, find_source(str(folder / "base")), draft, tmp_path / "out")


def set_config(adapter: Path, **values: Any) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, **values}))


def unpickled(adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")


def retyped(adapter: Path, dtype: torch.dtype) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: t.to(dtype) for name, t in tensors.items()}, adapter / WEIGHTS)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file": (lambda a: (shutil.rmtree(a), a.write_text("")), "is not a folder"),
    "nothing": (shutil.rmtree, "no such adapter"),
    "no config": (lambda a: (a / CONFIG).unlink(), "has no adapter_config.json"),
    "no JSON": (lambda a: (a / CONFIG).write_text("{"), "cannot be read as JSON"),
    "a list": (lambda a: (a / CONFIG).write_text("[]"), "must be a JSON object"),
    "another kind": (lambda a: set_config(a, peft_type="IA3"), "is a IA3 adapter: only LORA"),
    "no rank": (lambda a: set_config(a, r="4"), "r: "),
    "no pattern": (lambda a: set_config(a, rank_pattern={"[z-a]": 4}), "is not a pattern"),
    "a hard pattern": (
        lambda a: set_config(a, rank_pattern={"(.+)+!": 8}),
        "is not a simple pattern",
    ),
    "many stars": (lambda a: set_config(a, rank_pattern={".*" * 9: 8}), "is not a simple pattern"),
    "a long pattern": (
        lambda a: set_config(a, rank_pattern={"q" * 301: 8}),
        "not a simple pattern",
    ),
    "moved weights": (lambda a: set_config(a, init_lora_weights="pissa_niter_4"), "began as pissa"),
    "kasa": (lambda a: set_config(a, kasa_config={"beta": 1}), "began as kasa"),
    "replicas": (lambda a: set_config(a, layer_replication=[[0, 2]]), "has layer_replication"),
    "a pickle": (unpickled, "holds adapter_model.bin, a pickle"),
    "no weights": (lambda a: (a / WEIGHTS).unlink(), "holds no adapter_model.safetensors"),
    "half": (lambda a: (a / WEIGHTS).write_bytes((a / WEIGHTS).read_bytes()[:-9]), "is damaged"),
    "other names": (
        lambda a: save_file({"a": torch.ones(1)}, a / WEIGHTS),
        "begin with base_model",
    ),
    "float8": (lambda a: retyped(a, torch.float8_e4m3fn), "is F8_E4M3, must be one of F16, BF16"),
    "whole numbers": (lambda a: retyped(a, torch.int8), "is I8, must be one of F16, BF16"),
    "no tensor": (lambda a: save_file({}, a / WEIGHTS), "holds no tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_adapter_is_refused_in_one_line(adapter: Path, case: str) -> None:
    spoil, words = BAD[case]
    spoil(adapter)
    with pytest.raises(ExpertcutError) as refused:
        read_adapter(adapter)
    assert words in str(refused.value) and str(adapter) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "is_its"),
    [
        ("experts.down_proj", True),
        (r".*experts\.down_proj", True),
        (r"^model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj$", True),
        (r"layers.[0-9]+.mlp.experts.down_proj", True),
        ("gate_up_proj", False),
        ("down", False),
    ],
)
def test_patterns_that_peft_users_write_are_matched_as_peft_does(
    adapter: Path, key: str, is_its: bool
) -> None:
    set_config(adapter, rank_pattern={key: 2})
    found = read_adapter(adapter).rank("model.layers.0.mlp.experts.down_proj")
    assert found == (2 if is_its else RANK)


@pytest.mark.parametrize(
    ("key", "parameter"),
    [(".*.*.*Z", "down_proj"), (r"[a-z]+.*[a-z]+Z", "a" * 100_000), ("(a|aa)(a|aa)(a|aa)", "a")],
)
def test_no_pattern_that_is_let_in_takes_long(
    made: Make, adapter: Path, key: str, parameter: str
) -> None:
    base = made("olmoe") / "base"
    parameters = [f"experts.{parameter}", "experts.gate_up_proj", "experts.down_proj"]
    set_config(adapter, rank_pattern={key: 2}, target_parameters=parameters)
    draft = EditPlan(
        "cut", "a cut", "activations", "answer", edits_of(base, SAME), "stock", is_cut=True
    )
    began = time.process_time()
    assert adapter_cut(adapter, find_source(str(base)), draft, adapter.parent / "out")
    assert time.process_time() - began < 5


@pytest.fixture
def profiled(made: Make, quiz_folder: Path, tmp_path: Path, expertcut: Commands) -> Iterator[Path]:
    """A profile `p` of the model in `base`, beside its adapter `lora`."""
    shutil.copytree(made("olmoe") / "base", tmp_path / "base")
    shutil.copytree(made("olmoe") / "adapter", tmp_path / "lora")
    asked = f"--quiz {quiz_folder} --split val --shots 0 --threads 1 --dtype float32"
    expertcut(f"profile base {asked} --out p")
    return tmp_path


def page(expertcut: Commands, folder: Path) -> str:
    expertcut(f"report {folder} --out page.html")
    return (folder.parent / "page.html").read_text()


@pytest.mark.parametrize("layout", ["stock", "exact"])
def test_prune_writes_the_adapter_into_its_checkpoint(
    profiled: Path, expertcut: Commands, layout: Layout
) -> None:
    printed = expertcut(f"prune --profile p --keep 5 --layout {layout} --adapter lora --out cut")
    fitted = ", what was fitted is fitted" if layout == "stock" else ""
    said = " ".join(printed.split())
    assert f"experts were chosen{fitted} and held-out questions asked without it." in said
    folder = profiled / "cut" / "adapter"
    assert sorted(f.name for f in folder.iterdir()) == [CONFIG, WEIGHTS]
    plan = load_plan(profiled / "cut")
    assert plan.adapter is not None and plan.adapter.path == "lora"
    assert len(plan.adapter.weights_sha256) == len(plan.adapter.config_sha256) == 64
    assert f"lora, {plan.adapter.weights_sha256}" in page(expertcut, profiled / "cut")
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    options = {"trust_remote_code": True} if layout == "exact" else {}
    model = peft_quietly(AutoPeftModelForCausalLM.from_pretrained, folder, **options)
    assert type(model.get_base_model()).__name__.startswith("Exact") == (layout == "exact")
    experts = model.get_submodule("base_model.model.model.layers.0.mlp.experts").get_base_layer()
    assert len(experts.down_proj) == 5
    assert model.peft_config["default"].base_model_name_or_path == str(profiled / "cut")


def test_an_adapter_with_a_value_that_is_no_number_is_refused(
    profiled: Path, expertcut: Commands
) -> None:
    tensors = load_file(profiled / "lora" / WEIGHTS)
    first = min(tensors)
    tensors[first].view(-1)[0] = float("nan")
    save_file(tensors, profiled / "lora" / WEIGHTS)
    said = expertcut("prune --profile p --keep 5 --adapter lora --out cut", status=2)
    assert f"lora/{WEIGHTS} holds NaN or infinity, 1 of the" in said and first in said
    assert not (profiled / "cut").exists()


def test_without_an_adapter_a_plan_has_no_word_of_it(profiled: Path, expertcut: Commands) -> None:
    printed = expertcut("prune --profile p --keep 5 --no-verify --out cut")
    assert "adapter that was cut along" not in page(expertcut, profiled / "cut")
    written = (profiled / "cut" / "plan.json").read_text()
    assert "adapter" not in printed + written.replace(str(profiled.resolve()), "")
    assert not (profiled / "cut" / "adapter").exists()


def test_a_refused_adapter_leaves_nothing_behind(profiled: Path, expertcut: Commands) -> None:
    line = "prune --profile p --keep 5 --no-verify --adapter lora"
    before = sorted(profiled.iterdir())
    assert "leave one out" in expertcut(f"{line} --plan-only --out cut", status=2)
    sweep = "prune --profile p --sweep 0.5 --adapter lora"
    assert "--adapter does not go with --sweep" in expertcut(sweep, status=2)
    change(profiled / "lora", f"{PREFIX}mlp.gate.lora_B.weight", (16, 4))
    said = expertcut(f"{line} --out cut", status=2)
    assert "adapt 32 → 16" in said and len(said.splitlines()) == 1
    shutil.rmtree(profiled / "lora")
    assert "no such adapter: lora" in expertcut(f"{line} --out cut", status=2)
    assert sorted(profiled.iterdir()) == [path for path in before if path.name != "lora"]


def test_a_checkpoint_is_there_with_its_adapter_or_not_at_all(
    profiled: Path, expertcut: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(place: Path, shards: object) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(profiled.iterdir())
    line = "prune --profile p --keep 5 --no-verify --adapter lora --out cut"
    monkeypatch.setattr("expertcut.checkpoints.lora.write_shards", full)
    said = expertcut(line, status=2)
    assert said.strip().endswith("cut/adapter cannot be written: No space left on device")
    assert sorted(profiled.iterdir()) == before


def test_force_spares_the_adapter_that_is_read(profiled: Path, expertcut: Commands) -> None:
    line = "prune --profile p --keep 5 --no-verify --out cut"
    expertcut(f"{line} --adapter lora")
    said = expertcut(f"{line} --adapter cut/adapter --force", status=2)
    assert "cut holds cut/adapter, so --force spares it" in said


def test_a_recipe_makes_a_variant_again_where_its_adapter_changed(
    profiled: Path, quiz_folder: Path, expertcut: Commands
) -> None:
    prune = "prune: {keep: 5, verify: false, adapter: lora}"
    (profiled / "small.yaml").write_text(
        f"model: base\nquiz: {quiz_folder}\nshots: 0\nthreads: 1\nprofile: {{split: val}}\n"
        f"variants:\n- name: cut\n  {prune}\n"
    )
    expertcut("run small.yaml --out run")
    assert (profiled / "run" / "variants" / "cut" / "adapter" / CONFIG).is_file()
    assert "[cut] is current" in expertcut("run small.yaml --out run")
    set_config(profiled / "lora", lora_alpha=16)
    assert "the adapter changed" in expertcut("run small.yaml --out run --dry-run")
    shutil.rmtree(profiled / "lora")
    said = expertcut("run small.yaml --out run", status=2)
    assert "'lora' holds no adapter" in said
