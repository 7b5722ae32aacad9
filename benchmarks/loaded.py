"""Loads one checkpoint with the Python that runs this, and says what it then holds.

    python benchmarks/loaded.py LOADER EXPORT FOLDER PROMPT ...

benchmarks/loaders.py runs it in one Python after another; it needs nothing of expertcut. Prints one
line of JSON, and leaves tokens and logits of the prompts in FOLDER/answers.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

Report = dict[str, Any]


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor on disk."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def differing(disk: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> list[str]:
    """Names that only one side has, or whose type, shape or bytes differ."""

    def is_same(a: Tensor, b: Tensor) -> bool:
        raw = [tensor.detach().contiguous().view(torch.uint8) for tensor in (a, b)]
        return a.dtype == b.dtype and torch.equal(*raw)

    both = disk.keys() & loaded.keys()
    return sorted(
        (disk.keys() ^ loaded.keys()) | {n for n in both if not is_same(disk[n], loaded[n])}
    )


def write_answers(folder: Path, ids: list[list[int]], logits: list[Tensor]) -> None:
    """What a loader made of each prompt: its tokens, and logits at each of them."""
    answers = {f"ids.{i}": torch.tensor(tokens) for i, tokens in enumerate(ids)}
    answers |= {f"logits.{i}": rows.float().contiguous() for i, rows in enumerate(logits)}
    save_file(answers, folder / "answers")


def load_in_transformers(export: Path, folder: Path, prompts: list[str]) -> Report:
    """Version 5 fuses the experts, so there it is compared by what it saves."""
    model, told = AutoModelForCausalLM.from_pretrained(
        export, dtype="auto", output_loading_info=True
    )
    loaded = model.state_dict()
    if not transformers.__version__.startswith("4."):
        model.save_pretrained(folder)
        loaded = stored(folder)
    disk = stored(export)
    different = differing(disk, loaded)
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    with torch.inference_mode():
        model.float()
        write_answers(folder, ids, [model(torch.tensor([tokens])).logits[0] for tokens in ids])
    kinds = ("missing", "unexpected", "mismatched")
    remark = ", ".join(f"{len(told[f'{kind}_keys'])} {kind}" for kind in kinds)
    version = transformers.__version__
    return {"version": version, "n": len(disk), "different": different, "remark": remark}


def read_gguf(export: Path, folder: Path, prompts: list[str]) -> Report:
    """Experts lie stacked in a GGUF; each is compared with its own tensor."""
    import gguf

    config = json.loads((export / "config.json").read_text())
    disk = {name: tensor.float() for name, tensor in stored(export).items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.OLMOE, config["num_hidden_layers"])
    stacked = {re.sub(r"\.experts\.\d+\.", ".experts.", name) for name in disk}
    ours = {names.get_name(name, try_suffixes=(".weight",)): name for name in stacked}
    reader = gguf.GGUFReader(folder.parent / "f32.gguf")
    loaded = {}
    for found in reader.tensors:
        name, tensor = ours.get(found.name, found.name), torch.from_numpy(np.array(found.data))
        head, experts, tail = name.partition(".experts.")
        parts = {f"{head}.experts.{e}.{tail}": part for e, part in enumerate(tensor)}
        loaded |= parts if experts else {name: tensor}
    different = differing(disk, loaded)
    said = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
    counts = {key: reader.get_field(f"olmoe.{name}").contents() for key, name in said.items()}
    different += [key for key, count in counts.items() if count != config[key]]
    remark = "as f32, " + ", ".join(f"{said[key]} {count}" for key, count in counts.items())
    return {"n": len(disk), "different": different, "remark": remark}


def override_in_llama_cpp(export: Path, folder: Path, prompts: list[str]) -> Report:
    """The GGUF of a base with as many experts a token as the export has."""
    config = json.loads((export / "config.json").read_text())
    n_experts = {"olmoe.expert_used_count": config["num_experts_per_tok"]}
    return run_in_llama_cpp(export, folder, prompts, kv_overrides=n_experts)


def run_in_llama_cpp(export: Path, folder: Path, prompts: list[str], **options: object) -> Report:
    """With a cache of float32 keys and values: by default it is float16."""
    import llama_cpp

    how = {"n_ctx": 512, "logits_all": True, "type_k": 0, "type_v": 0, "n_threads": 1}
    how |= options
    model = llama_cpp.Llama(str(folder.parent / "f32.gguf"), verbose=False, **how)
    ids, logits = [], []
    for prompt in prompts:
        ids.append(model.tokenize(prompt.encode(), add_bos=True))
        model.reset()
        model.eval(ids[-1])
        logits.append(torch.tensor(model.scores[: len(ids[-1])]))
    write_answers(folder, ids, logits)
    return {"version": llama_cpp.__version__, "n": None, "different": None, "remark": ""}


LOADERS: dict[str, Callable[[Path, Path, list[str]], Report]] = {
    f.__name__: f
    for f in (load_in_transformers, read_gguf, run_in_llama_cpp, override_in_llama_cpp)
}


def main() -> None:
    """Reads the command line, loads, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loader", choices=LOADERS)
    parser.add_argument("export", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", nargs="*")
    args = parser.parse_args()
    print(json.dumps(LOADERS[args.loader](args.export, args.folder, args.prompts)))


if __name__ == "__main__":
    main()
