"""Profiles: chunks that are damaged, exchanged or forged, and descriptions that lie."""

import shutil
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from expertcut.profiling.storage import (
    Arrays,
    MeasuredFolder,
    load_profile,
    read_chunk,
    write_chunk,
)
from tests.hostile.case import Corpus, Spoil
from tests.hostile.cases.documents import CUT_PROFILE, PROFILE_COMMANDS
from tests.hostile.spoiling import (
    as_dangling_link,
    as_device,
    as_folder,
    as_pipe,
    cut_short,
    edited,
    emptied,
    flipped,
    put,
    spoiled,
    taken,
)
from tests.hostile.world import World

CASES = Corpus("profiles")
CHUNKS = f"{World.profile}/chunks"
CHUNK, OTHER = f"{CHUNKS}/green_birds-0.safetensors", f"{CHUNKS}/old_clocks-0.safetensors"
INFO = f"{World.profile}/profile.json"
COMMANDS = cycle(PROFILE_COMMANDS.items())  # every fault meets another command


def forged(
    change: Callable[[Arrays], object], load: Callable[[Path], MeasuredFolder] = load_profile
) -> Callable[[Path], None]:
    """A chunk with other arrays, sealed anew: its checksum holds."""

    def spoil(file: Path) -> None:
        profile = load(file.parents[1])
        subject = file.name.removesuffix("-0.safetensors")
        of = profile.info.chunk_hash(file.name, subject)
        arrays = {name: array.copy() for name, array in read_chunk(file, of).items()}
        change(arrays)
        write_chunk(file, arrays, of)

    return spoil


def at(name: str, value: object) -> Callable[[Arrays], None]:
    """One number of an array is another."""

    def change(arrays: Arrays) -> None:
        arrays[name].flat[1] = value

    return change


def typed(name: str, dtype: Any) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({name: arrays[name].astype(dtype)})


def shaped(name: str, *shape: int) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({name: np.zeros(shape, arrays[name].dtype)})


def add(fault: str, spoil: Callable[[Path], object], says: str, file: str = CHUNK) -> None:
    command, words = next(COMMANDS)
    CASES.add(f"{fault}, met by {command}", spoiled(file, spoil, *words), World.profile, says)


DAMAGED = r"chunks/green_birds-0\.safetensors is damaged"
MISSING = "is not finished: 1 of 3 chunks are missing"

add("a chunk that is gone", Path.unlink, MISSING)
add("a chunk that is a folder", as_folder, MISSING)
add("a chunk that is a pipe", as_pipe, MISSING)
add("a chunk that is a device", as_device, MISSING)
add("a chunk that links to nothing", as_dangling_link, MISSING)
add("a chunk cut short", cut_short, DAMAGED)
add("a chunk of no bytes", emptied, DAMAGED)
add("a chunk with one bit flipped", flipped, f"{DAMAGED}.*checksum")
add("a chunk with a header of 2^63 bytes", lambda f: f.write_bytes(b"\xff" * 64), DAMAGED)
add("a chunk that is text", lambda f: f.write_text("nonsense" * 99), DAMAGED)

FORGED: dict[str, tuple[Callable[[Arrays], object], str]] = {
    "an expert beyond the last": (at("chosen_NLK", 8), "experts that are not there"),
    "expert 32,767": (at("chosen_NLK", 32_767), "experts that are not there"),
    "expert -1": (at("chosen_NLK", -1), "experts that are not there"),
    "experts that are no whole numbers": (typed("chosen_NLK", np.float32), "experts"),
    "a probability of NaN": (at("alpha_NLE", np.nan), "alpha_NLE holds a value that is not finite"),
    "a gate weight of ∞": (at("weight_NLK", np.inf), "weight_NLK holds a value that is not finite"),
    "a gap of NaN": (at("gap_N", np.nan), "gap_N holds a value that is not finite"),
    "a log probability of NaN": (at("choice_logprob_NC", np.nan), "not a log probability"),
    "a log probability of 5": (at("choice_logprob_NC", 5), "not a log probability"),
    "an answer that is no choice": (at("answer_N", 4), "choices that are not there"),
    "answers that are text": (typed("answer_N", np.float64), "choices that are not there"),
    "one choice": (shaped("choice_logprob_NC", 3, 1), r"choice_logprob_NC has shape \[3, 1\]"),
    "27 choices": (shaped("choice_logprob_NC", 3, 27), r"choice_logprob_NC has shape \[3, 27\]"),
    "fewer questions than it has": (shaped("row_N", 2), r"row_N has shape \[2\], not \[3\]"),
    "no probabilities": (lambda a: a.pop("alpha_NLE"), "it has no alpha_NLE"),
    "no answers": (lambda a: a.pop("answer_N"), "it has no answer_N"),
    "a sum of ∞": (
        at("question_norm_LE", np.inf),
        "question_norm_LE holds a value that is not finite",
    ),
    "a sum without its prefix": (lambda a: a.pop("prefix_votes_LE"), "it has no prefix_votes_LE"),
    "sums of other layers": (shaped("prefix_tokens_LE", 3, 8), r"has shape \[3, 8\], not \[2, 8\]"),
    "more experts than the model": (shaped("alpha_NLE", 3, 2, 16), r"has shape \[3, 2, 16\]"),
    "an order of choices that are not there": (
        lambda a: a.update(order_NC=np.full((3, 4), 9, np.uint8)),
        "order_NC is not an order",
    ),
}
for fault, (change, says) in FORGED.items():
    add(f"a chunk sealed anew with {fault}", forged(change), f"{DAMAGED}.*{says}")


