"""Loads stock exports elsewhere: transformers 4.57 and 5, llama.cpp's converter, llama.cpp itself.

    python benchmarks/loaders.py --place BIG_DISK [--tokenizer DATA/olmoe] [--build] [--edits place]

Each loader runs loaded.py in a Python of its own, installed once under --place from the package
index (3 GB), and says whether what it holds equals what lies on disk, byte by byte. Logits and
log p are float32 and compared at every position of the prompts with those of this Python's
transformers; of a checkpoint with its experts in another order, with those of its base. Of a route
the base is asked too, with the rule at run time and in llama.cpp with the number of experts
overridden. --build compiles llama.cpp: some ten minutes of processor time.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import expertcut
from expertcut.models.load import LoadOptions, find_source, load
from expertcut.models.routing_rule import RoutingRule
from expertcut.reporting.tables import Column, Table, as_markdown
from expertcut.scoring.rerouting import Rerouting, rerouted

BUNDLED = Path(__file__).resolve().parents[1] / "checkpoints" / "quickstart"
QUIZ = BUNDLED / "quiz"
LOADED = Path(__file__).with_name("loaded.py")
LLAMA_CPP_PYTHON = "0.3.36"  # its source package holds llama.cpp as of 0c1e57098
TORCH = f"torch=={torch.__version__.split('+')[0]}"  # the same, so that only the loader differs
EXPERTS_A_TOKEN = 2
EDITS = {"prune": ("--keep", "16"), "reweight": ("--boost", "0:3=0.5", "--suppress", "2:5=1")}
EDITS["route"] = ("--rule", "top-k", "--at", str(EXPERTS_A_TOKEN), "--layout", "stock")
EDITS["place"] = ("--devices", "4", "--write")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
ENVIRONMENT |= {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}

Report = dict[str, Any]


def prompts() -> list[str]:
    """The first question of three subjects."""
    files = sorted((QUIZ / "test").iterdir())[:3]
    return [next(csv.reader(file.read_text().splitlines()))[0] for file in files]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; what it says is shown if it fails."""
    print("$", *command, file=sys.stderr, flush=True)
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | ENVIRONMENT
    )
    print(done.stderr if done.returncode else "", file=sys.stderr)
    return done


def python_with(place: Path, *requirements: object) -> Path:
    """The Python of a virtual environment, made where it is not there yet."""
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        run(sys.executable, "-m", "venv", "--clear", place).check_returncode()
        run(python, "-m", "pip", "install", *requirements).check_returncode()
        (place / "complete").touch()
    return python


def random_olmoe(folder: Path, real: Path) -> Path:
    """A small OLMoE with the config and tokenizer files of a real one, as they came."""
    small = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 3}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(real, **small))
    for name, tensor in model.named_parameters():
        # With 0.02 experts do not matter; with norms of 1 a loader could forget them.
        tensor.data.normal_(1 if "norm" in name else 0, 0.25)
    model.to(torch.bfloat16).save_pretrained(folder)
    shutil.copytree(real, folder, dirs_exist_ok=True)
    config = json.loads((real / "config.json").read_text()) | small
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def export_all(source: Path, place: Path, edits: Sequence[str]) -> dict[str, Path]:
    """Stock exports of a checkpoint by what made them, from the real command line."""
    cut = (sys.executable, "-m", "expertcut")
    for verb in edits:
        read, given = ("trace", ()) if verb == "place" else ("profile", ("--profile",))
        if not (place / read).exists():
            asked = ("--quiz", QUIZ, "--limit", 4, "--shots", 1, "--out", place / read)
            run(*cut, read, source, *asked).check_returncode()
        out = ("--out", place / verb)
        run(*cut, verb, *given, place / read, *EDITS[verb], *out).check_returncode()
    return {verb: place / verb / ("checkpoint" if verb == "place" else "") for verb in edits}


def llama_cpp(place: Path, *, is_built: bool) -> tuple[Path, Path]:
    """A Python that runs llama.cpp's converter, and where its sources lie."""
    python = python_with(place / "venv-llama.cpp", "transformers==4.57.*", TORCH, "gguf==0.19.0")
    name, source = "llama-cpp-python", place / f"llama_cpp_python-{LLAMA_CPP_PYTHON}"
    archive = Path(f"{source}.tar.gz")
    if not source.exists():
        how = ("--no-deps", "--no-binary", name, "--dest", place)
        run(python, "-m", "pip", "download", *how, f"{name}=={LLAMA_CPP_PYTHON}").check_returncode()
        shutil.unpack_archive(archive, place, filter="data")
    if is_built and run(python, "-c", "import llama_cpp").returncode:
        run(python, "-m", "pip", "install", archive).check_returncode()
    return python, source / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"


def ask(python: object, loader: str, export: Path, folder: Path) -> Report:
    """What a loader reports when a Python runs it, and what it answered."""
    folder.mkdir(parents=True)
    done = run(python, LOADED, loader, export, folder, *prompts())
    if done.returncode:
        return failed(done)
    answers = load_file(folder / "answers") if (folder / "answers").exists() else {}
    return json.loads(done.stdout.splitlines()[-1]) | {"answers": answers}


def failed(done: subprocess.CompletedProcess[str]) -> Report:
    """The line in which a traceback says what was wrong."""
    remark = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no word")
    return {"version": "", "n": None, "different": None, "remark": remark, "answers": {}}


