"""What `show` finds at a path, in every form it can be printed in."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertcut.edits.criteria import compare
from expertcut.edits.plan import PLAN_FILE, PROOF_FILE, load_plan
from expertcut.errors import OutputError, SettingsError
from expertcut.evaluation.cross_fit import load_proof
from expertcut.evaluation.results import load_results
from expertcut.evaluation.search_results import AUDIT_FILE, SWEEP_FILE, load_audit, load_sweep
from expertcut.files import parse_json, read_file
from expertcut.profiling.findings import find, findings_json
from expertcut.profiling.storage import load_profile
from expertcut.reporting.audits import audit_csv, audit_tables
from expertcut.reporting.criteria import criteria_csv, criteria_json, criteria_tables
from expertcut.reporting.cuts import rows_tables
from expertcut.reporting.findings import (
    experts_csv,
    margins_table,
    perturbation_tables,
    subject_tables,
    subjects_csv,
    suspects_table,
)
from expertcut.reporting.outcomes import plan_csv, plan_table, results_csv, results_table
from expertcut.reporting.profiles import profile_tables
from expertcut.reporting.proving import curve_table, proof_csv, proof_table
from expertcut.reporting.sweeps import sweep_csv, sweep_table
from expertcut.reporting.tables import Table


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
        tables.append(proof_table(load_proof(path)))
    return Shown(lambda: tables, lambda: plan_csv(plan), lambda: plan.model_dump(mode="json"))


def _proof(path: Path) -> Shown:
    proof = load_proof(path)
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
