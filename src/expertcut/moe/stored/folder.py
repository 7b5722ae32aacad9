"""Which files of a checkpoint's folder are read: regular ones that lie there, and no pickles."""

from collections.abc import Iterator
from pathlib import Path

from expertcut.errors import ModelError

_READ_ENDINGS = {".json", ".safetensors", ".txt", ".model", ".jinja", ".py", ".tiktoken"}
_READ_NAMES = ("LICENSE", "LICENCE", "NOTICE", "README.md")
_TEMPLATES = "additional_chat_templates"  # the one folder that tokenizers look into
_CODE_OF_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_ADAPTER = "adapter_config.json"


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
