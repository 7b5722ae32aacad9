"""Changes to a checkpoint's files, and the command lines that read a checkpoint."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.hostile.case import Spoil
from tests.hostile.world import World

Change = Callable[[Path], object]
Command = Callable[[World], list[str]]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def profile(world: World) -> list[str]:
    return ["profile", world.model, *world.asked, "--out", "out"]


def profile_sharded(world: World) -> list[str]:
    return ["profile", world.sharded, *world.asked, "--out", "out"]


def evaluate(world: World) -> list[str]:
    return ["eval", world.model, *world.asked, "--out", "new.json"]


def prune(world: World) -> list[str]:
    return ["prune", "--profile", world.profile, "--keep", "4", "--out", "out"]


def prune_exactly(world: World) -> list[str]:
    return [*prune(world), "--layout", "exact", "--no-verify"]


def reweight(world: World) -> list[str]:
    return ["reweight", "--profile", world.profile, "--boost", "1=1", "--out", "out"]


def merge(world: World) -> list[str]:
    return ["merge", "--profile", world.profile, "--keep", "4", "--out", "out"]


def audit(world: World) -> list[str]:
    return ["audit", "--profile", world.profile, "--sample", "2", "--out", "out"]


def run(world: World) -> list[str]:
    return ["run", world.recipe, "--out", "out"]


def eval_cut(world: World) -> list[str]:
    return ["eval", world.cut, world.model, *world.asked, "--out", "new.json"]


def publish(world: World) -> list[str]:
    return ["publish", world.cut, "me/cut", "--dry-run"]


def in_model(change: Change, command: Command = profile) -> Spoil:
    return _in(lambda world: world.model, change, command)


def in_shards(change: Change, command: Command = profile_sharded) -> Spoil:
    return _in(lambda world: world.sharded, change, command)


def in_cut(change: Change, command: Command) -> Spoil:
    return _in(lambda world: world.cut, change, command)


def _in(where: Callable[[World], str], change: Change, command: Command) -> Spoil:
    def spoil(world: World) -> list[str]:
        change(world / where(world))
        return command(world)

    return spoil


def json_of(name: str, change: Callable[[Any], object]) -> Change:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def config(**fields: object) -> Change:
    return json_of(CONFIG, lambda content: content.update(fields))


def text_of(name: str, text: str | bytes) -> Change:
    """The file holds this and nothing else; of a text with lone surrogates the bytes."""
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return lambda folder: (folder / name).write_bytes(content)


def header(change: Callable[[dict[str, Any]], object], name: str = WEIGHTS) -> Change:
    """Changes the header of a file, and not its data."""

    def edit(folder: Path) -> None:
        head, data = _split(folder / name)
        content = json.loads(head)
        change(content)
        _join(folder / name, json.dumps(content).encode(), data)

    return edit


def raw_header(text: str | bytes, name: str = WEIGHTS) -> Change:
    """The header is this, whatever it means; the data stay."""

    def edit(folder: Path) -> None:
        _, data = _split(folder / name)
        _join(folder / name, text.encode() if isinstance(text, str) else text, data)

    return edit


def _split(file: Path) -> tuple[bytes, bytes]:
    content = file.read_bytes()
    n = int.from_bytes(content[:8], "little")
    return content[8 : 8 + n], content[8 + n :]


def _join(file: Path, head: bytes, data: bytes) -> None:
    file.write_bytes(len(head).to_bytes(8, "little") + head + data)


def entry(name: str, **fields: object) -> Change:
    """A tensor's entry in the header says something else."""
    return header(lambda content: content[name].update(fields))


def tensors(change: Callable[[dict[str, torch.Tensor]], object], name: str = WEIGHTS) -> Change:
    """The file is written anew, sound, with other tensors."""

    def edit(folder: Path) -> None:
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name, metadata={"format": "pt"})

    return edit


def cut_to(n_bytes: int) -> Change:
    return lambda folder: os.truncate(folder / WEIGHTS, n_bytes)


def shard(folder: Path, number: int = 1) -> Path:
    """One of the files that the index names, counted from 1."""
    return sorted(folder.glob("*-of-*.safetensors"))[number - 1]


def weight_map(change: Callable[[dict[str, Any]], object]) -> Change:
    return json_of(INDEX, lambda content: change(content["weight_map"]))
