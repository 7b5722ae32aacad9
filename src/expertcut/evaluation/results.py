"""`results.json`, and records in the folder of a long run. Does not import torch."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import Field, model_validator

from expertcut.documents import Format1, Record
from expertcut.errors import OutputError
from expertcut.evaluation.generation import GenerationChange, GenerationInfo, GenerationResult
from expertcut.files import parse_json, read_file
from expertcut.profiling.locks import CLAIMS
from expertcut.profiling.schema import AnyProfileInfo, Settings
from expertcut.stats import Comparison, Count, Share, Verdict

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


class TaskResult(Record):
    """One task of lm-evaluation-harness on one model: the mean of its metric over documents."""

    metric: str  # with its filter, as the harness names it: `exact_match,strict-match`
    value: float
    stderr: float | None
    documents: Count


class TaskComparison(Record):
    """Paired comparison on one task's documents; `delta` is other minus base, in the metric.

    The delta of a perplexity is that of its logarithm. Outcomes of 0 and 1 have the intervals and
    tests of a quiz; others a bootstrap over documents, and no McNemar test. The `verdict` is
    within `margin`; null where the metric is no share. `unpaired_z` is the harness's own test.
    """

    delta: float
    ci95: tuple[float, float]
    mcnemar_p: Share | None = None
    gained: Count | None = None
    lost: Count | None = None
    verdict: Verdict | None
    smallest_effect: float | None
    margin: Share | None
    unpaired_z: float | None = None
    unpaired_p: Share | None = None


class TextResult(Record):
    """One source of texts on one model; `ci95` is that of the perplexity, by documents.

    Intervals are null where there are fewer than 10 documents.
    """

    perplexity: float
    ci95: tuple[float, float] | None
    bits_per_byte: float
    bits_per_byte_ci95: tuple[float, float] | None
    tokens: Count
    documents: Count


class TextComparison(Record):
    """Other minus base on the same documents; intervals are a paired bootstrap over these.

    `kl` is KL(base ‖ other) in nats per token, `top1_agreement` the share of tokens with the same
    likeliest token, `acceptance` the mean of Σ min(p, q). `delta_loss` is in nats per token, `ci95`
    its interval. All of these are null where the models read other tokens.
    """

    kl: float | None
    kl_ci95: tuple[float, float] | None
    top1_agreement: Share | None
    top1_agreement_ci95: tuple[Share, Share] | None
    acceptance: Share | None
    acceptance_ci95: tuple[Share, Share] | None
    delta_loss: float | None
    ci95: tuple[float, float] | None
    delta_bits_per_byte: float | None
    delta_bits_per_byte_ci95: tuple[float, float] | None


class JudgedSource(Record):
    """A source that was read; `dropped` documents had a part in a model's edit."""

    spec: str
    revision: str | None
    documents: Count
    dropped: Count
    content_hash: str


class JudgedTexts(Record):
    """The texts of an evaluation, and how they became rows.

    Of the base's predictions `top_k` of `vocabulary` tokens are kept: with fewer, `kl` is a lower
    bound and `acceptance` an upper one. Null without a model to compare.
    """

    sources: dict[str, JudgedSource] = Field(min_length=1)
    max_tokens: int
    tokens: int | None
    seed: int
    assistant_only: bool
    top_k: Count | None
    vocabulary: Count


class ModelResult(Record):
    """One model, with what was asked of it; null is what was not asked or is not known.

    `bytes` and `fingerprint` are those of its weights and config.json. `cut` prompts were
    truncated on the left, None without `--truncate`. `healed_from` is the fingerprint of the
    checkpoint that was healed, None where healing was not the last step.
    """

    path: str
    revision: str | None = None
    fingerprint: str | None = None
    accuracy: Share | None = None
    stderr: Share | None = None
    ci95: tuple[Share, Share] | None = None
    questions: Count | None = None
    cut: Count | None = None
    subjects: dict[str, SubjectResult] | None = None
    parameters: Count | None = None
    active_parameters: Count | None = None
    bytes: Count | None = None
    chosen_on: ChosenOnResult | None = None
    healed_from: str | None = None
    text: dict[str, TextResult] | None = None
    tasks: dict[str, TaskResult] | None = None
    generation: GenerationResult | None = None


