"""`expertcut prune`: a checkpoint with fewer experts, its plan, or the scores of many cuts."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import model_validator

from expertcut.commands import SILENT, UI, CheckpointSettings, save_table, say_result, wide_option
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits import edit_settings
from expertcut.edits.layouts import Positions
from expertcut.errors import SettingsError
from expertcut.settings import Count, Source, Texts, flag_of, in_recipe_only, option, refuse

if TYPE_CHECKING:
    from expertcut.checkpoints.build import Built
    from expertcut.edits.plan import EditPlan
    from expertcut.edits.router_edits import RouterEdit
    from expertcut.edits.selection import Pruning
    from expertcut.evaluation.search_results import Sweep
    from expertcut.profiling.storage import Profile

_NOT_IN_SWEEP = (
    *("keep_active", "keep", "keep_fraction", "sparsity", "max_bytes", "boost", "suppress"),
    *("scale", "apply_at", "adapter", "force", "verify", "plan_only"),
)
_sweep_option = partial(option, panel="Sweep", in_recipe=False)


def _check_adapter(text: str) -> None:
    if not (Path(text) / "adapter_config.json").is_file():
        refuse(f"{text[:200]!a} holds no adapter: give a folder with adapter_config.json")


class _Cut(edit_settings.RouterSettings, edit_settings.CutSettings):
    """A cut, and the router edits of the experts that stay; the order is that of its hash."""

    by: edit_settings.Criteria = option(
        "activations",
        "Criterion that ranks the experts, with --sweep several or all: "
        f"{edit_settings.CRITERIA_HERE}.",
        panel=edit_settings.RANK,
    )
    apply_at: Positions | None = edit_settings.apply_at_option()
    adapter: Annotated[str, in_recipe_only(_check_adapter)] | None = option(
        None, "LoRA adapter of the unpruned model to prune too, written to adapter/ of the output.",
        panel=edit_settings.CHECKPOINT, metavar="FOLDER",
    )  # fmt: skip
    wide: bool = wide_option()


class PruneSettings(CheckpointSettings, _Cut):
    """Remove experts from the profiled model."""

    examples: ClassVar = (
        "expertcut prune --keep-active",
        "expertcut prune --sparsity 0.5 --by reap --layout exact --out models/half",
        "expertcut prune --sweep 0.75,0.5,0.25 --by reap,frequency",
    )

    sweep: str | None = _sweep_option(
        None, "Score cuts that keep these shares, as 0.75,0.5,0.25; write no checkpoint."
    )
    quiz: Source | None = _sweep_option(None, "Quiz that --sweep scores.  [default: the profile's]")
    split: str | None = _sweep_option(None, "Split that --sweep scores.  [default: test]")
    shots: int | None = _sweep_option(None, "Shots of --sweep.  [default: the profile's]", ge=0)
    subjects: Texts | None = _sweep_option(
        None, "Subjects of --sweep, separated by commas.  [default: the profile's]", separator=","
    )
    limit: Count | None = _sweep_option(
        None, "Only the first N questions of each subject in --sweep.", metavar="N"
    )

    @property
    def scored(self) -> tuple[object, ...]:
        """What says which questions --sweep scores."""
        return self.quiz, self.split, self.shots, self.subjects, self.limit

    @model_validator(mode="after")
    def _one_criterion_cuts(self) -> Self:
        if self.sweep is None and ("," in self.by or self.by == "all"):
            refuse(f"--by {self.by} names several criteria: only --sweep scores several")
        return self

    def check(self) -> None:
        """Refuses options that do not go together, with a SettingsError."""
        if self.sweep is not None:
            self.check_layout()
            for name in _NOT_IN_SWEEP:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise SettingsError(
                        f"{flag_of(type(self), name)} does not go with --sweep, which writes no "
                        "checkpoint: leave it out"
                    )
            return
        if any(value is not None for value in self.scored):
            raise SettingsError(
                "--quiz, --split, --shots, --subjects and --limit say what --sweep scores: add "
                "--sweep or leave them out"
            )
        super().check()
        if self.adapter is not None and self.plan_only:
            raise SettingsError(
                "--adapter goes into a checkpoint, which --plan-only does not write: leave one out"
            )


@dataclass(frozen=True)
class Choice:
    """The experts to remove, before anything is written."""

    profile: "Profile"
    pruning: "Pruning"
    plan: "EditPlan"
    biases: "list[RouterEdit]"
    scalings: "list[RouterEdit]"


def run(
    settings: PruneSettings, ui: UI = SILENT, beside: Mapping[str, bytes] | None = None
) -> "Built | Sweep | Path":
    """Makes a checkpoint, a plan or a sweep; `beside` are files to write beside the plan."""
    settings.check()
    if settings.sweep is not None:
        return _sweep(settings, ui)
    return write(choose(settings, ui), settings, ui, beside)


def choose(settings: PruneSettings, ui: UI) -> Choice:
    """Ranks the experts of the profile and chooses which stay; writes nothing."""
    if settings.adapter is not None:  # refused before the profile is read
        from expertcut.checkpoints.lora import read_adapter

        read_adapter(Path(settings.adapter))
    profile = settings.choosing_profile(ui, settings.held_out)
    from expertcut.checkpoints.size import choose_cut, with_protection  # with torch
    from expertcut.edits.router_edits import scalings, tilts, with_tilts

    biased = tilts(profile, settings.boost or [], settings.suppress or [])
    scaled = scalings(profile, settings.scale or [])
    settings, notes = with_protection(profile, settings)
    ui.say([], notes)
    ui.quiet()
    pruning, notes = choose_cut(profile, settings, settings.load_as())
    ui.say([], notes)
    plan = pruning.draft
    if biased or scaled or settings.apply_at:
        plan = with_tilts(plan, biased, scaled, settings.apply_at)
    return Choice(profile, pruning, plan, biased, scaled)


def write(
    choice: Choice, settings: PruneSettings, ui: UI, beside: Mapping[str, bytes] | None = None
) -> "Built | Path":
    """Writes the checkpoint or the plan, and reports what was removed."""
    from expertcut.checkpoints.build import build, write_plan
    from expertcut.edits.selection import removed_traffic
    from expertcut.reporting import edit_tables as tables
    from expertcut.reporting.tables import labelled

    profile, pruning, plan = choice.profile, choice.pruning, choice.plan
    folder = settings.output_folder(profile, plan.slug, ui)
    settings.say_profile(profile, ui)
    removed = removed_traffic(profile, plan.edits)
    if settings.wide:
        ui.say([tables.touched_table(removed)], tables.pruning_sentences(pruning))
    cut = tables.cut_line(pruning, profile.info.model.blocks)
    traffic = tables.traffic_line(profile, plan.edits, "removed experts")
    touched = tables.touched_sentences(pruning, removed)
    ui.say([], [cut, traffic, *(labelled("", sentence) for sentence in touched)])
    make = write_plan if settings.plan_only else build
    built = make(profile, plan, folder, settings.build_options(beside or {}, settings.adapter))
    if built and settings.wide:
        ui.say(tables.proof_tables(built), [])
    sentences = tables.adapter_sentences(built) if built else []
    sentences += tables.tilt_sentences(choice.biases, built, plan.numbers)
    sentences += tables.scale_sentences(choice.scalings, built, plan.numbers)
    say_result(built, folder, profile, sentences, ui)
    return built or folder


def _sweep(settings: PruneSettings, ui: UI) -> "Sweep":
    """Scores every missing cell, then writes the table and the figure."""
    assert settings.sweep is not None
    fractions = edit_settings.read_fractions(settings.sweep, "--sweep")  # refused before imports
    from expertcut.edits.criteria import read_criteria
    from expertcut.evaluation.search_results import Grid

    grid = Grid(read_criteria(settings.by), fractions)
    profile = settings.choosing_profile(ui, settings.held_out)
    from expertcut.checkpoints.size import with_protection  # torch, not to refuse options
    from expertcut.evaluation.results import Scoring
    from expertcut.evaluation.sweep import SweepRun
    from expertcut.profiling.measure import MeasureOptions
    from expertcut.reporting import eval_tables as tables

    settings, notes = with_protection(profile, settings)
    ui.say([], notes)
    ui.quiet()
    quiz = scored_quiz(settings, profile)
    options = MeasureOptions(waits=ui.is_first)
    scoring = Scoring(quiz, settings.limit, settings.load_as(), options)
    folder = settings.out or Path("sweeps") / profile.path.resolve().name
    sweeping = SweepRun(profile, grid, settings, scoring)
    for step in sweeping.steps(folder):
        ui.watch(step.run, step.name, len(quiz), folder)
    sweep = sweeping.sweep
    if ui.is_first:
        save_table(folder / "sweep.csv", tables.sweep_csv(sweep), tables.sweep_figure(sweep))
        sentences = [*tables.sweep_sentences(sweep), f"written to {folder}"]
        ui.say([tables.sweep_table(sweep)], sentences)
    return sweep


def scored_quiz(settings: PruneSettings, profile: "Profile") -> Quiz:
    """The quiz as profiled, but split test, where no option says otherwise.

    Without options, a profile that holds questions out is scored on those.
    """
    from expertcut.edits.splits import held_out_quiz
    from expertcut.profiling.storage import ProfilePart

    if isinstance(profile, ProfilePart) and all(value is None for value in settings.scored):
        return held_out_quiz(profile)
    info = profile.info.quiz
    is_same = settings.quiz in (None, info.id)
    subjects, revision = (tuple(info.subjects), info.revision) if is_same else ((), None)
    if settings.subjects is not None:
        subjects = tuple(settings.subjects)
    shots = info.shots if settings.shots is None else settings.shots
    which = (settings.quiz or info.id, settings.split or "test", shots, subjects)
    return load_quiz(Selection(*which, settings.limit, revision, profile.truncate))
