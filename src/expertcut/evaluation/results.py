"""`results.json`, and records in the folder of a long run. Does not import torch."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import Field, model_validator

from expertcut.documents import Format1, Record
from expertcut.errors import OutputError
from expertcut.profiling.locks import CLAIMS
from expertcut.profiling.schema import AnyProfileInfo, Settings
from expertcut.stats import Comparison, Count, Share

if TYPE_CHECKING:
    from expertcut.checkpoints.size import Size
    from expertcut.data import Quiz
    from expertcut.models.load import LoadOptions, Source
    from expertcut.profiling.measure import MeasureOptions
    from expertcut.profiling.statistics import Answers

Outcome = TypeVar("Outcome", bound=Record)


class SubjectResult(Record):
    """One subject of one model."""

    accuracy: Share
    questions: Count


class ChosenOnResult(Record):
    """The split that a checkpoint's plan was made on, and how many scored questions it used."""

    split: str
    overlap: Count


class ModelResult(Record):
    """One model; `bytes` and `fingerprint` are those of its weights and config.json.

    `cut` prompts were truncated on the left, None without `--truncate`. `healed_from` is the
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
            raise ValueError("the questions of its subjects do not add up")
        n_right = sum(subject.accuracy * subject.questions for subject in subjects)
        if abs(n_right - self.accuracy * self.questions) > 1e-6 * max(self.questions, 1):
            raise ValueError("the accuracy is not that of its subjects")
        return self


class _ModelPair(Record):
    base: int
    other: int


class ComparisonResult(Comparison, _ModelPair):  # in JSON the indices come first
    """Two models, by index; deltas are other minus base."""

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
    chance: Share | None = None  # the accuracy of guessing; older files lack it
    content_hashes: dict[str, str]
    models: list[ModelResult] = Field(min_length=1)
    comparisons: list[ComparisonResult]

    @model_validator(mode="after")
    def _comparisons_name_models(self) -> Self:
        if any(not 0 <= i < len(self.models) for c in self.comparisons for i in (c.base, c.other)):
            raise ValueError("a comparison names a model that is missing")
        return self


def load_results(path: Path) -> Results:
    """Results from their file, an OutputError where it is missing or not valid."""
    return Results.load(path, OutputError, "holds no results")


def load_outcome(file: Path, kind: type[Outcome]) -> Outcome:
    """A saved record, an OutputError where it is missing or not valid."""
    return kind.load(file, OutputError, f"is not a valid {kind.__name__.lower()}")


def load_unfinished(file: Path, kind: type[Outcome]) -> Outcome | None:
    """The record of an earlier run, None in a new or empty folder; else an OutputError."""
    if file.is_file():
        return load_outcome(file, kind)
    folder = file.parent
    if folder.is_file():
        raise OutputError(f"{folder} is a file: remove it or name another --out")
    # Names with a dot are temporary files of a process that is running or was killed.
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    if any(not name.startswith(".") and name != CLAIMS for name in names):
        raise OutputError(
            f"{folder} is not empty and holds no {kind.__name__.lower()}: name another --out"
        )
    return None


def check_same(folder: Path, theirs: Record, ours: Record, kind: str) -> None:
    """Checks that a folder's run has the same settings; an error names the first that differs."""
    for key in type(ours).model_fields:
        was, now = getattr(theirs, key), getattr(ours, key)
        if was != now:
            is_long = len(f"{was}{now}") > 160
            how = "differs from now" if is_long else f"was {was}, now it is {now}"
            raise OutputError(f"{folder} is another {kind}: its {key} {how}: name another --out")


def profile_hash(info: AnyProfileInfo) -> str:
    """SHA-256 of everything that a profile's bytes depend on."""
    return hashlib.sha256(info.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class Scored:
    """One model's answers, size and provenance; `special_tokens` are those of its results file."""

    source: "Source"
    answers: "Answers"
    size: "Size"
    chosen_on: ChosenOnResult | None
    healed_from: str | None
    settings: Settings
    special_tokens: Mapping[str, Any]


@dataclass(frozen=True)
class Scoring:
    """The quiz and how every model is scored on it."""

    quiz: "Quiz"
    limit: int | None
    load_as: "LoadOptions"
    options: "MeasureOptions"
