"""Where the numbers come from: models, questions, settings, versions, times, commands."""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from expertcut.edits.plan import Plan
from expertcut.evaluation.results import Results
from expertcut.profiling.findings import Findings
from expertcut.reporting.page.gathering import MANIFEST_FILE, RUN_FILE, Run, notes_in, recipe_in
from expertcut.reporting.page.parts import Facts, Folded, Lines, Part, Section

Rows = list[tuple[str, str]]


def provenance_sections(run: Run) -> list[Section]:
    """One, with facts on everything that was found."""
    parts: list[Part] = []
    if stages := _stages(notes_in(run.path / MANIFEST_FILE)):
        parts.append(_folded("Stages of the run", stages))
    if recipe := recipe_in(run.path):
        parts.append(Folded("Recipe", [Lines(recipe)]))
    for profile in run.profiles:
        notes = notes_in(profile.file.parent / RUN_FILE)
        parts.append(_folded(f"Profile {profile.name}", _profile(profile.its, notes)))
    parts += [_folded(f"Plan {plan.name}", _plan(plan.its)) for plan in run.plans]
    parts += [_folded(f"Results {found.name}", _results(found.its)) for found in run.results]
    return [Section("provenance", "Where the numbers come from", parts)]


def _folded(title: str, rows: Rows) -> Folded:
    return Folded(title, [Facts(rows)])


def _profile(found: Findings, notes: Mapping[str, Any]) -> Rows:
    info = found.profile.info
    model, quiz, settings = info.model, info.quiz, info.settings
    asked = {name: subject.content_hash for name, subject in quiz.subjects.items()}
    return [
        *_some(("model", model.label), ("revision", model.revision)),
        ("fingerprint of config and weights", model.fingerprint),
        *_quiz(quiz.id, quiz.revision, quiz.split, quiz.shots, quiz.limit),
        ("hash of the questions", _hash(asked)),
        ("settings", ", ".join(f"{k} {v}" for k, v in settings.model_dump().items() if v)),
        *_times(notes),
    ]


def _plan(plan: Plan) -> Rows:
    chosen, adapter = plan.chosen_on, plan.adapter
    fitted = f", fitted on {chosen.fitted_questions:,} of {chosen.fitted_split}"
    return [
        ("made by", plan.action),
        *_some(("model", plan.model.label), ("revision", plan.model.revision)),
        ("fingerprint of config and weights", plan.model.fingerprint),
        ("chosen on", f"{chosen.questions:,} {chosen.split} questions of {chosen.quiz}"
                      f"{fitted if chosen.fitted_split else ''}"),
        ("hash of their list", chosen.sha256),
        *_some(("adapter that was cut along",
                f"{adapter.path}, {adapter.weights_sha256}" if adapter else None)),
    ]  # fmt: skip


def _results(found: Results) -> Rows:
    return [
        *_quiz(found.quiz, found.revision, found.split, found.shots, found.limit),
        ("hash of the questions", _hash(found.content_hashes)),
        *((f"model {i}", model.path) for i, model in enumerate(found.models)),
    ]


def _quiz(name: str, revision: str | None, split: str, shots: int, limit: int | None) -> Rows:
    first = f", the first {limit} of each subject" if limit else ""
    asked = f"{name}, split {split}, {shots} shots{first}"
    return [("questions", asked), *_some(("revision of the questions", revision))]


def _some(*rows: tuple[str, str | None]) -> Rows:
    return [(name, text) for name, text in rows if text]


def _stages(manifest: Mapping[str, Any]) -> Rows:
    """When each stage of a recipe was finished, by what, and how long it took."""
    stages = manifest.get("stages")
    rows: Rows = []
    for name, record in stages.items() if isinstance(stages, dict) else ():
        if not isinstance(record, dict) or not isinstance(record.get("finished"), str):
            continue
        texts = [record["finished"]]
        if isinstance(elapsed_s := record.get("elapsed_s"), int | float):
            texts.append(f"{elapsed_s:,.1f} s")
        if isinstance(versions := record.get("versions"), dict):
            texts += [f"{package} {version}" for package, version in versions.items()]
        rows.append((name, ", ".join(texts)))
    return rows


def _times(notes: Mapping[str, Any]) -> Rows:
    """Whatever of it is there: `run.json` promises nothing."""
    rows: Rows = []
    if isinstance(finished := notes.get("finished"), int | float):
        rows += [("finished", text) for text in (_moment(finished),) if text]
    if isinstance(elapsed_s := notes.get("elapsed_s"), int | float):
        rows.append(("took", f"{elapsed_s:,.1f} s"))
    for name in ("expertcut", "python"):
        rows += [
            (f"version of {name}", text) for text in (notes.get(name),) if isinstance(text, str)
        ]
    return rows


def _moment(seconds: float) -> str | None:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):  # no year that a calendar has
        return None


def _hash(hashes: Mapping[str, str]) -> str:
    """One for all subjects."""
    return hashlib.sha256("\n".join(f"{k} {v}" for k, v in hashes.items()).encode()).hexdigest()
