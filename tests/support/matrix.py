"""The matrix: every command on tiny models of every family, held to plain transformers by hand.

`python -m tests.support.matrix` runs all of it and writes the tables into docs/families.md; with
names of families only their rows of the matrix, with `families` only the table of families.
tests/models/test_matrix.py holds each number to its limit, and the tables to what is run.
"""

import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from expertcut.checkpoints.build import engine_as_profiled
from expertcut.checkpoints.exact import REFUSED as NOT_EXACT
from expertcut.checkpoints.exact import ExactWriter
from expertcut.checkpoints.tensor_names import match_blocks
from expertcut.cli import main
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits.plan import BlockEdit, PlanFile, load_plan
from expertcut.edits.splits import questions_for
from expertcut.errors import ContractError
from expertcut.evaluation.search_results import load_audit, load_sweep
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import LoadOptions, MoeModel, find_source
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.storage import Profile, load_profile
from expertcut.scoring.engine import ask
from expertcut.scoring.passes import scoring_mode
from tests.conftest import FAMILIES, make_checkpoint, open_model, write_quiz
from tests.support.families import MORE
from tests.support.plain import GATES, Plain

OTHERS = re.compile(r"(.*\.)?(vision|visual|audio|talker|code2wav)")  # tensors of other parts
COUNTS = {"dev": 1, "val": 4, "test": 4}
LIMIT = 3  # questions of each subject that a sweep asks
SAMPLE = 3  # experts that an audit removes
BIAS = 2.0  # in logits, of the boost
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN = "<!-- {}: by python -m tests.support.matrix -->"
END = "<!-- end of the {} -->"

# What is run: a family as tests/conftest.py or tests/support/families.py has it, or changed.
WORLDS: dict[str, tuple[str, dict[str, object]]] = {
    **{family: (family, {}) for family in (*FAMILIES, *MORE)},
    "axk2, in groups": ("axk2", {"n_group": 2, "topk_group": 1}),
    "cohere2_moe, softmax": ("cohere2_moe", {"expert_selection_fn": "softmax"}),
    "deepseek_v4, no hash layer": ("deepseek_v4", {"mlp_layer_types": ["moe"] * 3}),
    "laguna, no cap": ("laguna", {"moe_router_logit_softcapping": 0.0}),
    "nemotron_h, no latent": ("nemotron_h", {"moe_latent_size": None}),
}
# What people call the models of a type.
NAMES = {
    "afmoe": "Trinity",
    "aria": "Aria, with images",
    "aria_text": "Aria",
    "axk1": "A.X-K1",
    "axk2": "A.X-K2",
    "bailing_hybrid": "Ling and Ring 2.5",
    "beam": "Beam",
    "cohere2_moe": "Command A+",
    "deepseek_ocr2": "DeepSeek-OCR-2",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3, Kimi-K2",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v4": "DeepSeek-V4",
    "dots1": "dots.llm1",
    "dots3_note": "dots3 Note, with images and sounds",
    "dots3_note_text": "dots3 Note",
    "ernie4_5_moe": "ERNIE-4.5",
    "exaone_moe": "K-EXAONE",
    "flex_olmo": "FlexOlmo",
    "flint": "Flint",
    "gemma4": "Gemma-4, with images",
    "gemma4_text": "Gemma-4",
    "glm4_moe": "GLM-4.5 to 4.7",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm4v_moe": "GLM-4.5V, GLM-4.6V",
    "glm5_next": "GLM-5.3-Flash",
    "glm_moe_dsa": "GLM-5",
    "gpt_oss": "GPT-OSS",
    "granitemoe": "Granite-3",
    "granitemoehybrid": "Granite-4",
    "hunyuan_v1_moe": "Hunyuan-A13B",
    "hy_v3": "Hy3",
    "hy_v4": "Hy4",
    "inkling2": "Inkling-2, with images",
    "inkling2_text": "Inkling-2",
    "jamba": "Jamba",
    "kimi_k25": "Kimi-K2.6",
    "kimi_linear": "Kimi-Linear",
    "laguna": "Laguna",
    "lfm2_moe": "LFM2",
    "mellum": "Mellum",
    "mimo_v2_flash": "MiMo-V2-Flash",
    "minimax": "MiniMax-01 and M1",
    "minimax_m2": "MiniMax-M2",
    "minimax_m3_vl": "MiniMax-M3, with images",
    "minimax_m3_vl_text": "MiniMax-M3",
    "mistral3": "Mistral-Small-4, with images",
    "mistral4": "Mistral-Small-4",
    "mistral_large4": "Mistral-Large-4",
    "mixtral": "Mixtral",
    "muse_spark": "Muse Spark",
    "nemotron_h": "Nemotron-3",
    "nemotron_h_omni": "Nemotron-3 Omni",
    "olmoe": "OLMoE",
    "phimoe": "Phi-3.5-MoE",
    "qwen2_moe": "Qwen1.5 and Qwen2 MoE",
    "qwen3_5_moe": "Qwen3.5, with images",
    "qwen3_5_moe_text": "Qwen3.5",
    "qwen3_moe": "Qwen3 MoE",
    "qwen3_next": "Qwen3-Next",
    "qwen3_omni_moe": "Qwen3-Omni",
    "qwen3_omni_moe_thinker": "Qwen3-Omni, thinker alone",
    "qwen3_vl_moe": "Qwen3-VL MoE",
    "qwen4_exp": "Qwen4, with images",
    "qwen4_exp_text": "Qwen4",
    "solar_open": "Solar-Open",
    "step3p7": "Step-3.7-Flash",
    "unlimited_ocr": "Unlimited-OCR",
}
# The parts of a row: what must agree, and what must not be 0.
PARTS = {
    "profile": (("profile",), ()),
    "cut": (("mask",), ("cut",)),
    "sweep": (("cell",), ()),
    "reconstruction": (("reconstruction",), ()),
    "ablation": (("ablation",), ("removed",)),
    "boost": (("boost", "export"), ("boosted",)),
    "merge": (("merge",), ("merged",)),
}
AGREE = tuple(name for agree, _ in PARTS.values() for name in agree)
HEADS = {
    "profile": "profile",
    "mask": "checkpoint = mask",
    "cell": "sweep = checkpoint",
    "reconstruction": "by reconstruction",
    "ablation": "ablation",
    "boost": "boost",
    "export": "boost as exported",
    "merge": "merge",
}
Found = dict[str, float]


