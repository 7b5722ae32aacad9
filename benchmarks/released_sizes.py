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
    source = SimpleNamespace(id=size.name, revision=None, fingerprint="")
    found: Any = SimpleNamespace(blocks=blocks[-1:], source=source)
    return model_info(found).blocks[0]


class RandomProfile(ChunkedRun):
    """A profile of a quiz whose routing is drawn at random."""

    info: ProfileInfo

    def __init__(self, model: Path, block: BlockInfo, quiz: Quiz) -> None:
        self.quiz, self.waits = quiz, True
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
    kept, after = [], []
    for sparsity in SPARSITIES:
        choice = _choose(profile, folder, sparsity, "stock")
        kept.append(len(next(iter(choice.plan.edits.values())).keep))
        before, cut = planned_sizes(choice.profile, choice.plan)
        after.append(cut[1])
    try:
        choice = _choose(profile, folder, SPARSITIES[-1], "exact")
        exact_bytes = planned_sizes(choice.profile, choice.plan)[1][1]
    except ContractError:
        exact_bytes = None
    settings = prune.PruneSettings.read(keep=block.experts)
    return Planned(
        released=size,
        block=block,
        n_layers=len(random.info.model.blocks),
        allowed=counts(settings, random.info.model.blocks),
        n_parameters=before[0],
        size_bytes=before[1],
        kept=tuple(kept),
        cut_bytes=tuple(after),
        exact_bytes=exact_bytes,
        n_active=before[0] - _idle(model, block.top_k),
    )


def _idle(model: Path, top_k: int) -> int:
    """Parameters of the experts that one token does not use."""
    headers, n_idle = read_headers(model), 0
    for block in find_disk_blocks(headers).values():
        own = (*block.fused, *(name for parts in block.by_expert for name in parts.values()))
        n_all = sum(math.prod(headers[name].shape) for name in own)
        n_idle += n_all * (block.n_experts - top_k) // block.n_experts
    return n_idle


def _choose(profile: Path, folder: Path, sparsity: float, layout: str) -> prune.Choice:
    """Plans and writes plan.json, as `expertcut prune --plan-only` does."""
    out = folder / f"{layout}-{sparsity}"
    settings = prune.PruneSettings.read(
        profile=[str(profile)], sparsity=sparsity, layout=layout, plan_only=True, out=out
    )
    choice = prune.choose(settings, prune.SILENT)
    prune.write(choice, settings, prune.SILENT)
    return choice


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
        "refused" if planned.exact_bytes is None else unit(planned.exact_bytes),
    ]


HEADS = (
    *("model", "released as", "MoE layers × experts", "may keep a layer", "parameters", "bf16"),
    *("25 % cut, keeps: size", "50 % cut", "50 % cut, exact"),
)


TOKENS, PASS_TOKENS = 1_000_000, 2048
DISK_BYTES_S, FLOPS, DEVICE_BYTES = 2e9, 1e14, 80e9  # stated, not measured
SPARE = 1.25  # as `fits_in_memory` asks for


def way_row(planned: Planned) -> list[str]:
    """A row of the second table: a profile of a million tokens, by arithmetic alone."""
    size, passes = planned.size_bytes, -(-TOKENS // PASS_TOKENS)
    id_bytes = 1 if planned.block.experts <= 256 else 2
    routes = TOKENS * planned.n_layers * planned.block.top_k * id_bytes
    hidden = TOKENS * planned.released.config["hidden_size"] * 2
    cells = [
        f"{planned.released.label}: {planned.released.name}",
        unit(size),
        f"{planned.n_active / 1e9:.1f} G",
        f"{math.ceil(size * SPARE / DEVICE_BYTES)}",
        f"{2 * planned.n_active * TOKENS / FLOPS / 3600:.2g} h",
        f"{unit(size * passes)}, {hours(size * passes)}",
        f"{unit(size)}, {hours(size)}",
        unit(hidden),
        unit(routes),
    ]
    return [cell for cell, is_there in zip(cells, _is_there(), strict=True) if is_there]


def hours(n_bytes: float) -> str:
    """Time to read them from disk."""
    return f"{n_bytes / DISK_BYTES_S / 3600:.2g} h"


def _is_there() -> list[bool]:
    """Which columns of `way_row` belong to options that this version has."""
    layerwise = "layerwise" in ProfileSettings.model_fields
    return [True] * 6 + [layerwise] * 2 + [True]


def way_heads() -> tuple[str, ...]:
    """The heads of the second table."""
    heads = (
        *("model", "bf16", "active", "80 GB devices", "operations"),
        *("`--offload` reads", "`--layerwise` reads", "hidden states", "routes"),
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


def planned_all() -> Iterator[Planned]:
    """Every size in turn."""
    for size in released_sizes():
        with tempfile.TemporaryDirectory() as folder:
            yield plan(size, Path(folder))


def main() -> None:
    """Plans all sizes, and prints or writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    options = parser.parse_args()
    rows, ways = [], []
    for planned in planned_all():
        rows.append(size_row(planned))
        print("; ".join(rows[-1]), flush=True)
        if planned.released.label:
            ways.append((planned.size_bytes, way_row(planned)))
            print("; ".join(ways[-1][1]), flush=True)
    if options.write:
        replace_table("released sizes", table(HEADS, rows))
        replace_table("ways", table(way_heads(), [row for _, row in sorted(ways)]))


if __name__ == "__main__":
    main()
