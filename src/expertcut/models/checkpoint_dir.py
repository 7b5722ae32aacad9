"""A checkpoint's folder: which files are read, its JSON, and one hash of its contents."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expertcut.errors import ModelError
from expertcut.files import parse_json, wide_encoding

_MAX_CONFIG_BYTES = 10_000_000  # those of models are a thousandth of it
_MIN_BRACKETS = 1000  # small files may be odd
_MAX_LINE = 200  # what a parser says may quote the file
_READ_ENDINGS = {".json", ".safetensors", ".txt", ".model", ".jinja", ".py", ".tiktoken"}
_READ_NAMES = ("LICENSE", "LICENCE", "NOTICE", "README.md")
_TEMPLATES = "additional_chat_templates"  # the one folder that tokenizers look into
_CODE_OF_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_ADAPTER = "adapter_config.json"
_known: dict[tuple[object, ...], str] = {}  # by the names, sizes and times of the files


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
        ValueError: anything else, as `parse_json`.
    """
    # Each empty list of two bytes takes 64 of memory; tensors have 17 and more bytes a bracket.
    if content.count(b"[") + content.count(b"{") > _MIN_BRACKETS + len(content) // 8:
        raise ValueError("more lists and objects than there can be tensors")
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ValueError(f"found a {type(value).__name__}")
    return value


def check_folder(folder: Path) -> None:
    """That what is read from here lies here: no links to other places, devices or pipes.

    A link may lead to another file of the folder, or to the `blobs` of the hub's cache, where the
    files of a snapshot lie. Everything else could carry a file of the user into a checkpoint that
    is published, or hold up whoever opens it.

    Raises:
        ModelError: a file that leads elsewhere or is none, or an adapter, which names its own base.
    """
    if (folder / _ADAPTER).exists():
        raise ModelError(
            f"{folder / _ADAPTER} makes this an adapter: merge it into its base and save that"
        )
    homes = None
    for file in _files(folder):
        if file.is_symlink():
            homes = homes or _homes(folder)
            _check_link(file, homes)
        if not file.is_file():
            raise ModelError(f"{file} is no regular file: put the file itself there")


def refuse_pickles(folder: Path) -> None:
    """Says which files without safetensors beside them are never read, and why.

    Raises:
        ModelError: there are some.
    """
    found = sorted(f.name for f in folder.iterdir() if f.suffix in _CODE_OF_PICKLES)
    if found:
        raise ModelError(
            f"{folder / found[0]} is a pickle, which can run code, so it is never read: "
            "take the weights as safetensors"
        )


def _files(folder: Path) -> Iterator[Path]:
    """What this tool or transformers reads, copies or uploads."""
    for file in sorted(folder.iterdir()):
        if file.suffix in _READ_ENDINGS or file.name.startswith(_READ_NAMES):
            yield file
    templates = folder / _TEMPLATES
    if templates.is_symlink():
        raise ModelError(f"{templates} is a link: put the folder itself there")
    if templates.is_dir():
        yield from sorted(templates.iterdir())


def _homes(folder: Path) -> list[Path]:
    """Where a link of this folder may lead, spelled out."""
    from huggingface_hub.constants import HF_HUB_CACHE

    place = folder.resolve()
    homes = [place]
    if place.parent.name == "snapshots":
        homes.append(place.parent.parent / "blobs")
    # An older hub library put links to its cache into folders that were asked for by name.
    cache = Path(HF_HUB_CACHE).resolve()
    return [*homes, *(repository / "blobs" for repository in cache.glob("models--*"))]


def _check_link(file: Path, homes: list[Path]) -> None:
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: links that lead in a circle
        raise ModelError(f"{file} is a link to nothing: download it again") from None
    if not any(target.is_relative_to(home) for home in homes):
        raise ModelError(
            f"{file} is a link that leads outside the checkpoint: put the file itself there"
        )


def fingerprint_of(folder: Path) -> str:
    """SHA-256 over config.json (as JSON, not its spelling) and every byte of the weights.

    Files that look untouched are read once in a process.

    Raises:
        ModelError: a file that cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    try:
        key = tuple(stamp(file) for file in (folder / "config.json", *files))
    except OSError:
        return _hash(folder, files)  # which says what is wrong
    if key not in _known:
        _known[key] = _hash(folder, files)
    return _known[key]


def stamp(file: Path) -> tuple[object, ...]:
    """What changes when a file is written: its name, inode, size and times."""
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
