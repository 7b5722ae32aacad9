"""The command `reweight`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from expertcut.cli.changing import Named, Place
from expertcut.cli.deciding import (
    BoostBest,
    By,
    ContrastPair,
    Draws,
    Layers,
    MinAppearances,
    Prove,
    Seed,
    Strength,
    SuppressWorst,
    Tune,
    decided,
)
from expertcut.cli.options import (
    ApplyAtOption,
    Boost,
    Device,
    Dtype,
    Force,
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
    value,
)
from expertcut.cli.output import quiet
from expertcut.cli.reading import read_choosing_profile

if TYPE_CHECKING:
    from expertcut.checkpoints.build import BuildOptions
    from expertcut.evaluation.reweight_search import DecideOptions, Tilted, Tilting
    from expertcut.profiling.storage import Profile

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
    from expertcut.edits.reweight import How, ReweightSettings
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
        from expertcut.evaluation.reweight_search import chosen, prepared

        procedure, name = prepared(self.profile, self.tilting)
        mark = "" if self.tilting.layout == "stock" else f"-{self.tilting.layout}"
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
