"""Stages that make a variant's checkpoint: prune, merge, reweight."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from expertcut.checkpoints.build import BuildOptions, Built, build, write_beside
from expertcut.checkpoints.build import merge as merge_experts
from expertcut.checkpoints.size import choose_cut, protected
from expertcut.commands.ui import Job
from expertcut.edits.budget import Keep, read_size
from expertcut.edits.criteria import criterion_name
from expertcut.edits.merge_groups import Merge
from expertcut.edits.plan import EditPlan
from expertcut.edits.prune import removed_traffic
from expertcut.edits.ranking import Way
from expertcut.edits.reweight_tune import Procedure
from expertcut.edits.router_edits import How, ReweightSettings, scalings, tilts, with_tilts
from expertcut.evaluation.reweight_search import (
    DecideOptions,
    Decision,
    Tilted,
    Tilting,
    by_hand,
    chosen,
    decide,
    prepared,
)
from expertcut.profiling.storage import Profile
from expertcut.recipes.recipe_schema import PruneSection, ReweightSection, Variant
from expertcut.recipes.stages import variant_folder
from expertcut.reporting.edit_tables import (
    adapter_sentences,
    decision_sentences,
    decision_tables,
    groups_table,
    merging_sentences,
    proof_sentences,
    proof_tables,
    pruning_sentences,
    scale_sentences,
    tilt_sentences,
    touched_sentences,
    touched_table,
)


def prune(job: Job) -> None:
    """Chooses who stays, says what goes, and makes the checkpoint."""
    asked = _variant(job).prune
    assert asked is not None
    profile = job.choosing(asked.held_out)
    found = tilts(profile, asked.boost or [], asked.suppress or [])
    scaled = scalings(profile, asked.scale or [])
    stays, notes = protected(profile, asked.protect, is_active=asked.keep_active)
    way = Way.of(criterion_name(asked.by), asked.positions, asked.layout, asked.removed, asked.fold)
    way = replace(way, protect=stays, seed=asked.seed)
    chosen_cut = choose_cut(profile, _keep(asked), way, job.load_as())
    job.audience.say([], [*notes, *chosen_cut.notes])
    pruning = chosen_cut.pruning
    draft = pruning.draft
    if found or scaled or asked.apply_at:
        draft = with_tilts(draft, found, scaled, asked.apply_at)
    goes = removed_traffic(profile, draft.edits)
    job.audience.say([], pruning_sentences(pruning))
    job.audience.say([touched_table(goes)], touched_sentences(pruning, goes))
    adapter = None if asked.adapter is None else Path(asked.adapter)
    tilted = Tilted(draft, found, scaled)
    _build(job, profile, tilted, is_verified=asked.verify, adapter=adapter)


def merge(job: Job) -> None:
    """Makes one expert of several, and the checkpoint."""
    asked = _variant(job).merge
    assert asked is not None
    profile = job.choosing(asked.held_out)
    folder = job.run / variant_folder(job.stage.name)
    options = _options(job, job.beside, is_verified=asked.verify)
    merged = merge_experts(
        profile, Merge(asked.keep, asked.by, asked.router, asked.align), folder, options
    )
    tables = [groups_table(profile, merged), *proof_tables(merged.built)]
    sentences = [*proof_sentences(merged.built), *merging_sentences(profile, merged)]
    job.audience.say(tables, [*sentences, f"written to {folder}"])


def reweight(job: Job) -> None:
    """Chooses whom to tilt and how strongly, proves that if asked, and makes the checkpoint."""
    variant = _variant(job)
    assert variant.reweight is not None
    profile = job.choosing(variant.reweight.held_out)
    tilting = _tilting(variant, variant.reweight)
    if tilting.is_by_hand:
        found = by_hand(profile, tilting)
    else:
        procedure, name = prepared(profile, tilting)
        decision = None
        if tilting.how.is_deciding:
            decision = _decided(job, profile, tilting, (procedure, name))
        found = chosen(profile, tilting, procedure, decision)
    _build(job, profile, found, is_verified=variant.reweight.verify)


def _keep(asked: PruneSection) -> Keep:
    most = None if asked.max_bytes is None else read_size(asked.max_bytes)
    numbers = (asked.keep_active, asked.keep, asked.keep_fraction, most)
    return Keep(*numbers, asked.budget, asked.min_keep)


def _variant(job: Job) -> Variant:
    return next(v for v in job.recipe.variants if v.name == job.stage.name)


def _tilting(variant: Variant, asked: ReweightSection) -> Tilting:
    proof = variant.prove
    contrast = (asked.contrast[0], asked.contrast[1]) if asked.contrast else None
    by = (asked.by, asked.min_appearances, asked.layers, contrast)
    judged = (proof is not None, proof.draws if proof else 0, proof.seed if proof else 0)
    return Tilting(
        ReweightSettings(asked.boost_best, asked.suppress_worst, *by),
        How(asked.strength, asked.tune, *judged),
        (asked.boost, asked.suppress, asked.scale),
        asked.layout,
        asked.apply_at,
    )


def _decided(
    job: Job, profile: Profile, tilting: Tilting, named: tuple[Procedure, str]
) -> Decision:
    procedure, name = named
    how, apply_at = tilting.how, tilting.apply_at or "all"
    options = DecideOptions(job.load_as(), name, apply_at, how.is_proved, how.draws, how.seed)
    with job.audience.parts("proving") as report:
        decision = decide(profile, procedure, options, report)
    job.audience.say(decision_tables(decision), decision_sentences(decision))
    return decision


def _build(
    job: Job, profile: Profile, found: Tilted, *, is_verified: bool, adapter: Path | None = None
) -> None:
    """The checkpoint, or without anything to tilt what would lie beside it."""
    folder, beside = job.run / variant_folder(job.stage.name), {**found.beside, **job.beside}
    if found.draft is None:
        write_beside(profile, folder, _options(job, beside, is_verified=is_verified))
        job.audience.say([], [f"no checkpoint is made; the proof, if any, is in {folder}"])
        return
    options = replace(_options(job, beside, is_verified=is_verified), adapter=adapter)
    built = build(profile, found.draft, folder, options)
    job.audience.say(proof_tables(built), [*proof_sentences(built), *adapter_sentences(built)])
    job.audience.say([], [*_sentences(found, found.draft, built), f"written to {folder}"])


def _options(job: Job, beside: Mapping[str, bytes], *, is_verified: bool) -> BuildOptions:
    # What is there was made by this recipe, or the run would have stopped before.
    return BuildOptions(job.load_as(), is_verified, is_forced=True, beside=beside)


def _sentences(found: Tilted, draft: EditPlan, built: Built) -> list[str]:
    return [
        *tilt_sentences(found.tilts, built, draft.numbers),
        *scale_sentences(found.scalings, built, draft.numbers),
    ]
