"""Exports a random OLMoE of the real size, and prints seconds, bytes and peak memory beside `cp`.

    python benchmarks/export.py --config DATA/olmoe/config.json --place BIG_DISK [--keep 32]

Every step runs in its own process, from files that are not in the page cache. The export ends with
its files synced, so `cp` is shown both as it stands and with its files synced.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tests.support.rewrites import Fitted, exact_rewrite, stock_rewrite, zero_outputs

from expertcut.checkpoints.shards import (
    MAX_SHARD_BYTES,
    Rewrite,
    lay_out,
    write_checkpoint,
    write_shards,
)
from expertcut.edits.plan import BlockEdit
from expertcut.models.load import Source
from expertcut.models.safetensors_index import Stored, StoredTensor, read_headers
from expertcut.reporting.tables import Column, Table, as_markdown

Config = dict[str, int]


@dataclass(frozen=True)
class Step:
    """What one step took.

    `cpu_s` is the processor time, which a busy machine changes less than the seconds; `peak_mb`
    the largest resident memory of its process.
    """

    elapsed_s: float
    cpu_s: float
    size_bytes: int
    peak_mb: float


def stock(headers: Mapping[str, StoredTensor], config: Config, keep: tuple[int, ...]) -> Rewrite:
    """Every second expert is removed and the others' outputs are folded, in every layer."""
    layers = range(config["num_hidden_layers"])
    edits = {f"model.layers.{layer}.mlp": BlockEdit(keep=keep) for layer in layers}
    folds = {layer: np.linspace(0.9, 0.99, len(keep)) for layer in layers}
    return stock_rewrite(headers, edits, Fitted(folds, {}))


def exact(headers: Mapping[str, StoredTensor], config: Config, keep: tuple[int, ...]) -> Rewrite:
    """Every second expert is removed and leaves zeros, in every layer."""
    removed = [e for e in range(config["num_experts"]) if e not in keep]
    names = [f"model.layers.{layer}.mlp" for layer in range(config["num_hidden_layers"])]
    zeros = zero_outputs(dict.fromkeys(names, removed), config["hidden_size"])
    return exact_rewrite(headers, dict.fromkeys(names, BlockEdit(keep=keep)), zeros)


LAYOUTS: dict[str, Callable[[Mapping[str, StoredTensor], Config, tuple[int, ...]], Rewrite]] = {
    "stock": stock,
    "exact": exact,
}


def olmoe_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The tensors of an OLMoE as transformers 4 saved them."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    n_experts, words = config["num_experts"], (config["vocab_size"], width)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": words}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        shapes |= {f"{name}.self_attn.{p}_norm.weight": (width,) for p in "qk"}
        for expert in range(n_experts):
            own = f"{name}.mlp.experts.{expert}"
            shapes |= {f"{own}.{p}_proj.weight": (inner, width) for p in ("gate", "up")}
            shapes[f"{own}.down_proj.weight"] = (width, inner)
        shapes[f"{name}.mlp.gate.weight"] = (n_experts, width)
        shapes |= {f"{name}.{p}_layernorm.weight": (width,) for p in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": words}


def build(folder: Path, config: Config) -> None:
    """Writes the unedited checkpoint; each tensor is a random stretch of one pool of numbers."""
    shapes = olmoe_shapes(config)
    chance = random.Random(0)
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    pool = torch.empty(largest + 10_000_000, dtype=torch.bfloat16)
    pool.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    tensors = {}
    for name, shape in shapes.items():
        n = int(np.prod(shape))
        begin = chance.randrange(len(pool) - n)
        tensors[name] = pool[begin : begin + n].view(shape)
    write_shards(folder, lay_out(Stored({}, {}), Rewrite(added=tensors), MAX_SHARD_BYTES))
    (folder / "config.json").write_text(json.dumps(config))


def export(source: Path, folder: Path, layout: str, config: Config, n_kept: int) -> None:
    """The step that is measured."""
    keep = tuple(np.linspace(0, config["num_experts"] - 1, n_kept).astype(int).tolist())
    rewrite = LAYOUTS[layout](read_headers(source), config, keep)
    write_checkpoint(source, folder, rewrite)


def identify(source: Path, folder: Path) -> None:
    """What `prune` and `reweight` do first: is this, byte for byte, the model that was profiled?"""
    folder.mkdir()
    (folder / "fingerprint").write_text(Source(str(source), source).fingerprint)


def copy(source: Path, folder: Path, is_synced: bool) -> None:
    """`cp`, and what makes its outcome as safe as that of the export."""
    subprocess.run(["cp", "-r", source, folder], check=True)
    for file in folder.iterdir() if is_synced else []:
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())


def measured(source: Path, folder: Path, work: Callable[..., None], *rest: object) -> Step:
    """Runs a step in a process of its own, from a cold page cache."""
    for file in source.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    process = context.Process(target=_tell, args=(told, work, (source, folder, *rest)))
    process.start()
    elapsed_s, cpu_s, peak_mb = told.get()
    process.join()
    return Step(elapsed_s, cpu_s, sum(f.stat().st_size for f in folder.iterdir()), peak_mb)


def _tell(told: "multiprocessing.SimpleQueue[tuple[float, float, float]]", work, arguments) -> None:
    started, cpu_before_s = time.perf_counter(), sum(os.times()[:4])
    work(*arguments)
    elapsed_s, cpu_s = time.perf_counter() - started, sum(os.times()[:4]) - cpu_before_s
    # Not ru_maxrss: that starts from the peak of the process that started this one.
    status = Path("/proc/self/status").read_text().split()
    told.put((elapsed_s, cpu_s, int(status[status.index("VmHWM:") + 1]) / 1000))


def rounds(place: Path, config: Config, layouts: list[str], args: argparse.Namespace) -> list[list]:
    """One row per step: the export, `cp` of its output, `cp` with its files synced."""
    rows = []
    for layout in layouts * args.rounds:
        out, copied = place / layout, place / "copy"
        steps = {f"export, {layout}": (place / "m", out, export, layout, config, args.keep)}
        steps |= {"cp": (out, copied, copy, False), "cp, synced": (out, copied, copy, True)}
        steps |= {"fingerprint of the source": (place / "m", copied, identify)}
        for name, (source, folder, work, *rest) in steps.items():
            step = measured(source, folder, work, *rest)
            rows.append([name, step.elapsed_s, step.cpu_s, step.size_bytes, step.peak_mb])
            if folder == copied:
                shutil.rmtree(copied)
            os.sync()
        for row in rows[-4:]:
            row.append(rows[-4][1] / row[1])
        shutil.rmtree(out)
    return rows


def main() -> None:
    """Reads the command line, builds, measures, prints a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--place", type=Path, help="a folder on a disk with 30 GB free")
    parser.add_argument("--keep", type=int, default=32)
    parser.add_argument("--layers", type=int, help="fewer than the config says")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    args = parser.parse_args()
    config = json.loads(args.config.read_text())
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    with tempfile.TemporaryDirectory(dir=args.place) as folder:
        build(Path(folder) / "m", config)
        size_bytes = sum(file.stat().st_size for file in (Path(folder) / "m").iterdir())
        rows = rounds(Path(folder), config, args.layout or list(LAYOUTS), args)
        title = f"{config['num_experts']} → {args.keep} experts of {size_bytes:,} bytes, bf16"
    columns = ("step", "seconds", "CPU s", "bytes written", "peak MB", "export / it")
    specs = ("", ".1f", ".1f", ",d", ".0f", ".2f")
    print(as_markdown(Table(title, tuple(map(Column, columns, specs)), rows)))
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
