"""Samples of lm-evaluation-harness (`samples_<task>_<date>.jsonl`): read, matched and judged.

N are the documents of a task. A document has a number that the task averages, or where the metric
is a perplexity a log-likelihood with its weight in words or bytes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from expertcut.data.readers import json_lines
from expertcut.errors import OutputError, SettingsError
from expertcut.evaluation.results import Part, TaskComparison, TaskResult
from expertcut.files import parse_json, read_file
from expertcut.stats import Array, bootstrap_ci95, compare, interval_verdict, unpaired_z, verdict

_NAME = re.compile(r"samples_(?P<task>.+?)(_\d{4}-\d\d-\d\dT[\d.-]+)?\.jsonl")
# Keys of a sample that are no metrics, for files of versions that did not list the `metrics`.
_OTHERS = {
    *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"),
    *("doc_hash", "prompt_hash", "target_hash"),
}
_HASHES = {"doc_hash": "another text", "prompt_hash": "another prompt"}
# Σ −log p / Σ weight in these units is averaged over documents, then to the power of e, but bits.
_LOSSES = {"perplexity": 1.0, "word_perplexity": 1.0, "byte_perplexity": 1.0}
_LOSSES |= {"bits_per_byte": 1 / math.log(2)}
_LOWER_IS_BETTER = {"ter", "wer", "brier_score"}  # where no results file beside says it
_LARGEST = 700.0  # of a loss whose exponential is a float


@dataclass(frozen=True)
class Outcomes:
    """One metric of one task on one model; of a perplexity the values are −log p."""

    metric: str  # with its filter, as the harness names it
    is_loss: bool
    is_higher_better: bool
    documents: Sequence["Document"] = field(repr=False)  # by id
    value_N: Array
    weight_N: Array

    @property
    def result(self) -> TaskResult:
        """The metric as the harness aggregates it, and the standard error of a mean."""
        value, n = float(self.value_N.sum() / self.weight_N.sum()), len(self.documents)
        stderr = None
        if self.is_loss and not self.metric.startswith("bits_"):
            if value > _LARGEST:
                raise OutputError(f"{self.documents[0].where}: {self.metric} is e^{value:.0f}")
            value = math.exp(value)
        elif not self.is_loss and n > 1:
            stderr = float(self.value_N.std(ddof=1)) / math.sqrt(n)
        return TaskResult(metric=self.metric, value=value, stderr=stderr, documents=n)


@dataclass(frozen=True)
class Document:
    """One document as one filter saw it: where it is written, its hashes, its metrics."""

    id: int
    where: str
    hashes: Mapping[str, object]
    metrics: Mapping[str, Any]


def read_samples(path: Path) -> dict[str, Outcomes]:
    """Outcomes by task in a file, or in a folder of `samples_*.jsonl`.

    A task with several filters has an entry for each, `task,filter`. Raises SettingsError where
    there are none, or QuizError, with file and line where one cannot be used.
    """
    files = sorted(path.rglob("samples_*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise SettingsError(f"{path} holds no samples_*.jsonl: run lm_eval with --log_samples")
    found: dict[str, Outcomes] = {}
    for file in files:
        named = _NAME.fullmatch(file.name)
        own = _outcomes(named["task"] if named else file.stem, file)
        if again := next((name for name in own if name in found), None):
            raise SettingsError(f"{file}: a second file of {again} in {path}: name one of them")
        found |= own
    return found


def _outcomes(task: str, file: Path) -> dict[str, Outcomes]:
    by_filter: dict[str, dict[int, Document]] = {}
    for where, record in json_lines(file):
        one = _document(where, record)
        known = by_filter.setdefault(str(record.get("filter", "none")), {})
        if one.id in known:
            raise SettingsError(f"{where}: document {one.id} stands at {known[one.id].where} too")
        known[one.id] = one
    if not by_filter:
        raise SettingsError(f"{file} holds no samples")
    beside = _results_beside(file, task)
    return {
        f"{task},{name}" if len(by_filter) > 1 else task: _first_metric(
            task, name, [known[id] for id in sorted(known)], beside
        )
        for name, known in by_filter.items()
    }


def _document(where: str, record: Mapping[str, Any]) -> Document:
    if not isinstance(id := record.get("doc_id"), int):
        raise SettingsError(f"{where}: not a sample of lm-evaluation-harness: it has no doc_id")
    listed = record.get("metrics")
    names = listed if isinstance(listed, list) else [k for k in record if k not in _OTHERS]
    metrics = {name: record[name] for name in names if isinstance(name, str) and name in record}
    return Document(id, where, {k: record[k] for k in _HASHES if k in record}, metrics)


def _first_metric(
    task: str, name: str, documents: Sequence[Document], beside: Mapping[str, Any]
) -> Outcomes:
    """The first metric with a number for each document, whose aggregate is that of the harness."""
    for metric in documents[0].metrics:
        numbers = [_number(metric, document.metrics.get(metric)) for document in documents]
        value_N, weight_N = np.array([n for n in numbers if n is not None] or [(0, 0)]).T
        if len(value_N) < len(documents) or not weight_N.all():
            continue
        up = beside.get("higher_is_better", {}).get(metric)
        is_up = metric not in _LOWER_IS_BETTER if up is None else bool(up)
        key, is_loss = f"{metric},{name}", metric in _LOSSES
        found = Outcomes(key, is_loss, is_up and not is_loss, documents, value_N, weight_N)
        is_whole = beside.get("n-samples", {}).get("effective") == len(documents)
        theirs = beside.get("results", {}).get(key) if is_whole else None
        if theirs is None or math.isclose(found.result.value, theirs, rel_tol=1e-6, abs_tol=1e-9):
            return found
    tried = ", ".join(documents[0].metrics) or "no metric"
    raise SettingsError(
        f"{documents[0].where}: task {task} has no metric that averages one number a document "
        f"({tried}): its models cannot be compared document by document"
    )


def _number(metric: str, value: Any) -> tuple[float, float] | None:
    """A value and its weight; None where it is neither a number nor a weighed log-likelihood."""
    is_pair = metric in _LOSSES and isinstance(value, list) and len(value) == 2
    parts = value if is_pair else [value, 1]
    if not all(isinstance(part, bool | int | float) for part in parts):
        return None
    return -float(parts[0]) * _LOSSES[metric] if metric in _LOSSES else float(parts[0]), parts[1]


def _results_beside(file: Path, task: str) -> dict[str, Any]:
    """What the only `results_*.json` beside a file says of a task; empty if there is none."""
    found = []
    for beside in file.parent.glob("results_*.json"):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            content = parse_json(read_file(beside))
            keys = ("results", "higher_is_better", "n-samples")
            parts = {key: content[key].get(task) for key in keys}
            found += [parts] if all(isinstance(part, dict) for part in parts.values()) else []
    return found[0] if len(found) == 1 else {}


def judge(models: Sequence[Mapping[str, Outcomes]], margin: float) -> Part:
    """Every model's tasks, and each compared with the first on the same documents."""
    base, *others = models
    for other in others:
        if missing := sorted(base.keys() ^ other.keys()):
            raise SettingsError(f"{missing[0]} is not among the samples of every model")
    comparisons = [
        {task: _compare(task, base[task], other[task], margin) for task in base} for other in others
    ]
    results = [{task: own.result for task, own in model.items()} for model in models]
    return Part("tasks", results, comparisons)


