"""The matrix: every command on tiny models of every family, held to plain transformers by hand.

`python -m tests.support.matrix` runs all of it and writes the table into docs/families.md; with
names of families it only prints their rows. tests/models/test_matrix.py holds each number to its
limit.
"""

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from expertcut.checkpoints.build import engine_as_profiled
from expertcut.cli import main
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits.plan import PlanFile, load_plan
from expertcut.edits.splits import questions_for
from expertcut.evaluation.search_results import load_audit, load_sweep
from expertcut.models.load import LoadOptions, MoeModel, find_source
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.storage import Profile, load_profile
from expertcut.scoring.engine import ask
from expertcut.scoring.passes import scoring_mode
from tests.conftest import FAMILIES, make_checkpoint, open_model, write_quiz
from tests.support.families import MORE
from tests.support.plain import GATES, Plain

COUNTS = {"dev": 1, "val": 4, "test": 4}
LIMIT = 3  # questions of each subject that a sweep asks
SAMPLE = 3  # experts that an audit removes
BIAS = 2.0  # in logits, of the boost
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- by python -m tests.support.matrix -->", "<!-- end of the matrix -->"

# What is run: a family as tests/conftest.py or tests/support/families.py has it, or changed.
WORLDS: dict[str, tuple[str, dict[str, object]]] = {
    **{family: (family, {}) for family in (*FAMILIES, *MORE)},
    "axk2, in groups": ("axk2", {"n_group": 2, "topk_group": 1}),
    "cohere2_moe, softmax": ("cohere2_moe", {"expert_selection_fn": "softmax"}),
    "deepseek_v4, no hash layer": ("deepseek_v4", {"mlp_layer_types": ["moe"] * 3}),
    "laguna, no cap": ("laguna", {"moe_router_logit_softcapping": 0.0}),
    "nemotron_h, no latent": ("nemotron_h", {"moe_latent_size": None}),
}
# The parts of a row: what must agree, and what must not be 0.
PARTS = {
    "profile": (("profile",), ()),
    "cut": (("cell", "mask"), ("cut",)),
    "reconstruction": (("reconstruction",), ()),
    "ablation": (("ablation",), ("removed",)),
    "boost": (("boost", "export"), ("boosted",)),
    "merge": (("merge",), ("merged",)),
}
AGREE = tuple(name for agree, _ in PARTS.values() for name in agree)
HEADS = {
    "profile": "profile",
    "cell": "sweep = checkpoint",
    "mask": "checkpoint = mask",
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

    `profile`: the profile against plain transformers. `cell`: a cell of --sweep against the
    written checkpoint in plain transformers. `mask`: that against the router masked by hand.
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
    facts = {} if "profile" in refused else _facts(open_model(world.model))
    return Row(facts, found, refused)


def _profile(world: World) -> Found:
    found = torch.from_numpy(world.profile.answers.logprob_NC)
    return {"profile": _largest(found, world.plain.logprobs(world.split("val")))}


def _cut(world: World) -> Found:
    world.run(
        *("prune", "--sweep", 0.5, "--by", "reap", "--fold", "off", "--limit", LIMIT), out="sweep"
    )
    (cell,) = load_sweep(world.root / "sweep").cells
    (place,) = (world.root / "sweep" / "cells").glob("keep-*")
    found = torch.from_numpy(load_profile(place).answers.logprob_NC)
    # Its own questions are asked of the cut by reconstruction.
    world.run(
        *("prune", "--keep-fraction", 0.5, "--by", "reap", "--fold", "off", "--no-verify"),
        out="cut",
    )
    written, masked, keep = _cut_and_masked(world, "cut")
    assert keep == cell.keep
    base = world.plain.logprobs(world.asked)
    return {
        "cell": _largest(found, written),
        "mask": _largest(written, masked),
        "cut": _largest(masked, base),
    }


def _reconstruction(world: World) -> Found:
    world.run("prune", "--keep", 6, "--by", "reconstruction", "--fold", "off", out="reconstructed")
    written, masked, _ = _cut_and_masked(world, "reconstructed")
    return {"reconstruction": _largest(written, masked)}


def _cut_and_masked(world: World, out: str) -> tuple[Tensor, Tensor, dict[str, tuple[int, ...]]]:
    """A checkpoint's answers, those of the unedited model masked by hand, and what stays."""
    keep = {name: edit.keep for name, edit in world.plan(out).blocks.items()}
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


def _facts(moe: MoeModel) -> dict[str, str]:
    """What the contract found, in the words of the page."""
    block = moe.blocks[-1]
    rule = block.weights
    weight = "mixer" if rule is None else "renormalised" if rule.is_renormalised else "α"
    added = {"score": "to α", "logits": "to the logits", "table": "no"}[block.selection]
    is_split = block.n_groups > 1
    return {
        "α": block.scoring,
        "weight": weight,
        "bias": "no" if block.selection_bias() is None else added,
        "groups": f"{block.top_groups} of {block.n_groups}" if is_split else "no",
        "scored": scoring_mode(moe.model.config, longest=500),
        "`easy_ep`": "yes" if all(b.residual for b in moe.blocks) else "no",
    }


def rows(names: list[str]) -> Iterator[tuple[str, Row]]:
    """Each world in turn."""
    with tempfile.TemporaryDirectory() as root:
        quiz = write_quiz(Path(root) / "quiz", COUNTS)
        for i, name in enumerate(names):
            yield name, measure(World(Path(root) / str(i), name, quiz))


def facts_line(name: str, facts: Mapping[str, str]) -> str:
    """How a row of the page's table begins."""
    family, comma, change = name.partition(",")
    return f"| {' | '.join((f'`{family}`{comma}{change}', *facts.values()))} |"


def line(name: str, row: Row) -> str:
    """A row of the page's table."""
    told = []
    for part, (agree, _) in PARTS.items():
        is_refused = part in row.refused
        told += ["refused" if is_refused else _number(row.found[key]) for key in agree]
    return f"{facts_line(name, row.facts)} {' | '.join(told)} |"


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def write_table(found: Mapping[str, Row]) -> None:
    """Into the page, in place of the one that is there."""
    facts = next(list(row.facts) for row in found.values() if row.facts)
    head = ["family", *facts, *HEADS.values()]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [line(name, row) for name, row in found.items() if row.facts]
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "\n".join(lines)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    measured = {}
    for world_name, its in rows(sys.argv[1:] or list(WORLDS)):
        measured[world_name] = its
        numbers = " ".join(f"{key}={value:.1e}" for key, value in its.found.items())
        sys.stdout.write(f"{world_name}: {numbers} {its.refused or ''}\n")
        sys.stdout.flush()
    if not sys.argv[1:]:
        write_table(measured)
