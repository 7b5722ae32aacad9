"""What `show` finds at a path and a report in a run's folder."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from expertcut.edits.criteria import compare
from expertcut.edits.plan import PLAN_FILE, PROOF_FILE, PlanFile, load_plan
from expertcut.errors import OutputError, SettingsError
from expertcut.evaluation.cross_fit import CrossFitResult, load_cross_fit
from expertcut.evaluation.results import Results, load_results
from expertcut.evaluation.search_results import (
    AUDIT_FILE,
    SWEEP_FILE,
    Audit,
    Sweep,
    load_audit,
    load_sweep,
)
from expertcut.files import parse_json, read_file
from expertcut.profiling.findings import Findings, find, findings_json
from expertcut.profiling.schema import ModelInfo, QuizInfo
from expertcut.profiling.storage import load_profile
from expertcut.reporting.edit_tables import curve_table, proof_csv, proof_table, rows_tables
from expertcut.reporting.eval_tables import (
    audit_csv,
    audit_tables,
    plan_csv,
    plan_table,
    results_csv,
    results_table,
    sweep_csv,
    sweep_table,
)
from expertcut.reporting.profile_tables import (
    criteria_csv,
    criteria_json,
    criteria_tables,
    experts_csv,
    margins_table,
    perturbation_tables,
    profile_tables,
    subject_tables,
    subjects_csv,
    suspects_table,
)
from expertcut.reporting.tables import Table

PROFILE_FILE = "profile.json"
RUN_FILE = "run.json"
MANIFEST_FILE = "manifest.json"
RECIPE_FILE = "recipe.yaml"
RESULTS = "results*.json"
KINDS = (PROFILE_FILE, PLAN_FILE, PROOF_FILE, SWEEP_FILE, AUDIT_FILE)
T = TypeVar("T")


@dataclass(frozen=True)
class Found(Generic[T]):
    """What a file holds, and what the page calls it."""

    file: Path
    name: str
    its: T


@dataclass(frozen=True)
class Run:
    """Everything that was found under `path`, in the order of names."""

    path: Path
    profiles: list[Found[Findings]]
    plans: list[Found[PlanFile]]
    proofs: list[Found[CrossFitResult]]
    results: list[Found[Results]]
    sweeps: list[Found[Sweep]]
    audits: list[Found[Audit]]

    def profile_of(self, plan: PlanFile) -> Found[Findings] | None:
        """The profile that a plan was chosen on, or another of its model."""
        same = [p for p in self.profiles if model_of(p.its).fingerprint == plan.model.fingerprint]
        chosen = (plan.chosen_on.quiz, plan.chosen_on.split)
        exact = [p for p in same if (quiz_of(p.its).id, quiz_of(p.its).split) == chosen]
        return next(iter([*exact, *same]), None)


def gather(path: Path) -> Run:
    """What lies in a folder or is the file; a checkpoint's plan and proof count as two.

    Raises:
        OutputError: nothing to report on, or a file that cannot be read.
        ProfileError: an unfinished or damaged profile.
        PlanError: a damaged plan or proof.
    """
    files = list(_files(path))
    if not files:
        raise OutputError(
            f"nothing to report on in {path}: name a folder that holds a profile, a plan, a "
            "checkpoint with one, or results.json"
        )

    def read(name: str, load: Callable[[Path], T]) -> list[Found[T]]:
        its = [file for file in files if _kind(file) == name]
        return [Found(file, _name(file, path), load(file)) for file in its]

    return Run(
        path=path,
        profiles=read(PROFILE_FILE, lambda file: find(load_profile(file.parent))),
        plans=read(PLAN_FILE, load_plan),
        proofs=read(PROOF_FILE, lambda file: load_cross_fit(file.parent)),
        results=read(RESULTS, load_results),
        sweeps=read(SWEEP_FILE, load_sweep),
        audits=read(AUDIT_FILE, load_audit),
    )


def model_of(found: Findings) -> ModelInfo:
    """The profiled model."""
    return found.profile.info.model


def quiz_of(found: Findings) -> QuizInfo:
    """The profiled quiz."""
    return found.profile.info.quiz


def notes_in(file: Path) -> dict[str, Any]:
    """`run.json` of a profile, a recipe's manifest: empty where there is none that can be read."""
    try:
        notes = parse_json(read_file(file))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def recipe_in(folder: Path) -> list[str]:
    """The lines of the recipe that a run was made by; none where there is none."""
    try:
        return read_file(folder / RECIPE_FILE).decode("utf-8").splitlines()
    except (OSError, ValueError):
        return []


def _files(path: Path) -> Iterator[Path]:
    """Every file that is something by its name, a folder's own before those of its subfolders."""
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise OutputError(f"{path} is not there: name the folder of a run")
    for folder, subfolders, names in os.walk(path):
        # What `eval` scored is no profile of the run, nor is what lies in one, a sweep, an audit.
        subfolders[:] = sorted(s for s in subfolders if not s.startswith(".") and _is_open(s))
        here = Path(folder)
        if not {PROFILE_FILE, SWEEP_FILE, AUDIT_FILE}.isdisjoint(names):
            subfolders.clear()
        yield from (here / n for n in KINDS if n in names)
        yield from (here / n for n in sorted(names) if Path(n).match(RESULTS))


