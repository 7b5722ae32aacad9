"""One chunk on disk: a safetensors file whose bytes are a function of its arrays and its place."""

import hashlib
import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from expertcut.errors import OutputError, ProfileError
from expertcut.files import create_private, parse_json, share

Arrays = dict[str, np.ndarray[Any, Any]]

_METADATA_KEY = "expertcut"  # one key only: several would be written in random order
_MAX_BYTES = 1 << 30  # 256 questions of 1,024 experts in 200 layers are a fifth of it
_DTYPES = {"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}


def write_chunk(path: Path, arrays: Arrays, of: str = "", scratch: Path | None = None) -> None:
    """Writes a chunk so that it is there whole or not at all; equal arguments give equal bytes.

    `of` says what the chunk belongs to, `scratch` is where it is written before it is renamed.
    """
    described = json.dumps(_description(arrays, of), sort_keys=True, separators=(",", ":"))
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomically(path, save(contiguous, metadata={_METADATA_KEY: described}), scratch)


def read_chunk(path: Path, of: str = "") -> Arrays:
    """A chunk's arrays.

    Raises:
        ProfileError: truncated, altered, not a chunk, or one that belongs to something else.
    """
    found = _read(path, of)
    if isinstance(found, str):
        raise ProfileError(f"{path} is damaged ({found}): profile again to redo it")
    return found


def fault(path: Path, of: str) -> str | None:
    """Why a chunk cannot be used, None if it can."""
    found = _read(path, of)
    return found if isinstance(found, str) else None


def _read(path: Path, of: str) -> Arrays | str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            return f"it has more than {_MAX_BYTES >> 20} MiB"
        with safe_open(path, framework="numpy") as file:
            described = parse_json((file.metadata() or {})[_METADATA_KEY].encode())
            names = list(file.keys())
            if not {file.get_slice(name).get_dtype() for name in names} <= _DTYPES:
                return "it holds numbers of a type that numpy lacks"
            arrays = {name: file.get_tensor(name) for name in names}
        expected = _description(arrays, of)
        if described == expected:
            return arrays
        if {**described, "of": of} == expected:
            return "it belongs to another profile, subject or place"
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return "its checksum does not hold"


def _description(arrays: Arrays, of: str) -> dict[str, object]:
    return {"format": 1, "of": of, "sha256": _checksum(arrays)}


def _checksum(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes, scratch: Path | None = None) -> None:
    """Under a temporary name, beside it or in `scratch`, synced, renamed.

    Raises:
        OutputError: the place cannot be written.
    """
    # Hosts that share a folder may share a pid, so that does not tell their files apart.
    name = f".{path.name}.{secrets.token_hex(4)}.tmp"
    temporary = (scratch or path.parent) / name
    try:
        for folder in (path.parent, temporary.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with create_private(temporary) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        share(temporary)
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # where a file stands in place of the folder, not even this
            temporary.unlink()
        if isinstance(error, OSError):
            raise OutputError(f"{path} cannot be written: {error.strerror}") from None
        raise
