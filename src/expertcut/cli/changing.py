"""The command `prune`, and how a choice becomes a checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from expertcut.cli.options import (
    ApplyAtOption,
    Boost,
    Criterion,
    Device,
    Dtype,
    FoldOption,
    Force,
    Format,
    Layout,
    LayoutOption,
    NoVerify,
    OutDir,
    PlanOnly,
    PositionsOption,
    ProfileDir,
    ProtectOption,
    RemovedOption,
    Scale,
    Suppress,
    Threads,
    TrustRemoteCode,
    option,
    read_profile,
    value,
)
from expertcut.cli.output import print_tables, quiet

if TYPE_CHECKING:
    from expertcut.checkpoints.build import BuildOptions, Built
    from expertcut.interventions.plan import Draft
    from expertcut.interventions.prune import Keep, Pruning, Way
    from expertcut.interventions.reweighting.targets import Scaling, Tilt
    from expertcut.moe.loading import LoadOptions
    from expertcut.profiling.store import Profile


def prune(
    profile: ProfileDir = None,
    keep_active: Annotated[bool, option("Keep what ever fires.", "--keep-active")] = False,
    keep: Annotated[int | None, option("Keep so many per layer.")] = None,
    keep_fraction: Annotated[float | None, option("Keep this share per layer.")] = None,
    by: Annotated[Criterion, option("What --keep ranks by.")] = Criterion.activations,
    positions: PositionsOption = None,
    protect: ProtectOption = None,
    seed: Annotated[int, option("Of --by random.", min=0)] = 0,
    layout: LayoutOption = Layout.stock,
    removed: RemovedOption = None,
    fold: FoldOption = None,
    boost: Boost = None,
    suppress: Suppress = None,
    scale: Scale = None,
    apply_at: ApplyAtOption = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    out: OutDir = None,
    force: Force = False,
    no_verify: NoVerify = False,
    plan_only: PlanOnly = False,
) -> None:
    """Remove experts, and say what that did."""
    from expertcut.checkpoints.build import BuildOptions
    from expertcut.interventions.prune import Keep, Way
    from expertcut.moe.loading import LoadOptions

    found = read_profile(profile, threads)
    named = Named.of(found, boost, suppress, scale)
    way = Way.of(by.value, value(positions), layout.value, value(removed), value(fold))
    way = replace(way, protect=_protected(found, protect or [], keep_active), seed=seed)
    load_as = LoadOptions(dtype, device, trust_remote_code)
    chosen = _chosen(found, Keep(keep_active, keep, keep_fraction), way, load_as)
    draft = named.on(chosen.draft, value(apply_at))
    place = Place(found, draft.slug, out, plan_only, force)
    _say_what_goes(found, chosen)
    named.say(draft, place.make(draft, BuildOptions(load_as, not no_verify, force)))


def _protected(profile: "Profile", asked: list[str], is_active: bool) -> tuple[str, ...]:
    """What stays whatever its score; super experts unasked, where they are known."""
    from expertcut.interventions.criteria.protection import expressions_of

    is_known = profile.info.settings.stats == "all"
    if not (is_known or is_active or asked):
        print("Super experts are not known without all-token statistics: none is protected.")
    return expressions_of(asked, is_super=is_known and not is_active)


def _chosen(profile: "Profile", keep: "Keep", way: "Way", load_as: "LoadOptions") -> "Pruning":
    """Who stays; the profiled model is loaded where the criterion asks it."""
    from expertcut.checkpoints.build import engine_as_profiled, profiled_source
    from expertcut.interventions.criteria.scoring import NEEDS_MODEL
    from expertcut.interventions.prune import choose

    if way.by not in NEEDS_MODEL:
        return choose(profile, keep, way)
    quiet()
    return choose(
        profile, keep, way, engine_as_profiled(profile, profiled_source(profile), load_as)
    )


def _say_what_goes(profile: "Profile", chosen: "Pruning") -> None:
    from expertcut.interventions.touched import touched
    from expertcut.reporting.cuts import pruning_sentences, touched_sentences, touched_table

    goes = touched(profile, chosen.draft.edits)
    for sentence in pruning_sentences(chosen):
        print(sentence)
    print_tables([touched_table(goes)], Format.table)
    for sentence in touched_sentences(chosen, goes):
        print(sentence)


@dataclass(frozen=True)
class Named:
    """The experts that --boost, --suppress and --scale name."""

    tilts: "list[Tilt]"
    scalings: "list[Scaling]"

    @classmethod
    def of(
        cls,
        profile: "Profile",
        boost: list[str] | None,
        suppress: list[str] | None,
        scale: list[str] | None,
    ) -> Self:
        """As they stand on the command line."""
        from expertcut.interventions.reweighting.targets import scalings, tilts

        return cls(tilts(profile, boost or [], suppress or []), scalings(profile, scale or []))

    def on(self, draft: "Draft", apply_at: Any) -> "Draft":
        """A draft that tilts them too; the same one where none is named."""
        from expertcut.interventions.reweighting.drafting import with_tilts

        if not (self.tilts or self.scalings or apply_at):
            return draft
        return with_tilts(draft, self.tilts, self.scalings, apply_at)

    def say(self, draft: "Draft", built: "Built | None") -> None:
        """What was done to each, in words."""
        from expertcut.reporting.proofs import scale_sentences, tilt_sentences

        for sentence in (
            *tilt_sentences(self.tilts, built, draft.numbers),
            *scale_sentences(self.scalings, built, draft.numbers),
        ):
            print(sentence)


class Place:
    """Where a draft becomes a checkpoint or a plan; refused at once if something is there."""

    def __init__(
        self, profile: "Profile", slug: str, out: Path | None, is_plan: bool, is_forced: bool
    ) -> None:
        from expertcut.checkpoints.build import default_out, inputs_of
        from expertcut.checkpoints.files.folders import check_free

        self.profile, self.is_plan, self.is_forced = profile, is_plan, is_forced
        self.folder = out or default_out(profile, slug, is_plan=is_plan)
        check_free(self.folder, is_forced=is_forced, inputs=inputs_of(profile))

    def keep(self, options: "BuildOptions") -> None:
        """Only what would lie beside a plan, if there is anything."""
        from expertcut.checkpoints.build import write_beside

        if options.beside:
            write_beside(self.profile, self.folder, options)
            print(f"no checkpoint is made; the proof is written to {self.folder}")
        else:
            print("nothing is written")

    def make(self, draft: "Draft", options: "BuildOptions") -> "Built | None":
        """Builds and says what came of it; of a plan alone there is nothing to say."""
        from expertcut.checkpoints.build import build, write_plan
        from expertcut.reporting.proofs import proof_sentences, proof_tables

        if self.is_plan:
            write_plan(self.profile, draft, self.folder, options)
            print(f"written to {self.folder}")
            return None
        quiet()
        built = build(self.profile, draft, self.folder, options)
        print_tables(proof_tables(built), Format.table)
        for sentence in proof_sentences(built):
            print(sentence)
        print(f"written to {self.folder}")
        return built