@CASES.case("two chunks exchanged", DAMAGED, "belongs to another profile, subject or place")
def _exchanged(world: World) -> list[str]:
    chunk, other = world / CHUNK, world / OTHER
    kept = chunk.read_bytes()
    chunk.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    return PROFILE_COMMANDS["show"]


@CASES.case("a chunk of another profile", DAMAGED, "belongs to another profile, subject or place")
def _foreign(world: World) -> list[str]:
    shutil.copy(world / world.cut_profile / "chunks" / Path(CHUNK).name, world / CHUNK)
    return PROFILE_COMMANDS["prune"]


@CASES.case("a chunk that lies far outside", MISSING, World.profile)
def _outside(world: World) -> list[str]:
    info = world / INFO
    (world / CHUNK).unlink()
    info.write_text(info.read_text().replace("green_birds", "../../../green_birds"))
    return PROFILE_COMMANDS["report"]


def lying(fault: str, change: Callable[[Any], object], *says: str, command: str = "") -> None:
    name, words = (command, PROFILE_COMMANDS[command]) if command else next(COMMANDS)
    CASES.add(f"{fault}, met by {name}", edited(INFO, change, *words), *says)


NO_PROFILE = r"profile\.json is not a valid profile"
MODEL, BLOCK = ("model",), ("model", "blocks", 0)
TREES = ("quiz", "subjects", "tall_trees", "questions")
lying("experts as text", put(*BLOCK, "experts", value="8"), NO_PROFILE, "experts: .*integer")
lying("no experts", put(*BLOCK, "experts", value=0), NO_PROFILE, "experts: .*greater")
lying("fewer than no experts", put(*BLOCK, "experts", value=-8), NO_PROFILE, "experts: .*greater")
lying("10^12 experts", put(*BLOCK, "experts", value=10**12), NO_PROFILE, "experts: .*less")
lying("experts that its chunks lack", put(*BLOCK, "experts", value=9), DAMAGED, "has shape")
lying("more chosen than there are", put(*BLOCK, "top_k", value=9), NO_PROFILE, "9 of 8 experts")
lying("more chosen than its chunks say", put(*BLOCK, "top_k", value=4), DAMAGED, "has shape")
lying("three groups of 8", put(*BLOCK, "groups", value=3), NO_PROFILE, "do not lie in 3 groups")
lying("a gate that is none", put(*BLOCK, "scoring", value="argmax"), NO_PROFILE, "scoring: ")
lying("no layers", put("model", "blocks", value=[]), NO_PROFILE, "model.blocks: ")
lying("a layer too few", taken("model", "blocks", 1), DAMAGED, "has shape")
lying(
    "two layers of one name", put(*BLOCK, "name", value="model.layers.1.mlp"), NO_PROFILE, "one n"
)
lying("other weights", put(*MODEL, "fingerprint", value="f" * 64), DAMAGED, "another profile")
lying(
    "a model that leads out of the cache",
    lambda p: p["model"].update(id="../../../../etc", revision="main"),
    *(NO_PROFILE, "not an id of the Hub"),
)
lying(
    "a revision that leads out of the cache",
    lambda p: p["model"].update(id="owner/name", revision="../../../../../etc/passwd"),
    *(NO_PROFILE, "not a revision"),
)
lying(
    "a model with a NUL in its name",
    put(*MODEL, "id", value="olmoe\0x"),
    *("olmoe.x", "no such model"),
    command="audit",
)
lying(
    "a model that is gone",
    put("model", "id", value="./no"),
    "no such model",
    r"\./no",
    command="merge",
)
lying(
    "a split elsewhere",
    put("quiz", "split", value="../../etc"),
    r"\.\./\.\./etc",
    "split",
    command="audit",
)
lying(
    "10^15 questions",
    put(*TREES, value=10**15),
    NO_PROFILE,
    "less",
)
lying(
    "-1 questions",
    put(*TREES, value=-1),
    NO_PROFILE,
    "great",
)
lying("no subjects", put("quiz", "subjects", value={}), NO_PROFILE, "quiz.subjects")
lying("subjects in a list", put("quiz", "subjects", value=["tall_trees"]), NO_PROFILE, "subjects")
lying("10^9 threads", put("settings", "threads", value=10**9), NO_PROFILE, "settings.threads")
lying("no batch tokens", put("settings", "batch_tokens", value=0), NO_PROFILE, "batch_tokens")
lying(
    "statistics of a later version", put("settings", "stats", value="tokens"), NO_PROFILE, "stats"
)
lying("no settings", taken("settings"), NO_PROFILE, "settings: Field required")


def _cut(change: Callable[[Any], object]) -> Spoil:
    return edited(f"{World.cut_profile}/profile.json", change, *CUT_PROFILE)


CASES.add(
    "of a cut model, with a block that no plan names",
    _cut(put(*BLOCK, "name", value="model.layers.7.mlp")),
    r"plan\.json is not of this checkpoint",
    r"model\.layers\.7\.mlp",
)
CASES.add(
    "of a quiz that is gone",
    edited(INFO, put("quiz", "id", value="nowhere"), *PROFILE_COMMANDS["audit"]),
    "nowhere",
    "no such quiz",
)
