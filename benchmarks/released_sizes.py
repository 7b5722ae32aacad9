"""What a cut of each released size would weigh, by `prune --plan-only`, and what a profile reads.

For each size of `released_sizes.yaml` a folder is made with its config.json and a safetensors file
that has the header of the real checkpoint in bfloat16 and, behind it, a hole in place of the values
(names and shapes are those that the family's class in transformers saves). A random profile in the
real format stands beside it: blocks are probed on a narrow model of the same routing. Then the
command plans cuts of 25 and 50 % of the experts. Nothing is downloaded, and no weight is read.

    python -m benchmarks.released_sizes             # prints the tables
    python -m benchmarks.released_sizes --write     # and puts them into docs/scaling.md
"""

import argparse
import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from benchmarks.common import RUNS
from expertcut.checkpoints.size import planned_sizes
from expertcut.checkpoints.tensor_names import find_disk_blocks
from expertcut.commands import prune
from expertcut.commands.profile import ProfileSettings
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits.selection import counts
from expertcut.errors import ContractError
from expertcut.models.find_blocks import find_blocks
from expertcut.models.safetensors_index import SINGLE_FILE, read_headers
from expertcut.profiling.measure import ChunkedRun, model_info
from expertcut.profiling.schema import BlockInfo, ModelInfo, ProfileInfo, Settings, quiz_info
from expertcut.profiling.storage import Arrays
from expertcut.profiling.workers import Work, chunks_of_work
from expertcut.scoring.passes import OnPass, ignore

FACTS = Path(__file__).with_suffix(".yaml")
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN = "<!-- {}: by python -m benchmarks.released_sizes --write -->"
END = "<!-- end of the {} -->"
_AIC = (
    "https://github.com/ai-dynamo/aiconfigurator/blob/095f58a51c4ca8e61b66ec108d86f223f8d559ce/"
    "aic-core/src/aiconfigurator_core/model_configs/{}_config.json"
)
SPARSITIES = (0.25, 0.5)
CUTS = (*(("stock", sparsity) for sparsity in SPARSITIES), ("exact", SPARSITIES[-1]))
N_QUESTIONS = 20
# Of the narrow model that is probed; what decides the routing stays as it is.
_NARROW = {
    **{"hidden_size": 64, "intermediate_size": 16, "moe_intermediate_size": 16},
    **{"shared_expert_intermediate_size": 16, "vocab_size": 64, "num_attention_heads": 4},
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4},
}


@dataclasses.dataclass(frozen=True)
class Released:
    """A released size: facts of its config.json, and where they were read."""

    name: str
    source: str
    config: Mapping[str, Any]
    stored: str = "bf16"  # how the released weights are stored; planned is bf16
    label: str = ""  # of the sizes that the page computes with

    @property
    def link(self) -> str:
        """The page with the facts."""
        short = self.source.removeprefix("aic/")
        return self.source if short == self.source else _AIC.format(short)


@dataclasses.dataclass(frozen=True)
class Planned:
    """What the command plans for a size: bytes before, and after each cut."""

    released: Released
    block: BlockInfo
    n_layers: int
    allowed: range  # experts a layer
    n_parameters: int
    size_bytes: int
    kept: tuple[int, ...]  # at each of SPARSITIES
    cut_bytes: tuple[int, ...]
    exact_bytes: int | None  # at the last of them in layout exact; None where that is refused
    n_active: int  # parameters that a token uses
    layer_bytes: int  # of the largest decoder layer


def released_sizes() -> list[Released]:
    """All sizes, by family."""
    return [Released(**facts) for facts in yaml.safe_load(FACTS.read_text(encoding="utf-8"))]