def _check_same(task: str, base: Outcomes, other: Outcomes) -> None:
    """Refuses other documents, prompts and metrics, with the place of the first."""
    pairs = {document.id: document for document in other.documents}
    if base.metric != other.metric:
        where = other.documents[0].where
        raise SettingsError(f"{where}: {task} has {other.metric}, the base's has {base.metric}")
    for document in base.documents:
        if (pair := pairs.pop(document.id, None)) is None:
            raise _lacking(task, document, other)
        for key in document.hashes.keys() & pair.hashes.keys():
            if document.hashes[key] != pair.hashes[key]:
                raise SettingsError(f"{pair.where}: {_HASHES[key]} ({key}) than {document.where}")
    if pairs:
        raise _lacking(task, next(iter(pairs.values())), base)


def _lacking(task: str, document: Document, by: Outcomes) -> SettingsError:
    """The error for a document that the other model was not asked."""
    file = by.documents[0].where.rpartition(":")[0]
    return SettingsError(f"{document.where}: document {document.id} of {task} is not in {file}")


def _compare(task: str, base: Outcomes, other: Outcomes, margin: float) -> TaskComparison:
    """The paired comparison, and the harness's unpaired z beside it."""
    _check_same(task, base, other)
    before, after = base.result, other.result
    z, p = unpaired_z((before.value, before.stderr), (after.value, after.stderr))
    both_N = np.concatenate([base.value_N, other.value_N])
    if base.is_loss or not np.isin(both_N, (0, 1)).all():
        return _compare_values(base, other, margin).model_copy(
            update={"unpaired_z": z, "unpaired_p": p}
        )
    change = compare(base.value_N.astype(bool), other.value_N.astype(bool))
    won, lost = (change.gained, change.lost)[:: 1 if base.is_higher_better else -1]
    word = verdict(won, lost, len(base.documents), margin)
    paired = change.model_dump()
    return TaskComparison(**paired, verdict=word, margin=margin, unpaired_z=z, unpaired_p=p)


def _compare_values(base: Outcomes, other: Outcomes, margin: float) -> TaskComparison:
    """Values that are not all 0 or 1: a bootstrap over documents; shares have a margin."""
    difference_N, n = other.value_N - base.value_N, len(base.documents)
    delta = float(difference_N.sum() / base.weight_N.sum())
    ci95 = bootstrap_ci95(difference_N, base.weight_N)
    both_N = np.concatenate([base.value_N, other.value_N])
    is_share = not base.is_loss and bool(((both_N >= 0) & (both_N <= 1)).all())
    accepted = margin if is_share else None
    rest_N = difference_N - delta * base.weight_N  # linearised, as of a ratio
    stderr = float(rest_N.std()) * math.sqrt(n) / float(base.weight_N.sum())
    low, high = ci95 if base.is_higher_better else (-ci95[1], -ci95[0])
    return TaskComparison(
        delta=delta,
        ci95=ci95,
        verdict=interval_verdict((low, high), accepted) if n > 1 else None,
        smallest_effect=2.8 * stderr if n > 1 else None,
        margin=accepted,
    )
