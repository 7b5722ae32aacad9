"""The stage behind `prune` and `reweight`: gather, export, prove on held-out questions, rename."""

import gc
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from expertcut.checkpoints.adapters.carrying import carried
from expertcut.checkpoints.export import Gathered, check_export, export, removed_experts
from expertcut.checkpoints.files.folders import check_free, new_folder
from expertcut.checkpoints.layouts.exact import as_stored
from expertcut.checkpoints.layouts.stock import Fitted
from expertcut.checkpoints.proof import Before, Proof, prove_after, prove_before
from expertcut.edits.calibrate import (
    Fit,
    fit_directions,
    fold_at_answers,
    fold_over_tokens,
    judge_directions,
    mean_outputs,
    zero_outputs,
)
from expertcut.edits.plan import Draft, Plan, model_folder, save_plan
from expertcut.edits.splits import Questions, draft_plan, questions_for, used_hashes
from expertcut.errors import ProfileError
from expertcut.files import write_atomically
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import LoadOptions, Source, find_source, fits_in_memory, load
from expertcut.models.safetensors_index import read_headers
from expertcut.profiling.measure import model_info
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """How to build; without `is_verified` no question is asked of the new checkpoint.

    `beside` are files, by name, to lie beside the plan; `adapter` is the folder of one to cut too.
    """

    load_as: LoadOptions
    is_verified: bool = True
    is_forced: bool = False
    beside: Mapping[str, bytes] = field(default_factory=dict)
    adapter: Path | None = None


@dataclass(frozen=True)
class Built:
    """What was made: the plan, how well biases are carried, and the proof where one was asked.

    `why_unjudged` says why there is none where no question can judge.
    """

    folder: Path
    plan: Plan
    fits: list[Fit]
    proof: Proof | None
    why_unjudged: str = ""


@dataclass(frozen=True)
class _Job:
    """What a build works from."""

    profile: Profile
    draft: Draft
    questions: Questions
    source: Source
    load_as: LoadOptions

    @property
    def n_experts(self) -> int:
        return self.profile.info.model.blocks[0].experts

    @cached_property
    def removed(self) -> dict[str, tuple[int, ...]]:
        return removed_experts(self.draft.edits, self.n_experts)

    @property
    def needs_model(self) -> bool:
        """Whether something must be gathered that the profile does not hold."""
        draft = self.draft
        is_exact = draft.layout == "exact"
        is_gathering = draft.removed == "mean" if is_exact else draft.fold == "all"
        return draft.is_fitting or (is_gathering and bool(self.removed))

    def engine(self, source: Source) -> Engine:
        return engine_as_profiled(self.profile, source, self.load_as)


def build(profile: Profile, draft: Draft, folder: Path, options: BuildOptions) -> Built:
    """Makes the checkpoint; the folder appears when all is written and proved, or not at all.

    Raises:
        ContractError: a model that the layout cannot carry the plan for.
        ModelError: an adapter that is not of this model, or cannot be sliced.
        OutputError: the folder is not empty, cannot be written or has no room.
        ProfileError: the model or the quiz is not the one that was profiled.
    """
    job = _job(profile, draft, options)
    inputs = (job.source.path, *inputs_of(profile), *filter(None, [options.adapter]))
    check_free(folder, is_forced=options.is_forced, inputs=inputs)
    check_export(job.source, draft, job.n_experts, folder)
    adapter = carried(options.adapter, job.source, draft, folder)
    plan = draft_plan(profile, draft, job.questions)
    used = used_hashes(draft, job.questions)
    is_verified = options.is_verified and bool(len(job.questions.held_out)) and _has_room(job)
    gathered, fits, before = _gather_and_ask(job, is_verified=is_verified)
    gc.collect()
    proof = None
    with new_folder(folder, is_forced=options.is_forced) as temporary:
        export(job.source, draft, job.n_experts, gathered, temporary)
        if adapter is not None:
            plan = adapter.write(temporary, plan, gathered.fitted.folds)
        if before is not None:
            engine = job.engine(Source(str(folder), temporary))
            proof = prove_after(engine, job.questions.held_out, draft, before)
            proof = proof.judged_by(job.questions.held_out, used)
        figures = {"fits": [asdict(f) for f in fits], **(proof.figures(draft) if proof else {})}
        plan = plan.model_copy(update={"proof": figures})
        save_plan(temporary, plan, used)
        add_files(temporary, options.beside)
    return Built(folder, plan, fits, proof, job.questions.why_unjudged)


def write_plan(profile: Profile, draft: Draft, folder: Path, options: BuildOptions) -> None:
    """Only `plan.json` and the list of questions it was chosen on, without running the model."""
    check_free(folder, is_forced=options.is_forced, inputs=inputs_of(profile))
    questions = questions_for(profile, is_fitting=draft.asks_tuning, used=draft.used)
    plan = draft_plan(profile, draft, questions)
    with new_folder(folder, is_forced=options.is_forced) as temporary:
        save_plan(temporary, plan, used_hashes(draft, questions))
        add_files(temporary, options.beside)


def write_beside(profile: Profile, folder: Path, options: BuildOptions) -> None:
    """Only the files that would lie beside a plan, where there is none to make."""
    check_free(folder, is_forced=options.is_forced, inputs=inputs_of(profile))
    with new_folder(folder, is_forced=options.is_forced) as temporary:
        add_files(temporary, options.beside)


