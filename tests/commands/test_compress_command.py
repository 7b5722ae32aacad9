"""`expertcut compress` from the command line: what it prints, writes and refuses."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertcut import api
from expertcut.commands import compress
from expertcut.data import Selection, load_quiz
from expertcut.edits.compression import load_compression
from expertcut.edits.plan import PlanFile, load_plan
from expertcut.evaluation import compression_run
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import load_profile
from tests.conftest import WORDS, Commands, make_checkpoint, open_model
from tests.support.merged_models import measured
from tests.support.planted_subjects import plant_subjects, write_subjects

MENU = "--options 1,2,3,4,8 --group-size 16"
OUTLIER, IDLE = 2, 5  # experts
QUIET = [1, 17]  # dimensions that hold nothing, one in each group of columns


@pytest.fixture(scope="module")
def profiled(quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compressing")
    return measured(
        make_checkpoint(root / "model", "olmoe"), quiz_folder, root / "p", threads=1
    ).path


@pytest.fixture(scope="module")
def errors(profiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan with the errors of the menu."""
    folder = tmp_path_factory.mktemp("measured") / "plan"
    settings = compress.CompressSettings.read(
        profile=[str(profiled)], bits=2.5, options="1,2,3,4,8", group_size=16, verify=False,
        plan_only=True, out=folder,
    )  # fmt: skip
    compress.run(settings)
    return folder