class QuizModelResult(ModelResult):
    """One model that answered the quiz."""

    accuracy: Share
    stderr: Share | None
    ci95: tuple[Share, Share]
    questions: Count
    subjects: dict[str, SubjectResult]
    parameters: Count
    active_parameters: Count
    bytes: Count
    chosen_on: ChosenOnResult | None

    @model_validator(mode="after")
    def _is_the_sum_of_its_subjects(self) -> Self:
        subjects = self.subjects.values()
        if sum(subject.questions for subject in subjects) != self.questions:
            raise ValueError("the questions of its subjects do not add up")
        n_right = sum(subject.accuracy * subject.questions for subject in subjects)
        if abs(n_right - self.accuracy * self.questions) > 1e-6 * max(self.questions, 1):
            raise ValueError("the accuracy is not that of its subjects")
        return self


class ComparisonResult(Record):
    """Two models, by index, in what was asked of both; deltas are other minus base."""

    base: int
    other: int
    delta: float | None = None
    ci95: tuple[float, float] | None = None
    gained: Count | None = None
    lost: Count | None = None
    mcnemar_p: Share | None = None
    smallest_effect: float | None = None
    max_abs_logprob_diff: float | None = None
    median_abs_logprob_diff: float | None = None
    parameters_delta: int | None = None
    bytes_delta: int | None = None
    text: dict[str, TextComparison] | None = None
    tasks: dict[str, TaskComparison] | None = None
    generation: GenerationChange | None = None


# Records are frozen, so a subclass may narrow a field; in JSON the indices come first.
class QuizComparison(Comparison, ComparisonResult):  # type: ignore[misc]
    """Two models that answered the quiz."""

    max_abs_logprob_diff: float
    median_abs_logprob_diff: float
    parameters_delta: int
    bytes_delta: int


@dataclass(frozen=True)
class Part:
    """What is asked beside the quiz, such as `tasks`: its value for each model and comparison."""

    key: str  # the field of `ModelResult` and `ComparisonResult`
    models: Sequence[object]
    comparisons: Sequence[object]
    asked: object = None  # the same field of `Results`, if it has one


class Results(Record):
    """`results.json`; the first model is the base of every comparison.

    Without a quiz all that belongs to it is null; with one, the class is `QuizResults`.
    """

    format: Format1 = 1
    quiz: str | None = None
    revision: str | None = None
    split: str | None = None
    shots: Count | None = None
    limit: Count | None = None
    chance: Share | None = None  # the accuracy of guessing; older files lack it
    content_hashes: dict[str, str] | None = None
    text: JudgedTexts | None = None
    generation: GenerationInfo | None = None
    models: Sequence[ModelResult] = Field(min_length=1)
    comparisons: Sequence[ComparisonResult]

    @model_validator(mode="after")
    def _comparisons_name_models(self) -> Self:
        if any(not 0 <= i < len(self.models) for c in self.comparisons for i in (c.base, c.other)):
            raise ValueError("a comparison names a model that is missing")
        return self

    def with_part(self, part: Part) -> Self:
        """A copy with one more part."""
        values = {"models": part.models, "comparisons": part.comparisons}
        changed: dict[str, object] = {
            name: [
                record.model_copy(update={part.key: value})
                for record, value in zip(getattr(self, name), values[name], strict=True)
            ]
            for name in values
        }
        changed |= {} if part.asked is None else {part.key: part.asked}
        return self.model_copy(update=changed)


class QuizResults(Results):
    """Results with a quiz, all of whose figures are there."""

    quiz: str
    revision: str | None
    split: str
    shots: Count
    limit: Count | None
    content_hashes: dict[str, str]
    models: list[QuizModelResult] = Field(min_length=1)
    comparisons: list[QuizComparison]


def results_of(models: Sequence[ModelResult]) -> Results:
    """Results without a quiz, each model compared with the first; `with_part` fills them."""
    base, *others = models
    comparisons = [
        ComparisonResult(
            base=0,
            other=index,
            parameters_delta=_minus(other.parameters, base.parameters),
            bytes_delta=_minus(other.bytes, base.bytes),
        )
        for index, other in enumerate(others, start=1)
    ]
    return Results(models=list(models), comparisons=comparisons)


def _minus(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a - b


def load_results(path: Path) -> Results:
    """Results from their file, of a quiz `QuizResults`; OutputError if missing or not valid."""
    kind: type[Results] = QuizResults
    with suppress(OSError, ValueError):  # `load` says what is wrong
        content = parse_json(read_file(path))
        if isinstance(content, dict) and content.get("quiz", "") is None:
            kind = Results
    return kind.load(path, OutputError, "holds no results")


def predictions_file(results: Path) -> Path:
    """Where the answers of a results file lie: `predictions.parquet` beside `results.json`."""
    name = "predictions" if results.stem == "results" else f"{results.stem}.predictions"
    return results.with_name(f"{name}.parquet")


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
