"""What inputs hold, told by their content; files that look untouched are not read again."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from expertcut.data import DEFAULT_QUIZ, Quiz, Selection, load_quiz
from expertcut.data.sources import MMLU_HUB_ID, MMLU_REVISION
from expertcut.errors import ModelError, QuizError, RecipeError
from expertcut.models.checkpoint_dir import check_folder

_COMMIT_LENGTH = 40
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_QUIZ_FILES = ("*.csv", "*.jsonl", "*.parquet")
ABSENT = "absent"


class Stamp(BaseModel):
    """A file's content, and its size and times when that was read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str

    def looks_like(self, path: Path) -> bool:
        """Whether the file was not touched since.

        Raises:
            OSError: it is not there.
        """
        stat = path.stat()
        now = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        return now == (self.size, self.mtime_ns, self.ctime_ns)


def stamp(path: Path, known: Stamp | None = None) -> Stamp:
    """A file's stamp; `known` itself if the file looks like it, else it is read.

    Raises:
        OSError: it cannot be read.
    """
    if known is not None and known.looks_like(path):
        return known
    stat = path.stat()  # before it is read: what is written meanwhile shows next time
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return Stamp(
        size=stat.st_size, mtime_ns=stat.st_mtime_ns, ctime_ns=stat.st_ctime_ns, sha256=sha256
    )


def sha256_of(content: Any) -> str:
    """SHA-256 over a value's canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Stamps:
    """Stamps of input files by path; `now` collects those that still hold."""

    before: Mapping[str, Stamp]
    now: dict[str, Stamp] = field(default_factory=dict)

    def of(self, files: Iterable[Path]) -> dict[str, str]:
        """SHA-256 of each, by path.

        Raises:
            RecipeError: one cannot be read.
        """
        for file in files:
            name = str(file)
            try:
                self.now[name] = stamp(file, self.now.get(name) or self.before.get(name))
            except OSError as error:
                raise RecipeError(f"{file} cannot be read: {error.strerror}") from None
        return {str(file): self.now[str(file)].sha256 for file in files}


def model_files(folder: Path, *, has_code: bool) -> list[Path]:
    """What of a checkpoint says how it answers: config, weights, tokenizer, and code if it runs."""
    patterns = (*_MODEL_FILES, *(["*.py"] if has_code else []))
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


def model_content(model: str, commit: str | None, stamps: Stamps, *, has_code: bool) -> str | None:
    """Of a folder a hash over its files, of a hub id `id@commit`, None while that is not known.

    Raises:
        ModelError: a folder without a model, or with files that lead elsewhere.
    """
    folder = Path(model)
    if folder.is_dir():
        files = model_files(folder, has_code=has_code)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{model} holds no model: it has no config.json")
        check_folder(folder)
        found = stamps.of(files)
        return sha256_of({Path(name).name: content for name, content in found.items()})
    return f"{model}@{commit}" if commit else None


def adapter_content(folder: Path, stamps: Stamps) -> str:
    """A hash over the two files of an adapter.

    Raises:
        RecipeError: one cannot be read.
    """
    found = stamps.of([folder / name for name in _ADAPTER_FILES])
    return sha256_of({Path(name).name: content for name, content in found.items()})


def pinned(revision: str | None) -> str | None:
    """A revision that can never mean anything else: a full commit id."""
    if revision is None or len(revision) != _COMMIT_LENGTH:
        return None
    return revision if set(revision) <= set("0123456789abcdef") else None


def quiz_files(quiz: str) -> list[Path] | None:
    """The files that a local quiz is read from, None for one of the hub."""
    path = Path(MMLU_HUB_ID if quiz == DEFAULT_QUIZ and not Path(quiz).exists() else quiz)
    if path.is_file():
        return sorted({path, *path.parent.glob(f"dev{path.suffix}")})
    if path.is_dir():
        return sorted(file for pattern in _QUIZ_FILES for file in path.rglob(pattern))
    return None


def quiz_content(selection: Selection, *, is_needed: bool) -> str:
    """A hash over all that is asked, `absent` where there is no such split and none is needed.

    Raises:
        QuizError: it cannot be read.
    """
    if quiz_files(selection.quiz) is None:
        is_mmlu = selection.quiz == DEFAULT_QUIZ
        revision = selection.revision or (MMLU_REVISION if is_mmlu else "main")
        return f"{selection.quiz}@{revision}"
    try:
        quiz = load_quiz(selection)
    except QuizError:
        if is_needed:
            raise
        return ABSENT
    return sha256_of(_contents(quiz))


def _contents(quiz: Quiz) -> dict[str, str]:
    return {subject: quiz.content_hash(subject) for subject in quiz.questions}
