"""The command `prune`: a checkpoint, a plan, or what each of several cuts would answer."""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from expertcut.cli.edit_commands import Named, Place
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
    read_choosing_profile,
    value,
)
from expertcut.cli.progress import is_first, print_tables, quiet, watched
from expertcut.errors import SettingsError

if TYPE_CHECKING:
    from expertcut.data import Quiz
    from expertcut.edits.prune import Pruning
    from expertcut.edits.ranking import Way
    from expertcut.evaluation.search_results import Grid, Sweep
    from expertcut.models.load import LoadOptions
    from expertcut.profiling.storage import Profile

SweepOption = Annotated[
    str | None,
    option("Score cuts that keep these shares, 0.75,0.5,0.25, and write no checkpoint."),
]
SweepQuiz = Annotated[str | None, option("What --sweep scores: a quiz; the profile's without.")]
SweepSplit = Annotated[str | None, option("Split that --sweep scores.  [default: test]")]
SweepShots = Annotated[int | None, option("Shots of --sweep; the profile's without.")]
SweepSubjects = Annotated[str | None, option("Subjects of --sweep; the profile's without.")]
SweepLimit = Annotated[
    int | None, option("Only the first so many questions of each subject in --sweep.")
]


@dataclass(frozen=True)
class Start:
    """What a cut or a sweep of cuts starts from."""

    profile: "Profile"
    way: "Way"
    load_as: "LoadOptions"
    out: Path | None


@dataclass(frozen=True)
class Scored:
    """The options that say what is scored, None where they are not given."""

    quiz: str | None
    split: str | None
    shots: int | None
    subjects: str | None
    limit: int | None

    def read(self, profile: "Profile") -> "Quiz":
        """The quiz: as profiled where nothing else is said, but its split test.

        Where a fifth of a quiz is held out and nothing else is asked for, it is that fifth.
        """
        from expertcut.data import Selection, load_quiz
        from expertcut.edits.splits import held_out_quiz
        from expertcut.profiling.storage import ProfilePart

        if isinstance(profile, ProfilePart) and all(v is None for v in vars(self).values()):
            return held_out_quiz(profile)
        info = profile.info.quiz
        is_same = self.quiz in (None, info.id)
        subjects = tuple(info.subjects) if is_same else ()
        if self.subjects is not None:
            subjects = tuple(name.strip() for name in self.subjects.split(","))
        shots = info.shots if self.shots is None else self.shots
        revision = info.revision if is_same else None
        asked = (self.quiz or info.id, self.split or "test", shots, subjects)
        return load_quiz(Selection(*asked, self.limit, revision, profile.truncate))


def run_sweep(grid: "Grid", scored: Scored, start: Start) -> None:
    """Every cell that is missing, then the table and the figure."""
    from expertcut.evaluation.sweep import Asking, Sweeping

    quiet()
    quiz = scored.read(start.profile)
    asking = Asking(quiz, scored.limit, start.load_as, is_first())
    folder = start.out or Path("sweeps") / start.profile.path.resolve().name
    sweeping = Sweeping(start.profile, grid, start.way, asking)
    for step in sweeping.steps(folder):
        watched(step.run, step.name, len(quiz), folder)
    if is_first():
        _save(sweeping.found, folder)


def _save(found: "Sweep", folder: Path) -> None:
    from expertcut.files import write_atomically
    from expertcut.reporting.eval_tables import (
        sweep_csv,
        sweep_figure,
        sweep_sentences,
        sweep_table,
    )
    from expertcut.reporting.tables import as_csv

    files = {"sweep.csv": as_csv(sweep_csv(found)).encode(), **sweep_figure(found)}
    for name, content in files.items():
        write_atomically(folder / name, content)
    print_tables([sweep_table(found)], Format.table)
    for sentence in sweep_sentences(found):
        print(sentence)
    print(f"written to {folder}")


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
        from expertcut.edits.criteria import criterion_name
        from expertcut.edits.ranking import Way
        from expertcut.models.load import LoadOptions

        by = self.by if self.sweep is not None else criterion_name(self.by)
        found = read_choosing_profile(self.profile, self.threads, self.truncate, self.held_out)
        kind = (value(self.positions), value(self.layout), value(self.removed), value(self.fold))
        protect = _protected(found, self.protect or [], self.keep_active)
        way = replace(Way.of(by, *kind), protect=protect, seed=self.seed)
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
