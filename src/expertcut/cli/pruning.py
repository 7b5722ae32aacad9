"""The command `prune`: a checkpoint, a plan, or what each of several cuts would answer."""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from expertcut.cli.changing import Named, Place
from expertcut.cli.options import (
    ApplyAtOption,
    Boost,
    Criterion,
    Device,
    Dtype,
    FoldOption,
    Force,
    Format,
    HeldOut,
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
    TruncateMore,
    TrustRemoteCode,
    option,
    value,
)
from expertcut.cli.output import print_tables, quiet
from expertcut.cli.reading import read_choosing_profile
from expertcut.cli.sweeping import (
    Scored,
    Start,
    SweepLimit,
    SweepOption,
    SweepQuiz,
    SweepShots,
    SweepSplit,
    SweepSubjects,
    run_sweep,
)
from expertcut.errors import SettingsError

if TYPE_CHECKING:
    from expertcut.edits.prune import Pruning
    from expertcut.evaluation.search_results import Grid
    from expertcut.profiling.storage import Profile


class Budget(StrEnum):
    """Whether layers keep equally many."""

    layer = "layer"
    all = "global"


BudgetOption = Annotated[
    Budget,
    option("global: more experts in layers where they score more (layout exact).", "--budget"),
]
MinKeep = Annotated[int | None, option("What --budget global keeps in each layer at least.")]
MaxBytes = Annotated[
    str | None, option("Keep as many as fit in weights of this size: 4GB, 500MB, 3.5GiB.")
]
AdapterDir = Annotated[
    Path | None,
    option("Cut a LoRA adapter of the unpruned model too, into adapter/ of the output."),
]
ByText = Annotated[
    str,
    option(f"What ranks experts: {', '.join(Criterion)}; --sweep takes several or all.", "--by"),
]


@dataclass(frozen=True)
class Prune:
    """Remove experts, and say what that did."""

    profile: ProfileDir = None
    keep_active: Annotated[bool, option("Keep what ever fires.", "--keep-active")] = False
    keep: Annotated[int | None, option("Keep so many per layer.")] = None
    keep_fraction: Annotated[float | None, option("Keep this share per layer.")] = None
    max_bytes: MaxBytes = None
    budget: BudgetOption = Budget.layer
    min_keep: MinKeep = None
    by: ByText = "activations"
    positions: PositionsOption = None
    protect: ProtectOption = None
    seed: Annotated[int, option("Of --by random.", min=0)] = 0
    layout: LayoutOption = Layout.stock
    removed: RemovedOption = None
    fold: FoldOption = None
    boost: Boost = None
    suppress: Suppress = None
    scale: Scale = None
    apply_at: ApplyAtOption = None
    adapter: AdapterDir = None
    sweep: SweepOption = None
    quiz: SweepQuiz = None
    split: SweepSplit = None
    shots: SweepShots = None
    subjects: SweepSubjects = None
    limit: SweepLimit = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    threads: Threads = None
    truncate: TruncateMore = None
    trust_remote_code: TrustRemoteCode = False
    held_out: HeldOut = None
    out: OutDir = None
    force: Force = False
    no_verify: NoVerify = False
    plan_only: PlanOnly = False

    def run(self) -> None:
        """A checkpoint or a plan, or what each of several would answer."""
        asked = (self.quiz, self.split, self.shots, self.subjects, self.limit)
        if self.sweep is not None:
            self._refuse_what_writes()
            run_sweep(self._grid(self.sweep), Scored(*asked), self._start())
        elif any(given is not None for given in asked):
            raise SettingsError(
                "--quiz, --split, --shots, --subjects and --limit say what --sweep scores: add "
                "--sweep or leave them out"
            )
        else:
            self._cut()

    def _cut(self) -> None:
        from expertcut.checkpoints.build import BuildOptions

        self._check_adapter()
        start = self._start()
        found = start.profile
        named = Named.of(found, self.boost, self.suppress, self.scale)
        chosen = self._choose(start)
        draft = named.on(chosen.draft, value(self.apply_at))
        place = Place(found, draft.slug, self.out, self.plan_only, self.force)
        _say_what_goes(found, chosen)
        options = BuildOptions(start.load_as, not self.no_verify, self.force, adapter=self.adapter)
        built = place.make(draft, options)
        named.say(draft, built)

    def _check_adapter(self) -> None:
        """Told before the profile is read; whether it is of the model shows later."""
        if self.adapter is None:
            return
        if self.plan_only:
            raise SettingsError(
                "--adapter goes into a checkpoint, which --plan-only does not write: leave one out"
            )
        from expertcut.checkpoints.lora import read_adapter

        read_adapter(self.adapter)

    def _choose(self, start: Start) -> "Pruning":
        from expertcut.checkpoints.size import choose_cut
        from expertcut.edits.budget import Keep, read_size

        most = None if self.max_bytes is None else read_size(self.max_bytes)
        numbers = (self.keep_active, self.keep, self.keep_fraction, most)
        keep = Keep(*numbers, value(self.budget), self.min_keep)
        keep.check(start.way.layout)
        quiet()
        chosen = choose_cut(start.profile, keep, start.way, start.load_as)
        for note in chosen.notes:
            print(note)
        return chosen.pruning

    def _start(self) -> Start:
        from expertcut.checkpoints.size import check_criterion
        from expertcut.edits.ranking import Way
        from expertcut.models.load import LoadOptions

        if self.sweep is None:
            check_criterion(self.by)
        found = read_choosing_profile(self.profile, self.threads, self.truncate, self.held_out)
        kind = (value(self.positions), value(self.layout), value(self.removed), value(self.fold))
        protect = _protected(found, self.protect or [], self.keep_active)
        way = replace(Way.of(self.by, *kind), protect=protect, seed=self.seed)
        load_as = LoadOptions(self.dtype, self.device, self.trust_remote_code)
        return Start(found, way, load_as, self.out)

    def _grid(self, fractions: str) -> "Grid":
        from expertcut.edits.criteria import CRITERIA
        from expertcut.evaluation.search_results import Grid

        return Grid.of(self.by, fractions, CRITERIA, value(self.budget), self.min_keep)

    def _refuse_what_writes(self) -> None:
        numbers = ("keep_active", "keep", "keep_fraction", "max_bytes")
        names = (
            *numbers,
            "boost",
            "suppress",
            "scale",
            "apply_at",
            "adapter",
            "force",
            "no_verify",
        )
        given = [name for name in (*names, "plan_only") if getattr(self, name) not in (None, False)]
        if given:
            option_name = f"--{given[0].replace('_', '-')}"
            raise SettingsError(
                f"{option_name} does not go with --sweep, which writes no checkpoint: leave it out"
            )


def _protected(profile: "Profile", asked: list[str], is_active: bool) -> tuple[str, ...]:
    """What stays whatever its score; super experts unasked, where they are known."""
    from expertcut.checkpoints.size import protected

    found, notes = protected(profile, asked, is_active=is_active)
    for note in notes:
        print(note)
    return found


def _say_what_goes(profile: "Profile", chosen: "Pruning") -> None:
    from expertcut.edits.prune import removed_traffic
    from expertcut.reporting.edit_tables import pruning_sentences, touched_sentences, touched_table

    goes = removed_traffic(profile, chosen.draft.edits)
    for sentence in pruning_sentences(chosen):
        print(sentence)
    print_tables([touched_table(goes)], Format.table)
    for sentence in touched_sentences(chosen, goes):
        print(sentence)
