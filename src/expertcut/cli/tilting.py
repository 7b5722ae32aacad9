"""The command `reweight`."""

from typing import Annotated

from expertcut.cli.changing import Place
from expertcut.cli.options import (
    Device,
    Dtype,
    Force,
    Layout,
    LayoutOption,
    NoVerify,
    OutDir,
    PlanOnly,
    ProfileDir,
    Threads,
    TrustRemoteCode,
    option,
    read_profile,
)


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
    force: Force = False,
    no_verify: NoVerify = False,
    plan_only: PlanOnly = False,
) -> None:
    """Tilt the gate toward or away from experts."""
    from expertcut.interventions.reweighting.targets import reweight_draft, tilts
    from expertcut.moe.loading import LoadOptions
    from expertcut.reporting.outcomes import tilt_sentences

    found = read_profile(profile, threads)
    tilted = tilts(found, boost or [], suppress or [])
    place = Place(found, reweight_draft(found, tilted, layout.value), out, plan_only, force)
    load_as = LoadOptions(dtype, device, trust_remote_code)
    built = place.make(load_as, is_verified=not no_verify)
    for sentence in tilt_sentences(tilted, built):
        print(sentence)
