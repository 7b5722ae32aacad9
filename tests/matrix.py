"""The matrix: every command on tiny models of every family, held to plain transformers by hand.

`python -m tests.matrix` runs all of it and writes the table into docs/families.md; with names of
families it prints their rows. tests/test_matrix.py holds each number to its limit.
"""

import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from functools import cached_property
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from expertcut.checkpoints.build import engine_as_profiled
from expertcut.cli import main
from expertcut.evaluation.auditing.outcome import load_audit
from expertcut.evaluation.sweeping.outcome import load_sweep
from expertcut.interventions.plan import Plan, load_plan
from expertcut.interventions.questions import questions_for
from expertcut.moe.engine import ask
from expertcut.moe.loading import LoadOptions, find_source
from expertcut.profiling.statistics import answers, layer_statistics
from expertcut.profiling.store import Profile, load_profile
from expertcut.quiz import Quiz, Selection, load_quiz
from tests.conftest import FAMILIES, make_checkpoint, write_quiz
from tests.families import MORE
from tests.plain import Plain

COUNTS = {"dev": 1, "val": 4, "test": 4}
LIMIT = 3  # questions of each subject that a sweep asks
SAMPLE = 3  # experts that an audit removes
BIAS = 2.0  # in logits, of the boost
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- the matrix, by python -m tests.matrix -->", "<!-- end of the matrix -->"


@dataclass(frozen=True)
class Row:
    """Largest |Δ log p| of any choice between two runs that must agree, and what edits moved.

    `profile`: against plain transformers. `cell`: a cell of --sweep against the written checkpoint
    in plain transformers. `mask`: that checkpoint against the router masked by hand. `ablation`:
    audit's loss of log p against a mask by hand. `boost`: reweight's exact bias, as its proof
    tells of it, against a bias by hand. `export`: what reweight says of its checkpoint, against
    that checkpoint in plain transformers. `merge`: the merged checkpoint here and there.
    `reconstruction`: `mask` for a cut by that criterion. Of what must not be 0: `cut`, `removed`,
    `boosted` and `merged`.
    """

    profile: float
    cell: float
    mask: float
    ablation: float
    boost: float
    export: float
    merge: float
    reconstruction: float
    cut: float
    removed: float
    boosted: float
    merged: float


AGREE = ("profile", "cell", "mask", "ablation", "boost", "export", "merge", "reconstruction")
MOVED = ("cut", "removed", "boosted", "merged")


