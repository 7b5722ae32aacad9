"""One chunk on disk: a safetensors file whose bytes are a function of its arrays."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from expertcut.errors import OutputError, ProfileError

Arrays = dict[str, np.ndarray[Any, Any]]

_METADATA_KEY = "expertcut"  # one key only: several would be written in random order


def write_chunk(path: Path, arrays: Arrays) -> None:
    """Writes a chunk so that it is there whole or not at all; equal arrays give equal bytes."""
    described = json.dumps(
        {"format": 1, "sha256": _checksum(arrays)}, sort_keys=True, separators=(",", ":")
    )
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomically(path, save(contiguous, metadata={_METADATA_KEY: described}))


def read_chunk(path: Path) -> Arrays:
    """A chunk's arrays.

    Raises:
        ProfileError: truncated, altered, or not a chunk.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            described = json.loads((file.metadata() or {})[_METADATA_KEY])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if described == {"format": 1, "sha256": _checksum(arrays)}:
            return arrays
        reason = "its checksum does not hold"
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
    raise ProfileError(f"{path} is damaged ({reason}): delete it and profile again")


def _checksum(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Under a temporary name, synced, renamed.

    Raises:
        OutputError: the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # where a file stands in place of the folder, not even this
            temporary.unlink()
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None
