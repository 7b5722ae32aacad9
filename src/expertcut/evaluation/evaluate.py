"""The stage behind `eval`: scores several models on one quiz and writes `results.json`."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertcut.checkpoints.size import size, stored_size
from expertcut.data import without
from expertcut.edits.plan import PlanFile, load_hashes, plan_in
from expertcut.errors import OutputError
from expertcut.evaluation import lm_eval_export as export
from expertcut.evaluation import results as schema
from expertcut.evaluation.results import Scored, Scoring, load_results
from expertcut.files import write_atomically
from expertcut.models.contract_check import Contract
from expertcut.models.load import Source, find_source
from expertcut.profiling.measure import measure
from expertcut.profiling.schema import quiz_info
from expertcut.profiling.storage import load_profile
from expertcut.profiling.workers import Progress
from expertcut.scoring.passes import OnPass, ignore
from expertcut.stats import accuracy, compare, logprob_shift


def find_models(
    paths: Sequence[str], revision: str | None = None, contract: Contract | None = None
) -> list[Source]:
    """All checkpoints, the first of a revision; a wrong name or plan is refused at once."""
    sources = [find_source(path, None if i else revision, contract) for i, path in enumerate(paths)]
    for source in sources:
        _plan_and_hashes(source)
    return sources


def score(
    source: Source, scoring: Scoring, folder: Path, on_pass: OnPass = ignore
) -> Iterator[Progress | Scored]:
    """Progress of scoring into the folder, then, unless others are not waited for, the result."""
    options = replace(scoring.options, stats="none")
    measurement = measure(source, scoring.quiz, scoring.limit, scoring.load_as, options)
    store = folder / f"{source.name}-{measurement.info.called(source.id).short_hash}"
    yield from measurement.run(store, on_pass)
    if not scoring.options.waits:
        return
    chosen_on = healed_from = None
    if edited := _plan_and_hashes(source):
        plan, hashes = edited
        splits = dict.fromkeys(s for s in (plan.chosen_on.split, plan.chosen_on.fitted_split) if s)
        overlap = len(scoring.quiz) - len(without(scoring.quiz, hashes))
        chosen_on = schema.ChosenOnResult(split="+".join(splits), overlap=overlap)
        healed_from = plan.healed_from
    moe, settings = measurement.moe, measurement.info.settings
    answers, tokenizer = load_profile(store).answers, moe.tokenizer
    tokens: dict[str, Any] = {
        f"tokenizer_{name}": [getattr(tokenizer, name), str(getattr(tokenizer, f"{name}_id"))]
        for name in ("pad_token", "eos_token", "bos_token")
    }
    tokens["eot_token_id"] = tokenizer.eos_token_id
    tokens["max_length"] = getattr(moe.model.config, "max_position_embeddings", None)
    scored = Scored(source, answers, size(moe), chosen_on, healed_from, settings, tokens)
    del measurement, moe
    gc.collect()
    yield scored


def results(scoring: Scoring, scored: Sequence[Scored]) -> schema.QuizResults:
    """The record of all models, each compared with the first."""
    subjects, base = [q.subject for q in scoring.quiz], scored[0]
    info = quiz_info(scoring.quiz, scoring.limit)
    comparisons = []
    for index, other in enumerate(scored[1:], start=1):
        largest, median = logprob_shift(base.answers.logprob_NC, other.answers.logprob_NC)
        change = schema.QuizComparison(
            base=0,
            other=index,
            **compare(base.answers.is_correct_N, other.answers.is_correct_N).model_dump(),
            max_abs_logprob_diff=largest,
            median_abs_logprob_diff=median,
            parameters_delta=other.size.parameters - base.size.parameters,
            bytes_delta=other.size.size_bytes - base.size.size_bytes,
        )
        comparisons.append(change)
    return schema.QuizResults(
        quiz=info.id,
        **info.model_dump(include={"revision", "split", "shots", "limit"}),
        chance=base.answers.chance,
        content_hashes={name: s.content_hash for name, s in info.subjects.items()},
        models=[_model_result(s, subjects) for s in scored],
        comparisons=comparisons,
    )


def check_places(out: Path, harness_file: Path | None) -> None:
    """Checks that only files of an earlier `eval` would be replaced, else an OutputError."""
    if out.exists():
        try:
            load_results(out)
        except OutputError as error:
            raise OutputError(f"{error}, so it is not overwritten: name another --out") from None
    if harness_file is None:
        return
    if harness_file.resolve() == out.resolve():
        raise OutputError(f"--lm-eval-json {harness_file} is --out too: name another")
    if harness_file.exists() and not export.is_harness_file(harness_file):
        raise OutputError(
            f"{harness_file} holds no results of a harness, so it is not overwritten: name "
            "another --lm-eval-json"
        )


def save_answers(
    scoring: Scoring, scored: Sequence[Scored], out: Path, harness_file: Path | None = None
) -> schema.QuizResults:
    """Writes predictions beside the results, and the harness's files if requested."""
    record = results(scoring, scored)
    content = export.predictions_bytes(scoring.quiz, scored)
    write_atomically(schema.predictions_file(out), content)
    if harness_file is not None:
        places = export.harness_paths(harness_file, scored)
        for place, one, result in zip(places, scored, record.models, strict=True):
            write_atomically(place, export.harness_bytes(scoring, one, result))
    return record


def described(name: str, source: Source | None) -> schema.ModelResult:
    """A model of which nothing was asked yet: its size on disk, and where it comes from."""
    if source is None:
        return schema.ModelResult(path=name)
    edited = _plan_and_hashes(source)
    parameters, size_bytes = stored_size(source)
    return schema.ModelResult(
        path=source.id,
        revision=source.revision,
        fingerprint=source.fingerprint,
        parameters=parameters,
        bytes=size_bytes,
        healed_from=edited[0].healed_from if edited else None,
    )


def _plan_and_hashes(source: Source) -> tuple[PlanFile, frozenset[str]] | None:
    """The plan of a checkpoint and the questions that it used; None for an unedited model."""
    plan = plan_in(source.path)
    return None if plan is None else (plan, load_hashes(source.path, plan))


def _model_result(scored: Scored, subjects: Sequence[str]) -> schema.QuizModelResult:
    measured, source = accuracy(scored.answers.is_correct_N, subjects), scored.source
    return schema.QuizModelResult(
        path=source.id,
        revision=source.revision,
        fingerprint=source.fingerprint,
        accuracy=measured.accuracy,
        stderr=measured.stderr,
        ci95=measured.ci95,
        questions=measured.n_questions,
        cut=scored.answers.n_cut,
        subjects={
            name: schema.SubjectResult(accuracy=share, questions=n)
            for name, (share, n) in measured.by_subject.items()
        },
        parameters=scored.size.parameters,
        active_parameters=scored.size.active_parameters,
        bytes=scored.size.size_bytes,
        chosen_on=scored.chosen_on,
        healed_from=scored.healed_from,
    )
