"""`results.json`: how models did on the same questions. No torch here, so that it shows at once."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from expertcut.documents import Format1, Record, load_record
from expertcut.errors import OutputError
from expertcut.files import write_atomically

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
_ROUNDING = 1e-6


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
