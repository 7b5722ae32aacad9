"""`manifest.json` of a run folder: what each stage was made from and what it made; what is due."""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from expertcut import __version__
from expertcut.data import DEFAULT_QUIZ, Selection, load_quiz
from expertcut.data.sources import MMLU_HUB_ID, MMLU_REVISION
from expertcut.data.texts import text_files
from expertcut.documents import Format1, Record
from expertcut.errors import ModelError, OutputError, QuizError, RecipeError
from expertcut.files import write_atomically
from expertcut.models.checkpoint_dir import check_folder
from expertcut.recipes.recipe_schema import Recipe
from expertcut.recipes.stages import Stage

MANIFEST_FILE, RECIPE_FILE = "manifest.json", "recipe.yaml"
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MOST_CHANGES = 3
_NOT_HASHED = {"run.json", RECIPE_FILE}  # hold times and the like


def _below(name: str) -> str:
    """A path that leads nowhere but into the run folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name[:80]!a} lies outside the run folder")
    return name


class Stamp(Record):
    """A file's content hash, with its size and times when it was read."""

    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str


class StageRecord(Record):
    """One stage: started with these inputs, and finished if it has an output."""

    inputs: dict[str, Any]
    output: str | None = None  # the hash of its files, whose names are relative to the run folder
    files: dict[Annotated[str, AfterValidator(_below)], Stamp] = Field(default_factory=dict)
    elapsed_s: float | None = None
    finished: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)


class Manifest(Record):
    """The whole file."""

    format: Format1 = 1
    model: str
    commit: str | None = None  # pins the model of the Hub for later runs
    inputs: dict[str, Stamp] = Field(default_factory=dict)  # of files that stages read
    contents: dict[str, str] = Field(default_factory=dict)  # hashes of quizzes
    stages: dict[str, StageRecord] = Field(default_factory=dict)


def load_manifest(run: Path) -> Manifest | None:
    """A run folder's manifest, None if there is none yet."""
    file = run / MANIFEST_FILE
    if not file.exists():
        return None
    try:
        return Manifest.load(file, OutputError, "is not a manifest")
    except OutputError as error:
        do = "name another --out, or remove it and what the run made"
        raise OutputError(f"{error}: {do}") from None


def stamp(path: Path, known: Stamp | None = None) -> Stamp:
    """A file's stamp; `known` itself if size and times are the same, else the file is read."""
    stat = path.stat()  # before it is read: what is written meanwhile shows next time
    now = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if known is not None and now == (known.size, known.mtime_ns, known.ctime_ns):
        return known
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return Stamp(size=now[0], mtime_ns=now[1], ctime_ns=now[2], sha256=sha256)


