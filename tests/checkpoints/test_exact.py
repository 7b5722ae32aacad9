"""Layout `exact`: removed experts are constants, biases are biases, all else is the base's bits."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from expertcut.checkpoints.exact import REFUSED, ExactWriter, _check_exact, exact_config
from expertcut.checkpoints.prune_edit import constant_experts
from expertcut.checkpoints.size import size
from expertcut.edits.calibrate import Constants
from expertcut.edits.plan import BlockEdit, EditPlan, removed_experts
from expertcut.errors import ContractError
from expertcut.models import modeling_exact
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.hooks import Routing, observe_routers
from expertcut.models.load import MODELLING_FILE, MoeModel, find_source, modelling_code
from expertcut.models.modeling_exact import layer_number
from expertcut.models.safetensors_index import read_headers
from expertcut.scoring.router_bias import Tilts, tilted
from tests.conftest import DENSE_FIRST, open_model
from tests.support.exact_models import (
    EXACT_FAMILIES,
    REMOVED,
    TOKENS,
    as_transformers_runs_it,
    as_written_before,
    constants_for,
    declared,
    load_exact,
    logprobs,
    make_base,
    make_exact,
)
from tests.support.matrix import WORLDS
from tests.support.rewrites import Fitted, export

FIRST, SECOND = "model.layers.0.mlp", "model.layers.1.mlp"
Bases = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("modules_cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    made: dict[str, Path] = {}

    def find(family: str = "olmoe", **changes: object) -> Path:
        key = repr((family, sorted(changes.items())))
        if key not in made:
            made[key] = make_base(tmp_path_factory.mktemp("base"), family, **changes)
        return made[key]

    return find


@pytest.fixture(params=("olmoe", "qwen2_moe"))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def biases() -> dict[str, Tensor]:
    bias_E = torch.zeros(8)
    bias_E[2], bias_E[5] = 1.3, -12.3
    return {SECOND: bias_E}


def chosen(moe: MoeModel, tokens: Tensor) -> dict[str, set[int]]:
    """The experts that any of the tokens chose, by block."""
    found: dict[str, set[int]] = {block.name: set() for block in moe.blocks}

    def see(routing: Routing) -> None:
        found[moe.blocks[routing.layer].name].update(routing.experts_TK.flatten().tolist())

    with observe_routers(moe.blocks, see):
        logprobs(moe.model, tokens)
    return found


@pytest.mark.parametrize("is_zero", [True, False])
def test_exact_equals_the_reference_that_replaces_outputs_after_top_k(
    base: Bases, family: str, is_zero: bool, tmp_path: Path
) -> None:
    constants = constants_for(REMOVED, is_zero=is_zero)
    moe = open_model(base(family))
    before = logprobs(moe.model)
    with constant_experts(moe.blocks, constants):
        expected = logprobs(moe.model)
    assert (expected - before).abs().max() > 0.1  # else a no-op would pass too
    assert torch.equal(logprobs(moe.model), before)  # what was put in is taken out
    model = load_exact(make_exact(base(family), tmp_path / "exact", constants))
    assert type(model).__module__.startswith("transformers_modules")
    assert (logprobs(model) - expected).abs().max() < 1e-6 * expected.abs().max()


def test_a_dense_first_layer_stays_dense(base: Bases, tmp_path: Path) -> None:
    path = base("qwen2_moe", num_hidden_layers=3, **DENSE_FIRST["qwen2_moe"])
    removed = {"model.layers.1.mlp": (0, 3, 4, 6), "model.layers.2.mlp": (5,)}
    constants = constants_for(removed, is_zero=False)
    moe = open_model(path)
    with constant_experts(moe.blocks, constants):
        expected = logprobs(moe.model)
    model = load_exact(make_exact(path, tmp_path / "exact", constants))
    assert declared(model.config.to_dict()) == {"1": [0, 3, 4, 6], "2": [5]}
    assert (expected - logprobs(moe.model)).abs().max() > 0.1
    assert (logprobs(model) - expected).abs().max() < 1e-6 * expected.abs().max()


def test_the_reference_is_an_expert_whose_weights_give_nothing(base: Bases) -> None:
    moe = open_model(base())
    with constant_experts(moe.blocks, constants_for(REMOVED, is_zero=True)):
        expected = logprobs(moe.model)
    for block in moe.blocks:
        block.experts.get_parameter("down_proj").data[list(REMOVED[block.name])] = 0
    assert torch.equal(logprobs(moe.model), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_question_that_chose_no_removed_expert_keeps_every_bit(
    base: Bases, family: str, dtype: str, tmp_path: Path
) -> None:
    path = base(family, num_experts=32, dtype=getattr(torch, dtype))
    moe = as_transformers_runs_it(open_model(path, dtype=dtype))
    question, other = torch.arange(2, 14)[None], torch.arange(60, 90)[None]
    idle = {b: tuple(set(range(32)) - used) for b, used in chosen(moe, question).items()}
    assert all(0 < len(experts) < 32 for experts in idle.values())
    folder = make_exact(path, tmp_path / "exact", constants_for(idle, is_zero=False))
    model = load_exact(folder, dtype=getattr(torch, dtype))
    assert torch.equal(logprobs(model, question), logprobs(moe.model, question))
    assert not torch.equal(logprobs(model, other), logprobs(moe.model, other))


def test_eager_grouped_and_batched_experts_agree(base: Bases, family: str, tmp_path: Path) -> None:
    folder = make_exact(base(family), tmp_path, constants_for(REMOVED, is_zero=False))
    model = load_exact(folder)
    expected = logprobs(model)
    for experts in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation(experts)
        assert (logprobs(model) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["olmoe"])
def test_a_bfloat16_checkpoint_is_exact_to_its_precision(
    base: Bases, family: str, tmp_path: Path
) -> None:
    path = base(family, dtype=torch.bfloat16)
    constants = constants_for(REMOVED, is_zero=False)
    moe = open_model(path, dtype="bfloat16")
    before = logprobs(moe.model)
    with constant_experts(moe.blocks, constants):
        expected = logprobs(moe.model)
    folder = make_exact(path, tmp_path / "exact", constants)
    model = load_exact(folder, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    difference = (logprobs(model) - expected).abs().mean()
    assert difference < 0.05 < 0.5 < (expected - before).abs().mean()


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_generate_writes_what_the_reference_writes(
    base: Bases, family: str, tmp_path: Path
) -> None:
    constants = constants_for(REMOVED, is_zero=False)
    moe = open_model(base(family))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    before = moe.model.generate(TOKENS, **options)
    with constant_experts(moe.blocks, constants):
        expected = moe.model.generate(TOKENS, **options)
    assert not torch.equal(expected, before)
    model = load_exact(make_exact(base(family), tmp_path / "exact", constants))
    assert torch.equal(model.generate(TOKENS, **options), expected)


@pytest.mark.parametrize("family", ["olmoe"])
def test_it_loads_where_a_device_map_puts_it(base: Bases, family: str, tmp_path: Path) -> None:
    folder = make_exact(base(family), tmp_path, constants_for(REMOVED, is_zero=False), biases())
    expected = logprobs(load_exact(folder))
    assert torch.equal(logprobs(load_exact(folder, device_map="auto")), expected)
    where = {"model.layers.0": "disk", "model.layers.1": "cpu"}
    where |= dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    placed = load_exact(folder, device_map=where, offload_folder=tmp_path / "offloaded")
    assert placed.model.layers[0].mlp.experts.approx_value.is_meta  # it is on disk
    assert torch.equal(logprobs(placed), expected)


@pytest.mark.parametrize("family", ["olmoe"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_kept_experts_constants_and_biases_can_be_trained(
    base: Bases, family: str, experts: str, tmp_path: Path
) -> None:
    constants = constants_for(REMOVED, is_zero=True)
    tilt = {SECOND: torch.linspace(-0.5, 0.5, 8)}
    model = load_exact(make_exact(base(family), tmp_path, constants, tilt), experts).train()
    model(input_ids=TOKENS, labels=TOKENS, output_router_logits=True).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for layer in model.model.layers:
        for parameter in layer.mlp.parameters():
            assert parameter.grad.abs().max() > 0
    assert all(
        layer.mlp.experts.approx_value.grad.abs().sum(dim=1).all() for layer in model.model.layers
    )


def test_saving_a_loaded_model_writes_the_same_files(
    base: Bases, family: str, tmp_path: Path
) -> None:
    constants = constants_for(REMOVED, is_zero=False)
    folder = make_exact(base(family), tmp_path / "exact", constants)
    model = load_exact(folder)
    model.save_pretrained(tmp_path / "again")
    old, new = (load_file(p / "model.safetensors") for p in (folder, tmp_path / "again"))
    assert set(old) == set(new)
    assert all(torch.equal(new[name], old[name]) for name in old)
    configs = [read_config(p) for p in (folder, tmp_path / "again")]
    for key in ("compression_config", "architectures", "auto_map", "model_type"):
        assert configs[0][key] == configs[1][key], key
    code = [(p / MODELLING_FILE).read_bytes() for p in (folder, tmp_path / "again")]
    assert code[0] == code[1]
    assert torch.equal(logprobs(load_exact(tmp_path / "again")), logprobs(model))


def test_a_saved_model_with_biases_keeps_them(base: Bases, family: str, tmp_path: Path) -> None:
    constants = constants_for(REMOVED, is_zero=False)
    folder = make_exact(base(family), tmp_path / "exact", constants, biases())
    model = load_exact(folder)
    model.save_pretrained(tmp_path / "again")
    old, new = (load_file(p / "model.safetensors") for p in (folder, tmp_path / "again"))
    assert set(old) == set(new)
    assert f"{SECOND}.gate.bias" in new
    assert torch.equal(logprobs(load_exact(tmp_path / "again")), logprobs(model))
    assert read_config(folder)["auto_map"] == read_config(tmp_path / "again")["auto_map"]


def test_a_model_made_from_its_config_saves_original_ids(base: Bases, tmp_path: Path) -> None:
    folder = make_exact(base(), tmp_path / "exact", constants_for(REMOVED, is_zero=False))
    config = AutoConfig.from_pretrained(folder)
    made = modeling_exact.ExactOlmoeForCausalLM(config)  # type: ignore[attr-defined]
    made.load_state_dict(load_exact(folder).state_dict())
    made.save_pretrained(tmp_path / "again")
    old, new = (load_file(p / "model.safetensors") for p in (folder, tmp_path / "again"))
    assert set(old) == set(new)
    assert all(torch.equal(new[name], old[name]) for name in old)


@pytest.mark.parametrize("family", ["olmoe"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_packaged_file_is_the_one_that_checkpoints_carry(
    base: Bases, family: str, has_bias: bool, tmp_path: Path
) -> None:
    constants = constants_for(REMOVED, is_zero=False)
    folder = make_exact(base(family), tmp_path / "exact", constants, biases() if has_bias else None)
    cls = getattr(modeling_exact, type(load_exact(folder)).__name__)
    own = cls.from_pretrained(folder).eval()
    own.set_experts_implementation("eager")
    assert torch.equal(logprobs(own), logprobs(load_exact(folder)))


def test_without_its_code_transformers_refuses_a_pruned_one(
    base: Bases, family: str, tmp_path: Path
) -> None:
    folder = make_exact(base(family), tmp_path, constants_for(REMOVED, is_zero=True))
    for options in ({}, {"trust_remote_code": False}):
        with pytest.raises(RuntimeError, match="mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(folder, **options)


def test_without_its_code_transformers_refuses_a_reweighted_one(
    base: Bases, family: str, tmp_path: Path
) -> None:
    folder = make_exact(base(family), tmp_path, {}, biases())
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize("is_pruned", [False, True])
def test_a_gate_bias_equals_the_tilt_at_run_time(
    base: Bases, family: str, is_pruned: bool, tmp_path: Path
) -> None:
    constants = constants_for(REMOVED, is_zero=False) if is_pruned else {}
    moe = as_transformers_runs_it(open_model(base(family)))
    with constant_experts(moe.blocks, constants):
        untilted = logprobs(moe.model)
        with tilted(moe.blocks, Tilts({1: biases()[SECOND]})):
            expected = logprobs(moe.model)
    assert (expected - untilted).abs().max() > 0.1
    model = load_exact(make_exact(base(family), tmp_path / "exact", constants, biases()))
    assert (logprobs(model) - expected).abs().max() < 1e-6 * expected.abs().max()
    assert is_pruned or torch.equal(logprobs(model), expected)


def test_a_bias_of_zero_changes_no_bit(base: Bases, family: str, tmp_path: Path) -> None:
    zeros = {FIRST: torch.zeros(8), SECOND: torch.zeros(8)}
    model = load_exact(make_exact(base(family), tmp_path / "exact", {}, zeros))
    moe = as_transformers_runs_it(open_model(base(family)))
    assert torch.equal(logprobs(model), logprobs(moe.model))


def test_a_bias_is_not_rounded_to_the_checkpoints_dtype(base: Bases, tmp_path: Path) -> None:
    path = base(dtype=torch.bfloat16)
    model = load_exact(make_exact(path, tmp_path, {}, biases()), dtype=torch.float32)
    assert torch.equal(model.get_parameter(f"{SECOND}.gate.bias"), biases()[SECOND])


def test_a_layer_without_removed_experts_is_left_alone(base: Bases, tmp_path: Path) -> None:
    constants = constants_for({SECOND: (0, 1, 2, 3, 4, 5, 6)}, is_zero=False)
    moe = open_model(base())
    with constant_experts(moe.blocks, constants):
        expected = logprobs(moe.model)
    folder = make_exact(base(), tmp_path / "exact", constants)
    model = load_exact(folder)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert (len(first.down_proj), len(second.down_proj)) == (8, 1)  # fewer than the top 2
    assert not hasattr(first, "approx_value")
    assert (logprobs(model) - expected).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(read_headers(folder))


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_layers_are_counted_with_the_dense_ones(base: Bases, family: str, tmp_path: Path) -> None:
    path = base(family, num_hidden_layers=3, mlp_only_layers=[1])
    constants = constants_for({"model.layers.2.mlp": (1, 6)}, is_zero=False)
    moe = open_model(path)
    assert [block.name for block in moe.blocks] == [FIRST, "model.layers.2.mlp"]
    with constant_experts(moe.blocks, constants):
        expected = logprobs(moe.model)
    folder = make_exact(path, tmp_path / "exact", constants)
    assert declared(read_config(folder)) == {"2": [1, 6]}
    assert (logprobs(load_exact(folder)) - expected).abs().max() < 1e-5


def test_a_constant_that_is_missing_is_named_and_zero(base: Bases, tmp_path: Path) -> None:
    constants = constants_for(REMOVED, is_zero=False)
    folder = make_exact(base(), tmp_path, constants, biases())
    tensors = load_file(folder / "model.safetensors")
    lost = {f"{SECOND}.constant_experts.5.approx_value", f"{SECOND}.gate.bias"}
    kept = {name: tensor for name, tensor in tensors.items() if name not in lost}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert info["missing_keys"] == {f"{SECOND}.experts.approx_value", f"{SECOND}.gate.bias"}
    assert all(not model.get_parameter(name).any() for name in info["missing_keys"])
    value = model.get_parameter(f"{FIRST}.experts.approx_value")
    assert torch.equal(value, torch.stack([*constants[FIRST].values()]))


def test_parallel_plans_are_refused(base: Bases, tmp_path: Path) -> None:
    folder = make_exact(base(), tmp_path, constants_for(REMOVED, is_zero=True))
    with pytest.raises(ValueError, match="tp_plan is not supported"):
        load_exact(folder, tp_plan="auto")


@pytest.mark.parametrize("family", EXACT_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pruned_files_are_those_of_vllms_constant_experts(
    base: Bases, family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """As vLLM 0.33.0 reads them, version 1 of `expert_substitution` (benchmarks/against_vllm.py).

    It refuses a config that has `approximate_experts` too. Names say nothing to it: each constant
    is found by the name that config.json gives it.
    """
    path = base(family, dtype=dtype)
    folder = make_exact(path, tmp_path, constants_for(REMOVED, is_zero=False))
    config, original = read_config(folder), read_config(path)
    (transform,) = config.pop("compression_config").values()
    (substitution,) = transform.values()
    assert substitution["version"] == 1 and substitution["router_semantics"] == {
        "preserve_logical_expert_ids": True,
        "preserve_router_weights": True,
        "renormalize_after_substitution": False,
    }
    said = {
        (path, int(expert)): replacement["tensors"]["value"]
        for path, target in substitution["targets"].items()
        for expert, replacement in target["replacements"].items()
        if replacement["format"] == "constant-v1"
        if (target["weight_layout"], target["num_logical_experts"])
        == ("compact_retained_experts", 8)
    }
    assert set(config.pop("auto_map")) == {"AutoModelForCausalLM"}
    assert config == original  # architectures and model_type, and every expert is still counted
    tensors, before = (load_file(p / "model.safetensors") for p in (folder, path))
    gone = {
        f"{block}.experts.{expert}.{projection}_proj.weight"
        for block, experts in REMOVED.items()
        for expert in experts
        for projection in ("gate", "up", "down")
    }
    come = set(said.values())
    assert set(said) == {(f"{b}.experts", e) for b, experts in REMOVED.items() for e in experts}
    assert set(tensors) == (set(before) - gone) | come
    assert gone <= set(before)
    assert all(torch.equal(tensors[name], before[name]) for name in set(tensors) - come)
    assert {(tuple(tensors[name].shape), tensors[name].dtype) for name in come} == {((32,), dtype)}
    assert not any(tensors[name].isnan().any() for name in come)  # it marks what is missing
    assert tensors[f"{FIRST}.gate.weight"].shape == (8, 32)


def test_no_loader_takes_a_constant_for_a_tensor_that_it_may_skip(
    base: Bases, family: str, tmp_path: Path
) -> None:
    """What stock loaders skip in silence lies below `experts.` or has an ending of quantisation."""
    constants = constants_for(REMOVED, is_zero=False)
    folder = make_exact(base(family), tmp_path / "exact", constants, biases())
    names, original = set(read_headers(folder)), set(read_headers(base(family)))
    come = names - original
    assert len(come) == 6  # five constants and a bias
    modules = dict(open_model(base(family)).model.named_modules())
    for name in come - {f"{SECOND}.gate.bias"}:
        assert ".experts." not in name and not name.endswith((".bias", "_scale", ".inv_freq"))
        block, _, _ = name.partition(".constant_experts.")
        assert block in modules and f"{block}.constant_experts" not in modules
    # vLLM skips a bias that it does not know; it stops at the names of class and model type.
    assert read_config(folder)["architectures"][0].startswith("Exact")
    assert read_config(folder)["model_type"].startswith("exact_")


@pytest.mark.parametrize(
    ("family", "has_bias"), [("olmoe", False), ("olmoe", True), ("qwen2_moe", False)]
)
def test_a_checkpoint_as_written_before_is_the_same_model(
    base: Bases, family: str, has_bias: bool, tmp_path: Path
) -> None:
    constants = constants_for(REMOVED, is_zero=False)
    new = make_exact(base(family), tmp_path / "new", constants, biases() if has_bias else None)
    old = as_written_before(new, tmp_path / "old")
    expected = logprobs(load_exact(new))
    assert torch.equal(logprobs(load_exact(old)), expected)  # by its own modelling file
    assert torch.equal(logprobs(load_exact(new)), expected)  # though that one was there in between
    assert torch.equal(logprobs(load_exact(old)), expected)
    moe = open_model(old)  # without trust_remote_code: it is a file of ours
    assert torch.equal(logprobs(as_transformers_runs_it(moe).model), expected)
    assert size(moe).parameters == size(open_model(new)).parameters
    ours = getattr(modeling_exact, type(load_exact(old)).__name__).from_pretrained(old).eval()
    ours.set_experts_implementation("eager")
    assert torch.equal(logprobs(ours), expected)
    for model, name in ((load_exact(old), "by its own"), (ours, "by ours")):
        model.save_pretrained(tmp_path / name)
        assert set(load_file(tmp_path / name / "model.safetensors")) == set(read_headers(old))
        assert "approximate_experts" in read_config(tmp_path / name)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_whatever_is_made_of_one_as_written_before_has_todays_names(
    base: Bases, family: str, tmp_path: Path
) -> None:
    constants = constants_for(REMOVED, is_zero=False)
    new = make_exact(base(family), tmp_path / "new", constants)
    old = as_written_before(new, tmp_path / "old")
    tilt = BlockEdit(keep=tuple(range(8)), bias=dict(enumerate(biases()[SECOND].tolist())))
    edits = {FIRST: BlockEdit(keep=tuple(range(8)), scale={1: 0.5}), SECOND: tilt}
    draft = EditPlan("a", "by hand", "activations", "answer", edits, layout="exact")
    made = {}
    for source in (old, new):
        made[source] = tmp_path / f"of-{source.name}"
        made[source].mkdir()
        export(find_source(str(source)), draft, 8, Fitted(), made[source])
    first, second = (load_file(made[source] / "model.safetensors") for source in (old, new))
    assert set(first) == set(second) == {*read_headers(new), f"{SECOND}.gate.bias"}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_config(made[old]) == read_config(made[new])
    assert (made[old] / MODELLING_FILE).read_bytes() == modelling_code()
    logprobs_of = {source: logprobs(load_exact(made[source])) for source in made}
    assert torch.equal(logprobs_of[old], logprobs_of[new])
    assert not torch.equal(logprobs_of[old], logprobs(load_exact(old)))


def test_a_plans_edits_say_what_is_removed() -> None:
    edits = {"a.0": BlockEdit(keep=(0, 2)), "a.1": BlockEdit(keep=(0, 1, 2))}
    assert removed_experts(edits, 3) == {"a.0": (1,)}


# Routers, experts and their names on disk in many forms: renamed blocks, other and further tensors
# of a gate, experts without a gate matrix, transposed, with biases, in one tensor, beside images.
FORMS = (
    *("mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe", "ernie4_5_moe", "minimax_m2"),
    *("lfm2_moe", "jamba", "qwen3_next", "aria", "gemma4_text", "hunyuan_v1_moe", "nemotron_h"),
    *("afmoe", "hy_v3", "qwen3_vl_moe"),
)
NO_BIASES = {
    **dict.fromkeys(("deepseek_v4", "deepseek_v4, no hash layer"), "may act on gate logits or on"),
    "laguna": "caps the logits of its routers",
}
WORLD = [
    *(pytest.param(name) for name in FORMS),
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name, (family, _) in WORLDS.items()
        if name not in FORMS and family not in REFUSED
    ),
]


@pytest.fixture(scope="module", params=WORLD)
def world(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> tuple[str, Path]:
    """A family, and a tiny model of it."""
    family, changes = WORLDS[request.param]
    return request.param, checkpoint(family, **changes)


def idle_experts(moe: MoeModel, tokens: Tensor) -> dict[str, tuple[int, ...]]:
    """The experts of each block that no token chooses: of three tokens at least two."""
    used = chosen(moe, tokens)
    return {b.name: tuple(set(range(b.n_experts)) - used[b.name]) for b in moe.blocks}


def constants_of(moe: MoeModel, removed: dict[str, tuple[int, ...]]) -> Constants:
    """Numbers as large as an expert's output, of its width."""
    chance = torch.Generator().manual_seed(1)
    return {
        block.name: {e: torch.randn(block.width, generator=chance) for e in removed[block.name]}
        for block in moe.blocks
    }


