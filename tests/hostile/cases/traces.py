"""Traces: chunks that are damaged or forged, and descriptions that lie."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from expertcut.profiling.storage import Arrays
from expertcut.profiling.trace import load_trace
from tests.hostile.case import Corpus
from tests.hostile.cases.documents import TRACE_COMMANDS
from tests.hostile.cases.profiles import BLOCK, at, forged, shaped, typed
from tests.hostile.spoiling import (
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

CASES = Corpus("traces")
CHUNK = f"{World.trace}/chunks/green_birds-0.safetensors"
COMMANDS = cycle(TRACE_COMMANDS.items())  # every fault meets another command
DAMAGED = r"chunks/green_birds-0\.safetensors is damaged"
MISSING, NO_TRACE = "1 of 3 chunks are missing", r"trace\.json is not a valid trace"


def add(fault: str, spoil: Callable[[Path], object], says: str) -> None:
    command, words = next(COMMANDS)
    CASES.add(f"{fault}, met by {command}", spoiled(CHUNK, spoil, *words), World.trace, says)


def lying(fault: str, change: Callable[[Any], object], *says: str) -> None:
    command, words = next(COMMANDS)
    file = f"{World.trace}/trace.json"
    CASES.add(f"{fault}, met by {command}", edited(file, change, *words), World.trace, *says)


def ended(arrays: Arrays) -> None:
    """All but the last token."""
    arrays.update({n: a[:-1] for n, a in arrays.items() if n.endswith(("_T", "_TLK"))})


add("a chunk that is gone", Path.unlink, MISSING)
add("a chunk that is a folder", as_folder, MISSING)
add("a chunk that is a pipe", as_pipe, MISSING)
add("a chunk cut short", cut_short, DAMAGED)
add("a chunk of no bytes", emptied, DAMAGED)
add("a chunk with one bit flipped", flipped, f"{DAMAGED}.*checksum")
add("a chunk that is a zip", lambda file: file.write_bytes(b"PK\3\4" * 99), DAMAGED)

FORGED: dict[str, tuple[Callable[[Arrays], object], str]] = {
    "an expert beyond the last": (at("experts_TLK", 8), "names experts that are not in model.laye"),
    "expert 255": (at("experts_TLK", 255), "names experts that are not in model.layers.0.mlp"),
    "experts of two bytes": (typed("experts_TLK", np.uint16), "experts_TLK has type uint16"),
    "experts that are no whole numbers": (typed("experts_TLK", np.float32), "has type float32"),
    "another K": (shaped("experts_TLK", 9, 2, 3), r"experts_TLK has shape \[9, 2, 3\], not"),
    "no experts": (lambda a: a.pop("experts_TLK"), "it has no experts_TLK"),
    "no tokens": (lambda a: a.pop("token_T"), "token_T"),
    "a token id below 0": (at("token_T", -1), "negative number"),
    "sequences that go back": (at("sequence_T", 2), "sequence_T does not number 3 sequences"),
    "fewer questions than it has": (shaped("row_N", 2), r"row_N has shape \[2\], not \[3\]"),
    "one token too few": (ended, r"trace\.json says"),
}
for fault, (change, says) in FORGED.items():
    says = says if fault == "one token too few" else f"{DAMAGED}.*{says}"
    add(f"a chunk sealed anew with {fault}", forged(change, load_trace), says)

lying("experts that its chunks lack", put(*BLOCK, "experts", value=4), DAMAGED)
lying("no experts", put(*BLOCK, "experts", value=0), NO_TRACE, "experts: .*greater")
lying("more chosen than its chunks say", put(*BLOCK, "top_k", value=4), DAMAGED, "has shape")
lying("a layer too few", taken("model", "blocks", 1), DAMAGED, "has shape")
lying("other weights", put("model", "fingerprint", value="f" * 64), DAMAGED, "another profile")
lying("gate weights that it lacks", put("settings", "weights", value=True), DAMAGED)
lying("no token", put("n_tokens", value=0), NO_TRACE, "n_tokens")
lying("a token more", lambda t: t.update(n_tokens=t["n_tokens"] + 1), "tokens, and its trace.json")
lying("10^15 questions", put("quiz", "subjects", "tall_trees", "questions", value=10**15), NO_TRACE)
