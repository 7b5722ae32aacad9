"""What a model's folder holds, as one hash, by which it is found again on this machine."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from expertcut.errors import ModelError
from expertcut.moe.stored.objects import read_config

_known: dict[tuple[object, ...], str] = {}  # by the names, sizes and times of the files


def fingerprint_of(folder: Path) -> str:
    """SHA-256 over config.json (as JSON, not its spelling) and every byte of the weights.

    Files that look untouched are read once in a process.

    Raises:
        ModelError: a file that cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    try:
        key = tuple(_stamp(file) for file in (folder / "config.json", *files))
    except OSError:
        return _hash(folder, files)  # which says what is wrong
    if key not in _known:
        _known[key] = _hash(folder, files)
    return _known[key]


def _stamp(file: Path) -> tuple[object, ...]:
    stat = file.stat()
    times = (stat.st_mtime_ns, stat.st_ctime_ns)
    return (file.name, stat.st_dev, stat.st_ino, stat.st_size, *times)


def _hash(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256(json.dumps(read_config(folder), sort_keys=True).encode())
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            what = f"{file} cannot be read: {error.strerror}"
            raise ModelError(f"{what}: mend that or download it again") from None
    return digest.hexdigest()


def absolute_id(model: str, revision: str | None) -> str:
    """How a model is recorded: a folder by its whole path, what is on the hub by its id."""
    return model if revision is not None else str(Path(model).resolve())


def find_local(model: str, fingerprint: str, near: Path) -> Path | None:
    """The folder of a model that was recorded by a path, if it is there with its weights.

    Paths of older records are relative: they are tried from the working directory, then from the
    folders above `near`, where the record lies.
    """
    return next((f for f in _candidates(model, near) if _holds(f, fingerprint)), None)


def _candidates(model: str, near: Path) -> Iterator[Path]:
    yield Path(model)
    if not Path(model).is_absolute():
        yield from (above / model for above in near.resolve().parents)


def _holds(folder: Path, fingerprint: str) -> bool:
    try:
        return (folder / "config.json").is_file() and fingerprint_of(folder) == fingerprint
    except (ModelError, OSError, ValueError):
        return False
