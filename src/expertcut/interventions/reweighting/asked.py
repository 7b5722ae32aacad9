"""How to choose experts and strengths, in the words of options, and as the stages take it."""

import math
import re
from dataclasses import dataclass

from expertcut.errors import SettingsError
from expertcut.interventions.lineage import numbers_of
from expertcut.interventions.questions import held_out_quiz, profiled_quiz
from expertcut.interventions.reweighting.choosing import (
    MIN_APPEARANCES,
    SCORES,
    TOKEN_SCORES,
    Chooser,
    Contrast,
    read_contrast,
    token_scores,
)
from expertcut.interventions.reweighting.records import Records
from expertcut.interventions.reweighting.targets import named_picks
from expertcut.interventions.reweighting.tuning import Procedure, Settled
from expertcut.profiling.storage import Profile, ProfilePart

_LAYERS = re.compile(r"[0-9]{1,5}(-[0-9]{1,5})?")
Expressions = tuple[list[str] | None, list[str] | None, list[str] | None]
"""What --boost, --suppress and --scale name."""


@dataclass(frozen=True)
class How:
    """How strongly, and how it is judged, as given."""

    strength: float | None
    is_tuned: bool
    is_proved: bool
    draws: int
    seed: int

    @property
    def is_deciding(self) -> bool:
        """Whether the model is asked before anything is built."""
        return self.is_tuned or self.is_proved

    @property
    def is_asking(self) -> bool:
        """Whether there is more to settle than experts and strengths given by hand."""
        return self.is_deciding or self.strength is not None

    def check(self, *, is_given: bool) -> None:
        """That the strength is one, and given once.

        Raises:
            SettingsError: it is not.
        """
        if self.strength is not None and not (math.isfinite(self.strength) and self.strength > 0):
            raise SettingsError(f"--strength {self.strength:g} must be a number of logits above 0")
        if self.is_tuned and (self.strength is not None or is_given):
            raise SettingsError("--tune searches for the strength: leave the number out")


@dataclass(frozen=True)
class Asked:
    """The options that say how to choose, as given."""

    boost_best: int
    suppress_worst: int
    by: str | None
    min_appearances: float | None
    layers: str | None
    contrast: tuple[str, str] | None

    @property
    def is_choosing(self) -> bool:
        """Whether experts are chosen by a score."""
        return bool(self.boost_best or self.suppress_worst)

    @property
    def criterion(self) -> str:
        """What a plan says that experts were chosen by."""
        if not self.is_choosing:
            return "by hand"
        return "contrast" if self.contrast else self.by or "difference"

    def procedure(self, profile: Profile, how: How, named: Expressions) -> Procedure:
        """As the stages take it.

        Raises:
            PlanError: no such layer or expert, or one named twice.
            SettingsError: nothing to tilt, or an option that does not go with the others.
        """
        boost, suppress, scale = named
        self.check()
        if scale:
            raise SettingsError(
                "--scale takes its factor by hand: give it in a command of its own, without "
                "--boost-best, --suppress-worst, --strength, --tune and --prove"
            )
        if not (boost or suppress or self.is_choosing):
            raise SettingsError(
                "say which experts to tilt: --boost E or --suppress E, E as in 3:12, "
                "--boost-best N or --suppress-worst N"
            )
        picks = named_picks(profile, boost or [], suppress or [])
        how.check(is_given=any(strength for _, strength in picks))
        return Procedure(picks, self._chooser(profile), how.strength, how.is_tuned)

    def _chooser(self, profile: Profile) -> Chooser:
        model, least = profile.info.model, self.min_appearances
        constant = numbers_of(profile).constant
        by = self.by or "difference"
        return Chooser(
            boost_best=self.boost_best,
            suppress_worst=self.suppress_worst,
            by=by,
            min_appearances=MIN_APPEARANCES if least is None else least,
            layers=read_layers(self.layers),
            contrast=self._contrast(profile),
            fixed=token_scores(profile, by) if by in TOKEN_SCORES else None,
            constant=tuple(
                (layer, row)
                for layer, block in enumerate(model.blocks)
                for row in sorted(constant.get(block.name, ()))
            ),
        )

    def _contrast(self, profile: Profile) -> Contrast | None:
        """The two sides, without what is held out of the profile."""
        if self.contrast is None:
            return None
        found = read_contrast(self.contrast, profile.info.model.fingerprint)
        if not isinstance(profile, ProfilePart):
            return found
        return found.less({q.overlap_hash for q in held_out_quiz(profile)})

    def check(self) -> None:
        """That the options go together.

        Raises:
            SettingsError: which does not.
        """
        names = (*SCORES, *TOKEN_SCORES)
        if self.by is not None and self.by not in names:
            raise SettingsError(f"--by {self.by} is no score: take one of {', '.join(names)}")
        if self.by is not None and self.contrast:
            raise SettingsError("--by and --contrast both score experts: give one of them")
        if self.min_appearances is not None and not 0 <= self.min_appearances <= 1:
            raise SettingsError(
                f"--min-appearances {self.min_appearances:g} must be a share from 0 to 1"
            )
        if (self.by or self.contrast) and not self.is_choosing:
            raise SettingsError(
                "--by and --contrast rank experts for --boost-best N and --suppress-worst N: "
                "give one of these"
            )

    def name(self, profile: Profile, procedure: Procedure) -> str:
        """The procedure in words, which also name the outputs."""
        numbers, blocks = numbers_of(profile), profile.info.model.blocks
        words = {+1: "boost", -1: "suppress"}
        named = [
            f"{words[p.sign]} {p.layer}:{numbers.number(blocks[p.layer].name, p.expert)}"
            for p, _ in procedure.named
        ]
        chosen = (("boost-best", self.boost_best), ("suppress-worst", self.suppress_worst))
        named += [f"{name} {n}" for name, n in chosen if n]
        by = () if self.criterion in ("by hand", "difference") else (f"by {self.criterion}",)
        return " ".join((*named, *by, *(("tuned",) if procedure.is_tuned else ())))


def read_layers(text: str | None) -> tuple[int, ...]:
    """`0,3,8-15` as numbers.

    Raises:
        SettingsError: not of that form.
    """
    found: list[int] = []
    for part in (text or "").split(",") if text is not None else ():
        first, _, last = part.strip().partition("-")
        if not _LAYERS.fullmatch(part.strip()):
            raise SettingsError(f"--layers: {part[:80]!r} is no layer: write them as 0,3,8-15")
        found += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(found))


def settled_on_profile(profile: Profile, procedure: Procedure) -> Settled:
    """Chosen on the profile's own questions, with no run of the model.

    Raises:
        PlanError: fewer candidates than are to be tilted, or one without a strength.
    """
    records = Records.of(profile, profiled_quiz(profile))
    procedure.check(records)
    return Settled(procedure.untuned(records, procedure.pick(records)))
