"""The stages behind `prune`, `reweight` and `merge`: calibrate, export, check, rename."""

import gc
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertcut.checkpoints.exact import as_stored
from expertcut.checkpoints.export import Gathered, check_export, export, removed_experts
from expertcut.checkpoints.held_out_check import Before, Proof, difference, score_base, score_edited
from expertcut.checkpoints.lora_slice import carried
from expertcut.checkpoints.merged import Merging, aligned_neurons
from expertcut.checkpoints.output_dir import atomic_dir, check_writable
from expertcut.checkpoints.simulate import Router, under, unedited_routers
from expertcut.checkpoints.stock import Fitted
from expertcut.edits.calibrate import (
    Fit,
    fit_directions,
    fold_at_answers,
    fold_over_tokens,
    judge_directions,
    mean_outputs,
    zero_outputs,
)
from expertcut.edits.edit_settings import MergeSettings
from expertcut.edits.merge_groups import (
    check_count,
    gather_evidence,
    merge_draft,
    merge_edits,
    token_counts,
)
from expertcut.edits.merge_router import Quality, judge_rows, merged_rows
from expertcut.edits.plan import BlockEdit, EditPlan, PlanFile, model_folder, save_plan
from expertcut.edits.splits import Questions, draft_plan, questions_for, used_hashes
from expertcut.errors import ProfileError
from expertcut.files import write_atomically
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import LoadOptions, Source, find_source, fits_in_memory, load
from expertcut.models.safetensors_index import read_headers
from expertcut.profiling.measure import model_info
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine, ask

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
    plan: PlanFile
    fits: list[Fit]
    proof: Proof | None
    why_unjudged: str = ""


@dataclass(frozen=True)
class _Job:
    """What a build works from."""

    profile: Profile
    draft: EditPlan
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


def build(profile: Profile, draft: EditPlan, folder: Path, options: BuildOptions) -> Built:
    """Makes the checkpoint; the folder appears when all is written and proved, or not at all.

    Raises:
        ContractError: a model that the layout cannot carry the plan for.
        ModelError: an adapter that is not of this model, or cannot be sliced.
        OutputError: the folder is not empty, cannot be written or has no room.
        ProfileError: the model or the quiz is not the one that was profiled.
    """
    job = _job(profile, draft, options)
    inputs = (job.source.path, *inputs_of(profile), *filter(None, [options.adapter]))
    check_writable(folder, is_forced=options.is_forced, inputs=inputs)
    check_export(job.source, draft, job.n_experts, folder)
    adapter = carried(options.adapter, job.source, draft, folder)
    plan = draft_plan(profile, draft, job.questions)
    used = used_hashes(draft, job.questions)
    is_verified = options.is_verified and bool(len(job.questions.held_out)) and _has_room(job)
    gathered, fits, before = _gather_and_ask(job, is_verified=is_verified)
    gc.collect()
    proof = None
    with atomic_dir(folder, is_forced=options.is_forced) as temporary:
        export(job.source, draft, job.n_experts, gathered, temporary)
        if adapter is not None:
            plan = adapter.write(temporary, plan, gathered.fitted.folds)
        if before is not None:
            engine = job.engine(Source(str(folder), temporary))
            proof = score_edited(engine, job.questions.held_out, draft, before)
            proof = proof.judged_by(job.questions.held_out, used)
        figures = {"fits": [asdict(f) for f in fits], **(proof.figures(draft) if proof else {})}
        plan = plan.model_copy(update={"proof": figures})
        save_plan(temporary, plan, used)
        add_files(temporary, options.beside)
    return Built(folder, plan, fits, proof, job.questions.why_unjudged)


def write_plan(profile: Profile, draft: EditPlan, folder: Path, options: BuildOptions) -> None:
    """Only `plan.json` and the list of questions it was chosen on, without running the model."""
    check_writable(folder, is_forced=options.is_forced, inputs=inputs_of(profile))
    questions = questions_for(profile, is_fitting=draft.asks_tuning, used=draft.used)
    plan = draft_plan(profile, draft, questions)
    with atomic_dir(folder, is_forced=options.is_forced) as temporary:
        save_plan(temporary, plan, used_hashes(draft, questions))
        add_files(temporary, options.beside)


def write_beside(profile: Profile, folder: Path, options: BuildOptions) -> None:
    """Only the files that would lie beside a plan, where there is none to make."""
    check_writable(folder, is_forced=options.is_forced, inputs=inputs_of(profile))
    with atomic_dir(folder, is_forced=options.is_forced) as temporary:
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


def _job(profile: Profile, draft: EditPlan, options: BuildOptions) -> _Job:
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
    return gathered, fits, score_base(engine, held_out, job.draft, gathered.constants)


def gather(profile: Profile, draft: EditPlan, questions: Questions, engine: Engine) -> Gathered:
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


@dataclass(frozen=True)
class Merged:
    """What was made, the groups, and how well router rows keep their members' mass."""

    built: Built
    draft: EditPlan
    qualities: list[Quality]


@dataclass(frozen=True)
class _Before:
    """What the unedited model gives: `logprob_NC` of held-out questions and its routers."""

    logprob_NC: Tensor
    routers: dict[str, Router]
    qualities: list[Quality]


