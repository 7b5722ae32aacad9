"""Files of weights and their index."""

import json
import struct
from pathlib import Path

from tests.hostile.case import Corpus
from tests.hostile.world import World

CASES = Corpus("weights")


def _header(file: Path, change: str) -> None:
    size = struct.unpack("<Q", file.read_bytes()[:8])[0]
    data = file.read_bytes()[8 + size :]
    file.write_bytes(struct.pack("<Q", len(change)) + change.encode() + data)


@CASES.case("a header that is no JSON", "model.safetensors", "header")
def _no_json(world: World) -> list[str]:
    _header(world / world.model / "model.safetensors", "{" * 20)
    return ["profile", world.model, *world.asked, "--out", "out"]


@CASES.case("an index that points outside", "model.safetensors.index.json", "outside|path")
def _outside(world: World) -> list[str]:
    file = world / world.sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../olmoe/model.safetensors"
    file.write_text(json.dumps(index))
    return ["profile", world.sharded, *world.asked, "--out", "out"]