def sha256_of(content: Any) -> str:
    """SHA-256 over a value's canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def quiz_files(quiz: str) -> list[Path] | None:
    """The files that a local quiz is read from, None for one of the Hub."""
    path = Path(MMLU_HUB_ID if quiz == DEFAULT_QUIZ and not Path(quiz).exists() else quiz)
    if path.is_file():
        return sorted({path, *path.parent.glob(f"dev{path.suffix}")})
    if path.is_dir():
        return sorted(f for f in path.rglob("*") if f.suffix in (".csv", ".jsonl", ".parquet"))
    return None


def check_outputs(run: Path, record: StageRecord) -> tuple[str, dict[str, Stamp]]:
    """Which file of a stage is gone or changed, if any; else new stamps of those with new times."""
    stamps: dict[str, Stamp] = {}
    for name, before in record.files.items():
        try:
            now = stamp(run / name, before)
        except OSError:
            return f"{name} is gone", {}
        if now.sha256 != before.sha256 and name.rsplit("/", 1)[-1] not in _NOT_HASHED:
            return f"{name} is not what it wrote", {}
        if now is not before:
            stamps[name] = now
    return "", stamps


class Inputs:
    """Content hashes of everything that a recipe's stages read, each looked up once."""

    def __init__(self, recipe: Recipe, before: Manifest | None, *, is_anew: bool) -> None:
        self.recipe = recipe
        self.model_name = f"{recipe.model}@{recipe.revision or 'main'}"
        self.stamps: dict[str, Stamp] = {}
        self.contents: dict[str, str] = {}
        self._before = before or Manifest(model="")
        self._model: str | None = None
        # Of a model of the Hub: pinned by recipe or earlier run, else None until it is looked up.
        self.commit: str | None = None
        if re.fullmatch("[0-9a-f]{40}", recipe.revision or ""):
            self.commit = recipe.revision
        elif self._before.model == self.model_name and not is_anew:
            self.commit = self._before.commit

    def of(self, stage: Stage, outputs: Mapping[str, str | None]) -> dict[str, Any]:
        """A stage's inputs by name; None for what is not made or not known yet."""
        inputs: dict[str, Any] = {"settings": dict(stage.settings)}
        if stage.reads_model:
            inputs["model"] = self.model()
        if stage.adapter is not None:
            inputs["adapter"] = self._hash([Path(stage.adapter) / name for name in _ADAPTER_FILES])
        for selection in (*stage.questions, *stage.optional_questions):
            is_needed = selection in stage.questions
            inputs[f"quiz {selection.split}"] = self._quiz(selection, is_needed=is_needed)
        for name in stage.reads:
            files = quiz_files(name)  # what is on the Hub is its name
            inputs[f"data {name}"] = sha256_of(name if files is None else self._hashes(files))
        for name in stage.texts:
            files = text_files(name)
            inputs[f"text {name}"] = sha256_of(name if files is None else self._hashes(files))
        return {**inputs, **{f"stage {name}": outputs.get(name) for name in stage.after}}

    def model(self) -> str | None:
        """A hash over a local model's files; `id@commit` of one of the Hub, None if not known."""
        folder = Path(self.recipe.model)
        if not folder.is_dir():
            return f"{self.recipe.model}@{self.commit}" if self.commit else None
        if self._model is None:
            if not (folder / "config.json").is_file():
                raise ModelError(f"{self.recipe.model} holds no model: it has no config.json")
            check_folder(folder)
            patterns = (*_MODEL_FILES, *(["*.py"] if self.recipe.trust_remote_code else []))
            self._model = self._hash(sorted(f for p in patterns for f in folder.glob(p)))
        return self._model

    def _hashes(self, files: Iterable[Path]) -> dict[str, str]:
        """SHA-256 of each file, by path."""
        hashes = {}
        for file in files:
            name = str(file)
            try:
                known = self.stamps.get(name) or self._before.inputs.get(name)
                self.stamps[name] = stamp(file, known)
            except OSError as error:
                raise RecipeError(f"{file} cannot be read: {error.strerror}") from None
            hashes[name] = self.stamps[name].sha256
        return hashes

    def _hash(self, files: Iterable[Path]) -> str:
        """One hash over files of one folder."""
        return sha256_of({Path(name).name: value for name, value in self._hashes(files).items()})

    def _quiz(self, selection: Selection, *, is_needed: bool) -> str:
        """A hash over the questions, which are read again only if a file of the quiz changed."""
        files = quiz_files(selection.quiz)
        key = sha256_of([self._hashes(files or []), vars(selection)])
        known = self.contents.get(key) or self._before.contents.get(key)
        if known is None and files is None:
            is_mmlu = selection.quiz == DEFAULT_QUIZ
            revision = selection.revision or (MMLU_REVISION if is_mmlu else "main")
            known = f"{selection.quiz}@{revision}"
        elif known is None:
            try:
                quiz = load_quiz(selection)
                known = sha256_of({name: quiz.content_hash(name) for name in quiz.questions})
            except QuizError:
                if is_needed:
                    raise
                known = "absent"  # instead of the hash of a split that the quiz does not have
        self.contents[key] = known
        return known