def merge(
    profile: Profile,
    settings: MergeSettings,
    folder: Path,
    options: BuildOptions,
    *,
    is_plan: bool = False,
) -> Merged:
    """Makes the checkpoint, or with `is_plan` the plan alone, for which the model runs too.

    Raises:
        ContractError: a model whose experts cannot be told apart, or are constants.
        OutputError: the folder is not empty, cannot be written or has no room.
        PlanError: a count that does not fit the model.
        ProfileError: a profile without all-token counts, or not of this model and quiz.
    """
    source = profiled_source(profile)
    inputs = (source.path, *inputs_of(profile))
    check_writable(folder, is_forced=options.is_forced, inputs=inputs)
    n_experts = _check(profile, settings, source, folder)
    questions = questions_for(profile, is_fitting=True)
    engine = engine_as_profiled(profile, source, options.load_as)
    draft = _grouped(profile, engine, questions, settings)
    merging, before = Merging(), None
    if not is_plan:
        merging = _fitted(engine, questions, draft, settings)
        if options.is_verified and len(questions.held_out):
            before = _ask_before(engine, questions, draft, merging)
    del engine
    gc.collect()
    plan, proof, used = draft_plan(profile, draft, questions), None, used_hashes(draft, questions)
    with atomic_dir(folder, is_forced=options.is_forced) as temporary:
        if not is_plan:
            merging = _aligned(source, draft, merging, settings)
            export(source, draft, n_experts, Gathered(merging=merging), temporary)
        if before is not None:
            written = Source(str(folder), temporary)
            edited = engine_as_profiled(profile, written, options.load_as)
            proof = _prove(edited, questions, before).judged_by(questions.held_out, used)
            plan = plan.model_copy(update={"proof": _figures(draft, proof, before)})
        save_plan(temporary, plan, used)
        add_files(temporary, options.beside)
    qualities = before.qualities if before else []
    built = Built(folder, plan, [], proof, questions.why_unjudged)
    return Merged(built, draft, qualities)


def _check(profile: Profile, settings: MergeSettings, source: Source, folder: Path) -> int:
    """All that can be refused before a model is loaded; gives the unedited count of experts."""
    blocks = profile.info.model.blocks
    token_counts(profile)
    check_count(blocks, settings.keep)
    # Of the same size as any groups would be.
    first = {b.name: BlockEdit(keep=tuple(range(settings.keep))) for b in blocks}
    check_export(source, merge_draft(settings, profile, first), blocks[0].experts, folder)
    return blocks[0].experts


def _grouped(
    profile: Profile, engine: Engine, questions: Questions, settings: MergeSettings
) -> EditPlan:
    evidence = gather_evidence(profile, engine, questions.tuning, settings.by)
    edits = merge_edits(profile.info.model.blocks, evidence, settings.keep, settings.by)
    return merge_draft(settings, profile, edits)


def _aligned(source: Source, draft: EditPlan, merging: Merging, settings: MergeSettings) -> Merging:
    if not settings.is_aligned:
        return merging
    headers = read_headers(source.path)
    return replace(merging, orders=aligned_neurons(headers, draft.edits, merging.interleaved))


def _fitted(
    engine: Engine, questions: Questions, draft: EditPlan, settings: MergeSettings
) -> Merging:
    rows = merged_rows(engine, questions.tuning, draft.edits, settings.router)
    blocks = engine.moe.blocks
    return Merging(rows, {}, frozenset(b.name for b in blocks if _is_interleaved(b.experts)))


@torch.inference_mode()
def _is_interleaved(experts: Any) -> bool:
    """Whether gate and up lie in turn: read off which output the second column moves."""
    if not (hasattr(experts, "_apply_gate") and getattr(experts, "has_gate", False)):
        return False
    width = experts.gate_up_proj.shape[1 if not experts.is_transposed else 2]
    ones_1I = torch.ones(1, width, device=experts.gate_up_proj.device)
    moved_1I = ones_1I.clone()
    moved_1I[0, 1] += 1
    difference_I = (experts._apply_gate(moved_1I) - experts._apply_gate(ones_1I))[0]
    return bool(difference_I[0] != 0)


def _ask_before(engine: Engine, questions: Questions, draft: EditPlan, merging: Merging) -> _Before:
    held_out = questions.held_out
    qualities = judge_rows(engine, held_out, draft.edits, merging.rows)
    routers = unedited_routers(engine.moe.blocks, draft.edits)
    return _Before(ask(engine, held_out), routers, qualities)


def _prove(engine: Engine, questions: Questions, before: _Before) -> Proof:
    held_out = questions.held_out
    edited_NC = ask(engine, held_out)
    with under(before.routers, engine.moe.blocks):
        reference_NC = ask(engine, held_out)
    rows = [
        difference("the unedited base", edited_NC, before.logprob_NC),
        difference("the same experts under the unedited router", edited_NC, reference_NC),
        difference("these against the unedited base", reference_NC, before.logprob_NC),
    ]
    return Proof(held_out.split, rows, {}, None)


def _figures(draft: EditPlan, proof: Proof, before: _Before) -> dict[str, Any]:
    return {**proof.figures(draft), "rows": [asdict(quality) for quality in before.qualities]}
