"""The stage behind `merge`: calibrate, group, align, export, prove on held-out questions."""

import gc
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertcut.checkpoints.build import (
    BuildOptions,
    Built,
    add_files,
    engine_as_profiled,
    inputs_of,
    profiled_source,
)
from expertcut.checkpoints.export import Gathered, check_export, export
from expertcut.checkpoints.files.folders import check_free, new_folder
from expertcut.checkpoints.layouts.merged import Merging
from expertcut.checkpoints.layouts.neurons import aligned_neurons
from expertcut.checkpoints.merging.unedited_router import Router, under, unedited_routers
from expertcut.checkpoints.proof import Proof, difference
from expertcut.edits.merge_groups import (
    Merge,
    check_count,
    gather_evidence,
    merge_edits,
    token_counts,
)
from expertcut.edits.merge_router import Quality, judge_rows, merged_rows
from expertcut.edits.plan import Draft, Edit, save_plan
from expertcut.edits.splits import Questions, draft_plan, questions_for, used_hashes
from expertcut.models.load import Source
from expertcut.models.safetensors_index import read_headers
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine, ask


@dataclass(frozen=True)
class Merged:
    """What was made, the groups, and how well router rows keep their members' mass."""

    built: Built
    draft: Draft
    qualities: list[Quality]


@dataclass(frozen=True)
class _Before:
    """What the unedited model gives: `logprob_NC` of held-out questions and its routers."""

    logprob_NC: Tensor
    routers: dict[str, Router]
    qualities: list[Quality]


def merge(
    profile: Profile, asked: Merge, folder: Path, options: BuildOptions, *, is_plan: bool = False
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
    check_free(folder, is_forced=options.is_forced, inputs=inputs)
    n_experts = _check(profile, asked, source, folder)
    questions = questions_for(profile, is_fitting=True)
    engine = engine_as_profiled(profile, source, options.load_as)
    draft = _grouped(profile, engine, questions, asked)
    merging, before = Merging(), None
    if not is_plan:
        merging = _fitted(engine, questions, draft, asked)
        if options.is_verified and len(questions.held_out):
            before = _ask_before(engine, questions, draft, merging)
    del engine
    gc.collect()
    plan, proof, used = draft_plan(profile, draft, questions), None, used_hashes(draft, questions)
    with new_folder(folder, is_forced=options.is_forced) as temporary:
        if not is_plan:
            merging = _aligned(source, draft, merging, asked)
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


def _check(profile: Profile, asked: Merge, source: Source, folder: Path) -> int:
    """All that can be refused before a model is loaded; gives the unedited count of experts."""
    blocks = profile.info.model.blocks
    token_counts(profile)
    check_count(blocks, asked.n_keep)
    # Of the same size as any groups would be.
    first = {b.name: Edit(keep=tuple(range(asked.n_keep))) for b in blocks}
    check_export(source, asked.draft(profile, first), blocks[0].experts, folder)
    return blocks[0].experts


def _grouped(profile: Profile, engine: Engine, questions: Questions, asked: Merge) -> Draft:
    evidence = gather_evidence(profile, engine, questions.tuning, asked.by)
    edits = merge_edits(profile.info.model.blocks, evidence, asked.n_keep, asked.by)
    return asked.draft(profile, edits)


def _aligned(source: Source, draft: Draft, merging: Merging, asked: Merge) -> Merging:
    if not asked.is_aligned:
        return merging
    headers = read_headers(source.path)
    return replace(merging, orders=aligned_neurons(headers, draft.edits, merging.interleaved))


def _fitted(engine: Engine, questions: Questions, draft: Draft, asked: Merge) -> Merging:
    rows = merged_rows(engine, questions.tuning, draft.edits, asked.router)
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


def _ask_before(engine: Engine, questions: Questions, draft: Draft, merging: Merging) -> _Before:
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


def _figures(draft: Draft, proof: Proof, before: _Before) -> dict[str, Any]:
    return {**proof.figures(draft), "rows": [asdict(quality) for quality in before.qualities]}