class Refused(Exception):
    """A command ended with status 2; in words, the line that it said."""


@dataclass(frozen=True)
class Row:
    """Largest |Δ log p| of any choice between two runs that must agree, and what edits moved.

    `profile`: the profile against plain transformers. `mask`: the written checkpoint in plain
    transformers against the router masked by hand. `cell`: a cell of --sweep against it.
    `ablation`: what audit says of experts against a mask by hand. `boost`: what reweight says of
    its bias at run time against a bias by hand. `export`: what it says of its checkpoint against
    that in plain transformers. `merge`: the merged checkpoint here and there. `reconstruction`:
    `mask` for a cut by that criterion. What edits moved: `cut`, `removed`, `boosted`, `merged`.
    `refused` says by part what a command refused.
    """

    facts: Mapping[str, str]
    found: Found
    refused: Mapping[str, str]


class World:
    """One family's model, its quiz, and what the commands made of them."""

    def __init__(self, root: Path, name: str, quiz: Path) -> None:
        self.root, self.quiz = root, quiz
        self.family, changes = WORLDS[name]
        self.model = make_checkpoint(root / "model", self.family, **changes)
        self.gate = name if name in GATES else self.family
        self.plain = Plain(self.model, self.gate)

    def run(self, command: str, *words: object, out: str) -> None:
        """A command line in this process.

        Raises:
            Refused: it ended with status 2 and one line.
        """
        line = [command, *map(str, words), "--out", str(self.root / out)]
        if command != "profile":
            line[1:1] = ["--profile", str(self.profile.path)]
        printed, said = StringIO(), StringIO()
        with patch.object(sys, "argv", ["expertcut", *line]):
            try:
                with redirect_stdout(printed), redirect_stderr(said):
                    main()
            except SystemExit as stopped:
                status = stopped.code or 0
        torch.set_num_threads(1)
        if status == 2:
            last = said.getvalue().strip().splitlines()[-1]
            assert "Traceback" not in said.getvalue()
            raise Refused(last.replace(f"{self.root}/", ""))
        assert status == 0, f"{' '.join(line)}: {said.getvalue()}"

    def split(self, split: str, limit: int | None = None) -> Quiz:
        return load_quiz(Selection(str(self.quiz), split=split, shots=1, limit=limit))

    @cached_property
    def profile(self) -> Profile:
        self.run(
            *("profile", self.model, "--quiz", self.quiz, "--split", "val", "--shots", 1),
            out="profile",
        )
        return load_profile(self.root / "profile")

    @cached_property
    def blocks(self) -> tuple[BlockInfo, ...]:
        return self.profile.info.model.blocks

    @cached_property
    def held_out(self) -> Quiz:
        """What prune, reweight, merge and audit judge by."""
        return questions_for(self.profile, is_fitting=True).held_out

    @cached_property
    def base(self) -> Tensor:
        """The unedited model's answers to the held-out questions, in plain transformers."""
        return self.plain.logprobs(self.held_out)

    @cached_property
    def asked(self) -> Quiz:
        """What a sweep asks."""
        return self.split("test", LIMIT)

    def written(self, out: str) -> Plain:
        """A checkpoint that a command wrote, which must load without a complaint."""
        plain = Plain(self.root / out, self.gate)
        assert not any(plain.info.values()), plain.info
        return plain

    def plan(self, out: str) -> PlanFile:
        return load_plan(self.root / out)

    def kept(self, out: str) -> dict[str, tuple[int, ...]]:
        return {name: edit.keep for name, edit in self.plan(out).blocks.items()}

    def masks(self, keep: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """What forbids all other experts."""
        shifts = {}
        for block in self.blocks:
            if len(keep[block.name]) < block.experts:
                shifts[block.name] = torch.full((block.experts,), -torch.inf)
                shifts[block.name][list(keep[block.name])] = 0
        return shifts


def measure(world: World, parts: tuple[str, ...] = tuple(PARTS)) -> Row:
    """All of it for one family."""
    found: Found = {}
    refused = {}
    for part in parts:
        try:
            found |= _MEASURES[part](world)
        except Refused as error:
            refused[part] = str(error)
            if part == "profile":
                break
    facts = {} if "profile" in refused else facts_of(world.model)
    return Row(facts, found, refused)


def _profile(world: World) -> Found:
    """The answers; every sum over tokens and α must be those of each expert run alone."""
    sums, alpha_NLE = world.plain.observed(world.split("val"))
    for name, sum_LE in sums.items():
        rtol = {"tokens": 0, "residual_shift": 1e-4}.get(name, 1e-5)
        np.testing.assert_allclose(world.profile.token_sum(name), sum_LE, rtol=rtol, err_msg=name)
    np.testing.assert_allclose(world.profile.array("alpha_NLE"), alpha_NLE, atol=1e-5)
    found = torch.from_numpy(world.profile.answers.logprob_NC)
    return {"profile": _largest(found, world.plain.logprobs(world.split("val")))}


def _cut(world: World) -> Found:
    # Its own questions are asked of the cut by reconstruction.
    world.run(
        *("prune", "--keep-fraction", 0.5, "--by", "reap", "--fold", "off", "--no-verify"),
        out="cut",
    )
    written, masked, keep = _cut_and_masked(world, "cut")
    check_bytes(world.model, world.root / "cut", keep)
    base = world.plain.logprobs(world.asked)
    return {"mask": _largest(written, masked), "cut": _largest(masked, base)}


def check_bytes(model: Path, cut: Path, keep: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor of a cut has the bytes of the model's: all rows, or those of kept experts.

    In its config.json the counts of experts differ and nothing else.
    """
    configs = (json.loads((path / "config.json").read_text()) for path in (model, cut))
    assert {*_changed(*configs)} == {(8, n) for n in {*map(len, keep.values())}}
    before, after = (load_file(path / "model.safetensors") for path in (model, cut))
    keep_of = {re.findall(r"\.(\d+)", name)[-1]: kept for name, kept in keep.items()}
    n_rows, left = 0, set(before)
    for name, tensor in after.items():
        number = re.search(r"\.(\d+)\.", name)
        kept = keep_of.get(number[1], ()) if number and not OTHERS.match(name) else ()
        expert = re.search(r"(?<=\.experts\.)\d+(?=\.)", name)
        place = "" if expert is None else str(kept[int(expert[0])]) if kept else expert[0]
        named = re.sub(r"(?<=\.experts\.)\d+(?=\.)", place, name)
        wanted = before[named]
        if wanted.shape != tensor.shape:
            axis = [a == b for a, b in zip(wanted.shape, tensor.shape, strict=True)].index(False)
            wanted, n_rows = wanted.index_select(axis, torch.tensor(kept)), n_rows + 1
        assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name
        left.remove(named)
    assert n_rows >= len(keep)  # at least of each router
    assert all(re.search(r"\.experts\.\d+\.", n) and not OTHERS.match(n) for n in left), left


def _changed(one: Any, other: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict) and [*one] == [*other]:
        for key in one:
            yield from _changed(one[key], other[key])
    elif one != other:
        yield one, other


def _sweep(world: World) -> Found:
    world.run(
        *("prune", "--sweep", 0.5, "--by", "reap", "--fold", "off", "--limit", LIMIT), out="sweep"
    )
    (cell,) = load_sweep(world.root / "sweep").cells
    assert cell.keep == world.kept("cut")
    (place,) = (world.root / "sweep" / "cells").glob("keep-*")
    found = torch.from_numpy(load_profile(place).answers.logprob_NC)
    return {"cell": _largest(found, world.written("cut").logprobs(world.asked))}


def _reconstruction(world: World) -> Found:
    world.run("prune", "--keep", 6, "--by", "reconstruction", "--fold", "off", out="reconstructed")
    written, masked, _ = _cut_and_masked(world, "reconstructed")
    return {"reconstruction": _largest(written, masked)}


def _cut_and_masked(world: World, out: str) -> tuple[Tensor, Tensor, dict[str, tuple[int, ...]]]:
    """A checkpoint's answers, those of the unedited model masked by hand, and what stays."""
    keep = world.kept(out)
    written = world.written(out).logprobs(world.asked)
    return written, world.plain.logprobs(world.asked, world.masks(keep)), keep


def _ablation(world: World) -> Found:
    criteria = "reap,reconstruction" if "reconstructed" in _made(world) else "reap"
    world.run("audit", "--sample", SAMPLE, "--by", criteria, out="audit")
    harms = load_audit(world.root / "audit").harms
    differences = []
    for harm in harms:
        keep = {block.name: tuple(range(block.experts)) for block in world.blocks}
        name = world.blocks[harm.layer].name
        keep[name] = tuple(e for e in keep[name] if e != harm.expert)
        moved_NC = world.base - world.plain.logprobs(world.held_out, world.masks(keep))
        loss = float(_right(moved_NC, world.held_out).mean())
        differences += [abs(loss - harm.logprob), abs(float(moved_NC.abs().max()) - harm.largest)]
    return {"ablation": max(differences), "removed": max(harm.largest for harm in harms)}


def _made(world: World) -> set[str]:
    return {path.name for path in world.root.iterdir()}


def _boost(world: World) -> Found:
    layer = len(world.blocks) - 1
    # Behind the last layer only answers are read.
    expert = int(world.profile.layers[layer].appearances_E.argmax())
    world.run("reweight", "--boost", f"{layer}:{expert}={BIAS}", out="boosted")
    proof = world.plan("boosted").proof
    shift_E = torch.zeros(world.blocks[layer].experts)
    shift_E[expert] = BIAS
    by_hand = world.plain.logprobs(world.held_out, {world.blocks[layer].name: shift_E})
    written = world.written("boosted").logprobs(world.held_out)
    said = {row.form: row.right_logprob for row in proof.outcomes}
    against = {row.against: row.max_abs_logprob_diff for row in proof.held_out}
    right = {"bias everywhere": by_hand, "this checkpoint": written, "unedited": world.base}
    far = {
        form: abs(said[form] - float(_right(logprob_NC, world.held_out).mean()))
        for form, logprob_NC in right.items()
    }
    apart = abs(against["the exact bias"] - _largest(written, by_hand))
    return {
        "boost": max(far["bias everywhere"], far["unedited"]),
        "export": max(far["this checkpoint"], apart),
        "boosted": _largest(by_hand, world.base),
    }


def _merge(world: World) -> Found:
    try:
        world.run("merge", "--keep", 6, out="merged")
    except Refused as error:
        advice = next((a for a in ("--no-align", "--router dominant") if a in str(error)), None)
        if advice is None:
            raise
        world.run("merge", "--keep", 6, *advice.split(), out="merged")
    written = world.written("merged").logprobs(world.held_out)
    source = find_source(str(world.root / "merged"))
    found = ask(engine_as_profiled(world.profile, source, LoadOptions()), world.held_out)
    return {"merge": _largest(found, written), "merged": _largest(written, world.base)}


_MEASURES: dict[str, Callable[[World], Found]] = {
    "profile": _profile,
    "cut": _cut,
    "sweep": _sweep,
    "reconstruction": _reconstruction,
    "ablation": _ablation,
    "boost": _boost,
    "merge": _merge,
}


def _largest(a_NC: Tensor, b_NC: Tensor) -> float:
    assert a_NC.shape == b_NC.shape
    return float((a_NC - b_NC).abs().max())


def _right(logprob_NC: Tensor, quiz: Quiz) -> Tensor:
    answers_N = [question.answer for question in quiz]
    return logprob_NC[range(len(answers_N)), answers_N].double()


def facts_of(model: Path) -> dict[str, str]:
    """What the contract found of a checkpoint, in the words of the page."""
    moe = open_model(model)
    block = moe.blocks[-1]
    names = [b.name for b in moe.blocks]
    on_disk = next(iter(match_blocks(moe.source.headers, names)[0].values()))
    factors, rule = block.scaled or ("", block.weights)
    weight = "mixer" if rule is None else "renormalised" if rule.is_renormalised else "α"
    weight += f" · {factors}" if factors else ""
    added = {"score": "to α", "logits": "to the logits", "table": "no"}[block.selection]
    is_split = block.n_groups > 1
    return {
        "α": block.scoring,
        "weight": weight,
        "bias": "no" if block.selection_bias() is None else added,
        "groups": f"{block.top_groups} of {block.n_groups}" if is_split else "no",
        "scored": scoring_mode(moe.model.config, longest=500),
        "experts on disk": "one by one" if on_disk.by_expert else "fused",
        "layouts": _layouts(moe),
        "`easy_ep`": "yes" if all(b.residual for b in moe.blocks) else "no",
    }


def _layouts(moe: MoeModel) -> str:
    if read_config(moe.source.path)["model_type"] in NOT_EXACT:
        return "stock"
    return f"stock, exact{'' if _takes_biases(moe) else ' without biases'}"


def _takes_biases(moe: MoeModel) -> bool:
    """Whether layout exact has a place for biases of all gates."""
    edits = {b.name: BlockEdit(keep=tuple(range(b.n_experts)), bias={0: 1.0}) for b in moe.blocks}
    try:
        ExactWriter().check_biases(moe.source, edits)
    except ContractError:
        return False
    return True


def rows(names: list[str]) -> Iterator[tuple[str, Row]]:
    """Each world in turn."""
    with tempfile.TemporaryDirectory() as root:
        quiz = write_quiz(Path(root) / "quiz", COUNTS)
        for i, name in enumerate(names):
            yield name, measure(World(Path(root) / str(i), name, quiz))


def facts_line(name: str, facts: Mapping[str, str]) -> str:
    """A row of the page's table of families."""
    called = NAMES.get(WORLDS[name][0], "")
    return f"| {' | '.join((called, _typed(name), *facts.values()))} |"


def numbers_line(name: str, row: Row) -> str:
    """A row of the page's matrix."""
    told = []
    for part, (agree, _) in PARTS.items():
        is_refused = part in row.refused
        told += ["refused" if is_refused else _number(row.found[key]) for key in agree]
    return f"| {' | '.join((_typed(name), *told))} |"


def _typed(name: str) -> str:
    """The name of a world with its model_type as code."""
    family, comma, change = name.partition(",")
    return f"`{family}`{comma}{change}"


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def table(name: str) -> list[str]:
    """The rows of one of the page's tables."""
    begin, end = BEGIN.format(name), END.format(name)
    page = PAGE.read_text(encoding="utf-8")
    return page.partition(begin)[2].partition(end)[0].strip().splitlines()[2:]


def write_table(name: str, head: list[str], lines: list[str]) -> None:
    """Into the page, in place of the one that is there."""
    begin, end = BEGIN.format(name), END.format(name)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines]
    page = "\n".join((f"{before}{begin}\n", *lines, f"\n{end}{rest.partition(end)[2]}"))
    PAGE.write_text(page, encoding="utf-8")


def write_families() -> None:
    """What the contract finds of every model, as a table; the matrix stays as it is."""
    facts_by_name = {}
    with tempfile.TemporaryDirectory() as root:
        for i, (name, (family, changes)) in enumerate(WORLDS.items()):
            with suppress(ContractError):
                facts_by_name[name] = facts_of(
                    make_checkpoint(Path(root) / str(i), family, **changes)
                )
    lines = [facts_line(name, facts) for name, facts in facts_by_name.items()]
    write_table("families", ["models", "`model_type`", *facts_by_name["olmoe"]], lines)


def write_page(names: list[str]) -> None:
    """Measures, prints, and writes what was measured into the page."""
    lines = dict(zip(map(_typed, WORLDS), [""] * len(WORLDS), strict=True))
    lines |= {line.split("|")[1].strip(): line for line in table("matrix")}
    for name, row in rows([] if names == ["families"] else names or list(WORLDS)):
        numbers = " ".join(f"{key}={value:.1e}" for key, value in row.found.items())
        sys.stdout.write(f"{name}: {numbers} {row.refused or ''}\n")
        sys.stdout.flush()
        lines[_typed(name)] = numbers_line(name, row) if row.facts else ""
    write_table("matrix", ["family", *HEADS.values()], [line for line in lines.values() if line])
    write_families()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    write_page(sys.argv[1:])
