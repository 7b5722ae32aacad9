"""The commands `reweight` and `merge`, and how any choice becomes a checkpoint or a plan."""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from expertcut.cli.options import (
    ApplyAtOption,
    Boost,
    Device,
    Dtype,
    Force,
    Format,
    HeldOut,
    Layout,
    LayoutOption,
    NoVerify,
    OutDir,
    PlanOnly,
    ProfileDir,
    Scale,
    Suppress,
    Threads,
    TruncateMore,
    TrustRemoteCode,
    option,
    read_choosing_profile,
    value,
)
from expertcut.cli.progress import bar, print_tables, quiet
from expertcut.errors import SettingsError

if TYPE_CHECKING:
    from expertcut.checkpoints.build import BuildOptions, Built, Merged
    from expertcut.edits.plan import EditPlan
    from expertcut.edits.reweight_tune import Procedure
    from expertcut.edits.router_edits import Scaling, Tilt
    from expertcut.evaluation.reweight_search import DecideOptions, Decision, Tilted, Tilting
    from expertcut.profiling.storage import Profile

BoostBest = Annotated[
    int, option("Boost so many of the experts with the best score.", "--boost-best", min=0)
]
SuppressWorst = Annotated[
    int, option("Suppress so many of those with the worst.", "--suppress-worst", min=0)
]
By = Annotated[str | None, option("What scores experts: difference (default), accuracy, ...")]
MinAppearances = Annotated[
    float | None,
    option("Only experts in this share of questions or more; 0.01 without.", "--min-appearances"),
]
Layers = Annotated[str | None, option("Only these layers, as 0,3,8-15.")]
ContrastPair = Annotated[
    tuple[str, str] | None,
    option(
        "Score by how much more often A activates an expert than B; each is a profile, or "
        "PROFILE@right, PROFILE@wrong, PROFILE@subject,subject.",
        "--contrast",
        metavar="A B",
    ),
]
Strength = Annotated[
    float | None, option("Bias in logits; the admission gap without.", "--strength")
]
Tune = Annotated[bool, option("Search for the strength on the tuning questions.", "--tune")]
Prove = Annotated[
    bool, option("Cross-fit the whole procedure and hold it against random experts.", "--prove")
]
Draws = Annotated[
    int, option("Random experts that --prove compares with.", "--draws", min=99, max=10**6)
]
Seed = Annotated[int, option("Seed of folds and draws.", min=0)]
_Where = tuple[Path | None, bool, bool]


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
        from expertcut.edits.router_edits import scalings, tilts

        return cls(tilts(profile, boost or [], suppress or []), scalings(profile, scale or []))

    def on(self, draft: "EditPlan", apply_at: Any) -> "EditPlan":
        """A draft that tilts them too; the same one where none is named."""
        from expertcut.edits.router_edits import with_tilts

        if not (self.tilts or self.scalings or apply_at):
            return draft
        return with_tilts(draft, self.tilts, self.scalings, apply_at)

    def say(self, draft: "EditPlan", built: "Built | None") -> None:
        """What was done to each, in words."""
        from expertcut.reporting.edit_tables import scale_sentences, tilt_sentences

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
        from expertcut.checkpoints.build import default_out, found_source, inputs_of
        from expertcut.checkpoints.output_dir import check_writable

        self.profile, self.is_plan, self.is_forced = profile, is_plan, is_forced
        self.folder = out or default_out(profile, slug, is_plan=is_plan)
        check_writable(self.folder, is_forced=is_forced, inputs=inputs_of(profile))
        if not is_plan:  # what it is made from is looked at before anything is said of it
            quiet()
            found_source(profile)

    def keep(self, options: "BuildOptions") -> None:
        """Only what would lie beside a plan, if there is anything."""
        from expertcut.checkpoints.build import write_beside

        if options.beside:
            write_beside(self.profile, self.folder, options)
            print(f"no checkpoint is made; the proof is written to {self.folder}")
        else:
            print("nothing is written")

    def make(self, draft: "EditPlan", options: "BuildOptions") -> "Built | None":
        """Builds and says what came of it; of a plan alone there is nothing to say."""
        from expertcut.checkpoints.build import build, write_plan
        from expertcut.reporting.edit_tables import adapter_sentences, proof_sentences, proof_tables

        if self.is_plan:
            write_plan(self.profile, draft, self.folder, options)
            print(f"written to {self.folder}")
            return None
        quiet()
        built = build(self.profile, draft, self.folder, options)
        print_tables(proof_tables(built), Format.table)
        for sentence in (*proof_sentences(built), *adapter_sentences(built)):
            print(sentence)
        print(f"written to {self.folder}")
        return built


def decided(profile: "Profile", procedure: "Procedure", options: "DecideOptions") -> "Decision":
    """Chosen and proved on the tuning questions; prints what was found."""
    from expertcut.evaluation.reweight_search import decide
    from expertcut.reporting.edit_tables import decision_sentences, decision_tables

    quiet()
    with bar("proving", is_shown=options.is_proved) as report:
        found = decide(profile, procedure, options, report)
    print_tables(decision_tables(found), Format.table)
    for sentence in decision_sentences(found):
        print(sentence)
    return found


