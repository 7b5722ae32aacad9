"""The stage behind `prune` and `reweight`: fit, export, judge on held-out questions, rename."""

import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertcut.checkpoints.export import check_free, export, new_folder
from expertcut.checkpoints.held_out import Answered, Difference, answer, at_run_time, proof
from expertcut.checkpoints.stock import Fitted
from expertcut.errors import ProfileError
from expertcut.interventions.direction import Fit, fit_directions, judge_directions
from expertcut.interventions.plan import Draft, Plan, save_plan
from expertcut.interventions.prune import fold_factors
from expertcut.interventions.questions import Questions, draft_plan, questions_for, used_hashes
from expertcut.moe.engine import Engine
from expertcut.moe.loading import LoadOptions, MoeModel, Source, find_source, load
from expertcut.profiling.store import Profile


@dataclass(frozen=True)
class Built:
    """What was made: the plan, and what it did to held-out questions."""

    folder: Path
    plan: Plan
    held_out_split: str
    differences: list[Difference]
    fits: list[Fit]
    shares: dict[tuple[int, int], tuple[float, float, float]]


@dataclass(frozen=True)
class _Judged:
    base: Answered
    exact: Answered
    directions: dict[int, Tensor]
    fits: list[Fit]


def build(profile: Profile, draft: Draft, folder: Path, load_as: LoadOptions) -> Built:
    """Makes the checkpoint; the folder appears when all is written and judged, or not at all.

    Raises:
        OutputError: the folder is not empty or cannot be written.
        ProfileError: the model or the quiz is not the one that was profiled.
    """
    check_free(folder)
    source = profiled_source(profile)
    questions = questions_for(profile, is_fitting=draft.is_fitting)
    plan = draft_plan(profile, draft, questions)
    judged = _judge_base(_load(source, profile, load_as), profile, draft, questions)
    fitted = Fitted(_folds(profile, draft, questions), judged.directions)
    gc.collect()
    with new_folder(folder) as temporary:
        export(source, profile, plan, fitted, temporary)
        gc.collect()
        edited = _load(Source(str(folder), temporary), profile, load_as)
        exported = answer(_engine(edited, profile), questions.held_out, draft.edits)
        exact_name = "the same removal as a mask" if not draft.is_fitting else "the exact bias"
        figures, rows = proof(judged.base, judged.exact, exported, exact_name)
        figures |= {
            "held_out_split": questions.held_out.split,
            "fits": [asdict(f) for f in judged.fits],
        }
        plan = plan.model_copy(update={"proof": figures})
        save_plan(temporary, plan, used_hashes(draft, questions))
    shares = {
        key: (share, judged.exact.shares[key], exported.shares[key])
        for key, share in judged.base.shares.items()
    }
    return Built(folder, plan, questions.held_out.split, rows, judged.fits, shares)


def write_plan(profile: Profile, draft: Draft, folder: Path) -> None:
    """Only `plan.json` and the list of questions it was chosen on, without running the model."""
    check_free(folder)
    questions = questions_for(profile, is_fitting=draft.is_fitting)
    plan = draft_plan(profile, draft, questions)
    with new_folder(folder) as temporary:
        save_plan(temporary, plan, used_hashes(draft, questions))


def default_out(profile: Profile, draft: Draft, *, is_plan: bool) -> Path:
    """`checkpoints/<model>-<what>`, or the same under `plans/`."""
    model = profile.info.model.id
    name = Path(model).resolve().name if Path(model).is_dir() else model.split("/")[-1]
    return Path("plans" if is_plan else "checkpoints") / f"{name}-{draft.slug}"


def profiled_source(profile: Profile) -> Source:
    """The checkpoint that was profiled.

    Raises:
        ProfileError: its config or weights changed since.
    """
    recorded = profile.info.model
    source = find_source(recorded.id, recorded.revision)
    if source.fingerprint != recorded.fingerprint:
        raise ProfileError(
            f"{profile.path} is a profile of another model: it saw {recorded.id} as "
            f"{recorded.fingerprint[:8]}, now it is {source.fingerprint[:8]}: profile it again"
        )
    return source


def _judge_base(moe: MoeModel, profile: Profile, draft: Draft, questions: Questions) -> _Judged:
    """All that needs the unedited model, so that only one model is in memory at a time."""
    engine, held_out = _engine(moe, profile), questions.held_out
    directions: dict[int, Tensor] = {}
    if draft.is_fitting:
        layers = [b.layer for b in moe.blocks if draft.edits[b.name].bias]
        directions = fit_directions(engine, questions.tuning, layers)
    fits = judge_directions(engine, held_out, directions) if directions else []
    base = answer(engine, held_out, draft.edits)
    with at_run_time(moe, draft.edits):
        exact = answer(engine, held_out, draft.edits)
    return _Judged(base, exact, directions, fits)


def _folds(
    profile: Profile, draft: Draft, questions: Questions
) -> dict[int, "np.ndarray[Any, Any]"]:
    is_same_split = questions.held_out.split == profile.info.quiz.split
    judges = {(q.subject, q.row) for q in questions.held_out} if is_same_split else set()
    return fold_factors(profile, draft.edits, judges)


def _load(source: Source, profile: Profile, load_as: LoadOptions) -> MoeModel:
    dtype = profile.info.settings.dtype if load_as.dtype == "auto" else load_as.dtype
    return load(source, LoadOptions(dtype, load_as.device, load_as.trust_remote_code))


def _engine(moe: MoeModel, profile: Profile) -> Engine:
    settings = profile.info.settings
    torch.set_num_threads(settings.threads)
    engine = Engine(moe, settings.batch_tokens)
    engine.is_trusted = settings.way == "shared"
    return engine
