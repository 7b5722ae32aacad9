"""JSON files of strangers: small enough, regular, an object, or refused by name."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from expertcut.errors import ModelError
from expertcut.files import wide_encoding

_MAX_CONFIG_BYTES = 10_000_000  # those of models are a thousandth of it
_MIN_BRACKETS = 1000  # small files may be odd
_MAX_LINE = 200  # what a parser says may quote the file


def read_config(path: Path) -> dict[str, Any]:
    """config.json as it stands.

    Raises:
        ModelError: missing, or not a JSON object.
    """
    file = path / "config.json"
    if not file.exists():
        raise ModelError(f"{path} holds no model: it has no config.json")
    return read_object(file, _MAX_CONFIG_BYTES)


def read_object(file: Path, max_bytes: int = _MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        ModelError: it cannot be read, is too large, or holds anything else.
    """
    try:
        check_size(file, max_bytes)
        content = file.read_bytes()
        if (encoding := wide_encoding(content)) is not None:
            raise ValueError(f"{encoding} text, must be UTF-8: save it as UTF-8")
        config = json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {str(error)[:_MAX_LINE]}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds a {type(config).__name__}, must be a JSON object")
    return config


def check_size(file: Path, max_bytes: int) -> None:
    """That a file is one, and no larger than what it holds can be.

    Raises:
        ModelError: it is not.
        OSError: it is not there.
    """
    if not file.is_file():  # else opening a FIFO waits for ever, and a device never ends
        file.stat()
        raise ModelError(f"{file} cannot be read: it is no regular file")
    if (size_bytes := file.stat().st_size) > max_bytes:
        raise ModelError(
            f"{file} has {size_bytes:,} bytes, more than the {max_bytes:,} that it can need: "
            "download it again"
        )


def parse(content: bytes) -> dict[str, Any]:
    """A JSON object of a header or an index.

    Raises:
        RecursionError: it is nested too deeply.
        ValueError: anything else, or a name that stands in it twice.
    """
    # Each empty list of two bytes takes 64 of memory; tensors have 17 and more bytes a bracket.
    if content.count(b"[") + content.count(b"{") > _MIN_BRACKETS + len(content) // 8:
        raise ValueError("more lists and objects than there can be tensors")
    value = json.loads(content.decode("utf-8"), object_pairs_hook=_distinct)
    if not isinstance(value, dict):
        raise ValueError(f"found a {type(value).__name__}")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name[:_MAX_LINE]} stands in it twice")
    return found
