"""Commands that change a model: `prune`, `reweight`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from expertcut.cli.options import (
    Criterion,
    Device,
    Dtype,
    Format,
    Layout,
    LayoutOption,
    OutDir,
    PlanOnly,
    Positions,
    ProfileDir,
    Threads,
    TrustRemoteCode,
    option,
    read_profile,
)
from expertcut.cli.output import print_tables, quiet

if TYPE_CHECKING:
    from expertcut.checkpoints.build import Built
    from expertcut.interventions.plan import Draft
    from expertcut.profiling.store import Profile


def prune(
    profile: ProfileDir = None,
    keep_active: Annotated[bool, option("Keep what ever fires.", "--keep-active")] = False,
    keep: Annotated[int | None, option("Keep so many per layer.")] = None,
    keep_fraction: Annotated[float | None, option("Keep this share per layer.")] = None,
    by: Annotated[Criterion, option("What --keep ranks by.")] = Criterion.activations,
    positions: Annotated[
        Positions, option("Count at the answer position, or at all tokens.")
    ] = Positions.answer,
    layout: LayoutOption = Layout.stock,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    out: OutDir = None,
    plan_only: PlanOnly = False,
) -> None:
    """Remove experts, and say what that did."""
    from expertcut.interventions.prune import Keep, choose
    from expertcut.moe.loading import LoadOptions
    from expertcut.reporting.outcomes import pruning_sentences

    found = read_profile(profile, threads)
    asked = Keep(keep_active, keep, keep_fraction)
    chosen = choose(found, asked, by.value, positions.value)
    folder = _folder(found, chosen.draft, out, plan_only)
    for sentence in pruning_sentences(chosen):
        print(sentence)
    load_as = LoadOptions(dtype, device, trust_remote_code)
    _make(found, chosen.draft, folder, None if plan_only else load_as)


def reweight(
    profile: ProfileDir = None,
    boost: Annotated[
        list[str] | None, option("E, L:E, E=bias or L:E=bias; may be repeated.")
    ] = None,
    suppress: Annotated[list[str] | None, option("As --boost, the other way.")] = None,
    layout: LayoutOption = Layout.stock,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    out: OutDir = None,
    plan_only: PlanOnly = False,
) -> None:
    """Tilt the gate toward or away from experts."""
    from expertcut.interventions.reweight import reweight_draft, tilts
    from expertcut.moe.loading import LoadOptions
    from expertcut.reporting.outcomes import tilt_sentences

    found = read_profile(profile, threads)
    tilted = tilts(found, boost or [], suppress or [])
    load_as = LoadOptions(dtype, device, trust_remote_code)
    draft = reweight_draft(found, tilted)
    folder = _folder(found, draft, out, plan_only)
    built = _make(found, draft, folder, None if plan_only else load_as)
    for sentence in tilt_sentences(tilted, built):
        print(sentence)


def _folder(profile: "Profile", draft: "Draft", out: Path | None, plan_only: bool) -> Path:
    """Where to write, refused before anything is printed if something is there."""
    from expertcut.checkpoints.build import default_out
    from expertcut.checkpoints.export import check_free

    folder = out or default_out(profile, draft, is_plan=plan_only)
    check_free(folder)
    return folder


def _make(profile: "Profile", draft: "Draft", folder: Path, load_as: Any) -> "Built | None":
    """Builds the checkpoint, or without `load_as` writes the plan alone."""
    from expertcut.checkpoints.build import build, write_plan
    from expertcut.reporting.outcomes import fit_table, held_out_table

    if load_as is None:
        write_plan(profile, draft, folder)
        print(f"written to {folder}")
        return None
    quiet()
    built = build(profile, draft, folder, load_as)
    tables = [held_out_table(built)]
    print_tables([fit_table(built), *tables] if built.fits else tables, Format.table)
    print(f"written to {folder}")
    return built
