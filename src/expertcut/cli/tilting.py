"""The command `reweight`."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from expertcut.cli.changing import Place
from expertcut.cli.deciding import (
    Asked,
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
    settled_on_profile,
)
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
from expertcut.errors import SettingsError

if TYPE_CHECKING:
    from expertcut.checkpoints.build import BuildOptions
    from expertcut.evaluation.proving.decision import DecideOptions, Decision
    from expertcut.interventions.reweighting.tuning import Procedure, Settled
    from expertcut.profiling.store import Profile


def reweight(
    profile: ProfileDir = None,
    boost: Annotated[
        list[str] | None, option("E, L:E, E=bias or L:E=bias; may be repeated.")
    ] = None,
    suppress: Annotated[list[str] | None, option("As --boost, the other way.")] = None,
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
    from expertcut.evaluation.proving.decision import DecideOptions
    from expertcut.moe.loading import LoadOptions

    asked = Asked(boost_best, suppress_worst, by, min_appearances, layers, contrast)
    found = read_profile(profile, threads)
    procedure = _procedure(found, asked, (boost or [], suppress or []), strength, tune)
    name = "-".join(filter(None, (_slug(procedure), asked.slug(), "tuned" if tune else "")))
    load_as = LoadOptions(dtype, device, trust_remote_code)
    tilting = _Tilting(found, procedure, asked.criterion, layout.value)
    place = Place(found, name + tilting.mark, out, plan_only, force)
    if tune or prove:
        tilting.decide(DecideOptions(load_as, name, "all", prove, draws, seed))
    tilting.make(place, BuildOptions(load_as, not no_verify, force))


@dataclass
class _Tilting:
    """From a procedure to shifts, and from these to a checkpoint."""

    profile: "Profile"
    procedure: "Procedure"
    criterion: str
    layout: Any
    decision: "Decision | None" = None

    @property
    def mark(self) -> str:
        """What names of outputs end in."""
        return "" if self.layout == "stock" else f"-{self.layout}"

    def decide(self, options: "DecideOptions") -> None:
        """On the tuning questions, with the model."""
        self.decision = decided(self.profile, self.procedure, options)

    def make(self, place: Place, options: "BuildOptions") -> None:
        """The checkpoint or plan; where nothing is tilted, the proof alone."""
        from expertcut.evaluation.proving.outcome import proof_file
        from expertcut.interventions.reweighting.targets import reweight_draft, tilts_of
        from expertcut.reporting.outcomes import tilt_sentences

        found = self.decision
        proof = proof_file(found.proof) if found and found.proof else {}
        options = replace(options, beside=proof)
        settled = found.settled if found else settled_on_profile(self.profile, self.procedure)
        if not settled.shifts:
            place.keep(options)
            return
        tilted = tilts_of(self.profile, settled.shifts, self._origins(settled))
        draft = replace(
            reweight_draft(self.profile, tilted, self.layout, self.criterion),
            is_tuned=found is not None,
            tuning=settled.curve,
        )
        built = place.make(draft, options)
        for sentence in tilt_sentences(tilted, built):
            print(sentence)

    def _origins(self, settled: "Settled") -> list[str]:
        given = {(pick.layer, pick.expert) for pick, strength in self.procedure.named if strength}
        if self.procedure.is_tuned:
            return ["found by a search"] * len(settled.shifts)
        is_given = self.procedure.strength is not None
        return [
            "given" if is_given or (s.layer, s.expert) in given else "its admission gap"
            for s in settled.shifts
        ]


def _slug(procedure: "Procedure") -> str:
    words = {+1: "boost", -1: "suppress"}
    named = [f"{words[p.sign]}-{p.layer}.{p.expert}" for p, _ in procedure.named]
    return "-".join(named)[:100]


def _procedure(
    profile: "Profile",
    asked: Asked,
    named: tuple[list[str], list[str]],
    strength: float | None,
    is_tuned: bool,
) -> "Procedure":
    from expertcut.interventions.reweighting.targets import named_picks
    from expertcut.interventions.reweighting.tuning import Procedure

    if not any(named) and not asked.is_choosing:
        raise SettingsError(
            "say which experts to tilt: --boost E or --suppress E, E as in 3:12, or "
            "--boost-best N or --suppress-worst N"
        )
    if strength is not None and not (math.isfinite(strength) and strength > 0):
        raise SettingsError(f"--strength {strength:g} must be a number of logits above 0")
    picks = named_picks(profile, *named)
    if is_tuned and (strength is not None or any(given for _, given in picks)):
        raise SettingsError("--tune searches for the strength: leave the number out")
    chooser = asked.chooser(profile.info.model.fingerprint)
    return Procedure(picks, chooser, strength, is_tuned)
