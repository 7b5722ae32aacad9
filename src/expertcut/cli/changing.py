"""The command `prune`, and how a choice becomes a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from expertcut.cli.options import (
    Criterion,
    Device,
    Dtype,
    Fold,
    Force,
    Format,
    Layout,
    LayoutOption,
    NoVerify,
    OutDir,
    PlanOnly,
    Positions,
    ProfileDir,
    Removed,
    Threads,
    TrustRemoteCode,
    option,
    read_profile,
)
from expertcut.cli.output import print_tables, quiet

if TYPE_CHECKING:
    from expertcut.checkpoints.build import Built
    from expertcut.interventions.plan import Draft
    from expertcut.interventions.prune import Pruning
    from expertcut.moe.loading import LoadOptions
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
    removed: Annotated[
        Removed | None, option("What removed experts give in layout exact; zero without.")
    ] = None,
    fold: Annotated[
        Fold | None,
        option("Which tokens say how much layout stock must scale experts; answer without."),
    ] = None,
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
    from expertcut.interventions.prune import Keep, Way, choose
    from expertcut.moe.loading import LoadOptions

    found = read_profile(profile, threads)
    way = Way.of(by.value, positions.value, layout.value, _value(removed), _value(fold))
    chosen = choose(found, Keep(keep_active, keep, keep_fraction), way)
    place = Place(found, chosen.draft, out, plan_only, force)
    _say_what_goes(found, chosen)
    place.make(LoadOptions(dtype, device, trust_remote_code), is_verified=not no_verify)


def _say_what_goes(profile: "Profile", chosen: "Pruning") -> None:
    from expertcut.interventions.touched import touched
    from expertcut.reporting.cuts import pruning_sentences, touched_sentences, touched_table

    goes = touched(profile, chosen.draft.edits)
    for sentence in pruning_sentences(chosen):
        print(sentence)
    print_tables([touched_table(goes)], Format.table)
    for sentence in touched_sentences(chosen, goes):
        print(sentence)


def _value(choice: Any) -> Any:
    """A choice in the words of the stages."""
    return None if choice is None else choice.value


class Place:
    """Where a draft becomes a checkpoint or a plan; refused at once if something is there."""

    def __init__(
        self, profile: "Profile", draft: "Draft", out: Path | None, is_plan: bool, is_forced: bool
    ) -> None:
        from expertcut.checkpoints.build import default_out, inputs_of
        from expertcut.checkpoints.files.folders import check_free

        self.profile, self.draft, self.is_plan, self.is_forced = profile, draft, is_plan, is_forced
        self.folder = out or default_out(profile, draft, is_plan=is_plan)
        check_free(self.folder, is_forced=is_forced, inputs=inputs_of(profile))

    def make(self, load_as: "LoadOptions", *, is_verified: bool) -> "Built | None":
        """Builds and says what came of it; of a plan alone there is nothing to say."""
        from expertcut.checkpoints.build import BuildOptions, build, write_plan
        from expertcut.reporting.outcomes import proof_sentences, proof_tables

        if self.is_plan:
            write_plan(self.profile, self.draft, self.folder, is_forced=self.is_forced)
            print(f"written to {self.folder}")
            return None
        quiet()
        options = BuildOptions(load_as, is_verified, self.is_forced)
        built = build(self.profile, self.draft, self.folder, options)
        print_tables(proof_tables(built), Format.table)
        for sentence in proof_sentences(built):
            print(sentence)
        print(f"written to {self.folder}")
        return built