def save_header(size: Released, folder: Path) -> None:
    """Writes config.json, and a safetensors file without values."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(size.config), dtype=torch.bfloat16)
    # Tied weights have one name there.
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    state = {name: tensor for name, tensor in model.state_dict().items() if name in own}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in revert_weight_conversion(model, state).items():
        end = begin + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    content = json.dumps(header).encode()
    with (folder / SINGLE_FILE).open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + begin)
    (folder / "config.json").write_text(json.dumps(dict(size.config)))


def _config(facts: Mapping[str, Any], **changes: object) -> Any:
    values = {**facts, **changes}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def probed_block(size: Released) -> BlockInfo:
    """The last MoE block of a narrow model with the routing of this size."""
    facts = size.config
    narrow = {k: v for k, v in _NARROW.items() if facts.get(k)}
    if facts["num_attention_heads"] == facts["num_key_value_heads"]:
        narrow["num_key_value_heads"] = narrow["num_attention_heads"]
    else:
        narrow["num_key_value_heads"] = 2
    n_layers = facts.get("full_attention_interval", facts.get("first_k_dense_replace", 0) + 1)
    torch.manual_seed(0)
    config = _config(facts, **narrow, num_hidden_layers=n_layers, initializer_range=0.25)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    blocks = find_blocks(model, torch.arange(16)[None])
    source = SimpleNamespace(id=size.name, revision=None, fingerprint="", contract=None)
    found: Any = SimpleNamespace(blocks=blocks[-1:], source=source)
    return model_info(found).blocks[0]


class RandomProfile(ChunkedRun):
    """A profile of a quiz whose routing is drawn at random."""

    info: ProfileInfo

    def __init__(self, model: Path, block: BlockInfo, quiz: Quiz) -> None:
        self.quiz, self.waits = quiz, True
        no_model: Any = SimpleNamespace(layers=None, group=None)
        self.moe = no_model
        names = (b.rpartition(".") for b in find_disk_blocks(read_headers(model)))
        layers = sorted(int(re.findall(r"\.(\d+)$", name)[0]) for name, _, _ in names)
        blocks = [
            block.model_copy(update={"name": re.sub(r"\.\d+(?=\.|$)", f".{layer}", block.name)})
            for layer in layers
        ]
        self.info = ProfileInfo(
            # The fingerprint would read every byte; a plan by a profile alone needs none.
            model=ModelInfo(id=str(model), revision=None, fingerprint="0" * 64, blocks=blocks),
            quiz=quiz_info(quiz, None),
            settings=Settings(
                **{"dtype": "bfloat16", "device_type": "cpu", "threads": 1, "batch_tokens": 2048},
                **{"stats": "answer", "way": "shared", "experts_implementation": "eager"},
                **{"attention": "sdpa", "torch": torch.__version__, "cpu_capability": None},
            ),
        )

    def work(self) -> dict[str, Work]:
        """Chunks of questions by file name."""
        return chunks_of_work(self.info, self.quiz)

    def measure(self, work: Work, on_pass: OnPass) -> tuple[Arrays, int]:
        """Random arrays of a chunk of questions."""
        questions: Any = work.questions
        rng, block = np.random.default_rng(0), self.info.model.blocks[0]
        shape_NLE = (len(questions), len(self.info.model.blocks), block.experts)
        alpha_NLE = rng.dirichlet(np.ones(block.experts), shape_NLE[:2]).astype(np.float32)
        chosen_NLK = np.argsort(-alpha_NLE, axis=-1)[..., : block.top_k].astype(np.int16)
        gap_N = np.ones(len(questions), np.float32)
        logprob_NC = np.log(rng.dirichlet(np.ones(4), len(questions))).astype(np.float32)
        arrays = {
            "alpha_NLE": alpha_NLE,
            "chosen_NLK": chosen_NLK,
            "weight_NLK": np.take_along_axis(alpha_NLE, chosen_NLK.astype(np.int64), axis=-1),
            "gap_N": gap_N,
            "prefix_gap": gap_N[:1],
            "choice_logprob_NC": logprob_NC,
            "answer_N": np.array([q.answer for q in questions], np.uint8),
            "row_N": np.array([q.row for q in questions], np.int32),
        }
        return arrays, 0


def random_quiz(folder: Path) -> Quiz:
    """A few questions of four choices."""
    rows = [
        {"question": f"Question {i}?", "choices": [f"{i} a", f"{i} b", f"{i} c", f"{i} d"],
         "answer": "ABCD"[i % 4]}
        for i in range(N_QUESTIONS)
    ]  # fmt: skip
    file = folder / "quiz.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_quiz(Selection(str(file), shots=0))


def plan(size: Released, folder: Path) -> Planned:
    """Runs the command on a size; `folder` is empty."""
    model, profile = folder / "model", folder / "profile"
    model.mkdir()
    save_header(size, model)
    block = probed_block(size)
    random = RandomProfile(model, block, random_quiz(folder))
    for _ in random.run(profile, ignore):
        pass
    sizes, kept = {}, []
    for layout, sparsity in CUTS:
        settings = prune.PruneSettings.read(
            profile=[str(profile)], sparsity=sparsity, layout=layout, plan_only=True
        )
        choice = prune.choose(settings, prune.SILENT)
        try:
            before, sizes[layout, sparsity] = planned_sizes(choice.profile, choice.plan)
        except ContractError:  # the family has no layout exact
            continue
        kept.append(len(next(iter(choice.plan.edits.values())).keep))
    out = settings.updated(layout="stock", out=folder / "plan")
    prune.run(out, prune.SILENT)  # the whole command
    n_idle, layer_bytes = _idle(model, block.top_k), _largest_layer(model)
    return Planned(
        released=size,
        block=block,
        n_layers=len(random.info.model.blocks),
        allowed=counts(out, random.info.model.blocks),
        n_parameters=before[0],
        size_bytes=before[1],
        kept=tuple(kept[:2]),
        cut_bytes=tuple(sizes["stock", sparsity][1] for sparsity in SPARSITIES),
        exact_bytes=sizes.get(CUTS[-1], (0, None))[1],
        n_active=before[0] - n_idle,
        layer_bytes=layer_bytes,
    )


def _largest_layer(model: Path) -> int:
    """Bytes of the largest decoder layer."""
    by_layer: dict[str, int] = {}
    for name, tensor in read_headers(model).items():
        if layer := re.match(r".*?\.layers\.\d+\.", name):
            by_layer[layer[0]] = by_layer.get(layer[0], 0) + tensor.end - tensor.begin
    return max(by_layer.values())


def _idle(model: Path, top_k: int) -> int:
    """Parameters of the experts that one token does not use."""
    headers, n_idle = read_headers(model), 0
    for block in find_disk_blocks(headers).values():
        own = (*block.fused, *(name for parts in block.by_expert for name in parts.values()))
        n_all = sum(math.prod(headers[name].shape) for name in own)
        n_idle += n_all * (block.n_experts - top_k) // block.n_experts
    return n_idle


def unit(size_bytes: float) -> str:
    """Bytes in GB or TB."""
    return f"{size_bytes / 1e12:.3g} TB" if size_bytes >= 1e12 else f"{size_bytes / 1e9:.3g} GB"


def size_row(planned: Planned) -> list[str]:
    """A row of the first table."""
    block, size, allowed = planned.block, planned.released, planned.allowed
    groups = f", best {block.top_groups} of {block.groups} groups" if block.groups > 1 else ""
    steps = f", by {allowed.step}" if allowed.step > 1 else ""
    cuts = [
        f"{n}: {unit(b)}" for n, b in zip(planned.kept, planned.cut_bytes, strict=True)
    ]  # fmt: skip
    return [
        f"[{size.name}]({size.link})",
        size.stored,
        f"{planned.n_layers} × {block.experts}, top {block.top_k}{groups}",
        f"{allowed[0]} to {allowed[-1]}{steps}",
        f"{planned.n_parameters / 1e9:.1f} G",
        unit(planned.size_bytes),
        *cuts,
    ]


HEADS = (
    *("model", "released as", "MoE layers × experts", "may keep a layer", "parameters", "bf16"),
    *("25 % cut, keeps: size", "50 % cut"),
)


TOKENS, PASS_TOKENS = 1_000_000, 2048
DISK_BYTES_S, FLOPS, CPU_FLOPS, DEVICE_BYTES = 2e9, 1e14, 1.68e11, 80e9  # stated
SPARE = 1.25  # as `fits_in_memory` asks for


def way_row(planned: Planned) -> list[str]:
    """A row of the second table: a profile of a million tokens, by arithmetic alone."""
    size, passes = planned.size_bytes, -(-TOKENS // PASS_TOKENS)
    flop = 2 * planned.n_active * TOKENS
    id_bytes = 1 if planned.block.experts <= 256 else 2
    routes = TOKENS * planned.n_layers * planned.block.top_k * id_bytes
    hidden = TOKENS * planned.released.config["hidden_size"] * 2
    cells = [
        f"{planned.released.label}: {planned.released.name}",
        unit(size),
        f"{planned.n_active / 1e9:.1f} G",
        f"{math.ceil(size * SPARE / DEVICE_BYTES)}",
        f"{time_text(flop / FLOPS)}, {time_text(flop / CPU_FLOPS)}",
        f"{unit(size * passes)}, {time_text(size * passes / DISK_BYTES_S)}",
        f"{unit(size)}, {time_text(size / DISK_BYTES_S)}",
        f"{unit(2 * planned.layer_bytes)} + {unit(hidden)}",
        unit(routes),
    ]
    return [cell for cell, is_there in zip(cells, _is_there(), strict=True) if is_there]


def time_text(elapsed_s: float) -> str:
    """A time in its largest unit."""
    unit_s, name = next((u, n) for u, n in ((3600, "h"), (60, "min"), (0, "s")) if elapsed_s >= u)
    return f"{elapsed_s / (unit_s or 1):,.3g} {name}"


def _is_there() -> list[bool]:
    """Which columns of `way_row` belong to options that this version has."""
    layerwise = "layerwise" in ProfileSettings.model_fields
    return [True] * 6 + [layerwise] * 2 + [True]


def way_heads() -> tuple[str, ...]:
    """The heads of the second table."""
    heads = (
        *("model", "bf16", "active", "80 GB devices", "operations: 10¹⁴, 1.68·10¹¹ a second"),
        *("`--offload` reads", "`--layerwise` reads", "and holds", "routes"),
    )
    return tuple(head for head, is_there in zip(heads, _is_there(), strict=True) if is_there)


def table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def replace_table(name: str, content: str) -> None:
    """Puts a table between its markers in the page."""
    begin, end = BEGIN.format(name), END.format(name)
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(begin)
    PAGE.write_text(f"{head}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")


def planned_all(kept_in: Path) -> Iterator[Planned]:
    """Every size in turn; those in a file of an earlier run that ended are taken from it."""
    known = json.loads(kept_in.read_text()) if kept_in.exists() else {}
    for size in released_sizes():
        if size.name not in known:
            with tempfile.TemporaryDirectory() as folder:
                facts = dataclasses.asdict(plan(size, Path(folder)))
            block, allowed = facts.pop("block").model_dump(), facts.pop("allowed")
            steps = [allowed.start, allowed.stop, allowed.step]
            known[size.name] = {**facts, "block": block, "allowed": steps}
            kept_in.parent.mkdir(exist_ok=True)
            kept_in.write_text(json.dumps(known, indent=1))
        facts = dict(known[size.name])
        given = {"released": size, "block": BlockInfo(**facts["block"])}
        yield Planned(**{**facts, **given, "allowed": range(*facts["allowed"])})


def main() -> None:
    """Plans all sizes, and prints or writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    parser.add_argument("--out", type=Path, default=RUNS / "released_sizes.json")
    options = parser.parse_args()
    rows, ways = [], []
    for planned in planned_all(options.out):
        rows.append(size_row(planned))
        exact = "refused" if planned.exact_bytes is None else unit(planned.exact_bytes)
        print("; ".join(rows[-1]), f"(exact: {exact})", flush=True)
        if planned.released.label:
            ways.append((planned.size_bytes, way_row(planned)))
            print("; ".join(ways[-1][1]), flush=True)
    if options.write:
        replace_table("released sizes", table(HEADS, rows))
        replace_table("ways", table(way_heads(), [row for _, row in sorted(ways)]))


if __name__ == "__main__":
    main()
