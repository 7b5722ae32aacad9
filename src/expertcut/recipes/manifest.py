"""`manifest.json` of a run folder: what each stage was made from, what it made, what is due."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from expertcut import __version__
from expertcut.data import DEFAULT_QUIZ, Quiz, Selection, load_quiz
from expertcut.data.sources import MMLU_HUB_ID, MMLU_REVISION
from expertcut.documents import Format1, load_record
from expertcut.errors import ModelError, OutputError, QuizError, RecipeError
from expertcut.models.checkpoint_dir import check_folder
from expertcut.recipes.recipe_schema import Recipe
from expertcut.recipes.stages import Asking, Stage

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


MANIFEST_FILE = "manifest.json"
RECIPE_FILE = "recipe.yaml"
_NOT_CONTENT = {"run.json", RECIPE_FILE}  # times and the like, which say nothing of what was made
_MOST_CHANGES = 3
_LIBRARIES = ("torch", "transformers", "numpy")


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


class Inputs:
    """Content hashes of all that the stages of a recipe read, each looked up once.

    `commit` is that of a hub model: the pinned one, else the one that an earlier run found, else
    None until `found_commit` says what it is.
    """

    def __init__(self, recipe: Recipe, before: Manifest | None, *, is_anew: bool) -> None:
        self.recipe = recipe
        self.stamps = Stamps(before.inputs if before else {})
        self.contents: dict[str, str] = {}
        self._contents_before = before.contents if before else {}
        is_same = before is not None and before.model == self.asked_model and not is_anew
        self.commit = pinned(recipe.revision) or (before.commit if before and is_same else None)
        self._model: str | None = None

    @property
    def asked_model(self) -> str:
        """The model as the recipe names it."""
        return f"{self.recipe.model}@{self.recipe.revision or 'main'}"

    def of(self, stage: Stage, outputs: Mapping[str, str | None]) -> dict[str, Any]:
        """A stage's inputs by name; None for what is not made or not known yet.

        Raises:
            ModelError: the model's folder holds none.
            QuizError: questions that the stage needs cannot be read.
            RecipeError: a file cannot be read.
        """
        found: dict[str, Any] = {"settings": dict(stage.settings)}
        if stage.reads_model:
            found["model"] = self.model()
        if stage.adapter is not None:
            found["adapter"] = adapter_content(Path(stage.adapter), self.stamps)
        for asking in stage.asks:
            found[f"quiz {asking.split}"] = self._quiz(asking)
        for name in stage.reads:
            files = quiz_files(name)  # what is on the hub is its name
            found[f"data {name}"] = sha256_of(name if files is None else self.stamps.of(files))
        return {**found, **{f"stage {name}": outputs.get(name) for name in stage.after}}

    def model(self) -> str | None:
        """What the model is, by its content or its commit."""
        if self._model is None:
            recipe = self.recipe
            self._model = model_content(
                recipe.model, self.commit, self.stamps, has_code=recipe.trust_remote_code
            )
        return self._model

    def _quiz(self, asking: Asking) -> str:
        """Questions are read again only where some file of the quiz holds something else."""
        selection = asking.selection(self.recipe)
        files = quiz_files(selection.quiz)
        held = self.stamps.of(files) if files is not None else {}
        key = sha256_of([held, vars(selection)])
        if key not in self.contents:
            known = self._contents_before.get(key)
            self.contents[key] = known or quiz_content(selection, is_needed=asking.is_needed)
        return self.contents[key]


def reason(run: Path, stage: Stage, record: StageRecord | None, inputs: Mapping[str, Any]) -> str:
    """Why a stage has to run, in words; empty where what it made is there and current."""
    if record is None:
        return "it never ran"
    pending = [n for n, v in inputs.items() if n.startswith("stage ") and v is None]
    if pending:
        return f"{pending[0].removeprefix('stage ')} runs before it"
    if changes := list(_changes(stage, record.inputs, inputs)):
        more = len(changes) - _MOST_CHANGES
        return "; ".join(changes[:_MOST_CHANGES]) + (f"; and {more} more" if more > 0 else "")
    if record.output is None:
        return "it was begun and not finished"
    return look(run, record).fault or ""


def _changes(stage: Stage, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name, value in now.items():
        was = before.get(name)
        if value == was:
            continue
        kind, _, which = name.partition(" ")
        if kind == "settings":
            yield from _changed_settings(was or {}, value)
        elif kind == "stage":
            yield f"{which} made something else" if was else f"{which} is new"
        else:
            named = {"quiz": f"split {which} of the quiz", "data": which}
            what = named.get(kind, f"the {kind}")
            yield f"{what} changed" if was else f"{what} is new"
    yield from (f"{name} is no longer read" for name in before if name not in now)


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    old, new = dict(_flat(before)), dict(_flat(now))
    for key in dict.fromkeys([*new, *old]):
        if old.get(key) != new.get(key):
            yield f"{key} is {_short(new.get(key))}, was {_short(old.get(key))}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    return "unset" if value is None else ascii(value)[:60]


class Ledger:
    """The records of a run folder's stages; `text` is the recipe, which lies beside them.

    Raises:
        OutputError: the folder's manifest cannot be read.
    """

    def __init__(self, folder: Path, text: bytes) -> None:
        self.folder, self.text = folder, text
        self.before = self._saved = load_manifest(folder)
        self.records = dict(self.before.stages) if self.before else {}

    def keep(self, stage: Stage) -> None:
        """A current stage; where its files were only touched, their new times are noted."""
        record = self.records[stage.name]
        if touched := look(self.folder, record).touched:
            files = {**record.files, **touched}
            self.records[stage.name] = record.model_copy(update={"files": files})

    def begin(self, stage: Stage, inputs: Mapping[str, Any]) -> None:
        """From now on what lies in the stage's place was begun with these inputs."""
        self.records[stage.name] = StageRecord(inputs=dict(inputs))

    def finish(self, stage: Stage, elapsed_s: float) -> str:
        """Notes what the stage made; returns the hash of its content."""
        files = made_files(self.folder, (*stage.makes, *stage.leaves), {})
        loaded = {name: version(name) for name in _LIBRARIES if name in sys.modules}
        output = content_of(files)
        self.records[stage.name] = StageRecord(
            inputs=self.records[stage.name].inputs,
            output=output,
            files=files,
            elapsed_s=round(elapsed_s, 3),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={"expertcut": __version__, **loaded},
        )
        return output

    def check_unchanged(self) -> None:
        """That nobody else has written the manifest since this run read or wrote it.

        Raises:
            OutputError: another run has.
        """
        if load_manifest(self.folder) != self._saved:
            raise OutputError(
                f"{self.folder} was just changed by another run: run the same command again"
            )

    def is_saved(self, inputs: Inputs) -> bool:
        """Whether the manifest and the recipe's copy on disk say what is known."""
        return self._manifest(inputs) == self._saved and self._has_copy()

    def save(self, inputs: Inputs) -> None:
        """Writes the manifest and the recipe's copy, where they differ from what is there.

        Raises:
            OutputError: the place cannot be written.
        """
        if self.is_saved(inputs):
            return
        from expertcut.files import write_atomically  # with numpy, else not needed

        if not self._has_copy():
            write_atomically(self.folder / RECIPE_FILE, self.text)
        self._saved = self._manifest(inputs)
        save_manifest(self.folder, self._saved)

    def _has_copy(self) -> bool:
        copy = self.folder / RECIPE_FILE
        return copy.is_file() and copy.read_bytes() == self.text

    def _manifest(self, inputs: Inputs) -> Manifest:
        return Manifest(
            model=inputs.asked_model,
            commit=inputs.commit,
            inputs=dict(inputs.stamps.now),
            contents=dict(inputs.contents),
            stages=dict(self.records),
        )
