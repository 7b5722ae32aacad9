"""`manifest.json` of a run folder: what each stage was made from, and what it made."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from expertcut.documents import Format1, load_record
from expertcut.errors import OutputError
from expertcut.recipe.record.hashes import Stamp, sha256_of, stamp

MANIFEST_FILE = "manifest.json"
RECIPE_FILE = "recipe.yaml"
_NOT_CONTENT = {"run.json", RECIPE_FILE}  # times and the like, which say nothing of what was made


def _below(name: str) -> str:
    """A path that leads nowhere but into the run folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name[:80]!a} lies outside the run folder")
    return name


class Entry(BaseModel):
    """Base of what the manifest holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StageRecord(Entry):
    """One stage: begun with these inputs, and done if there is an `output`, the hash of its files.

    `files` are relative to the run folder.
    """

    inputs: dict[str, Any]
    output: str | None = None
    files: dict[Annotated[str, AfterValidator(_below)], Stamp] = Field(default_factory=dict)
    elapsed_s: float | None = None
    finished: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)


class Manifest(Entry):
    """All of it; `inputs` are stamps of the files that stages read, `contents` hashes of quizzes.

    `commit` is that of a hub model, which later runs keep to.
    """

    format: Format1 = 1
    model: str
    commit: str | None = None
    inputs: dict[str, Stamp] = Field(default_factory=dict)
    contents: dict[str, str] = Field(default_factory=dict)
    stages: dict[str, StageRecord] = Field(default_factory=dict)


def load_manifest(run: Path) -> Manifest | None:
    """A run folder's manifest, None where there is none yet.

    Raises:
        OutputError: it cannot be read.
    """
    file = run / MANIFEST_FILE
    if not file.exists():
        return None
    try:
        return load_record(file, Manifest, OutputError, "is no manifest")
    except OutputError as error:
        do = "name another --out, or remove it and what the run made"
        raise OutputError(f"{error}: {do}") from None


def save_manifest(run: Path, manifest: Manifest) -> None:
    """Writes it, whole or not at all.

    Raises:
        OutputError: the place cannot be written.
    """
    from expertcut.files import write_atomically

    content = (manifest.model_dump_json(indent=1) + "\n").encode()
    write_atomically(run / MANIFEST_FILE, content)


def made_files(run: Path, makes: Iterable[str], known: Mapping[str, Stamp]) -> dict[str, Stamp]:
    """Stamps of all files that a stage made, by their place in the run folder."""
    files: list[Path] = []
    for name in makes:
        place = run / name
        files += sorted(f for f in place.rglob("*") if f.is_file()) if place.is_dir() else [place]
    names = [file.relative_to(run).as_posix() for file in files if file.is_file()]
    return {name: stamp(run / name, known.get(name)) for name in names}


def content_of(files: Mapping[str, Stamp]) -> str:
    """One hash over what the files hold, times and the recipe's copy aside."""
    kept = {n: s.sha256 for n, s in files.items() if n.rsplit("/", 1)[-1] not in _NOT_CONTENT}
    return sha256_of(kept)


@dataclass(frozen=True)
class Look:
    """What has become of a stage's files: the first that is not as it was left, and new stamps."""

    fault: str | None = None
    touched: dict[str, Stamp] = field(default_factory=dict)


def look(run: Path, record: StageRecord) -> Look:
    """Whether a stage's files are still what it wrote; only those that were touched are read."""
    touched: dict[str, Stamp] = {}
    for name, before in record.files.items():
        try:
            now = stamp(run / name, before)
        except OSError:
            return Look(f"{name} is gone")
        if now.sha256 != before.sha256 and name.rsplit("/", 1)[-1] not in _NOT_CONTENT:
            return Look(f"{name} is not what it wrote")
        if now is not before:
            touched[name] = now
    return Look(None, touched)
