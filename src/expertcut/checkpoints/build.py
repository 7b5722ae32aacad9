"""The stages behind `prune`, `reweight` and `merge`: calibrate, export, check, rename."""

import gc
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from expertcut.checkpoints.edit import Calibration, Edit
from expertcut.checkpoints.export import check_export, edits_of, export
from expertcut.checkpoints.held_out_check import BaseScores, score_base, score_edited
from expertcut.checkpoints.lora import adapter_cut
from expertcut.checkpoints.merge_edit import MergeEdit
from expertcut.checkpoints.output_dir import atomic_dir, check_writable
from expertcut.checkpoints.permute_edit import permute_draft
from expertcut.checkpoints.prune_edit import PruneEdit
from expertcut.checkpoints.routed import check_contrast, contrast_files
from expertcut.checkpoints.text_check import (
    BaseTexts,
    score_base_texts,
    score_edited_texts,
)
from expertcut.data import ngrams
from expertcut.data.corpus import CalibrationSet, Corpus, as_quiz
from expertcut.edits import splits
from expertcut.edits.calibrate import Fit
from expertcut.edits.edit_settings import MergeSettings
from expertcut.edits.layouts import LAYOUTS, Layout
from expertcut.edits.merging import Quality, gather_evidence, merge_draft, merge_edits, token_counts
from expertcut.edits.plan import BlockEdit, EditPlan, PlanFile, check_count, model_folder, save_plan
from expertcut.edits.splits import Questions, ScoredSplit, scored_split
from expertcut.errors import ContractError, ModelError, ProfileError
from expertcut.files import write_atomically
from expertcut.models.load import LoadOptions, Source, find_source, fits_in_memory, load
from expertcut.profiling.measure import model_info
from expertcut.profiling.storage import Profile, TextProfile, once_per_profile
from expertcut.scoring.engine import Engine
from expertcut.scoring.rerouting import Rerouting
from expertcut.stats import HeldOutResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build; `extra_files` are by name, `adapter` is the folder of one to cut too."""

    load_as: LoadOptions
    is_verified: bool = True
    is_forced: bool = False
    extra_files: Mapping[str, bytes] = field(default_factory=dict)
    adapter: Path | None = None


@dataclass(frozen=True)
class Built:
    """The plan, the fit of bias directions, and the held-out result, or why there is none."""

    folder: Path
    plan: PlanFile
    fits: list[Fit]
    proof: HeldOutResult | None
    why_unscored: str = ""
    scored_on: ScoredSplit | None = None


def build(
    profile: Profile,
    plan: EditPlan,
    folder: Path,
    options: BuildOptions,
    edits: Sequence[Edit] | None = None,  # not fitted; where the plan does not say all of them
) -> Built:
    """Makes the checkpoint; the folder appears when all is written and checked, or not at all."""
    check_declared(profile, plan.layout)
    source = profiled_source(profile)
    questions = splits.questions_for(profile, is_fitting=plan.asks_tuning, used=plan.used)
    calibration = Calibration(profile, questions, source)
    inputs = (source.path, *inputs_of(profile), *filter(None, [options.adapter]))
    check_writable(folder, is_forced=options.is_forced, inputs=inputs)
    check_export(source, plan, calibration.n_experts, folder)
    adapter = adapter_cut(options.adapter, source, plan, folder)
    file, used = splits.draft_plan(profile, plan, questions), splits.used_hashes(plan, questions)
    load_as = _dtype_as_profiled(options.load_as, profile)
    is_verified = options.is_verified and bool(len(questions.held_out))
    if is_verified and not load_as.layerwise and not fits_in_memory(source, load_as):
        is_verified = False
        logger.warning(
            "%s does not fit in the free memory as %s: the checkpoint is not scored",
            *(source.id, load_as.dtype),
        )
    fitted, qualities, before = _fit_and_score(
        plan, edits or edits_of(plan), calibration, load_as, is_verified=is_verified
    )
    gc.collect()
    is_merging = any(isinstance(edit, MergeEdit) for edit in fitted)
    proof = None
    unscored = HeldOutResult() if is_merging else HeldOutResult(fits=())
    with atomic_dir(folder, is_forced=options.is_forced) as temporary:
        export(source, plan, calibration.n_experts, fitted, temporary)
        if adapter is not None:
            (folds,) = (edit.folds for edit in fitted if isinstance(edit, PruneEdit))
            file = adapter.write(temporary, file, folds)
        if before is not None:
            written = Source(str(folder), temporary, contract=source.contract)
            engine = engine_as_profiled(profile, written, load_as)
            figures = {"rows" if is_merging else "fits": tuple(map(asdict, qualities))}
            proof = _judge(engine, questions.held_out, plan, before)
            proof = proof.model_copy(update=figures)
        file = file.model_copy(update={"proof": proof or unscored})
        if file.routing and before:
            counted = {"experts_per_token": before.experts_per_token}
            file = file.model_copy(update={"routing": file.routing.model_copy(update=counted)})
        _save_records(temporary, profile, file, used)
        add_files(temporary, options.extra_files)
    fits = [quality for quality in qualities if isinstance(quality, Fit)]
    scored_on = scored_split(proof.held_out_hashes, used, proof.held_out_split) if proof else None
    return Built(folder, file, fits, proof, questions.why_unscored, scored_on)


def write_plan(
    profile: Profile, draft: EditPlan | None, folder: Path, options: BuildOptions
) -> None:
    """Writes the plan, if any, with the list of its questions, and the further files."""
    check_writable(folder, is_forced=options.is_forced, inputs=inputs_of(profile))
    if draft is not None:
        questions = splits.questions_for(profile, is_fitting=draft.asks_tuning, used=draft.used)
        plan = splits.draft_plan(profile, draft, questions)
        used = splits.used_hashes(draft, questions)
    with atomic_dir(folder, is_forced=options.is_forced) as temporary:
        if draft is not None:
            _save_records(temporary, profile, plan, used)
        add_files(temporary, options.extra_files)


def write_contrast(
    profile: Profile, folder: Path, options: BuildOptions, routing_of: Callable[[Engine], Rerouting]
) -> None:
    """Writes rule contrast for `generate` of transformers, beside no weights."""
    source = profiled_source(profile)
    check_contrast(source)
    check_writable(folder, is_forced=options.is_forced, inputs=inputs_of(profile))
    engine = engine_as_profiled(profile, source, options.load_as)
    files = contrast_files(engine.moe, routing_of(engine))
    with atomic_dir(folder, is_forced=options.is_forced) as temporary:
        add_files(temporary, files)


def add_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes further files, by name."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, content)


def inputs_of(profile: Profile) -> tuple[Path, ...]:
    """The profiles, and the local files that they were made from: never to be replaced."""
    model = model_folder(profile) or Path(profile.info.model.id)
    made_from = (model, *(Path(part.info.quiz.id) for part in profile.parts))
    return (*(p.path for p in profile.parts), *(path for path in made_from if path.exists()))


def default_out(model: str, slug: str, *, is_plan: bool = False) -> Path:
    """`checkpoints/<model>-<what>`, or the same under `plans/`."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.split("/")[-1]
    return Path("plans" if is_plan else "checkpoints") / f"{name}-{slug}"