def largest_change(
    answers: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> tuple[float, float] | None:
    """Of logits and of log p, over all prompts; none where a prompt was read as other tokens."""
    if not answers or not all(torch.equal(answers[n], reference[n]) for n in answers if "ids" in n):
        return None
    pairs = [(answers[n], reference[n]) for n in answers if "logits" in n]
    logits = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
    softmax = [(ours.log_softmax(-1), theirs.log_softmax(-1)) for ours, theirs in pairs]
    return logits, max((ours - theirs).abs().max().item() for ours, theirs in softmax)


def reports(export: Path, work: Path, args: argparse.Namespace) -> dict[str, Report]:
    """Every loader's but the reference's."""
    four = python_with(args.place / "venv-transformers4", "transformers==4.57.*", TORCH)
    told = {"transformers 4": ask(four, "load_in_transformers", export, work / "4")}
    theirs, done = converted(export, work, args)
    gguf = failed(done) if done.returncode else ask(theirs, "read_gguf", export, work / "gguf")
    told["llama.cpp's converter"] = gguf | {"version": LLAMA_CPP_PYTHON}
    if args.build and not done.returncode:
        told["llama.cpp"] = ask(theirs, "run_in_llama_cpp", export, work / "llama.cpp")
    return told


def converted(
    checkpoint: Path, work: Path, args: argparse.Namespace
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Writes f32.gguf; the Python that ran the converter, and what it said."""
    python, converter = llama_cpp(args.place, is_built=args.build)
    work.mkdir(exist_ok=True)
    to = ("--outfile", work / "f32.gguf", "--outtype", "f32")
    return python, run(python, converter, checkpoint, *to)


def routed_base(
    source: Path, export: Path, work: Path, args: argparse.Namespace
) -> dict[str, Report]:
    """The unedited checkpoint with as many experts a token as the routed export."""
    told = {"base, rule at run time": at_run_time(source)}
    theirs, done = converted(source, work, args)
    if args.build and not done.returncode:
        overridden = ask(theirs, "override_in_llama_cpp", export, work / "llama.cpp")
        told["base, llama.cpp with the count overridden"] = overridden
    return told


def at_run_time(source: Path) -> Report:
    """What the unedited checkpoint answers in expertcut, with the rule in the running model."""
    moe = load(find_source(str(source)), LoadOptions(dtype="float32"))
    at = {block.layer: float(EXPERTS_A_TOKEN) for block in moe.blocks}
    answers = {}
    with rerouted(moe.blocks, Rerouting(RoutingRule(rule="top-k"), at)), torch.inference_mode():
        for i, prompt in enumerate(prompts()):
            answers[f"ids.{i}"] = torch.tensor(moe.tokenizer(prompt).input_ids)
            answers[f"logits.{i}"] = moe.model(answers[f"ids.{i}"][None]).logits[0]
    version = expertcut.__version__
    return {"version": version, "n": None, "different": None, "remark": "", "answers": answers}


def rows(name: str, source: Path, place: Path, args: argparse.Namespace) -> list[list[Any]]:
    """One row per export and loader."""
    base, made = ask(sys.executable, "load_in_transformers", source, place / "base"), []
    for verb, export in export_all(source, place, args.edits).items():
        work = place / f"{verb}-loaded"
        ours = ask(sys.executable, "load_in_transformers", export, work / "5")
        moved = largest_change(base["answers"], ours["answers"])
        reference = base["answers"] if verb == "place" else ours["answers"]
        highest = max(t.abs().max().item() for n, t in reference.items() if "logits" in n)
        ours |= {"remark": f"{ours['remark']}; |logits| to {highest:.0f}, edited by {moved[0]:.2g}"}
        told_by = {"transformers 5": ours, **reports(export, work, args)}
        if verb == "route":
            told_by |= routed_base(source, export, place / "base-loaded", args)
        for loader, told in told_by.items():
            is_own = told["answers"] is reference
            change = None if is_own else largest_change(told["answers"], reference)
            is_misread = bool(told["answers"]) and not is_own and change is None
            different = told["different"]
            is_equal = f"no: {len(different)}, as {different[0]}" if different else "yes"
            row = [f"{name}, {verb} {' '.join(EDITS[verb])}", loader, told["version"], told["n"]]
            remark = told["remark"] + ("; prompts become other tokens" if is_misread else "")
            bits = None if different is None else is_equal
            made.append([*row, bits, *(change or (None, None)), remark])
    return made


def main() -> None:
    """Reads the command line, exports, asks every loader, prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--place", type=Path, required=True, help="where installations stay")
    parser.add_argument("--tokenizer", type=Path, help="config and tokenizer of a real OLMoE")
    parser.add_argument("--build", action="store_true", help="build and run llama.cpp too")
    parser.add_argument("--edits", nargs="+", choices=EDITS, default=[*EDITS])
    args = parser.parse_args()
    args.place = args.place.resolve()
    args.place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.place) as folder:
        work = Path(folder)
        made = rows("quickstart", BUNDLED, work / "quickstart", args)
        if args.tokenizer:
            made += rows("olmoe", random_olmoe(work / "m", args.tokenizer), work / "olmoe", args)
    names = ("export", "loader", "version", "tensors", "bit-equal")
    names += ("largest |Δ logit|", "largest |Δ log p|", "remark")
    columns = tuple(Column(name, ".1e" if "Δ" in name else "") for name in names)
    print(as_markdown(Table("Stock exports in other loaders", columns, made)))


if __name__ == "__main__":
    main()
