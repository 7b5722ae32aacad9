"""What `show` finds at a path, in every form it can be printed in."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertcut.errors import OutputError
from expertcut.evaluation.evaluate import load_results
from expertcut.interventions.plan import PLAN_FILE, load_plan
from expertcut.profiling.statistics import as_json
from expertcut.profiling.store import load_profile
from expertcut.reporting.outcomes import plan_table, results_csv, results_table
from expertcut.reporting.profiles import profile_csv, profile_tables
from expertcut.reporting.tables import Table


@dataclass(frozen=True)
class Shown:
    """Tables for people, one flat table for data frames, and JSON, each made when asked for."""

    tables: Callable[[], list[Table]]
    flat: Callable[[], Table]
    json: Callable[[], dict[str, Any]]


def find_shown(path: Path) -> Shown:
    """What lies at the path: a profile, a plan, a checkpoint that holds one, or results.

    Raises:
        OutputError: nothing of that kind.
    """
    if (path / "profile.json").is_file() or path.name == "profile.json":
        return _profile(path if path.is_dir() else path.parent)
    if (path / PLAN_FILE).is_file():
        return _plan(path)
    if path.is_file():
        return _results(path) if "models" in _keys(path) else _plan(path)
    raise OutputError(
        f"nothing to show in {path}: it is no profile, plan, results, or checkpoint with a plan"
    )


def _profile(path: Path) -> Shown:
    profile = load_profile(path)
    return Shown(
        lambda: profile_tables(profile), lambda: profile_csv(profile), lambda: as_json(profile)
    )


def _plan(path: Path) -> Shown:
    plan = load_plan(path)
    return Shown(
        lambda: [plan_table(plan)], lambda: plan_table(plan), lambda: plan.model_dump(mode="json")
    )


def _results(path: Path) -> Shown:
    results = load_results(path)
    return Shown(
        lambda: [results_table(results)],
        lambda: results_csv(results),
        lambda: results.model_dump(mode="json"),
    )


def _keys(path: Path) -> set[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{path} cannot be read as JSON: {error}") from None
    return set(content) if isinstance(content, dict) else set()
