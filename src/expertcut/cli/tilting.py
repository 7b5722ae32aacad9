"""The command `reweight`."""

from expertcut.cli.changing import Named, Place
from expertcut.cli.options import (
    ApplyAtOption,
    Boost,
    Device,
    Dtype,
    Force,
    Layout,
    LayoutOption,
    NoVerify,
    OutDir,
    PlanOnly,
    ProfileDir,
    Scale,
    Suppress,
    Threads,
    TrustRemoteCode,
    read_profile,
    value,
)


def reweight(
    profile: ProfileDir = None,
    boost: Boost = None,
    suppress: Suppress = None,
    scale: Scale = None,
    apply_at: ApplyAtOption = None,
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
    from expertcut.interventions.reweighting.drafting import reweight_draft
    from expertcut.moe.loading import LoadOptions

    found = read_profile(profile, threads)
    named = Named.of(found, boost, suppress, scale)
    draft = reweight_draft(found, named.tilts, layout.value, named.scalings, value(apply_at))
    place = Place(found, draft, out, plan_only, force)
    load_as = LoadOptions(dtype, device, trust_remote_code)
    built = place.make(load_as, is_verified=not no_verify)
    named.say(draft, built)
