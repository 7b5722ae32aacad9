"""A profile larger than memory: `--layerwise` beside `--device-map auto --offload`, by one limit.

    python -m benchmarks.layerwise --quiz DATA/mmlu --tokenizer DATA/olmoe --place /fast/disk
    python -m benchmarks.layerwise ... --place DIR --layers 4 --width 256 --experts 16 --tokens 2000

An OLMoE of the real size (13.8 GB in bfloat16, random weights) is made shard by shard, and its
fingerprint is taken, which later commands remember. Then a process of each way profiles the same
texts. Its memory is limited by a cgroup, page cache included, where one can be made, else by
`ulimit -d`. Bytes are of /proc/self/io: `read_bytes` came from the disk (the files leave the page
cache before each run), `rchar` were asked of the system by read(), mapped files left out.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.common import ENVIRONMENT, TOKENIZER_FILES, parser, report, text_rows

_CGROUPS = Path("/sys/fs/cgroup")
_RUN = """
import json, sys
from expertcut.cli import main
try: main()
except SystemExit as stopped: assert not stopped.code, stopped.code
words = open('/proc/self/status').read().split()
io = dict(line.split(': ') for line in open('/proc/self/io').read().splitlines())
peak = int(words[words.index('VmHWM:') + 1]) * 1024
print(json.dumps({'peak': peak, 'rchar': int(io['rchar']), 'read_bytes': int(io['read_bytes'])}))
"""


def write_model(folder: Path, tokenizer: Path, n_layers: int, width: int, n_experts: int) -> int:
    """Writes a random OLMoE with one shard in memory at a time; its bytes."""
    folder.mkdir(parents=True)
    config = json.loads((tokenizer / "config.json").read_text())
    inner, n_words = width // 2, config["vocab_size"]
    config |= {"num_hidden_layers": n_layers, "hidden_size": width, "intermediate_size": inner}
    config |= {"num_experts": n_experts, "num_attention_heads": 16, "num_key_value_heads": 16}
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    random, index, size = torch.Generator().manual_seed(0), dict[str, str](), 0

    def matrix(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=random) * 0.02).bfloat16()

    for shard in range(n_layers + 1):
        tensors = {}
        if shard == n_layers:
            tensors |= {f"{n}.weight": matrix(n_words, width) for n in ("lm_head",)}
            tensors["model.embed_tokens.weight"] = matrix(n_words, width)
            tensors["model.norm.weight"] = torch.ones(width).bfloat16()
        else:
            layer = f"model.layers.{shard}."
            for name in ("q", "k", "v", "o"):
                tensors[f"{layer}self_attn.{name}_proj.weight"] = matrix(width, width)
            for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm"):
                tensors[f"{layer}{name}.weight"] = torch.ones(width).bfloat16()
            tensors[f"{layer}post_attention_layernorm.weight"] = torch.ones(width).bfloat16()
            tensors[f"{layer}mlp.gate.weight"] = matrix(n_experts, width)
            for expert in range(n_experts):
                for name, shape in (("gate", (inner, width)), ("up", (inner, width))):
                    tensors[f"{layer}mlp.experts.{expert}.{name}_proj.weight"] = matrix(*shape)
                tensors[f"{layer}mlp.experts.{expert}.down_proj.weight"] = matrix(width, inner)
        file = f"model-{shard + 1:05}-of-{n_layers + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        size += (folder / file).stat().st_size
    content = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return size


def _join(processes: Path) -> None:
    processes.write_text(str(os.getpid()))


@contextmanager
def limited(limit_bytes: int) -> Iterator[tuple[str, object]]:
    """A limit by name, and what a new process calls to be under it."""
    own = dict(
        line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()
    )
    for controller, file in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        root = _CGROUPS / controller / own.get(controller, "/missing").lstrip("/")
        group = root / f"layerwise-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            try:
                (group / file).write_text(str(limit_bytes))
                yield "cgroup", partial(_join, group / "cgroup.procs")
                return
            finally:
                group.rmdir()
    limits = limit_bytes, limit_bytes
    yield "ulimit -d", partial(resource.setrlimit, resource.RLIMIT_DATA, limits)


def forget(folder: Path) -> None:
    """Takes files out of the page cache."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Prints a row for each way."""
    options = parser(__doc__, "layerwise")
    options.add_argument("--place", type=Path, required=True, help="a folder with room for 45 GB")
    options.add_argument("--layers", type=int, default=16)
    options.add_argument("--width", type=int, default=2048)
    options.add_argument("--experts", type=int, default=64)
    options.add_argument("--tokens", type=int, default=20_000)
    options.add_argument("--limit", type=float, default=3.0, help="GB of memory")
    options.add_argument("--ways", nargs="+", default=["layerwise", "offload"])
    given = options.parse_args()
    place = given.place.resolve()
    model, text, environment = place / "olmoe", place / "text.jsonl", {**os.environ, **ENVIRONMENT}
    environment |= {"OMP_NUM_THREADS": str(given.threads), "EXPERTCUT_CACHE": str(place / "cache")}
    if not model.exists():
        write_model(model, given.tokenizer, given.layers, given.width, given.experts)
        time.sleep(11)  # a fingerprint of fresher files is not remembered
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    if not text.exists():
        rows = text_rows(given.quiz, given.tokenizer, [1000] * -(-given.tokens // 1000))
        text.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    code = (
        "import sys; from expertcut.models.load import find_source as f; f(sys.argv[1]).fingerprint"
    )
    subprocess.run([sys.executable, "-c", code, model], env=environment, check=True)
    ways = {
        "layerwise": ["--layerwise"],
        "offload": ["--device-map", "auto", "--max-memory", f"cpu={given.limit / 2}GB"],
    }
    ways["offload"] += ["--offload", str(place / "offload")]
    found = []
    for way in given.ways:
        forget(place)
        words = ["profile", model, "--text", text, "--dtype", "stored", "--threads", given.threads]
        command = [sys.executable, "-c", _RUN, *words, *ways[way], "--out", place / f"by-{way}"]
        shutil.rmtree(place / f"by-{way}", ignore_errors=True)
        began = time.monotonic()
        with limited(round(given.limit * 1e9)) as (by, join):
            done = subprocess.run(
                [str(word) for word in command],
                env=environment, capture_output=True, text=True, preexec_fn=join, check=False,
            )  # fmt: skip
        seconds = time.monotonic() - began
        if done.returncode:
            print(f"{way} ended with {done.returncode}: {done.stderr[-800:]}", flush=True)
            continue
        used = json.loads(done.stdout.splitlines()[-1])
        gigabytes = [used[name] / 1e9 for name in ("peak", "read_bytes", "rchar")]
        times = max(used["read_bytes"], used["rchar"]) / size
        found.append([way, by, given.limit, seconds, *gigabytes, times])
    heads = {"way": "", "limited by": "", "limit GB": ".1f", "seconds": ",.0f"}
    heads |= {"peak GB": ".2f", "read_bytes GB": ".1f", "rchar GB": ".1f", "x checkpoint": ".2f"}
    title = f"{given.tokens:,} tokens through {size / 1e9:.2f} GB of weights"
    report(given.out, title, heads, found, size=size)
    chunks = [sorted(f.read_bytes() for f in place.glob(f"by-{w}/chunks/*")) for w in given.ways]
    print("chunks equal" if all(c == chunks[0] != [] for c in chunks) else "chunks differ")


if __name__ == "__main__":
    main()
