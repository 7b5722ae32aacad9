"""The stage behind `eval`: every model answers the same quiz; `results.json` says how it went."""

import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from expertcut.checkpoints.size import size
from expertcut.edits.plan import PLAN_FILE, PlanFile, load_hashes, load_plan
from expertcut.edits.splits import n_used
from expertcut.errors import OutputError
from expertcut.evaluation.lm_eval_export import (
    harness_bytes,
    harness_paths,
    is_harness_file,
    predictions_bytes,
    predictions_path,
)
from expertcut.evaluation.results import (
    ChosenOnResult,
    ComparisonResult,
    Loaded,
    ModelResult,
    Results,
    Scored,
    Scoring,
    SubjectResult,
    load_results,
    save_results,
)
from expertcut.evaluation.stats import accuracy, compare
from expertcut.files import write_atomically
from expertcut.models.load import Source, find_source
from expertcut.profiling.measure import measure
from expertcut.profiling.schema import quiz_info
from expertcut.profiling.statistics import answers
from expertcut.profiling.storage import load_profile
from expertcut.profiling.workers import Progress
from expertcut.scoring.passes import OnPass, ignore

Array = np.ndarray[Any, Any]


def find_models(paths: Sequence[str], revision: str | None = None) -> list[Source]:
    """All models' checkpoints, the first of a revision; a wrong name or plan is found at once."""
    sources = [find_source(path, None if i else revision) for i, path in enumerate(paths)]
    for source in sources:
        _seen(source)
    return sources


def score(
    source: Source, scoring: Scoring, folder: Path, on_pass: OnPass = ignore
) -> Iterator[Progress | Scored]:
    """Progress while chunks are scored into the folder, at last the scored model.

    Where this process does not wait for others, it may end without.
    """
    options = replace(scoring.options, stats="none")
    measurement = measure(source, scoring.quiz, scoring.limit, scoring.load_as, options)
    store = folder / f"{source.name}-{measurement.info.called(source.id).short_hash}"
    yield from measurement.run(store, on_pass)
    if not scoring.options.waits:
        return
    seen = _seen(source)
    found = Scored(
        source,
        answers(load_profile(store)),
        size(measurement.moe),
        _chosen_on(seen, scoring),
        seen[0].healed_from if seen else None,
        Loaded.of(measurement.moe, measurement.info.settings),
    )
    del measurement
    gc.collect()
    yield found


def results(scoring: Scoring, scored: Sequence[Scored]) -> Results:
    """Accuracies, sizes, and every model compared with the first."""
    subjects = [q.subject for q in scoring.quiz]
    info = quiz_info(scoring.quiz, scoring.limit)
    return Results(
        quiz=info.id,
        revision=info.revision,
        split=info.split,
        shots=info.shots,
        limit=info.limit,
        content_hashes={name: s.content_hash for name, s in info.subjects.items()},
        models=[_model_result(s, subjects) for s in scored],
        comparisons=[
            _comparison(scored[0], other, index) for index, other in enumerate(scored[1:], start=1)
        ],
    )


def check_places(out: Path, harness_file: Path | None) -> None:
    """That nothing is replaced but what an earlier `eval` wrote there.

    Raises:
        OutputError: something else is there, a checkpoint's own file for one.
    """
    if out.exists():
        try:
            load_results(out)
        except OutputError as error:
            raise OutputError(f"{error}, so it is spared: name another --out") from None
    if harness_file is None:
        return
    if harness_file.resolve() == out.resolve():
        raise OutputError(f"--lm-eval-json {harness_file} is --out too: name another")
    if harness_file.exists() and not is_harness_file(harness_file):
        raise OutputError(
            f"{harness_file} holds no results of a harness, so it is spared: name another "
            "--lm-eval-json"
        )


def save(
    scoring: Scoring, scored: Sequence[Scored], out: Path, harness_file: Path | None = None
) -> Results:
    """Writes predictions, the harness's form where it is wanted, and at last the results.

    Raises:
        OutputError: a place cannot be written.
    """
    found = results(scoring, scored)
    write_atomically(predictions_path(out), predictions_bytes(scoring.quiz, scored))
    if harness_file is not None:
        places = harness_paths(harness_file, scored)
        for place, one, result in zip(places, scored, found.models, strict=True):
            write_atomically(place, harness_bytes(scoring, one, result))
    save_results(out, found)
    return found


def _seen(source: Source) -> tuple[PlanFile, frozenset[str]] | None:
    """The plan that made a checkpoint, and the questions that were looked at; None for others."""
    if not os.path.lexists(source.path / PLAN_FILE):
        return None
    plan = load_plan(source.path)
    return plan, load_hashes(source.path, plan)


def _chosen_on(
    seen: tuple[PlanFile, frozenset[str]] | None, scoring: Scoring
) -> ChosenOnResult | None:
    if seen is None:
        return None
    plan, hashes = seen
    splits = dict.fromkeys(s for s in (plan.chosen_on.split, plan.chosen_on.fitted_split) if s)
    return ChosenOnResult(split="+".join(splits), overlap=n_used(scoring.quiz, hashes))


def _model_result(scored: Scored, subjects: Sequence[str]) -> ModelResult:
    found = accuracy(scored.answers.is_correct_N, subjects)
    return ModelResult(
        path=scored.source.id,
        revision=scored.source.revision,
        fingerprint=scored.source.fingerprint,
        accuracy=found.accuracy,
        stderr=found.stderr,
        ci95=found.ci95,
        questions=found.n_questions,
        cut=scored.answers.n_cut,
        subjects={
            name: SubjectResult(accuracy=share, questions=n)
            for name, (share, n) in found.by_subject.items()
        },
        parameters=scored.size.parameters,
        active_parameters=scored.size.active_parameters,
        bytes=scored.size.size_bytes,
        chosen_on=scored.chosen_on,
        healed_from=scored.healed_from,
    )


def _comparison(base: Scored, other: Scored, index: int) -> ComparisonResult:
    found = compare(base.answers.is_correct_N, other.answers.is_correct_N)
    both_NC = np.isfinite(base.answers.logprob_NC) & np.isfinite(other.answers.logprob_NC)
    moved = np.abs(base.answers.logprob_NC - other.answers.logprob_NC)[both_NC]
    return ComparisonResult(
        base=0,
        other=index,
        delta=found.delta,
        ci95=found.ci95,
        gained=found.gained,
        lost=found.lost,
        mcnemar_p=found.mcnemar_p,
        smallest_effect=found.smallest_effect,
        max_abs_logprob_diff=float(moved.max()),
        median_abs_logprob_diff=float(np.median(moved)),
        parameters_delta=other.size.parameters - base.size.parameters,
        bytes_delta=other.size.size_bytes - base.size.size_bytes,
    )