def check_declared(profile: Profile, layout: Layout) -> None:
    """Refuses checkpoints of blocks that a contract declares, unless they are cut as it names."""
    for block in reversed(profile.info.model.blocks):  # the first is handed no state
        why = block.declared and block.declared.why_not_cut
        if block.declared and LAYOUTS[layout].keeps_rows:  # by classes of known families
            why = f"layout {layout} is for the families of docs/families.md"
        if why:
            raise ContractError(
                f"{block.name} cannot be written to a checkpoint: {why}: take --plan-only, or "
                "judge single experts with audit"
            )


@once_per_profile
def found_source(profile: Profile) -> Source:
    """The checkpoint that was profiled, changed or not."""
    recorded, folder = profile.info.model, model_folder(profile)
    place = recorded.id if folder is None else str(folder)
    return find_source(place, recorded.revision, recorded.read_contract())


def source_here(profile: Profile) -> Source:
    """The checkpoint that was profiled, if it is on this machine; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    recorded = profile.info.model
    if recorded.revision is not None:
        found = try_to_load_from_cache(recorded.id, "config.json", revision=recorded.revision)
        if not isinstance(found, str):
            raise ModelError(f"{recorded.id} is not on this machine")
    return found_source(profile)


def profiled_source(profile: Profile) -> Source:
    """The checkpoint that was profiled; a ProfileError if its config or weights changed since."""
    recorded, source = profile.info.model, found_source(profile)
    if source.fingerprint != recorded.fingerprint:
        raise ProfileError(
            f"{profile.path} is a {profile.info.noun} of another model: it saw {recorded.id} as "
            f"{recorded.fingerprint[:8]}, now it is {source.fingerprint[:8]}: "
            f"{profile.info.noun} it again"
        )
    return source


def engine_as_profiled(profile: Profile, source: Source, load_as: LoadOptions) -> Engine:
    """A model, loaded and run as it was profiled."""
    settings = profile.info.settings
    torch.set_num_threads(settings.threads)
    moe = load(source, _dtype_as_profiled(load_as, profile))
    engine = Engine(moe, settings.batch_tokens)
    if source.fingerprint == profile.info.model.fingerprint:
        for was, now in zip(profile.info.model.blocks, model_info(moe).blocks, strict=True):
            for name in ("scoring", "inflates", "selection"):
                before, after = getattr(was, name), getattr(now, name)
                if before != after:
                    raise ProfileError(
                        f"{profile.path} read the gate of {was.name} as {name} {before}, it is "
                        f"{after}: an older version misread it, so profile it again"
                    )
    engine.is_trusted = settings.way == "shared"
    if settings.attention != "split":
        engine.attention = "masked"
    return engine


def _dtype_as_profiled(load_as: LoadOptions, profile: Profile) -> LoadOptions:
    is_auto = load_as.dtype == "auto"
    return replace(load_as, dtype=profile.info.settings.dtype) if is_auto else load_as


def _fit_and_score(
    plan: EditPlan,
    edits: Sequence[Edit],
    calibration: Calibration,
    load_as: LoadOptions,
    *,
    is_verified: bool,
) -> tuple[list[Edit], list[Fit | Quality], BaseScores | BaseTexts | None]:
    """All that needs the unedited model, so that only one model is in memory at a time."""
    engine = None
    if is_verified or any(edit.needs_engine(calibration) for edit in edits):
        engine = engine_as_profiled(calibration.profile, calibration.source, load_as)
    fitted = [edit.fit(engine, calibration) for edit in edits]
    if engine is None or not is_verified:
        return fitted, [], None
    held_out = calibration.questions.held_out
    qualities = [quality for edit in fitted for quality in edit.judge(engine, held_out)]
    if isinstance(held_out, Corpus):
        return fitted, qualities, score_base_texts(engine, held_out, plan, fitted)
    return fitted, qualities, score_base(engine, held_out, plan, fitted)


def _judge(
    engine: Engine, held_out: CalibrationSet, plan: EditPlan, before: BaseScores | BaseTexts
) -> HeldOutResult:
    """The written checkpoint against the unedited model."""
    if isinstance(before, BaseTexts):
        assert isinstance(held_out, Corpus), "both read the same"
        return score_edited_texts(engine, held_out, before)
    return score_edited(engine, as_quiz(held_out), plan, before)


def _save_records(folder: Path, profile: Profile, plan: PlanFile, used: Collection[str]) -> None:
    """The plan, what chose it by hash, and the runs of words of texts that did."""
    save_plan(folder, plan, used)
    chosen = [splits.profiled_on(p) for p in profile.parts if isinstance(p, TextProfile)]
    texts = [one for one in chosen if isinstance(one, Corpus)]
    ngrams.save(folder, ngrams.ngrams_of(d.said for corpus in texts for d in corpus))


def fit_edits(profile: Profile, plan: EditPlan, questions: Questions, engine: Engine) -> list[Edit]:
    """The edits of a plan, fitted with a model that is loaded already."""
    calibration = Calibration(profile, questions, engine.moe.source)
    return [edit.fit(engine, calibration) for edit in edits_of(plan)]


def choose_groups(
    profile: Profile, settings: MergeSettings, folder: Path, load_as: LoadOptions
) -> EditPlan:
    """The groups of experts to merge; the count, the layout and the disk are checked first."""
    check_declared(profile, "stock")
    source, blocks = profiled_source(profile), profile.info.model.blocks
    source.refuse_packed("merged")
    token_counts(profile)
    check_count(blocks, settings.keep, "stock")
    # Of the same size as any groups would be.
    first = {b.name: BlockEdit(keep=tuple(range(settings.keep))) for b in blocks}
    check_export(source, merge_draft(settings, profile, first), blocks[0].experts, folder)
    tuning = splits.questions_for(profile, is_fitting=True).tuning
    engine = engine_as_profiled(profile, source, load_as)
    evidence = gather_evidence(profile, engine, tuning, settings.by)
    return merge_draft(settings, profile, merge_edits(blocks, evidence, settings.keep, settings.by))


def permute_checkpoint(
    profile: Profile,
    order: Sequence[Sequence[int]],
    folder: Path,
    options: BuildOptions,
    *,
    action: str = "place",
) -> Built:
    """Makes the checkpoint with each layer's experts in an order of their ids.

    `profile` says the model and the questions; that of a trace is `splits.traced_profile`.
    """
    source = profiled_source(profile)
    plan = permute_draft(profile, source, order, action, "placed")
    return build(profile, plan, folder, options)


def merge(
    profile: Profile, settings: MergeSettings, plan: EditPlan, folder: Path, options: BuildOptions
) -> Built:
    """Makes the checkpoint of chosen groups."""
    edits = [MergeEdit(plan.edits, settings.router, is_aligned=settings.is_aligned)]
    return build(profile, plan, folder, options, edits)
