"""`results.json`: how models did on the same questions. No torch here, so that it shows at once."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from expertcut.errors import OutputError
from expertcut.profiling.chunks import write_atomically
from expertcut.profiling.record import Record, first_fault


class SubjectResult(Record):
    """One subject of one model."""

    accuracy: float
    questions: int


class ChosenOnResult(Record):
    """Which split a checkpoint's plan was made on, and how many scored questions were among it."""

    split: str
    overlap: int


class ModelResult(Record):
    """One model; `bytes` are those of its safetensors files.

    `fingerprint` is a hash over these and config.json. `cut` of its prompts were longer than its
    context and lost tokens on their left; None where none may (`--truncate`).
    """

    path: str
    revision: str | None = None
    fingerprint: str | None = None
    accuracy: float
    stderr: float | None
    ci95: tuple[float, float]
    questions: int
    cut: int | None = None
    subjects: dict[str, SubjectResult]
    parameters: int
    active_parameters: int
    bytes: int
    chosen_on: ChosenOnResult | None


class ComparisonResult(Record):
    """A model (`other`, an index) against the first; deltas are other minus base."""

    base: int
    other: int
    delta: float
    ci95: tuple[float, float]
    gained: int
    lost: int
    mcnemar_p: float
    smallest_effect: float
    max_abs_logprob_diff: float
    median_abs_logprob_diff: float
    parameters_delta: int
    bytes_delta: int


class Results(Record):
    """`results.json`; the first model is the base of every comparison."""

    format: Literal[1] = 1
    quiz: str
    revision: str | None
    split: str
    shots: int
    limit: int | None
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
    try:
        return Results.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise OutputError(f"{path} holds no results: {first_fault(error)}") from None
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from None
