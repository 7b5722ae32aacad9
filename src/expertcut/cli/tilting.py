"""The command `reweight`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from expertcut.cli.changing import Named, Place
from expertcut.cli.deciding import (
    Asked,
    BoostBest,
    By,
    ContrastPair,
    Draws,
    Expressions,
    How,
    Layers,
    MinAppearances,
    Prove,
    Seed,
    Strength,
    SuppressWorst,
    Tune,
    decided,
    settled_on_profile,
)
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

if TYPE_CHECKING:
    from expertcut.checkpoints.build import BuildOptions
    from expertcut.evaluation.proving.decision import DecideOptions, Decision
    from expertcut.interventions.plan import Layout as LayoutName
    from expertcut.interventions.plan import Positions
    from expertcut.interventions.reweighting.tuning import Settled
    from expertcut.profiling.store import Profile

_Where = tuple[Path | None, bool, bool]


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
    trust_remote_code: TrustRemoteCode = False,
    out: OutDir = None,
    force: Force = False,
    no_verify: NoVerify = False,
    plan_only: PlanOnly = False,
) -> None:
    """Tilt the gate toward or away from experts."""
    from expertcut.checkpoints.build import BuildOptions
    from expertcut.moe.loading import LoadOptions

    asked = Asked(boost_best, suppress_worst, by, min_appearances, layers, contrast)
    how = How(strength, tune, prove, draws, seed)
    options = BuildOptions(LoadOptions(dtype, device, trust_remote_code), not no_verify, force)
    tilting = _Tilting(read_profile(profile, threads), layout.value, value(apply_at), options)
    named, where = (boost, suppress, scale), (out, plan_only, force)
    tilting.make(asked, how, named, where)


@dataclass(frozen=True)
class _Tilting:
    """What every way to a tilted checkpoint has in common."""

    profile: "Profile"
    layout: "LayoutName"
    apply_at: "Positions | None"
    options: "BuildOptions"

    def make(self, asked: Asked, how: How, named: Expressions, where: _Where) -> None:
        """The one way or the other."""
        asked.check()
        if asked.is_choosing or how.is_asking:
            self.choose(asked, how, named, where)
        else:
            self.by_hand(named, where)

    def by_hand(self, named: Expressions, where: _Where) -> None:
        """Experts and strengths that need no question to be asked."""
        from expertcut.interventions.reweighting.drafting import reweight_draft

        found = Named.of(self.profile, *named)
        kind = (self.layout, found.scalings, self.apply_at)
        draft = reweight_draft(self.profile, found.tilts, *kind)
        built = Place(self.profile, draft.slug, *where).make(draft, self.options)
        found.say(draft, built)

    def choose(self, asked: Asked, how: How, named: Expressions, where: _Where) -> None:
        """Experts by a score, strengths by a search, the proof; then the checkpoint."""
        from expertcut.checkpoints.build import profiled_source
        from expertcut.checkpoints.export import check_layout
        from expertcut.interventions.reweighting.drafting import check_place

        check_place(self.layout, self.apply_at, is_biased=True)
        check_layout(profiled_source(self.profile), self.layout, is_cutting=False)
        procedure = asked.procedure(self.profile, how, named)
        name = asked.name(self.profile, procedure)
        mark = "" if self.layout == "stock" else f"-{self.layout}"
        mark += "-answer" if self.apply_at == "answer" else ""
        place = Place(self.profile, name.replace(":", ".").replace(" ", "-") + mark, *where)
        decision = None
        if how.is_deciding:
            decision = decided(self.profile, procedure, self._decide_options(how, name))
        settled = decision.settled if decision else settled_on_profile(self.profile, procedure)
        origins = [procedure.origin(shift) for shift in settled.shifts]
        used = procedure.chooser.looked_at(self.profile)
        self._make(place, (settled, origins, asked.criterion, used), decision)

    def _make(
        self,
        place: Place,
        chosen: "tuple[Settled, list[str], str, frozenset[str]]",
        decision: "Decision | None",
    ) -> None:
        from expertcut.evaluation.proving.outcome import proof_file
        from expertcut.interventions.reweighting.drafting import reweight_draft
        from expertcut.interventions.reweighting.targets import tilts_of

        proof = proof_file(decision.proof) if decision and decision.proof else {}
        options, (settled, origins, criterion, used) = replace(self.options, beside=proof), chosen
        if not settled.shifts:
            place.keep(options)
            return
        tilts = tilts_of(self.profile, settled.shifts, origins)
        draft = replace(
            reweight_draft(self.profile, tilts, self.layout, (), self.apply_at),
            criterion=criterion,
            is_tuned=decision is not None,
            tuning=decision.curve if decision else (),
            used=used,
        )
        Named(tilts, []).say(draft, place.make(draft, options))

    def _decide_options(self, how: How, name: str) -> "DecideOptions":
        from expertcut.evaluation.proving.decision import DecideOptions

        load_as, apply_at = self.options.load_as, self.apply_at or "all"
        return DecideOptions(load_as, name, apply_at, how.is_proved, how.draws, how.seed)
