"""What lies in a run's folder, in whatever subfolders: profiles, plans, results, searches."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from expertcut.edits.plan import PLAN_FILE, PROOF_FILE, Plan, load_plan
from expertcut.errors import OutputError
from expertcut.evaluation.cross_fit import ProofResult, load_proof
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
from expertcut.profiling.findings import Findings, find
from expertcut.profiling.schema import ModelInfo, QuizInfo
from expertcut.profiling.storage import load_profile

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
    plans: list[Found[Plan]]
    proofs: list[Found[ProofResult]]
    results: list[Found[Results]]
    sweeps: list[Found[Sweep]]
    audits: list[Found[Audit]]

    def profile_of(self, plan: Plan) -> Found[Findings] | None:
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
        proofs=read(PROOF_FILE, lambda file: load_proof(file.parent)),
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