def reason(run: Path, record: StageRecord | None, inputs: Mapping[str, Any]) -> str:
    """Why a stage has to run, in words; empty if its output is current."""
    if record is None:
        return "not run yet"
    pending = [n for n, v in inputs.items() if n.startswith("stage ") and v is None]
    if pending:
        return f"{pending[0].removeprefix('stage ')} runs before it"
    if changes := list(_changes(record.inputs, inputs)):
        more = len(changes) - _MOST_CHANGES
        return "; ".join(changes[:_MOST_CHANGES]) + (f"; and {more} more" if more > 0 else "")
    if record.output is None:
        return "it was begun and not finished"
    return check_outputs(run, record)[0]


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name, value in now.items():
        was = before.get(name)
        if value == was:
            continue
        kind, _, which = name.partition(" ")
        if kind == "settings":
            old, new = dict(_flat(was or {})), dict(_flat(value))
            for key in dict.fromkeys([*new, *old]):
                if old.get(key) != new.get(key):
                    yield f"{key} is {_short(new.get(key))}, was {_short(old.get(key))}"
        else:
            what = f"split {which} of the quiz" if kind == "quiz" else which or f"the {kind}"
            done = "made something else" if kind == "stage" else "changed"
            yield f"{what} {done if was else 'is new'}"
    yield from (f"{name} is no longer read" for name in before if name not in now)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    return "unset" if value is None else ascii(value)[:60]


class Ledger:
    """The records of a run folder's stages, and the recipe's copy beside them (`text`)."""

    def __init__(self, folder: Path, text: bytes) -> None:
        self.folder, self.text = folder, text
        self.before = self._saved = load_manifest(folder)
        self.records = dict(self.before.stages) if self.before else {}

    def keep(self, stage: Stage) -> None:
        """Notes new times of a current stage's files."""
        record = self.records[stage.name]
        files = {**record.files, **check_outputs(self.folder, record)[1]}
        self.records[stage.name] = record.model_copy(update={"files": files})

    def finish(self, stage: Stage, elapsed_s: float) -> str:
        """Records the stage's files; returns the hash of their content."""
        paths: list[Path] = []
        for place in (self.folder / name for name in (*stage.makes, *stage.leaves)):
            paths += sorted(place.rglob("*")) if place.is_dir() else [place]
        made = [path for path in paths if path.is_file()]
        files = {path.relative_to(self.folder).as_posix(): stamp(path) for path in made}
        hashed = {n: s.sha256 for n, s in files.items() if n.rsplit("/", 1)[-1] not in _NOT_HASHED}
        loaded = [name for name in ("torch", "transformers", "numpy") if name in sys.modules]
        output = sha256_of(hashed)
        self.records[stage.name] = StageRecord(
            inputs=self.records[stage.name].inputs,
            output=output,
            files=files,
            elapsed_s=round(elapsed_s, 3),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={"expertcut": __version__} | {name: version(name) for name in loaded},
        )
        return output

    def check_unchanged(self) -> None:
        """Refuses to go on, with an OutputError, if another run has written the manifest."""
        if load_manifest(self.folder) != self._saved:
            fault = "was just changed by another run: run the same command again"
            raise OutputError(f"{self.folder} {fault}")

    def is_saved(self, inputs: Inputs) -> bool:
        """Whether the manifest and the recipe's copy on disk are current."""
        copy = self.folder / RECIPE_FILE
        is_copied = copy.is_file() and copy.read_bytes() == self.text
        return is_copied and self._manifest(inputs) == self._saved

    def save(self, inputs: Inputs) -> None:
        """Writes the manifest and the recipe's copy, if they differ from those on disk."""
        if self.is_saved(inputs):
            return
        write_atomically(self.folder / RECIPE_FILE, self.text)
        self._saved = self._manifest(inputs)
        self._saved.save(self.folder / MANIFEST_FILE)

    def _manifest(self, inputs: Inputs) -> Manifest:
        return Manifest(
            model=inputs.model_name,
            commit=inputs.commit,
            inputs=dict(inputs.stamps),
            contents=dict(inputs.contents),
            stages=dict(self.records),
        )
