"""Files that are links, pipes, pickles or not there."""

import json
import os
from pathlib import Path
from typing import Any

from tests.hostile.case import Corpus
from tests.hostile.cases.indexes import HERE, forget_a_file, forget_one, swap
from tests.hostile.edits import (
    CONFIG,
    INDEX,
    Q_PROJ,
    WEIGHTS,
    Change,
    evaluate,
    in_cut,
    in_model,
    in_shards,
    merge,
    profile,
    prune,
    publish,
    run,
    shard,
    text_of,
    weight_map,
)
from tests.hostile.world import World

CASES = Corpus("files")
FIRST = r"sharded/model-00001-of-00006\.safetensors"


def huge_index(folder: Path) -> None:
    (folder / INDEX).touch()
    os.truncate(folder / INDEX, 2_000_000_000)


def replaced(make: Any) -> Change:
    """The first shard is something else."""

    def edit(folder: Path) -> None:
        file = shard(folder)
        file.unlink()
        make(file)

    return edit


def loop(file: Path) -> None:
    file.symlink_to(file.name)


FILES: dict[str, tuple[Change, str, str]] = {
    "an index of 2 GB": (huge_index, HERE, "2,000,000,000 bytes, more than"),
    "a tensor that the index does not name": (
        weight_map(forget_one),
        r"sharded/model-.*\.safetensors",
        "which the index does not say",
    ),
    "a tensor that the index names and no shard holds": (
        weight_map(lambda found: found.update(a=max(found.values()))),
        r"sharded/model-.*\.safetensors",
        "lacks a, which the index says",
    ),
    "a shard that the index does not name": (
        weight_map(forget_a_file),
        FIRST,
        "the index does not name it",
    ),
    "tensors whose shards were swapped": (
        weight_map(swap),
        r"sharded/model-.*\.safetensors",
        "lacks .*, which the index says",
    ),
    "a shard missing": (
        lambda folder: shard(folder).unlink(),
        FIRST,
        "is missing, but the index names it",
    ),
    "a shard of no bytes": (
        replaced(Path.touch),
        FIRST,
        "cannot lie in 0 bytes",
    ),
    "a shard that is a folder": (
        replaced(Path.mkdir),
        FIRST,
        "not a regular file",
    ),
    "a shard that is a pipe": (
        replaced(os.mkfifo),
        FIRST,
        "not a regular file",
    ),
    "a shard that is /dev/zero": (
        replaced(lambda file: file.symlink_to("/dev/zero")),
        FIRST,
        "leads outside the checkpoint",
    ),
    "a shard that is a link to another model": (
        replaced(lambda file: file.symlink_to("../olmoe/model.safetensors")),
        FIRST,
        "leads outside the checkpoint",
    ),
    "a shard that is a link to nothing": (
        replaced(lambda file: file.symlink_to("gone")),
        FIRST,
        "a link to nothing",
    ),
    "a shard that is a link to itself": (
        replaced(loop),
        FIRST,
        "a link to nothing",
    ),
    "one file and an index of others": (
        text_of(WEIGHTS, ""),
        "sharded",
        "holds model.safetensors and an index of other files",
    ),
    "an index that is a pipe": (
        lambda f: ((f / INDEX).unlink(), os.mkfifo(f / INDEX)),
        HERE,
        "not a regular file",
    ),
    "no index and no single file": (
        lambda f: (f / INDEX).unlink(),
        "sharded",
        "neither model.safetensors nor model.safetensors.index.json",
    ),
}
for fault, (change, file, says) in FILES.items():
    CASES.add(fault, in_shards(change), file, says)


# Unpickling it makes a file.
EVIL = b"cposix\nsystem\n(S'touch unpickled'\ntR."


def pickled(*names: str, index: bool = False) -> Change:
    """In place of the safetensors lie pickles; whoever loads one makes a file, which is noticed."""

    def edit(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        for name in names:
            (folder / name).write_bytes(EVIL)
        if index:
            content = {"weight_map": dict.fromkeys([Q_PROJ], names[0])}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))

    return edit


PICKLES = {
    "pytorch_model.bin": (pickled("pytorch_model.bin"), profile),
    "a .bin index": (pickled("pytorch_model-00001-of-00001.bin", index=True), profile),
    "model.pt": (pickled("model.pt"), evaluate),
    "consolidated.00.pth": (pickled("consolidated.00.pth"), profile),
    "weights.ckpt": (pickled("weights.ckpt"), merge),
    "model.pkl": (pickled("model.pkl"), prune),
}
for fault, (change, command) in PICKLES.items():
    CASES.add(f"pickles alone, {fault}", in_model(change, command), "olmoe/", "is a pickle")


def named_safetensors(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(EVIL)


CASES.add(
    "a pickle named model.safetensors",
    in_model(named_safetensors),
    r"olmoe/model\.safetensors",
    "cannot lie in",
)
CASES.add(
    "weights in GGUF alone",
    in_model(lambda f: (f / WEIGHTS).rename(f / "model.gguf")),
    "olmoe",
    r"no \*\.safetensors",
)
CASES.add(
    "an adapter, which names its own base",
    in_model(text_of("adapter_config.json", '{"base_model_name_or_path": "../sharded"}')),
    r"olmoe/adapter_config\.json",
    "makes this an adapter",
)


def linked(file: Path, target: str) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(target)


def linked_config(folder: Path) -> None:
    """What it leads to is right, but lies elsewhere."""
    (folder / CONFIG).rename(folder.parent / "x.json")
    linked(folder / CONFIG, "../x.json")


CASES.add(
    "a config.json that is a link to a file of the user",
    in_model(linked_config),
    r"olmoe/config\.json",
    "leads outside the checkpoint",
)
LINKS = {
    "a licence": ("LICENSE", "/etc/passwd"),
    "a README": ("README.md", "/etc/passwd"),
    "a text": ("merges.txt", "../results.json"),
    "a module": ("extra.py", "../recipe.yaml"),
}
for fault, (name, target) in LINKS.items():
    CASES.add(
        f"{fault} that is a link to a file of the user, which would be copied and published",
        in_model(lambda f, name=name, target=target: linked(f / name, target), prune),
        f"olmoe/{name}",
        "leads outside the checkpoint",
    )
CASES.add(
    "a link to a file of the user in what is published",
    in_cut(lambda f: linked(f / "notes.txt", "/etc/passwd"), publish),
    r"cut/notes\.txt",
    "leads outside the checkpoint",
)


def _of_recipe(world: World) -> list[str]:
    linked(world / world.model / "tokenizer.json", "/dev/zero")
    return run(world)


CASES.add("a tokenizer that is /dev/zero", _of_recipe, r"olmoe/tokenizer\.json", "leads outside")
