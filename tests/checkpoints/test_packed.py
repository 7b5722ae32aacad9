"""Layout `packed`: what is written is what was measured, and it is read, run and cut again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertcut.checkpoints.build import BuildOptions, build, engine_as_profiled
from expertcut.checkpoints.compress_edit import CONSTANT_FAMILIES as WITH_CONSTANTS
from expertcut.checkpoints.compress_edit import CompressEdit
from expertcut.checkpoints.edit import Calibration, simulated
from expertcut.checkpoints.export import check_export, edits_of
from expertcut.edits.compression import Loader
from expertcut.edits.plan import BlockEdit, EditPlan, load_plan
from expertcut.edits.splits import questions_for
from expertcut.errors import ContractError, ExpertcutError
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.hooks import observe_routers
from expertcut.models.load import LoadOptions, find_source, load
from expertcut.models.modeling_packed import PACKING_KEY
from expertcut.profiling.storage import load_profile
from tests.conftest import Commands, open_model, write_quiz
from tests.support.exact_models import logprobs
from tests.support.packed_models import (
    CONSTANTS,
    EVERY_OPTION,
    WIDTHS,
    Packed,
    make_packed,
    packed_plan,
    respelled,
)
from tests.support.rewrites import Fitted, export

Checkpoints = Callable[..., Path]
ONE_BY_ONE = ("olmoe", "qwen2_moe", "mixtral", "deepseek_v3", "jamba", "axk1")
FIRST = "model.layers.0.mlp.experts.0.down_proj.weight"  # 1 bit in a checkpoint of every option

pytestmark = pytest.mark.usefixtures("modules_cache")


@pytest.fixture(scope="module")
def packed(
    checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Packed]:
    made: dict[tuple[object, ...], Packed] = {}

    def find(
        family: str = "olmoe",
        options: tuple[str, ...] = EVERY_OPTION,
        loader: Loader = "transformers",
    ) -> Packed:
        key = (family, options, loader)
        if key not in made:
            folder = tmp_path_factory.mktemp("packed") / "model"
            made[key] = make_packed(checkpoint(family), folder, options, loader)
        return made[key]

    return find


@pytest.mark.parametrize("family", ONE_BY_ONE)
@pytest.mark.parametrize("loader", ["transformers", "vllm"])
def test_a_packed_checkpoint_loads_as_the_experts_that_were_measured(
    packed: Callable[..., Packed], family: str, loader: Loader
) -> None:
    made = packed(family, WIDTHS if loader == "vllm" else EVERY_OPTION, loader)
    moe = open_model(made.base)
    before = logprobs(moe.model)
    with simulated(moe, [made.edit], is_as_written=True):
        expected = logprobs(moe.model)
        tensors = {name: t.clone() for name, t in moe.model.state_dict().items()}
    assert torch.equal(logprobs(moe.model), before)  # what was put in is taken out
    assert (expected - before).abs().max() > 0.1  # else a no-op would pass too
    found = open_model(made.folder).model
    assert all(torch.equal(t, tensors[name]) for name, t in found.state_dict().items())
    assert (logprobs(found) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", sorted(WITH_CONSTANTS))
def test_constants_and_copies_give_what_the_reference_gives(
    packed: Callable[..., Packed], family: str
) -> None:
    made = packed(family, CONSTANTS)
    moe = open_model(made.base)
    before = logprobs(moe.model)
    with simulated(moe, [made.edit], is_as_written=True):
        expected = logprobs(moe.model)
    assert (expected - before).abs().max() > 0.1
    assert (logprobs(open_model(made.folder).model) - expected).abs().max() < 1e-4


def test_constants_that_no_token_chooses_leave_every_bit(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base, question = checkpoint("olmoe", num_experts=32), torch.arange(2, 5)[None]
    moe = open_model(base)
    used: list[set[int]] = [set(), set()]
    with observe_routers(
        moe.blocks, lambda r: used[r.layer].update(r.experts_TK.flatten().tolist())
    ):
        before = logprobs(moe.model, question)
    # The second layer takes the options one expert later.
    idle = [e not in used[0] and (e - 1) % 32 not in used[1] for e in range(32)]
    assert sum(idle) > 4
    options = ["copy" if is_idle else "whole" for is_idle in idle]
    made = make_packed(base, tmp_path / "packed", options)
    assert any("approx_scale" in name for name in made.tensors)
    found = open_model(made.folder)
    assert (logprobs(found.model, question) - before).abs().max() < 1e-6
    assert (logprobs(found.model) - logprobs(moe.model)).abs().max() > 0.1


@pytest.mark.parametrize("options", [EVERY_OPTION, CONSTANTS])
def test_files_have_the_predicted_size_and_all_other_tensors_every_byte(
    packed: Callable[..., Packed], options: tuple[str, ...]
) -> None:
    made = packed("olmoe", options)
    assert (made.folder / "model.safetensors").stat().st_size == made.predicted_bytes
    base, found = load_file(made.base / "model.safetensors"), made.tensors
    others = {name for name in base if ".experts." not in name}
    assert others and all(torch.equal(base[name], found[name]) for name in others)
    assert {name for name in found if "experts" not in name} == others
    assert made.predicted_bytes < (made.base / "model.safetensors").stat().st_size


def test_transformers_loads_it_with_its_code_and_saves_the_family_form(
    packed: Callable[..., Packed], tmp_path: Path
) -> None:
    made = packed()
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(made.folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(made.folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    expected = logprobs(model)
    model.save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(plain).__name__ == "OlmoeForCausalLM"
    assert torch.equal(logprobs(plain), expected)
    assert read_config(tmp_path / "saved")["model_type"] == "olmoe"
    with_constants = AutoModelForCausalLM.from_pretrained(
        packed("olmoe", CONSTANTS).folder, trust_remote_code=True
    )
    with pytest.raises(ValueError, match="cannot be saved unpacked"):
        with_constants.save_pretrained(tmp_path / "constants")
    with pytest.raises(ValueError, match="loaded as one"):
        type(model).from_pretrained(made.folder, tp_size=2)


def test_what_vllm_reads_is_what_llm_compressor_writes(packed: Callable[..., Packed]) -> None:
    made = packed("olmoe", WIDTHS, "vllm")
    config = read_config(made.folder)
    assert config["model_type"] == "olmoe" and "auto_map" not in config
    said = config.pop("quantization_config")
    assert config == read_config(made.base)
    linear = ("q_proj", "k_proj", "v_proj", "o_proj")
    # The keys and the ignored modules are those of llm-compressor 0.14.0.1, of this model.
    assert sorted(said.pop("ignore")) == sorted(
        [
            *(f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in linear),
            *(f"model.layers.{i}.mlp.gate" for i in (0, 1)),
            "lm_head",
        ]
    )
    groups = said.pop("config_groups")
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4, 8]
    assert groups["group_1"] == {
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": [r"re:.*layers\.(1)\.mlp\.experts\..*_proj$"],
        "weights": {
            **{"actorder": None, "block_structure": None, "dynamic": False, "group_size": 8},
            **{"num_bits": 8, "observer": "memoryless_minmax", "observer_kwargs": {}},
            **{"scale_dtype": None, "strategy": "group", "symmetric": True, "type": "int"},
            "zp_dtype": None,
        },
    }
    assert said == {
        **{"format": "pack-quantized", "global_compression_ratio": None, "version": "0.19.0"},
        **{"kv_cache_scheme": None, "quant_method": "compressed-tensors"},
        **{"quantization_status": "compressed", "sparsity_config": {}, "transform_config": {}},
    }
    one = {n: t for n, t in made.source.headers.items() if n.startswith(FIRST.removesuffix("t"))}
    assert {n.rpartition("weight_")[2]: (t.dtype, t.shape) for n, t in one.items()} == {
        **{"packed": ("I32", (32, 2)), "scale": ("F32", (32, 2)), "shape": ("I64", (2,))}
    }


def cut_plan(made: Packed, keep: tuple[int, ...]) -> EditPlan:
    names = [block.name for block in open_model(made.folder).blocks]
    edits = {name: BlockEdit(keep=keep) for name in names}
    return EditPlan("cut", "prune", "by hand", "all", edits, is_cut=True)


@pytest.mark.parametrize(("options", "loader"), [(EVERY_OPTION, "transformers"), (WIDTHS, "vllm")])
def test_a_cut_packed_checkpoint_is_the_packed_cut_and_keeps_its_bytes(
    packed: Callable[..., Packed], tmp_path: Path, options: tuple[str, ...], loader: Loader
) -> None:
    made, keep = packed("olmoe", options, loader), (1, 2, 5, 6)
    plan = cut_plan(made, keep)
    check_export(made.source, plan, 8, tmp_path / "cut")
    for path, name in ((made.folder, "cut"), (made.twin(tmp_path / "twin"), "plain")):
        (tmp_path / name).mkdir()
        export(find_source(str(path)), plan, 8, Fitted(), tmp_path / name)
    cut, plain = (open_model(tmp_path / name).model for name in ("cut", "plain"))
    whole = open_model(made.folder).model
    assert (logprobs(plain) - logprobs(whole)).abs().max() > 0.1
    assert torch.equal(logprobs(cut), logprobs(plain))
    before, after = made.tensors, load_file(tmp_path / "cut" / "model.safetensors")
    for layer in (0, 1):
        prefix = f"model.layers.{layer}.mlp.experts"
        for place, expert in enumerate(keep):
            own = {n: t for n, t in before.items() if n.startswith(f"{prefix}.{expert}.")}
            assert len(own) >= 3
            for name, tensor in own.items():
                new = name.replace(f"experts.{expert}.", f"experts.{place}.")
                assert torch.equal(after.pop(new), tensor)
    assert not [name for name in after if ".experts." in name]


def test_scaling_experts_of_a_packed_model_multiplies_their_scales_and_factors(
    packed: Callable[..., Packed], tmp_path: Path
) -> None:
    made, keep = packed(), tuple(range(1, 8))
    folds = {layer: np.linspace(0.5, 1.5, 7) for layer in (0, 1)}
    plan, fitted = cut_plan(made, keep), Fitted(folds=folds)
    for path, name in ((made.folder, "cut"), (made.twin(tmp_path / "twin"), "plain")):
        (tmp_path / name).mkdir()
        export(find_source(str(path)), plan, 8, fitted, tmp_path / name)
    (tmp_path / "unscaled").mkdir()
    export(made.source, plan, 8, Fitted(), tmp_path / "unscaled")
    cut, plain, unscaled = (
        logprobs(open_model(tmp_path / name).model) for name in ("cut", "plain", "unscaled")
    )
    assert (cut - unscaled).abs().max() > 0.1
    assert (cut - plain).abs().max() < 1e-4


def test_kept_constants_of_a_cut_packed_model_are_scaled_and_renamed(
    packed: Callable[..., Packed], tmp_path: Path
) -> None:
    made, keep = packed("olmoe", CONSTANTS), (0, 2, 3, 5, 6)
    folds = {layer: np.linspace(0.5, 1.5, 5) for layer in (0, 1)}
    (tmp_path / "cut").mkdir()
    export(made.source, cut_plan(made, keep), 8, Fitted(folds=folds), tmp_path / "cut")
    before, after = made.tensors, load_file(tmp_path / "cut" / "model.safetensors")
    options = read_config(tmp_path / "cut")[PACKING_KEY]["options"]
    assert list(options["model.layers.0.mlp"].values()) == ["copy", "3", "zero", "mean", "3"]
    prefix = "model.layers.0.mlp.constant_experts"
    for part in ("value", "scale"):  # expert 0 of copy is the first of the kept
        expected = before[f"{prefix}.0.approx_{part}"].double() * 0.5
        assert torch.equal(after[f"{prefix}.0.approx_{part}"], expected.float())
    expected = before[f"{prefix}.5.approx_value"].double() * folds[0][3]
    assert torch.equal(after[f"{prefix}.3.approx_value"], expected.float())
    moe = open_model(tmp_path / "cut")
    assert len(moe.blocks[0].experts.places) == 5  # type: ignore[arg-type]
    assert torch.isfinite(logprobs(moe.model)).all()


@pytest.mark.parametrize(
    ("options", "loader"),
    [((*EVERY_OPTION, *CONSTANTS), "transformers"), (WIDTHS, "vllm")],
)
def test_packed_experts_in_another_order_answer_as_before(
    packed: Callable[..., Packed], tmp_path: Path, options: tuple[str, ...], loader: Loader
) -> None:
    made, order = packed("olmoe", options, loader), (3, 0, 7, 1, 6, 2, 5, 4)
    names = [block.name for block in open_model(made.folder).blocks]
    edits = {name: BlockEdit(keep=tuple(range(8)), order=order) for name in names}
    (tmp_path / "placed").mkdir()
    plan = EditPlan("placed", "place", "by hand", "all", edits)
    export(made.source, plan, 8, Fitted(), tmp_path / "placed")
    before, after = made.tensors, load_file(tmp_path / "placed" / "model.safetensors")
    gate = "model.layers.0.mlp.gate.weight"
    assert torch.equal(after[gate], before[gate][list(order)])
    assert sorted(after) != sorted(before) or loader == "vllm"
    found = logprobs(open_model(tmp_path / "placed").model)
    assert (found - logprobs(open_model(made.folder).model)).abs().max() < 1e-4


@pytest.mark.parametrize(("options", "loader"), [(CONSTANTS, "transformers"), (WIDTHS, "vllm")])
def test_it_loads_where_a_device_map_puts_it(
    packed: Callable[..., Packed], tmp_path: Path, options: tuple[str, ...], loader: Loader
) -> None:
    made = packed("olmoe", options, loader)
    placed = LoadOptions(device_map="auto", max_memory="cpu=70kB", offload=tmp_path / "disk")
    expected = logprobs(open_model(made.folder).model)
    found = logprobs(load(made.source, placed).model)
    assert (found - expected).abs().max() < 1e-5


Spoil = Callable[[dict[str, Any]], None]


def options_changed(**options: str) -> Spoil:
    def spoil(config: dict[str, Any]) -> None:
        config[PACKING_KEY]["options"]["model.layers.0.mlp"] |= options

    return spoil


@pytest.mark.parametrize(
    ("changed", "spoil", "says"),
    [
        ({f"{FIRST}_packed": torch.zeros(32, 2).int()}, None, r"is I32 \[32, 2\], must be I32"),
        ({f"{FIRST}_packed": torch.zeros(32, 1)}, None, r"is F32 \[32, 1\], must be I32"),
        ({f"{FIRST}_scale": torch.zeros(32, 5)}, None, "must be I32"),
        ({f"{FIRST}_scale": torch.zeros(32)}, None, "must be"),
        ({f"{FIRST}_scale": None}, None, "must have weight_packed, weight_scale, weight_shape"),
        ({f"{FIRST}_shape": None}, None, "must have weight_packed, weight_scale, weight_shape"),
        ({f"{FIRST}_packed": None}, None, "must have weight_packed"),
        ({f"{FIRST}_shape": torch.tensor([32, 17])}, None, r"says \[32, 17\], must be \[32, 16\]"),
        ({FIRST: torch.zeros(32, 16)}, None, "there packed and plain"),
        ({}, options_changed(**{"0": "9"}), "is packed, but the config says 9"),
        ({}, options_changed(**{"0": "0"}), "is packed, but the config says 0"),
        ({}, options_changed(**{"0": "whole"}), "is packed, but the config says whole"),
        ({}, options_changed(**{"0": "lowrank:0.3"}), "must have weight_u, weight_v"),
        ({}, options_changed(**{"7": "2"}), "is a plain weight, but the config says 2"),
        ({}, lambda c: c[PACKING_KEY]["options"]["model.layers.0.mlp"].pop("3"), "does not say"),
        ({}, lambda c: c[PACKING_KEY].update(group_size=0), "must give a group_size"),
        ({}, lambda c: c[PACKING_KEY].update(options=["4"]), "must give a group_size"),
        ({}, lambda c: c.update({PACKING_KEY: "4"}), "must give a group_size"),
        (
            {FIRST.replace(".0.d", ".6.d") + "_rows": torch.tensor([0, 0, 1, 2]).int()},
            None,
            "must name rows 0 to 31, each once",
        ),
        (
            {FIRST.replace(".0.d", ".6.d") + "_s": None},
            None,
            "weight_rows, weight_u, weight_v: must have",
        ),
        ({FIRST.replace(".0.d", ".5.d") + "_u": torch.zeros(32, 9)}, None, "must be F32"),
    ],
)
def test_tensors_that_the_config_does_not_say_are_refused_in_one_line(
    packed: Callable[..., Packed],
    tmp_path: Path,
    changed: dict[str, Tensor | None],
    spoil: Spoil | None,
    says: str,
) -> None:
    folder = Path(shutil.copytree(packed().folder, tmp_path / "spoiled"))
    config = read_config(folder)
    if spoil is not None:
        spoil(config)
    respelled(folder, changed, **config)
    with pytest.raises(ExpertcutError, match=says) as refused:
        open_model(folder)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=9), "is quantized"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric=False), "quantized"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(strategy="channel"), "quantiz"),
        (lambda q: q.update(format="int-quantized"), "is quantized"),
        (lambda q: q["config_groups"].pop("group_0"), "fits 0 of the widths"),
        (lambda q: q.update(config_groups={}), "is quantized"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=16), "is quantized"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=3), "fits 0 of the"),
    ],
)
def test_other_quantised_checkpoints_stay_refused(
    packed: Callable[..., Packed], tmp_path: Path, spoil: Spoil, says: str
) -> None:
    made = packed("olmoe", WIDTHS, "vllm")
    folder = Path(shutil.copytree(made.folder, tmp_path / "spoiled"))
    config = read_config(folder)
    spoil(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExpertcutError, match=says) as refused:
        find_source(str(folder)).headers  # noqa: B018
    assert "\n" not in str(refused.value)


def test_what_layout_packed_cannot_hold_is_refused_before_a_model_is_loaded(
    packed: Callable[..., Packed], checkpoint: Checkpoints, tmp_path: Path
) -> None:
    def refused(base: Path, options: tuple[str, ...], loader: Loader = "transformers") -> str:
        plan = packed_plan(base, options, loader)
        with pytest.raises(ExpertcutError) as found:
            check_export(find_source(str(base)), plan, 8, tmp_path / "out")
        assert "\n" not in str(found.value)
        return str(found.value)

    assert "is not supported for mixtral" in refused(checkpoint("mixtral"), ("4", "copy"))
    assert "original format" in refused(checkpoint("gpt_oss"), ("4",))
    assert "cannot be packed again" in refused(packed().folder, ("4",))
    assert "does not divide" in refused(checkpoint("olmoe", intermediate_size=12), ("4",))
    uneven = packed_plan(checkpoint("olmoe"), ("4", "8"))
    assert uneven.compression is not None
    for_vllm = uneven.compression.model_copy(update={"loader": "vllm"})
    plan = EditPlan("", "", "", "all", uneven.edits, "packed", compression=for_vllm)
    with pytest.raises(ContractError, match="vLLM loads one for all experts"):
        check_export(find_source(str(checkpoint("olmoe"))), plan, 8, tmp_path / "out")


OPTIONS = ("2", "lowrank:0.4:0.2", "copy", "mean", "whole", "4")


def test_the_held_out_check_compares_with_the_unpacked_experts(
    checkpoint: Checkpoints, tmp_path: Path, expertcut: Commands
) -> None:
    base = checkpoint("olmoe")
    write_quiz(tmp_path / "quiz", {"dev": 5, "val": 4, "test": 2})
    expertcut(f"profile {base} --quiz quiz --split val --shots 1 --threads 1 --out p")
    plan = replace(packed_plan(base, OPTIONS), is_calibrated=True)
    options = BuildOptions(LoadOptions())
    made = build(load_profile(Path("p")), plan, Path("packed"), options)
    assert made.proof is not None
    unedited, unpacked = made.proof.held_out
    assert unpacked.max_abs_logprob_diff < 1e-4 < 0.1 < unedited.max_abs_logprob_diff
    found = load_plan(Path("packed"))
    assert found.blocks == plan.edits and found.compression == plan.compression
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    fitted = {n: t for n, t in tensors.items() if "approx_" in n or "weight_rows" in n}
    assert sum("approx_scale" in n and bool(t.any()) for n, t in fitted.items()) >= 1
    assert sum("approx_value" in n and bool(t.any()) for n, t in fitted.items()) >= 3
    # Those that the tokens weigh most, as measured again.
    (edit,) = edits_of(plan)
    profile = load_profile(Path("p"))
    engine = engine_as_profiled(profile, find_source(str(base)), LoadOptions())
    questions = questions_for(profile, is_fitting=True)
    again = edit.fit(engine, Calibration(profile, questions, engine.moe.source))
    assert isinstance(again, CompressEdit)
    for block, own in again.rows.items():
        for expert, by_part in own.items():
            for part, rows_K in by_part.items():
                name = f"{block}.experts.{expert}.{part}_proj.weight_rows"
                assert torch.equal(fitted[name], rows_K)


@pytest.mark.parametrize("loader", ["transformers", "vllm"])
def test_a_packed_checkpoint_is_profiled_pruned_and_evaluated(
    packed: Callable[..., Packed], tmp_path: Path, expertcut: Commands, loader: Loader
) -> None:
    options = WIDTHS if loader == "vllm" else (*EVERY_OPTION, *CONSTANTS)
    made = packed("olmoe", options, loader)
    shutil.copytree(made.folder, tmp_path / "model")
    write_quiz(tmp_path / "quiz", {"dev": 5, "val": 3, "test": 2})
    expertcut("profile model --quiz quiz --split val --shots 1 --threads 1 --out p")
    n_bytes = (made.folder / "model.safetensors").stat().st_size
    said = expertcut(f"prune --profile p --max-bytes {n_bytes * 9 // 10} --out cut")
    size = (tmp_path / "cut" / "model.safetensors").stat().st_size
    assert size <= n_bytes * 9 // 10 and f"{size / 1000:.1f} kB" in said
    expertcut("eval model cut --quiz quiz --shots 1 --out results.json")
    found = json.loads((tmp_path / "results.json").read_text())["models"]
    assert [model["bytes"] for model in found] == [n_bytes, size]
    refused = expertcut("merge --profile p --keep 4 --out merged", status=2)
    assert "has packed experts (compress), which cannot be merged" in refused
    refused = expertcut("heal cut --quiz quiz --out healed", status=2)
    assert "has packed experts (compress), which cannot be healed" in refused
    if loader == "vllm":
        refused = expertcut("prune --profile p --keep 4 --layout exact --out no", status=2)
        assert "cannot be cut with layout exact" in refused