def reweight(
    profile: ProfileDir = None,
    boost: Boost = None,
    suppress: Suppress = None,
    scale: Scale = None,
    boost_best: BoostBest = 0,
    suppress_worst: SuppressWorst = 0,
    by: By = None,
    min_appearances: MinAppearances = None,
    layers: Layers = None,
    contrast: ContrastPair = None,
    strength: Strength = None,
    tune: Tune = False,
    prove: Prove = False,
    draws: Draws = 99,
    seed: Seed = 0,
    apply_at: ApplyAtOption = None,
    layout: LayoutOption = Layout.stock,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    truncate: TruncateMore = None,
    trust_remote_code: TrustRemoteCode = False,
    held_out: HeldOut = None,
    out: OutDir = None,
    force: Force = False,
    no_verify: NoVerify = False,
    plan_only: PlanOnly = False,
) -> None:
    """Tilt the gate toward or away from experts."""
    from expertcut.checkpoints.build import BuildOptions
    from expertcut.edits.router_edits import How, ReweightSettings
    from expertcut.evaluation.reweight_search import Tilting
    from expertcut.models.load import LoadOptions

    asked = ReweightSettings(boost_best, suppress_worst, by, min_appearances, layers, contrast)
    how, named = How(strength, tune, prove, draws, seed), (boost, suppress, scale)
    tilting = Tilting(asked, how, named, layout.value, value(apply_at))
    options = BuildOptions(LoadOptions(dtype, device, trust_remote_code), not no_verify, force)
    found = read_choosing_profile(profile, threads, truncate, held_out)
    _Reweighting(found, tilting, options).make((out, plan_only, force))


@dataclass(frozen=True)
class _Reweighting:
    """What every way to a tilted checkpoint has in common."""

    profile: "Profile"
    tilting: "Tilting"
    options: "BuildOptions"

    def make(self, where: _Where) -> None:
        """The one way or the other."""
        self.tilting.asked.check()
        if self.tilting.is_by_hand:
            self.by_hand(where)
        else:
            self.choose(where)

    def by_hand(self, where: _Where) -> None:
        """Experts and strengths that need no question to be asked."""
        from expertcut.evaluation.reweight_search import by_hand

        found = by_hand(self.profile, self.tilting)
        assert found.draft is not None
        self._make(Place(self.profile, found.draft.slug, *where), found)

    def choose(self, where: _Where) -> None:
        """Experts by a score, strengths by a search, the proof; then the checkpoint."""
        from expertcut.edits.layouts import LAYOUTS
        from expertcut.evaluation.reweight_search import chosen, prepared

        procedure, name = prepared(self.profile, self.tilting)
        rules = LAYOUTS[self.tilting.layout]
        mark = f"-{rules.mark}" if rules.mark else ""
        mark += "-answer" if self.tilting.apply_at == "answer" else ""
        place = Place(self.profile, name.replace(":", ".").replace(" ", "-") + mark, *where)
        quiet()
        decision = None
        if self.tilting.how.is_deciding:
            decision = decided(self.profile, procedure, self._decide_options(name))
        self._make(place, chosen(self.profile, self.tilting, procedure, decision))

    def _make(self, place: Place, found: "Tilted") -> None:
        options = replace(self.options, beside=found.beside)
        if found.draft is None:
            place.keep(options)
            return
        built = place.make(found.draft, options)
        Named(found.tilts, found.scalings).say(found.draft, built)

    def _decide_options(self, name: str) -> "DecideOptions":
        from expertcut.evaluation.reweight_search import DecideOptions

        how, apply_at = self.tilting.how, self.tilting.apply_at or "all"
        return DecideOptions(
            self.options.load_as, name, apply_at, how.is_proved, how.draws, how.seed
        )


class Method(StrEnum):
    """The names in `edits.merge_groups.METHODS`; a test holds them together."""

    m_smoe = "m_smoe"
    hc_smoe = "hc_smoe"


class RouterRow(StrEnum):
    """What a group's router row is made of."""

    fitted = "fitted"
    mean = "mean"
    dominant = "dominant"


def merge(
    profile: ProfileDir = None,
    keep: Annotated[int | None, option("Experts per layer afterwards.")] = None,
    by: Annotated[
        Method, option("What makes a group: like router logits, or like mean outputs.")
    ] = Method.m_smoe,
    router: Annotated[
        RouterRow,
        option("A group's router row: fitted to its members' mass, their mean, or one's own."),
    ] = RouterRow.fitted,
    align: Annotated[
        bool | None,
        option("Put neurons in the same order first.  [default: in m_smoe]", "--align/--no-align"),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    truncate: TruncateMore = None,
    trust_remote_code: TrustRemoteCode = False,
    held_out: HeldOut = None,
    out: OutDir = None,
    force: Force = False,
    no_verify: NoVerify = False,
    plan_only: PlanOnly = False,
) -> None:
    """Make one expert of several, and say what that did."""
    from expertcut.checkpoints.build import BuildOptions
    from expertcut.checkpoints.build import merge as make
    from expertcut.edits.merge_groups import Merge
    from expertcut.models.load import LoadOptions

    if keep is None:
        raise SettingsError("say how many experts each layer has afterwards: --keep N")
    found = read_choosing_profile(profile, threads, truncate, held_out)
    asked = Merge(keep, by.value, router.value, align)
    folder = Place(found, asked.slug, out, plan_only, force).folder
    quiet()
    options = BuildOptions(LoadOptions(dtype, device, trust_remote_code), not no_verify, force)
    _say(found, make(found, asked, folder, options, is_plan=plan_only), is_plan=plan_only)
    print(f"written to {folder}")


def _say(profile: "Profile", merged: "Merged", *, is_plan: bool) -> None:
    from expertcut.reporting.edit_tables import (
        groups_table,
        merging_sentences,
        proof_sentences,
        proof_tables,
    )

    print_tables([groups_table(profile, merged)], Format.table)
    if is_plan:
        return
    print_tables(proof_tables(merged.built), Format.table)
    for sentence in (*proof_sentences(merged.built), *merging_sentences(profile, merged)):
        print(sentence)