def _is_open(folder: str) -> bool:
    return not folder.endswith(".chunks")


def _kind(file: Path) -> str:
    return file.name if file.name in KINDS else RESULTS


def _name(file: Path, root: Path) -> str:
    """Its folder within the run, or, for results, of which there may be many, its own."""
    place = file.with_suffix("") if _kind(file) == RESULTS else file.parent
    if file == root or place == root:
        return place.resolve().name
    return place.relative_to(root).as_posix()


@dataclass(frozen=True)
class Shown:
    """Tables for people, one flat table for data frames, and JSON, each made when asked for."""

    tables: Callable[[], list[Table]]
    flat: Callable[[], Table]
    json: Callable[[], dict[str, Any]]


def find_shown(path: Path, by_subject: bool = False, by_criteria: bool = False) -> Shown:
    """What lies at the path: a profile, a plan, a proof, results, a sweep or an audit.

    With `by_subject` the tables of a profile end with those of its subjects, and the flat one has
    a row for each expert and subject. With `by_criteria` it is the criteria that are shown.

    Raises:
        OutputError: nothing of that kind.
        SettingsError: subjects or criteria of something that is no profile, or both.
    """
    if by_subject and by_criteria:
        raise SettingsError("--subjects and --criteria show different tables: give one of them")
    if (path / "profile.json").is_file() or path.name == "profile.json":
        folder = path if path.is_dir() else path.parent
        return _criteria(folder) if by_criteria else _profile(folder, by_subject)
    if by_subject or by_criteria:
        option = "--subjects" if by_subject else "--criteria"
        raise SettingsError(f"{option}: {path} is no profile: name one or leave the option out")
    return _no_profile(path)


def _no_profile(path: Path) -> Shown:
    by_file = {PLAN_FILE: _plan, PROOF_FILE: _proof, SWEEP_FILE: _sweep, AUDIT_FILE: _audit}
    for name, make in by_file.items():
        if (path / name).is_file():
            return make(path)
    if path.name == PROOF_FILE:
        return _proof(path.parent)
    if path.is_file():
        keys = _keys(path)
        by_key = {"models": _results, "cells": _sweep, "harms": _audit}
        return next((make for key, make in by_key.items() if key in keys), _plan)(path)
    raise OutputError(
        f"nothing to show in {path}: it is no profile, plan, results, sweep, audit, or "
        "checkpoint with a plan; of a run's folder name a part, or make its page with report"
    )


def _profile(path: Path, by_subject: bool) -> Shown:
    found = find(load_profile(path))

    def tables() -> list[Table]:
        return [
            *profile_tables(found.profile, found.layers),
            suspects_table(found),
            margins_table(found),
            *perturbation_tables(found),
            *(subject_tables(found) if by_subject else []),
            *rows_tables(found.profile),
        ]

    flat = subjects_csv if by_subject else experts_csv
    return Shown(tables, lambda: flat(found), lambda: findings_json(found))


def _criteria(path: Path) -> Shown:
    found = compare(load_profile(path))
    return Shown(
        lambda: criteria_tables(found),
        lambda: criteria_csv(found),
        lambda: criteria_json(found),
    )


def _plan(path: Path) -> Shown:
    plan = load_plan(path)
    tables = [plan_table(plan), *([curve_table(plan.tuning)] if plan.tuning else [])]
    if (path / PROOF_FILE).is_file():
        tables.append(proof_table(load_cross_fit(path)))
    return Shown(lambda: tables, lambda: plan_csv(plan), lambda: plan.model_dump(mode="json"))


def _proof(path: Path) -> Shown:
    proof = load_cross_fit(path)
    table = proof_table(proof)
    return Shown(lambda: [table], lambda: proof_csv(proof), lambda: proof.model_dump(mode="json"))


def _results(path: Path) -> Shown:
    results = load_results(path)
    return Shown(
        lambda: [results_table(results)],
        lambda: results_csv(results),
        lambda: results.model_dump(mode="json"),
    )


def _sweep(path: Path) -> Shown:
    found = load_sweep(path)
    return Shown(
        lambda: [sweep_table(found)],
        lambda: sweep_csv(found),
        lambda: found.model_dump(mode="json"),
    )


def _audit(path: Path) -> Shown:
    found = load_audit(path)
    return Shown(
        lambda: audit_tables(found),
        lambda: audit_csv(found),
        lambda: found.model_dump(mode="json"),
    )


def _keys(path: Path) -> set[str]:
    try:
        content = parse_json(read_file(path))
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise OutputError(f"{path} cannot be read as JSON: {error}") from None
    return set(content) if isinstance(content, dict) else set()