def test_every_familys_experts_become_constants_and_all_else_keeps_its_bits(
    world: tuple[str, Path], tmp_path: Path
) -> None:
    _, base = world
    moe, question = as_transformers_runs_it(open_model(base)), TOKENS[:, :3]
    before, short = logprobs(moe.model), logprobs(moe.model, question)
    removed = idle_experts(moe, question)
    assert all(2 <= len(experts) < 8 for experts in removed.values())
    constants = constants_of(moe, removed)
    with constant_experts(moe.blocks, constants):
        expected = logprobs(moe.model)
    assert (expected - before).abs().max() > 0.05
    folder = make_exact(base, tmp_path / "exact", constants)
    model = load_exact(folder)
    assert type(model).__module__.startswith("transformers_modules")
    assert (logprobs(model) - expected).abs().max() < 1e-5
    assert torch.equal(logprobs(model, question), short)
    for experts in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation(experts)
        assert (logprobs(model) - expected).abs().max() < 1e-4
    own = open_model(folder)  # without trust_remote_code: the file is ours
    assert (logprobs(own.model) - expected).abs().max() < 1e-4
    files = {n: load_file(p / "model.safetensors") for n, p in (("old", base), ("new", folder))}
    for name in {*files["old"]} & {*files["new"]}:
        old, new = files["old"][name], files["new"][name]
        if old.shape != new.shape:  # of all experts
            block = next(b for b in moe.blocks if f".{layer_number(b.name)}." in name)
            old = old[[e for e in range(8) if e not in removed[block.name]]]
        assert torch.equal(old, new), name
    constant = {name for name in files["new"] if name.endswith(".approx_value")}
    assert {*files["new"]} - {*files["old"]} == constant
    assert len(constant) == sum(map(len, removed.values()))
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {*again} == {*files["new"]}
    assert all(torch.equal(again[name], files["new"][name]) for name in again)
    assert size(own).parameters == sum(p.numel() for p in own.model.parameters())