def add_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Files, by name, that lie beside a plan."""
    for name, content in files.items():
        write_atomically(folder / name, content)


def inputs_of(profile: Profile) -> tuple[Path, ...]:
    """The profile, and what lies here of that which it was made from: never to be replaced."""
    model = model_folder(profile) or Path(profile.info.model.id)
    made_from = (model, Path(profile.info.quiz.id))
    return (profile.path, *(path for path in made_from if path.exists()))


def default_out(profile: Profile, slug: str, *, is_plan: bool) -> Path:
    """`checkpoints/<model>-<what>`, or the same under `plans/`."""
    model = profile.info.model.id
    name = Path(model).resolve().name if Path(model).is_dir() else model.split("/")[-1]
    return Path("plans" if is_plan else "checkpoints") / f"{name}-{slug}"


def found_source(profile: Profile) -> Source:
    """The checkpoint that was profiled, whatever it holds now.

    Raises:
        ModelError: no sound checkpoint.
        ProfileError: it is not there.
    """
    recorded, folder = profile.info.model, model_folder(profile)
    return find_source(recorded.id if folder is None else str(folder), recorded.revision)


def profiled_source(profile: Profile) -> Source:
    """The checkpoint that was profiled.

    Raises:
        ProfileError: its config or weights changed since.
    """
    recorded, source = profile.info.model, found_source(profile)
    if source.fingerprint != recorded.fingerprint:
        raise ProfileError(
            f"{profile.path} is a profile of another model: it saw {recorded.id} as "
            f"{recorded.fingerprint[:8]}, now it is {source.fingerprint[:8]}: profile it again"
        )
    return source


def engine_as_profiled(profile: Profile, source: Source, load_as: LoadOptions) -> Engine:
    """A model, run as it was when it was profiled."""
    settings = profile.info.settings
    torch.set_num_threads(settings.threads)
    if load_as.dtype == "auto":
        load_as = replace(load_as, dtype=settings.dtype)
    engine = Engine(load(source, load_as), settings.batch_tokens)
    if source.fingerprint == profile.info.model.fingerprint:
        _check_read_alike(profile, engine)
    engine.is_trusted = settings.way == "shared"
    if settings.attention != "split":
        engine.attention = "masked"
    return engine


def _check_read_alike(profile: Profile, engine: Engine) -> None:
    """That the profile saw the gates as they are read now; older versions misread some.

    Raises:
        ProfileError: it did not.
    """
    for was, now in zip(profile.info.model.blocks, model_info(engine.moe).blocks, strict=True):
        for name in ("scoring", "inflates", "selection"):
            before, after = getattr(was, name), getattr(now, name)
            if before != after:
                raise ProfileError(
                    f"{profile.path} read the gate of {was.name} as {name} {before}, it is "
                    f"{after}: an older version misread it, so profile it again"
                )


def _job(profile: Profile, draft: Draft, options: BuildOptions) -> _Job:
    source = profiled_source(profile)
    questions = questions_for(profile, is_fitting=draft.asks_tuning, used=draft.used)
    load_as = options.load_as
    if load_as.dtype == "auto":
        load_as = replace(load_as, dtype=profile.info.settings.dtype)
    return _Job(profile, draft, questions, source, load_as)


def _has_room(job: _Job) -> bool:
    if fits_in_memory(job.source, job.load_as):
        return True
    logger.warning(
        "%s does not fit in the free memory as %s: the checkpoint is not asked any question",
        *(job.source.id, job.load_as.dtype),
    )
    return False


def _gather_and_ask(job: _Job, *, is_verified: bool) -> tuple[Gathered, list[Fit], Before | None]:
    """All that needs the unedited model, so that only one model is in memory at a time."""
    engine = job.engine(job.source) if is_verified or job.needs_model else None
    gathered = _gather(job, engine)
    if engine is None or not is_verified:
        return gathered, [], None
    held_out, directions = job.questions.held_out, dict(gathered.fitted.directions)
    apply_at = job.draft.apply_at
    fits = judge_directions(engine, held_out, directions, apply_at) if directions else []
    return gathered, fits, prove_before(engine, held_out, job.draft, gathered.constants)


def gather(profile: Profile, draft: Draft, questions: Questions, engine: Engine) -> Gathered:
    """What the layout needs beside the plan, from a model that is loaded already."""
    return _gather(_Job(profile, draft, questions, engine.moe.source, LoadOptions()), engine)


def _gather(job: _Job, engine: Engine | None) -> Gathered:
    draft, tuning = job.draft, job.questions.tuning
    if draft.layout == "exact":
        if draft.removed == "mean" and engine is not None:
            means = mean_outputs(engine, tuning, job.removed)
            return Gathered(constants=as_stored(read_headers(job.source.path), means))
        width = int(read_config(job.source.path)["hidden_size"])
        return Gathered(constants=zero_outputs(job.removed, width))
    directions = {}
    if draft.is_fitting and engine is not None:
        layers = [b.layer for b in engine.moe.blocks if draft.edits[b.name].bias]
        directions = fit_directions(engine, tuning, layers, draft.apply_at)
    if draft.fold == "off":
        return Gathered(Fitted(directions=directions))
    if draft.fold == "all" and engine is not None:
        return Gathered(Fitted(fold_over_tokens(engine, tuning, draft.edits), directions))
    is_same_split = job.questions.held_out.split == job.profile.info.quiz.split
    judges = {(q.subject, q.row) for q in job.questions.held_out} if is_same_split else set()
    return Gathered(Fitted(fold_at_answers(job.profile, draft.edits, judges), directions))
