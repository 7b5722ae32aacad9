"""The stage behind `reweight`: experts and strengths, by hand or by a procedure, become a draft."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from expertcut.checkpoints.build import profiled_source
from expertcut.checkpoints.export import check_layout
from expertcut.edits.plan import Draft, Layout, Positions
from expertcut.edits.reweight import (
    Expressions,
    How,
    ReweightSettings,
    Scaling,
    Tilt,
    check_place,
    reweight_draft,
    scalings,
    settled_on_profile,
    tilts,
    tilts_of,
)
from expertcut.edits.reweight_tune import Procedure
from expertcut.evaluation.proving.decision import Decision
from expertcut.evaluation.proving.outcome import proof_file
from expertcut.profiling.storage import Profile


@dataclass(frozen=True)
class Tilting:
    """What is asked: who is tilted, how strongly and how it is judged, and in which form."""

    asked: ReweightSettings
    how: How
    named: Expressions
    layout: Layout = "stock"
    apply_at: Positions | None = None

    @property
    def is_by_hand(self) -> bool:
        """Whether experts and strengths need no question to be asked."""
        return not (self.asked.is_choosing or self.how.is_asking)


@dataclass(frozen=True)
class Tilted:
    """What came of it; no draft where nothing is to be tilted. `beside` is the proof, if any."""

    draft: Draft | None
    tilts: list[Tilt] = field(default_factory=list)
    scalings: list[Scaling] = field(default_factory=list)
    beside: Mapping[str, bytes] = field(default_factory=dict)


def by_hand(profile: Profile, tilting: Tilting) -> Tilted:
    """Experts and strengths as they were named.

    Raises:
        PlanError: no such expert, or one that has no default strength.
        SettingsError: nothing to tilt, or an option that does not go with the others.
    """
    tilting.asked.check()
    boost, suppress, scale = tilting.named
    found, scaled = tilts(profile, boost or [], suppress or []), scalings(profile, scale or [])
    draft = reweight_draft(profile, found, tilting.layout, scaled, tilting.apply_at)
    return Tilted(draft, found, scaled)


def prepared(profile: Profile, tilting: Tilting) -> tuple[Procedure, str]:
    """The procedure and its name, all that can be refused before anything runs refused.

    Raises:
        ContractError: a model that the layout cannot carry biases for.
        PlanError: no such expert.
        SettingsError: nothing to tilt, or an option that does not go with the others.
    """
    check_place(tilting.layout, tilting.apply_at, is_biased=True)
    check_layout(profiled_source(profile), tilting.layout, is_cutting=False)
    procedure = tilting.asked.procedure(profile, tilting.how, tilting.named)
    return procedure, tilting.asked.name(profile, procedure)


def chosen(
    profile: Profile, tilting: Tilting, procedure: Procedure, decision: Decision | None
) -> Tilted:
    """What a decision settled, or without one what the profile's own questions say."""
    settled = decision.settled if decision else settled_on_profile(profile, procedure)
    beside = proof_file(decision.proof) if decision and decision.proof else {}
    if not settled.shifts:
        return Tilted(None, beside=beside)
    found = tilts_of(profile, settled.shifts, [procedure.origin(s) for s in settled.shifts])
    draft = replace(
        reweight_draft(profile, found, tilting.layout, (), tilting.apply_at),
        criterion=tilting.asked.criterion,
        is_tuned=decision is not None,
        tuning=decision.curve if decision else (),
        used=procedure.chooser.looked_at(profile),
    )
    return Tilted(draft, found, beside=beside)