def written(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def widths(plan: PlanFile, block: str, n_experts: int = 8) -> list[int]:
    options = plan.blocks[block].options or {}
    return [int(options.get(str(e), options.get("*", "16"))) for e in range(n_experts)]


def chosen_error(folder: Path) -> float:
    found = load_compression(folder / "compress.json").block_error
    assert found is not None
    return sum(found.sum)


def test_a_compressed_checkpoint_is_scored_beside_its_peers_shown_and_evaluated(
    profiled: Path, tmp_path: Path, quiz_folder: Path, expertcut: Commands
) -> None:
    printed = expertcut(f"compress --profile {profiled} --bits 2.5 {MENU} --out small")
    for words in ("sum of experts", "by pmq", "shuffled", "for all", "loads in transformers"):
        assert words in printed, printed
    assert max(len(line) for line in printed.splitlines() if line[:1] in "│┃") <= 80
    plan = load_plan(tmp_path / "small")
    assert plan.compression is not None and plan.compression.bits <= 2.5
    assert plan.compression.bytes == written(tmp_path / "small")
    assert "50.0 k parameters, were 50.0 k" in printed
    file = load_compression(tmp_path / "small" / "compress.json")
    assert file.block_error is not None
    for layer in (0, 1):  # routing does not change, and errors of experts hardly correlate
        own, whole = file.block_error.sum[layer], file.block_error.measured[layer]
        assert whole == pytest.approx(own, rel=0.5)
    base, this, *others = file.peers
    assert (base.plan, base.flipped, this.plan) == ("base", None, "this (per expert)")
    assert len({peer.logprob for peer in (base, this, *others)}) == len(file.peers) == 6
    shown = expertcut("show small")
    for words in ("by pmq", "sum of experts", "loads in transformers", "the program is solved"):
        assert words in shown
    model = load_profile(profiled).info.model.id
    expertcut(
        f"eval {model} small --quiz {quiz_folder} --split test --shots 1 --limit 2 --threads 1 "
        "--out r.json"
    )
    assert json.loads((tmp_path / "r.json").read_text())["models"][1]["bytes"] < written(
        Path(model)
    )
    expertcut("report small")
    assert "by pmq" in (tmp_path / "small" / "report.html").read_text()
    file = tmp_path / "small" / "compress.json"
    file.write_text(file.read_text().replace("layers.1.mlp:", "layers.7.mlp:"))
    assert "is not of the plan.json beside it" in expertcut("show small", status=2)


def test_a_larger_budget_costs_no_more_and_no_byte_beyond_it_is_written(
    profiled: Path,
    errors: Path,
    tmp_path: Path,
    expertcut: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(*_args: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("expertcut.checkpoints.build.load", loaded)  # errors are known: none is
    command = f"compress --profile {profiled} --from {errors} --no-verify"
    found = []
    for kilobytes in (134, 137, 140, 150):
        folder = tmp_path / str(kilobytes)
        expertcut(f"{command} --max-bytes {kilobytes}kB --out {folder}")
        compression = load_plan(folder).compression
        assert compression is not None
        assert written(folder) == compression.bytes <= kilobytes * 1000
        found.append(chosen_error(folder))
    assert found == sorted(found, reverse=True) and found[0] > 2 * found[-1]
    refusal = expertcut(f"{command} --max-bytes 100kB", status=2)
    assert "the smallest size that these options allow" in refusal and refusal.count("\n") == 1


def test_errors_of_another_model_or_option_are_not_taken(
    profiled: Path, errors: Path, quiz_folder: Path, tmp_path: Path, expertcut: Commands
) -> None:
    command = f"compress --from {errors} --bits 3"
    assert "has no error of option 5" in expertcut(
        f"{command} --options 5 --profile {profiled}", status=2
    )
    refusal = expertcut(f"{command} --options 4 --for llama.cpp --profile {profiled}", status=2)
    assert "not of --for llama.cpp" in refusal
    assert "as they are" in expertcut(f"{command} --group-size 32 --profile {profiled}", status=2)
    other = make_checkpoint(tmp_path / "other", "olmoe", seed=3)
    path = measured(other, quiz_folder, tmp_path / "p", threads=1).path
    assert "of another model" in expertcut(f"{command} --profile {path}", status=2)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("", "say how small"),
        ("--bits 3 --max-bytes 4GB", "only one of them"),
        ("--bits 3 --for vllm --grain expert", "scheme of a layer's expert 0"),
        ("--bits 3 --for vllm --options lowrank:0.25", "does not take option lowrank:0.25"),
        ("--bits 3 --for vllm --options 2,4", "add --allow 2"),
        ("--bits 3 --for llama.cpp --options copy", "does not take option copy"),
        ("--bits 3 --options 4,4", "stands twice"),
        ("--bits 3 --options five", "is not an option"),
        ("--bits 3 --by pmq --options 4,copy", "scores widths"),
        ("--bits 3 --by pmq --grain layer", "take --grain expert"),
        ("--bits 3 --least 3 --options 4,8", "is none of the options"),
        ("--bits 3 --rest 8", "add --for llama.cpp"),
        ("--max-bytes many", "is not a size"),
        ("--sweep 4GB,4GB", "a size twice"),
        ("--bits 3 --text x.jsonl", "add --sweep"),
    ],
)
def test_what_cannot_be_is_refused_before_a_profile_is_read(
    options: str, why: str, expertcut: Commands
) -> None:
    refusal = expertcut(f"compress --profile nowhere {options}", status=2)
    assert why in refusal and refusal.count("\n") == 1


def test_a_group_size_that_divides_no_row_is_refused_before_a_model_is_loaded(
    profiled: Path, expertcut: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertcut.checkpoints.build.load", lambda *_: pytest.fail("loaded"))
    refusal = expertcut(f"compress --profile {profiled} --bits 3", status=2)
    assert "--group-size 128 does not divide" in refusal and "take 16" in refusal


def test_a_checkpoint_for_vllm_has_one_width_a_layer_and_a_recipe(
    profiled: Path, tmp_path: Path, expertcut: Commands, quiz_folder: Path
) -> None:
    model = tmp_path / "wide"
    make_checkpoint(model, "olmoe", intermediate_size=32)
    path = measured(model, quiz_folder, tmp_path / "p", threads=1).path
    command = f"compress --profile {path} --for vllm --group-size 32 --no-verify"
    printed = expertcut(f"{command} --bits 6 --out both")
    plan, config = (
        load_plan(tmp_path / "both"),
        json.loads((tmp_path / "both/config.json").read_text()),
    )
    assert {len(edit.options or {}) for edit in plan.blocks.values()} == {1}
    groups = config["quantization_config"]["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {4, 8}
    assert "transformers alone does not load it or answers wrongly" in " ".join(printed.split())
    recipe = (tmp_path / "both" / "recipe.yaml").read_text()
    assert "GPTQModifier" in recipe and "num_bits: 8" in recipe
    expertcut("publish both me/both --dry-run")
    card = (tmp_path / "both" / "README.md").read_text()
    assert "vllm serve" in card and "AutoModelForCausalLM" not in card


def test_a_checkpoint_for_llama_cpp_is_the_base_with_a_list_of_types(
    profiled: Path, tmp_path: Path, expertcut: Commands
) -> None:
    command = f"compress --profile {profiled} --for llama.cpp --no-verify"
    printed = expertcut(f"{command} --bits 6 --out typed")
    base = Path(load_profile(profiled).info.model.id)
    assert (
        load_file(tmp_path / "typed/model.safetensors").keys()
        == load_file(base / "model.safetensors").keys()
    )
    types = (tmp_path / "typed" / "tensor-types.txt").read_text()
    assert types.count("_exps=") == 6 and types.endswith("weight=f32\n")
    assert "llama-quantize" in printed and "convert_hf_to_gguf.py" in printed
    expertcut(f"{command} --bits 6 --rest 8 --out smaller")
    assert "weight=q8_0" in (tmp_path / "smaller" / "tensor-types.txt").read_text()
    sizes = [load_plan(tmp_path / name).compression for name in ("typed", "smaller")]
    assert sizes[0] is not None and sizes[1] is not None and sizes[1].bytes < sizes[0].bytes


def plant(source: Path, folder: Path) -> Path:
    """An OLMoE whose expert `OUTLIER` has large weights where no input is, and `IDLE` no token."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    embeddings[:, 0], embeddings[:, QUIET] = 4, 0
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[[0, *QUIET]] = 0
        if name.endswith("mlp.gate.weight"):
            tensor[IDLE] = 0
            tensor[IDLE, 0] = -50
            tensor[OUTLIER] = 0
            tensor[OUTLIER, 0] = 2
        if name.endswith(
            (f"experts.{OUTLIER}.gate_proj.weight", f"experts.{OUTLIER}.up_proj.weight")
        ):
            tensor[:, QUIET] = 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_expert_with_outliers_gets_the_most_bits_and_one_no_token_chooses_the_fewest(
    profiled: Path, quiz_folder: Path, tmp_path: Path, expertcut: Commands
) -> None:
    model = plant(Path(load_profile(profiled).info.model.id), tmp_path / "planted")
    path = measured(model, quiz_folder, tmp_path / "p", threads=1).path
    command = f"compress --profile {path} --plan-only --no-verify"
    expertcut(f"{command} --bits 2 {MENU} --out first")
    for bits in (1.6, 2, 2.5, 3):
        expertcut(f"{command} --bits {bits} --from first --out at-{bits}")
        for block in ("model.layers.0.mlp", "model.layers.1.mlp"):
            own = widths(load_plan(tmp_path / f"at-{bits}"), block)
            assert own[OUTLIER] == max(own) and own[IDLE] == min(own) == 1
            assert own[OUTLIER] > sorted(own)[4]  # the median: not all alike
    expertcut(f"{command} --bits 3 --from first --least 3 --out floor")
    own = widths(load_plan(tmp_path / "floor"), "model.layers.0.mlp")
    assert own[IDLE] == 3


def plant_twins(folder: Path) -> Path:
    """Two layers of equal experts, of which the second adds a hundredth to the residual stream."""
    plant_subjects(folder, 1.0)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for name, tensor in list(tensors.items()):
        if ".experts." in name:
            tensor += 0.05 * torch.randn_like(tensor)
        if name.startswith("model.layers.0."):
            scale = 0.01 if "down_proj" in name else 0.0 if "o_proj" in name else 1.0
            tensors[name.replace("layers.0", "layers.1")] = scale * tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_block_that_adds_a_hundredth_loses_bits_before_its_twin_where_answers_weigh(
    tmp_path: Path, expertcut: Commands
) -> None:
    quiz = write_subjects(tmp_path / "quiz", {"val": 12, "test": 4})
    asked = load_quiz(Selection(str(quiz), "val", 0))
    model = plant_twins(tmp_path / "twins")
    options = MeasureOptions(threads=1)
    list(Measurement(open_model(model), asked, None, options).run(tmp_path / "p"))
    command = "compress --profile p --plan-only --no-verify --grain layer"
    expertcut(f"{command} --bits 3 {MENU} --weigh answers --out first")
    for bits in (1.5, 2.5, 3.5, 5):
        expertcut(f"{command} --bits {bits} --from first --out at-{bits}")
        plan = load_plan(tmp_path / f"at-{bits}")
        loud, quiet = (widths(plan, f"model.layers.{layer}.mlp")[0] for layer in (0, 1))
        assert loud > quiet


def test_matrices_that_are_not_those_on_disk_stop_the_measurement(
    profiled: Path, expertcut: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = compression_run.matrices
    swapped = {"gate": "up", "up": "gate", "down": "down"}
    monkeypatch.setattr(
        compression_run, "matrices",
        lambda block, e: {name: own(block, e)[other] for name, other in swapped.items()},
    )  # fmt: skip
    refusal = expertcut(f"compress --profile {profiled} --bits 3 {MENU}", status=2)
    assert "is not the gate matrix" in refusal


def test_a_sweep_scores_each_size_against_the_base_and_writes_no_checkpoint(
    profiled: Path, tmp_path: Path, expertcut: Commands
) -> None:
    command = f"compress --profile {profiled} --sweep 150kB,136kB {MENU} --out swept"
    printed = expertcut(command)
    assert "150.0 kB" in printed and "unedited" in printed
    found = json.loads((tmp_path / "swept/compress_sweep.json").read_text())
    large, small = found["cells"]
    assert small["bytes"] <= 136_000 < large["bytes"] <= 150_000
    assert small["error"] > large["error"] and len(small["change"]["ci95"]) == 2
    assert not list((tmp_path / "swept").rglob("config.json"))
    before = (tmp_path / "swept/compress_sweep.json").read_bytes()
    expertcut(command)  # resumed: nothing is left
    assert (tmp_path / "swept/compress_sweep.json").read_bytes() == before
    assert "150.0 kB" in expertcut("show swept")
    refusal = expertcut(command.replace("136kB", "135kB"), status=2)
    assert "sizes" in refusal


def test_a_merged_checkpoint_is_compressed_too(
    profiled: Path, quiz_folder: Path, tmp_path: Path, expertcut: Commands
) -> None:
    expertcut(f"merge --profile {profiled} --keep 4 --no-verify --out merged")
    path = measured(tmp_path / "merged", quiz_folder, tmp_path / "p", threads=1).path
    expertcut(
        f"compress --profile {path} --bits 4 --options 4,copy,mean,lowrank:0.5:0.1 --group-size 16 "
        "--out both"
    )
    plan = load_plan(tmp_path / "both")
    assert [s.against for s in plan.proof.held_out][1] == (
        "the same experts unpacked in the unedited model"
    )
    assert plan.proof.held_out[1].max_abs_logprob_diff < 1e-4
    assert "sum of experts" in expertcut("show both --wide")
    expertcut("publish both me/both --dry-run")
    card = " ".join((tmp_path / "both" / "README.md").read_text().replace("\\", "").split())
    assert "modeling_packed.py and the file that it imports" in card
    assert "loaded and scored here" in card
    # The next edit takes no part of what was chosen here along.
    again = measured(tmp_path / "both", quiz_folder, tmp_path / "q", threads=1).path
    expertcut(f"prune --profile {again} --keep 3 --no-verify --out cut")
    assert not (tmp_path / "cut" / "compress.json").exists()


def test_texts_measure_and_judge_as_questions_do(tmp_path: Path, expertcut: Commands) -> None:
    chance = random.Random(0)
    lines = [" ".join(chance.choices(WORDS, k=30)) for _ in range(40)]
    text = "".join(json.dumps({"text": f"{n} {line}"}) + "\n" for n, line in enumerate(lines))
    (tmp_path / "words.jsonl").write_text(text)
    make_checkpoint(tmp_path / "model", "olmoe")
    expertcut("profile model --text words.jsonl --threads 1 --out p")
    command = f"compress --profile p --bits 3 {MENU}"
    refusal = expertcut(f"{command} --weigh answers", status=2)
    assert "noise in no block makes answers worse" in refusal  # of a model that knows nothing
    printed = expertcut(f"{command} --out small")
    assert "same top token" in printed and "KL" in printed
    base, this, *others = load_compression(tmp_path / "small" / "compress.json").peers
    assert base.kl is None and this.kl is not None and this.kl > 0 and len(others) == 4
    held_out = load_plan(tmp_path / "small").proof.text
    assert held_out[0].kl == pytest.approx(this.kl, rel=0.01)  # scored before and once written
    expertcut(f"compress --profile p --sweep 150kB,140kB {MENU} --out swept")
    large, small = json.loads((tmp_path / "swept/compress_sweep.json").read_text())["cells"]
    assert small["change"]["kl"] > large["change"]["kl"] > 0


def test_python_and_a_recipe_write_what_the_command_writes(
    profiled: Path, quiz_folder: Path, tmp_path: Path, expertcut: Commands
) -> None:
    expertcut(f"compress --profile {profiled} --bits 2.5 {MENU} --no-verify --out small")
    plan = api.load_profile(profiled).compress(
        bits=2.5, options="1,2,3,4,8", group_size=16, verify=False
    )
    plan.save(tmp_path / "again")
    weights = "model.safetensors"
    content = (tmp_path / "small" / weights).read_bytes()
    assert (tmp_path / "again" / weights).read_bytes() == content
    model = load_profile(profiled).info.model.id
    section = '{bits: 2.5, for: transformers, options: "1,2,3,4,8", group_size: 16, verify: false}'
    (tmp_path / "r.yaml").write_text(
        f"model: {model}\nquiz: {quiz_folder}\nshots: 1\nthreads: 1\nout: run\n"
        "profile: {split: val, limit: 2}\n"
        f"variants: [{{name: small, compress: {section}}}]\nreport:\n"
    )
    expertcut("run r.yaml")
    assert (tmp_path / "run/variants/small" / weights).read_bytes() == content
    assert "sum of experts" in (tmp_path / "run/report.html").read_text()
    section = "{bits: 3, for: vllm, grain: expert}"
    (tmp_path / "r.yaml").write_text(
        f"model: {model}\nvariants: [{{name: small, compress: {section}}}]"
    )
    assert "--grain expert" in expertcut("run r.yaml", status=2)
