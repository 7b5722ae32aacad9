"""Ways to spoil a file of the world, each before the command that is to refuse it."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.case import Spoil
from tests.hostile.world import World

Change = Callable[[Any], object]


def spoiled(name: str, spoil: Callable[[Path], object], *words: str) -> Spoil:
    """`spoil` gets the file, which must be there; `words` are the command."""

    def case(world: World) -> list[str]:
        assert (world / name).exists(), name
        spoil(world / name)
        return list(words)

    return case


def written(name: str, content: bytes | str, *words: str) -> Spoil:
    """The file holds this, whether it was there or not."""

    def case(world: World) -> list[str]:
        (world / name).parent.mkdir(parents=True, exist_ok=True)
        (world / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return list(words)

    return case


def edited(name: str, change: Change, *words: str) -> Spoil:
    """JSON with something in it changed."""
    return spoiled(name, lambda file: edit(file, change), *words)


def edit(file: Path, change: Change) -> None:
    value = json.loads(file.read_text())
    before = json.dumps(value)
    change(value)
    assert json.dumps(value) != before, "nothing was changed"
    file.write_text(json.dumps(value))


def put(*path: str | int, value: Any) -> Change:
    """A change of one place in JSON."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def taken(*path: str | int) -> Change:
    """A change that takes one place out of JSON."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def as_pipe(file: Path) -> None:
    """Nobody writes into it: who opens it to read waits without end."""
    file.unlink()
    os.mkfifo(file)


def as_dangling_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def as_device(file: Path) -> None:
    """It has no end."""
    file.unlink()
    file.symlink_to("/dev/zero")


def as_huge(file: Path) -> None:
    """40 MiB that take no room on disk."""
    os.truncate(file, 40 << 20)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def replaced(old: str, new: str) -> Callable[[Path], None]:
    """The first place of a text in a file."""

    def change(file: Path) -> None:
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return change


def header_of(file: Path) -> dict[str, Any]:
    """The header of a safetensors file."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return dict(json.loads(content[8 : 8 + size]))
