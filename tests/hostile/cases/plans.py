"""Plans: experts that are not there, plans of something else, and the files beside them."""

import shutil
from collections.abc import Callable
from itertools import cycle
from typing import Any

from tests.hostile.case import Corpus
from tests.hostile.cases.documents import CUT_PROFILE, EVAL, PUBLISH
from tests.hostile.spoiling import (
    as_dangling_link,
    as_folder,
    edited,
    put,
    replaced,
    spoiled,
    taken,
    written,
)
from tests.hostile.world import AUDITED, World

CASES = Corpus("plans")
PLAN, CHOSEN_ON = f"{World.cut}/plan.json", f"{World.cut}/chosen_on.txt"
NO_PLAN = r"plan\.json is not a valid plan"
COMMANDS = {
    "show": ["show", PLAN],
    "publish": PUBLISH,
    "prune": CUT_PROFILE,
    "eval": EVAL,
    "report": ["report", World.cut, "--out", "new.html"],
}
AUDIT = ["audit", "--profile", World.cut_profile, *AUDITED, "--out", "new"]
TURNS = cycle(COMMANDS.items())
BLOCK = ("blocks", "model.layers.0.mlp")


def wrong(fault: str, change: Callable[[Any], object], says: str) -> None:
    """The form itself is refused, whatever the command."""
    command, words = next(TURNS)
    CASES.add(f"{fault}, met by {command}", edited(PLAN, change, *words), NO_PLAN, says)


ASCENDING = "ascending numbers, none of them twice"
wrong("an expert twice", put(*BLOCK, "keep", value=[0, 1, 1, 2]), ASCENDING)
wrong("experts in disorder", put(*BLOCK, "keep", value=[3, 1, 2, 0]), ASCENDING)
wrong("an expert below 0", put(*BLOCK, "keep", value=[-1, 0, 1, 2]), "keep.0: .*greater")
wrong("an expert beyond any", put(*BLOCK, "keep", value=[0, 1, 2, 1 << 40]), "keep.3: .*less")
wrong("an expert of 1.5", put(*BLOCK, "keep", value=[0, 1.5]), "keep.1: .*integer")
wrong("an expert as text", put(*BLOCK, "keep", value=["0", 1]), "keep.0: .*integer")
wrong("an expert that is true", put(*BLOCK, "keep", value=[True]), "keep.0: .*integer")
wrong("experts in a text", put(*BLOCK, "keep", value="0123"), "keep: ")
wrong("no experts named", taken(*BLOCK, "keep"), "keep: Field required")
wrong("a bias for who goes", put(*BLOCK, "bias", value={"99": 1.0}), "99 does not stay")
wrong("a factor for who goes", put(*BLOCK, "scale", value={"99": 1.0}), "99 does not stay")
wrong("a bias as text", put(*BLOCK, "bias", value={"0": "1.0"}), "bias.0: .*number")
wrong("a bias by name", put(*BLOCK, "bias", value={"first": 1.0}), "bias.first")
wrong("biases in a list", put(*BLOCK, "bias", value=[1.0]), "bias: ")
wrong("a merge into who goes", put(*BLOCK, "merged", value={"99": {"99": 1.0}}), "99 does not")
wrong("no blocks", put("blocks", value={}), "blocks: ")
wrong("blocks in a list", put("blocks", value=[]), "blocks: ")
wrong("another layout", put("layout", value="sparse"), "layout: ")
wrong("another removal", put("removal", value="dropped"), "removal: ")
wrong("no model", taken("model"), "model: Field required")
wrong(
    "a model that leads out of the cache",
    put("model", value={"id": "../../etc", "revision": "main", "fingerprint": "f"}),
    "not an id of the Hub",
)
wrong(
    "a revision that leads out of the cache",
    put("model", value={"id": "a/b", "revision": "../../../etc/passwd", "fingerprint": "f"}),
    "not a revision",
)
wrong("what it was chosen on left out", taken("chosen_on"), "chosen_on: Field required")
wrong("a search in words", put("tuning", value="none"), "tuning: ")

LIST = "is not the list that plan.json was made with"
for command in ("publish", "audit", "eval"):
    for fault, spoil in {
        "a question more": lambda file: file.write_text(file.read_text() + "0123456789abcdef\n"),
        "no questions": lambda file: file.write_text(""),
        "bytes that are no text": lambda file: file.write_bytes(b"\xff\x00"),
    }.items():
        CASES.add(
            f"a list of questions with {fault}, met by {command}",
            spoiled(CHOSEN_ON, spoil, *{**COMMANDS, "audit": AUDIT}[command]),
            r"chosen_on\.txt",
            LIST,
        )
CASES.add(
    "a list of questions that links to nothing",
    spoiled(CHOSEN_ON, as_dangling_link, *PUBLISH),
    r"chosen_on\.txt",
    "is a link to nothing",
)
CASES.add(
    "a list of questions that is a folder",
    spoiled(CHOSEN_ON, as_folder, *EVAL),
    r"chosen_on\.txt",
    "is not a regular file",
)
CASES.add(
    "a plan that links to nothing, met by eval",
    spoiled(PLAN, as_dangling_link, *EVAL),
    r"plan\.json",
    "is a link to nothing",
)


@CASES.case(
    "a plan of another checkpoint, met by publish", r"plan\.json", "is not of these weights"
)
def _another(world: World) -> list[str]:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(world / world.model / name, world / world.cut / name)
    return PUBLISH


def differs(fault: str, change: Callable[[Any], object], *says: str, command: str) -> None:
    """The form is right, what it says of the checkpoint is not."""
    CASES.add(f"{fault}, met by {command}", edited(PLAN, change, *COMMANDS[command]), *says)


differs(
    "more experts than the weights",
    put(*BLOCK, "keep", value=list(range(5))),
    *("is not of these weights", "keeps 5 experts"),
    command="publish",
)
differs(
    "fewer experts than the checkpoint",
    put(*BLOCK, "keep", value=[0, 1]),
    *(r"plan\.json is not of this checkpoint", "has 4 experts"),
    command="prune",
)
differs(
    "a layer that is not there",
    lambda p: p["blocks"].update({"model.layers.9.mlp": p["blocks"].pop(BLOCK[1])}),
    *(r"model\.layers\.9\.mlp", "."),
    command="publish",
)
differs(
    "a layer by another name",
    lambda p: p["blocks"].update({"../../mlp": p["blocks"].pop(BLOCK[1])}),
    *(r"plan\.json is not of this checkpoint", r"model\.layers\.0\.mlp"),
    command="prune",
)
differs(
    "held-out figures that are no numbers",
    put("proof", value={"held_out": [{"against": "x", "questions": "many"}]}),
    *(r"plan\.json", "proof.held_out"),
    command="publish",
)
differs(
    "held-out figures in words",
    put("proof", value={"held_out": "good"}),
    *(r"plan\.json", "proof.held_out"),
    command="report",
)
CASES.add(
    "a plan whose JSON is YAML",
    spoiled(PLAN, replaced('"format": 1', "format: 1"), "show", World.cut),
    NO_PLAN,
    "JSON",
)
CASES.add(
    "a proof that is a plan",
    written(f"{World.cut}/proof.json", '{"format": 1}', "show", World.cut),
    r"proof\.json is not a valid proof",
    "procedure: Field required",
)
CASES.add(
    "a proof of a later version, met by publish",
    written(f"{World.cut}/proof.json", '{"format": 2}', *PUBLISH),
    r"proof\.json is not a valid proof",
    "format: ",
)