class World:
    """One family's model, its quiz, and what the commands made of them."""

    def __init__(self, root: Path, family: str, quiz: Path) -> None:
        self.root, self.family, self.quiz = root, family, quiz
        self.model = make_checkpoint(root / "model", family)
        self.plain = Plain(self.model, family)
        self.run("profile", self.model, "--quiz", quiz, "--split", "val", "--shots", 1)
        self.asked = self.split("test", LIMIT)

    def run(self, command: str, *words: object, out: str = "profile") -> str:
        """A command line in this process; what it printed."""
        line = [command, *map(str, words), "--out", str(self.root / out)]
        if command != "profile":
            line[1:1] = ["--profile", str(self.root / "profile")]
        printed = StringIO()
        with patch.object(sys, "argv", ["expertcut", *line]):
            try:
                with redirect_stdout(printed), redirect_stderr(printed):
                    main()
            except SystemExit as stopped:
                if stopped.code:
                    raise AssertionError(f"{' '.join(line)}: {printed.getvalue()}") from None
        torch.set_num_threads(1)
        return printed.getvalue()

    def split(self, split: str, limit: int | None = None) -> Quiz:
        return load_quiz(Selection(str(self.quiz), split=split, shots=1, limit=limit))

    @cached_property
    def profile(self) -> Profile:
        return load_profile(self.root / "profile")

    @cached_property
    def held_out(self) -> Quiz:
        """What prune, reweight and merge judge by."""
        return questions_for(self.profile, is_fitting=True).held_out

    @cached_property
    def base(self) -> Tensor:
        """The unedited model's answers to the held-out questions, in plain transformers."""
        return self.plain.logprobs(self.held_out)

    def written(self, out: str) -> Plain:
        plain = Plain(self.root / out, self.family)
        assert not any(plain.info.values()), plain.info
        return plain

    def plan(self, out: str) -> Plan:
        return load_plan(self.root / out)

    def masks(self, keep: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """What forbids all other experts."""
        shifts = {}
        for block in self.profile.info.model.blocks:
            if len(keep[block.name]) < block.experts:
                shifts[block.name] = torch.full((block.experts,), -torch.inf)
                shifts[block.name][list(keep[block.name])] = 0
        return shifts


def measure(root: Path, family: str, quiz: Path) -> Row:
    """All of it for one family."""
    world = World(root, family, quiz)
    val = world.plain.logprobs(world.split("val"))
    found = torch.from_numpy(answers(world.profile).logprob_NC)
    return Row(
        profile=_largest(found, val),
        **_sweep(world),
        **_reconstruction(world),
        **_ablation(world),
        **_boost(world),
        **_merge(world),
    )


def _sweep(world: World) -> dict[str, float]:
    world.run(
        *("prune", "--sweep", 0.5, "--by", "reap", "--fold", "off", "--limit", LIMIT),
        out="sweep",
    )
    (cell,) = load_sweep(world.root / "sweep").cells
    (place,) = (world.root / "sweep" / "cells").glob("keep-*")
    found = torch.from_numpy(answers(load_profile(place)).logprob_NC)
    world.run("prune", "--keep-fraction", 0.5, "--by", "reap", "--fold", "off", out="cut")
    written = world.written("cut").logprobs(world.asked)
    keep = {name: edit.keep for name, edit in world.plan("cut").blocks.items()}
    assert keep == cell.keep
    masked = world.plain.logprobs(world.asked, world.masks(keep))
    base = world.plain.logprobs(world.asked)
    return {
        "cell": _largest(found, written),
        "mask": _largest(written, masked),
        "cut": _largest(masked, base),
    }


def _reconstruction(world: World) -> dict[str, float]:
    world.run("prune", "--keep", 6, "--by", "reconstruction", "--fold", "off", out="reconstructed")
    keep = {name: edit.keep for name, edit in world.plan("reconstructed").blocks.items()}
    written = world.written("reconstructed").logprobs(world.asked)
    masked = world.plain.logprobs(world.asked, world.masks(keep))
    return {"reconstruction": _largest(written, masked)}


def _ablation(world: World) -> dict[str, float]:
    world.run("audit", "--sample", SAMPLE, "--by", "reap,reconstruction", out="audit")
    audit = load_audit(world.root / "audit")
    quiz = questions_for(world.profile, is_fitting=True).held_out
    differences = []
    for harm in audit.harms:
        block = world.profile.info.model.blocks[harm.layer]
        keep = {b.name: tuple(range(b.experts)) for b in world.profile.info.model.blocks}
        keep[block.name] = tuple(e for e in keep[block.name] if e != harm.expert)
        moved_NC = world.base - world.plain.logprobs(quiz, world.masks(keep))
        loss = float(_right(moved_NC, quiz).mean())
        differences += [abs(loss - harm.logprob), abs(float(moved_NC.abs().max()) - harm.largest)]
    return {"ablation": max(differences), "removed": max(h.largest for h in audit.harms)}


def _boost(world: World) -> dict[str, float]:
    block = world.profile.info.model.blocks[-1]
    appearances_E = layer_statistics(world.profile)[-1].appearances_E
    expert = int(np.argmin(np.abs(appearances_E - 0.25)))
    layer = len(world.profile.info.model.blocks) - 1
    world.run("reweight", "--boost", f"{layer}:{expert}={BIAS}", out="boosted")
    proof = world.plan("boosted").proof
    shift_E = torch.zeros(block.experts)
    shift_E[expert] = BIAS
    by_hand = world.plain.logprobs(world.held_out, {block.name: shift_E})
    written = world.written("boosted").logprobs(world.held_out)
    said = {row["form"]: row["right_logprob"] for row in proof["outcomes"]}
    against = {row["against"]: row["max_abs_logprob_diff"] for row in proof["held_out"]}
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


def _merge(world: World) -> dict[str, float]:
    world.run("merge", "--keep", 6, out="merged")
    written = world.written("merged").logprobs(world.held_out)
    source = find_source(str(world.root / "merged"))
    found = ask(engine_as_profiled(world.profile, source, LoadOptions()), world.held_out)
    return {"merge": _largest(found, written), "merged": _largest(written, world.base)}


def _largest(a_NC: Tensor, b_NC: Tensor) -> float:
    return float((a_NC - b_NC).abs().max())


def _right(logprob_NC: Tensor, quiz: Quiz) -> Tensor:
    answers_N = [question.answer for question in quiz]
    return logprob_NC[range(len(answers_N)), answers_N].double()


def rows(names: list[str]) -> Iterator[tuple[str, Row | Exception]]:
    """Each family in turn; what went wrong with one does not stop the others."""
    with tempfile.TemporaryDirectory() as root:
        quiz = write_quiz(Path(root) / "quiz", COUNTS)
        for family in names:
            try:
                yield family, measure(Path(root) / family, family, quiz)
            except Exception as error:
                yield family, error


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    for name, row in rows(sys.argv[1:] or [*FAMILIES, *MORE]):
        if isinstance(row, Row):
            told = " ".join(f"{f.name}={getattr(row, f.name):.1e}" for f in fields(Row))
        else:
            told = f"{type(row).__name__}: {str(row)[-600:]}"
        print(name, told, flush=True)  # noqa: T201
