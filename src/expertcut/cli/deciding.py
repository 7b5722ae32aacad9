"""How `reweight` chooses experts and strengths where they are not all given by hand."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from expertcut.cli.options import Format, option
from expertcut.cli.output import print_tables, quiet
from expertcut.cli.running import is_first
from expertcut.errors import SettingsError

if TYPE_CHECKING:
    from expertcut.evaluation.proving.decision import DecideOptions, Decision
    from expertcut.interventions.reweighting.choosing import Chooser, Pick
    from expertcut.interventions.reweighting.tuning import Procedure, Settled
    from expertcut.profiling.store import Profile

Expressions = tuple[list[str] | None, list[str] | None, list[str] | None]
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
Draws = Annotated[int, option("Random experts that --prove compares with.", "--draws", min=99)]
Seed = Annotated[int, option("Seed of folds and draws.")]


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

    def procedure(self, profile: "Profile", how: "How", named: Expressions) -> "Procedure":
        """As the stages take it.

        Raises:
            PlanError: no such layer or expert, or one named twice.
            SettingsError: nothing to tilt, or an option that does not go with the others.
        """
        from expertcut.interventions.reweighting.targets import named_picks
        from expertcut.interventions.reweighting.tuning import Procedure

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

    def _chooser(self, profile: "Profile") -> "Chooser":
        from expertcut.interventions.lineage import numbers_of
        from expertcut.interventions.reweighting import choosing

        model, least = profile.info.model, self.min_appearances
        constant = numbers_of(profile).constant
        by = self.by or "difference"
        return choosing.Chooser(
            boost_best=self.boost_best,
            suppress_worst=self.suppress_worst,
            by=by,
            min_appearances=choosing.MIN_APPEARANCES if least is None else least,
            layers=read_layers(self.layers),
            contrast=choosing.read_contrast(self.contrast, model.fingerprint)
            if self.contrast
            else None,
            fixed=choosing.token_scores(profile, by) if by in choosing.TOKEN_SCORES else None,
            constant=tuple(
                (layer, row)
                for layer, block in enumerate(model.blocks)
                for row in sorted(constant.get(block.name, ()))
            ),
        )

    def check(self) -> None:
        """That the options go together.

        Raises:
            SettingsError: which does not.
        """
        from expertcut.interventions.reweighting.choosing import SCORES, TOKEN_SCORES

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

    def name(self, profile: "Profile", procedure: "Procedure") -> str:
        """The procedure in words, which also name the outputs."""
        from expertcut.interventions.lineage import numbers_of

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


def read_layers(text: str | None) -> tuple[int, ...]:
    """`0,3,8-15` as numbers.

    Raises:
        SettingsError: not of that form.
    """
    found: list[int] = []
    for part in (text or "").split(",") if text is not None else ():
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise SettingsError(f"--layers {text}: {part!r} is no layer: write them as 0,3,8-15")
        found += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(found))


def settled_on_profile(profile: "Profile", procedure: "Procedure") -> "Settled":
    """Chosen on the profile's own questions, with no run of the model."""
    from expertcut.interventions.questions import profiled_quiz
    from expertcut.interventions.reweighting.records import Records
    from expertcut.interventions.reweighting.tuning import Settled

    quiet()
    records = Records.of(profile, profiled_quiz(profile))
    procedure.check(records)
    picks: tuple[Pick, ...] = procedure.pick(records)
    return Settled(procedure.untuned(records, picks))


def decided(profile: "Profile", procedure: "Procedure", options: "DecideOptions") -> "Decision":
    """Chosen and proved on the tuning questions; prints what was found."""
    from expertcut.evaluation.proving.decision import decide
    from expertcut.reporting.proving import decision_sentences, decision_tables

    quiet()
    columns = (TextColumn("proving"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    console = Console(stderr=True)
    is_quiet = not (console.is_terminal and is_first() and options.is_proved)
    with Progress(*columns, console=console, disable=is_quiet) as bar:
        task = bar.add_task("", total=None)
        found = decide(
            profile,
            procedure,
            options,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    print_tables(decision_tables(found), Format.table)
    for sentence in decision_sentences(found):
        print(sentence)
    return found
