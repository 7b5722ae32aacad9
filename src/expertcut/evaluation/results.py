"""`results.json`, and the folder that a long run fills. No torch here."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

from pydantic import Field, model_validator

from expertcut.documents import Format1, Record, load_record
from expertcut.errors import OutputError
from expertcut.files import write_atomically
from expertcut.profiling.locks import CLAIMS
from expertcut.profiling.schema import ProfileInfo, Settings

if TYPE_CHECKING:
    from expertcut.checkpoints.size import Size
    from expertcut.data import Quiz
    from expertcut.models.load import LoadOptions, MoeModel, Source
    from expertcut.profiling.measure import MeasureOptions
    from expertcut.profiling.statistics import Answers

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
_ROUNDING = 1e-6
Outcome = TypeVar("Outcome", bound=Record)


class SubjectResult(Record):
    """One subject of one model."""

    accuracy: Share
    questions: Count


class ChosenOnResult(Record):
    """Which split a checkpoint's plan was made on, and how many scored questions were among it."""

    split: str
    overlap: Count


class ModelResult(Record):
    """One model; `bytes` are those of its safetensors files.

    `fingerprint` is a hash over these and config.json. `cut` of its prompts were longer than its
    context and lost tokens on their left; None where none may (`--truncate`). `healed_from` is the
    fingerprint of the checkpoint that was healed, None where healing was not the last step.
    """

    path: str
    revision: str | None = None
    fingerprint: str | None = None
    accuracy: Share
    stderr: Share | None
    ci95: tuple[Share, Share]
    questions: Count
    cut: Count | None = None
    subjects: dict[str, SubjectResult]
    parameters: Count
    active_parameters: Count
    bytes: Count
    chosen_on: ChosenOnResult | None
    healed_from: str | None = None

    @model_validator(mode="after")
    def _is_the_sum_of_its_subjects(self) -> Self:
        subjects = self.subjects.values()
        if sum(subject.questions for subject in subjects) != self.questions:
            raise ValueError("its subjects have another number of questions")
        n_right = sum(subject.accuracy * subject.questions for subject in subjects)
        if abs(n_right - self.accuracy * self.questions) > _ROUNDING * max(self.questions, 1):
            raise ValueError("its accuracy is not that of its subjects")
        return self


class ComparisonResult(Record):
    """A model (`other`, an index) against the first; deltas are other minus base."""

    base: int
    other: int
    delta: float
    ci95: tuple[float, float]
    gained: Count
    lost: Count
    mcnemar_p: Share
    smallest_effect: float
    max_abs_logprob_diff: float
    median_abs_logprob_diff: float
    parameters_delta: int
    bytes_delta: int


class Results(Record):
    """`results.json`; the first model is the base of every comparison."""

    format: Format1 = 1
    quiz: str
    revision: str | None
    split: str
    shots: Count
    limit: Count | None
    content_hashes: dict[str, str]
    models: list[ModelResult] = Field(min_length=1)
    comparisons: list[ComparisonResult]

    @model_validator(mode="after")
    def _comparisons_name_models(self) -> Self:
        if any(not 0 <= i < len(self.models) for c in self.comparisons for i in (c.base, c.other)):
            raise ValueError("a comparison names a model that is not there")
        return self


def save_results(path: Path, found: Results) -> None:
    """Writes `results.json`, whole or not at all."""
    write_atomically(path, results_bytes(found))


def results_bytes(found: Results) -> bytes:
    """`results.json` as it is written."""
    return (found.model_dump_json(indent=1) + "\n").encode()


def load_results(path: Path) -> Results:
    """Results from their file.

    Raises:
        OutputError: no results there.
    """
    return load_record(path, Results, OutputError, "holds no results")


def save_outcome(file: Path, found: Record) -> None:
    """Writes it as JSON, whole or not at all."""
    write_atomically(file, (found.model_dump_json(indent=1) + "\n").encode())


def load_outcome(file: Path, kind: type[Outcome]) -> Outcome:
    """What was saved.

    Raises:
        OutputError: none there, or one that does not hold together.
    """
    return load_record(file, kind, OutputError, f"is no {kind.__name__.lower()}")


def begun(file: Path, kind: type[Outcome]) -> Outcome | None:
    """What an earlier run left in the file's folder; None where there is nothing.

    Raises:
        OutputError: the folder holds something else.
    """
    if file.is_file():
        return load_outcome(file, kind)
    folder = file.parent
    if folder.is_file():
        raise OutputError(f"{folder} is a file: remove it or name another --out")
    # Names with a dot are files that another process is just writing, or was when it was killed.
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    if any(not name.startswith(".") and name != CLAIMS for name in names):
        raise OutputError(
            f"{folder} is not empty and holds no {kind.__name__.lower()}: name another --out"
        )
    return None


def check_same(folder: Path, theirs: Record, ours: Record, kind: str) -> None:
    """That what was asked in a folder is what is asked now.

    Raises:
        OutputError: naming the first thing that differs.
    """
    for key in type(ours).model_fields:
        was, now = getattr(theirs, key), getattr(ours, key)
        if was != now:
            is_long = len(f"{was}{now}") > 160
            how = "differs from what is asked now" if is_long else f"was {was}, now it is {now}"
            raise OutputError(f"{folder} is another {kind}: its {key} {how}: name another --out")


def profile_hash(info: ProfileInfo) -> str:
    """SHA-256 of all that a profile's bytes depend on."""
    return hashlib.sha256(info.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class Loaded:
    """What a results file says of a model while it was loaded."""

    settings: Settings
    special_tokens: Mapping[str, Any]

    @classmethod
    def of(cls, moe: "MoeModel", settings: Settings) -> "Loaded":
        """Of a model in memory."""
        tokenizer, config = moe.tokenizer, moe.model.config
        tokens: dict[str, Any] = {
            f"tokenizer_{name}_token": [
                getattr(tokenizer, f"{name}_token"),
                str(getattr(tokenizer, f"{name}_token_id")),
            ]
            for name in ("pad", "eos", "bos")
        }
        tokens["eot_token_id"] = tokenizer.eos_token_id
        tokens["max_length"] = getattr(config, "max_position_embeddings", None)
        return cls(settings, tokens)


@dataclass(frozen=True)
class Scored:
    """One model's answers, and what else a result says of it."""

    source: "Source"
    answers: "Answers"
    size: "Size"
    chosen_on: ChosenOnResult | None
    healed_from: str | None
    loaded: Loaded


@dataclass(frozen=True)
class Scoring:
    """What is asked, and how, of every model alike."""

    quiz: "Quiz"
    limit: int | None
    load_as: "LoadOptions"
    options: "MeasureOptions"