def test_every_familys_gate_takes_a_bias_or_says_why_not(
    world: tuple[str, Path], tmp_path: Path
) -> None:
    name, base = world
    moe = as_transformers_runs_it(open_model(base))
    last = moe.blocks[-1]
    if words := NO_BIASES.get(name):
        with pytest.raises(ContractError, match=words):
            make_exact(base, tmp_path, {}, {last.name: torch.ones(8)})
        return
    bias_E = biases()[SECOND]
    with tilted(moe.blocks, Tilts({last.layer: bias_E})):
        expected = logprobs(moe.model)
    assert (expected - logprobs(moe.model)).abs().max() > 0.05
    folder = make_exact(base, tmp_path / "exact", {}, {last.name: bias_E})
    model = load_exact(folder)
    assert (logprobs(model) - expected).abs().max() < 1e-5
    assert (logprobs(open_model(folder).model) - expected).abs().max() < 1e-4
    model.save_pretrained(tmp_path / "again")
    old, new = (load_file(p / "model.safetensors") for p in (folder, tmp_path / "again"))
    assert {*old} == {*new} and all(torch.equal(old[n], new[n]) for n in old)


def test_they_load_in_a_process_without_this_package(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    code = """
import sys, torch, transformers
from safetensors.torch import save_file
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.set_experts_implementation("eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.inference_mode():
        logits = model.eval()(input_ids=torch.arange(2, 42)[None], use_cache=False).logits
    save_file({"logits": logits}, f"{folder}/logits.safetensors")
assert "expertcut" not in sys.modules
"""
    folders = []
    for family in ("gpt_oss", "mixtral", "nemotron_h"):
        moe = open_model(checkpoint(family))
        removed = idle_experts(moe, TOKENS[:, :3])
        biased = {moe.blocks[-1].name: biases()[SECOND]}
        folders.append(tmp_path / family)
        make_exact(checkpoint(family), folders[-1], constants_of(moe, removed), biased)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": ""}
    line = [sys.executable, "-c", code, *map(str, folders)]
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder in folders:
        found = load_file(folder / "logits.safetensors")["logits"].log_softmax(dim=-1)
        assert torch.equal(found, logprobs(load_exact(folder)))


def test_a_model_with_code_of_its_own_is_refused(base: Bases) -> None:
    config = {**read_config(base()), "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    with pytest.raises(ContractError, match="brings code of its own, which layout exact would"):
        _check_exact(config, is_cutting=True)


def test_an_exact_model_is_not_made_exact_again(base: Bases, tmp_path: Path) -> None:
    folder = make_exact(base(), tmp_path, constants_for(REMOVED, is_zero=True))
    with pytest.raises(ContractError, match="has layout exact already"):
        ExactWriter().check(find_source(str(folder)), is_cutting=True)


@pytest.mark.parametrize("block", ["mlp", "model.layers.1.experts.2"])
def test_a_block_must_name_its_layer(base: Bases, block: str) -> None:
    with pytest.raises(ContractError, match="must have one layer number in its name"):
        exact_config(read_config(base()), {block: [1]})
