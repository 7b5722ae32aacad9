"""A checkpoint folder: safe files, config.json, and the fingerprint of the weights."""

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from expertcut.errors import ModelError
from expertcut.files import parse_json, recall, remember, wide_encoding

_MAX_CONFIG_BYTES = 10_000_000  # a thousand times those of models
# Of files that expertcut or transformers reads, copies or uploads.
_READ_ENDINGS = {".json", ".safetensors", ".txt", ".model", ".jinja", ".py", ".tiktoken"}
_READ_NAMES = ("LICENSE", "LICENCE", "NOTICE", "README.md")
_FRESH_S = 10.0
TEXT_PARTS = ("text_config", "language_config", "llm_config", "thinker_config")
_fingerprints: dict[tuple[object, ...], str] = {}  # by the stamps of the files


def text_parts(config: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The parts of config.json that describe what reads text, by name."""
    return [(name, part) for name in TEXT_PARTS if isinstance(part := config.get(name), dict)]


def parts_of(config: Mapping[str, Any]) -> list[Any]:
    """config.json and its parts that describe what reads text, from the outside in."""
    return [config, *(inner for _, part in text_parts(config) for inner in parts_of(part))]


def read_config(path: Path) -> dict[str, Any]:
    """The content of config.json."""
    file = path / "config.json"
    if not file.exists():
        raise ModelError(f"{path} holds no model: it has no config.json")
    return read_object(file, _MAX_CONFIG_BYTES)


def read_object(file: Path, max_bytes: int = _MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        check_size(file, max_bytes)
        content = file.read_bytes()
        if (encoding := wide_encoding(content)) is not None:
            raise ValueError(f"{encoding} text, must be UTF-8: save it as UTF-8")
        config = json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {str(error)[:200]}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds a {type(config).__name__}, must be a JSON object")
    return config


def check_size(file: Path, max_bytes: int) -> None:
    """Checks that a regular file has a plausible size."""
    if not file.is_file():  # opening a FIFO would wait forever; a device never ends
        file.stat()
        raise ModelError(f"{file} cannot be read: it is not a regular file")
    if (size_bytes := file.stat().st_size) > max_bytes:
        raise ModelError(
            f"{file} has {size_bytes:,} bytes, more than the {max_bytes:,} that it can need: "
            "download it again"
        )


def parse(content: bytes) -> dict[str, Any]:
    """The JSON object of a header or index; ValueError as `parse_json`, or if implausible."""
    # An empty list of two bytes takes 64 bytes of memory; a tensor has 17 or more bytes a bracket.
    if content.count(b"[") + content.count(b"{") > 1000 + len(content) // 8:
        raise ValueError("more lists and objects than there can be tensors")
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ValueError(f"found a {type(value).__name__}")
    return value


def check_folder(folder: Path) -> None:
    """Checks that the files of a checkpoint are regular files in its folder.

    A link may lead to another file of the folder, or to the `blobs` of the hub's cache. Any other
    link could bring a private file into a published checkpoint; a device or pipe could block.
    """
    if (adapter := folder / "adapter_config.json").exists():
        raise ModelError(f"{adapter} makes this an adapter: merge it into its base and save that")
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.suffix in _READ_ENDINGS or file.name.startswith(_READ_NAMES)
    ]
    templates = folder / "additional_chat_templates"  # the only subfolder that tokenizers read
    if templates.is_symlink():
        raise ModelError(f"{templates} is a link: put the folder itself there")
    files += sorted(templates.iterdir()) if templates.is_dir() else []
    for file in files:
        if file.is_symlink():
            _check_link(file, folder)
        if not file.is_file():
            raise ModelError(f"{file} is not a regular file: put the file itself there")


def refuse_pickles(folder: Path) -> None:
    """Refuses pickled weights."""
    endings = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
    if pickles := sorted(file for file in folder.iterdir() if file.suffix in endings):
        raise ModelError(
            f"{pickles[0]} is a pickle, which can run code, so it is never read: "
            "take the weights as safetensors"
        )


def _check_link(file: Path, folder: Path) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a circle of links
        raise ModelError(f"{file} is a link to nothing: download it again") from None
    allowed = [folder := folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    # Older hub libraries put links to their cache into `local_dir` folders.
    allowed += (kept / "blobs" for kept in Path(HF_HUB_CACHE).resolve().glob("models--*"))
    if not any(target.is_relative_to(place) for place in allowed):
        raise ModelError(
            f"{file} is a link that leads outside the checkpoint: put the file itself there"
        )


def fingerprint_of(folder: Path) -> str:
    """SHA-256 over config.json (as parsed JSON) and the bytes of the weights.

    Remembered by `stamp`, by later runs too if no file changed in the seconds before: a change
    within the resolution of the file system's clock would leave the stamp as it was.
    """
    files = sorted(folder.glob("*.safetensors"))
    stamps: tuple[object, ...] = ()
    is_settled = False
    with suppress(OSError):  # reading the file raises an error that names it
        paths = (folder / "config.json", *files)
        stamps = tuple(map(stamp, paths))
        is_settled = time.time() - max(file.stat().st_ctime for file in paths) > _FRESH_S
    if stamps in _fingerprints:
        return _fingerprints[stamps]
    if is_settled and (known := recall(("fingerprint", stamps))):
        return _fingerprints.setdefault(stamps, known)
    digest = hashlib.sha256(json.dumps(read_config(folder), sort_keys=True).encode())
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise ModelError(
                f"{file} cannot be read: {error.strerror}: mend that or download it again"
            ) from None
    if stamps:
        _fingerprints[stamps] = digest.hexdigest()
    if is_settled:
        remember(("fingerprint", stamps), digest.hexdigest())
    return digest.hexdigest()


def stamp(file: Path) -> tuple[object, ...]:
    """Name, inode, size and times of a file, to detect changes."""
    s = file.stat()
    return (file.name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)


def absolute_id(model: str, revision: str | None) -> str:
    """The id in records: the absolute path of a folder, the id of a hub model."""
    return model if revision is not None else str(Path(model).resolve())


def find_local(model: str, fingerprint: str, near: Path) -> Path | None:
    """The folder of a model recorded by path, if it still holds its weights.

    Relative paths of older records may begin in the working directory or above `near`, the record.
    """
    for folder in dict.fromkeys(above / model for above in (Path(), *near.resolve().parents)):
        with suppress(ModelError, OSError, ValueError):
            if (folder / "config.json").is_file() and fingerprint_of(folder) == fingerprint:
                return folder
    return None
