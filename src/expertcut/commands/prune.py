"""`expertcut prune`: a checkpoint with fewer experts, its plan, or the scores of many cuts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import AfterValidator, model_validator

from expertcut.commands import (
    UI,
    CheckpointSettings,
    SilentUI,
    choosing_profile,
    output_folder,
    write_edit,
)
from expertcut.edits.edit_settings import (
    CHECKPOINT,
    CRITERIA_HERE,
    Criteria,
    CutSettings,
    Positions,
    RouterSettings,
    apply_at_option,
)
from expertcut.edits.edit_settings import RANK as RANK
from expertcut.errors import SettingsError
from expertcut.settings import Count, Source, Texts, flag_of, in_recipe_only, option, refuse

if TYPE_CHECKING:
    from expertcut.checkpoints.build import Built
    from expertcut.data import Quiz
    from expertcut.edits.plan import EditPlan
    from expertcut.edits.router_edits import RouterEdit
    from expertcut.edits.selection import Pruning
    from expertcut.evaluation.search_results import Sweep
    from expertcut.profiling.storage import Profile

SWEEP = "Sweep"
_NOT_IN_SWEEP = (
    *("keep_active", "keep", "keep_fraction", "sparsity", "max_bytes", "boost", "suppress"),
    *("scale", "apply_at", "adapter", "force", "verify", "plan_only"),
)


def _adapter(text: str) -> None:
    """A folder of this machine that peft wrote."""
    if not (Path(text) / "adapter_config.json").is_file():
        refuse(f"{text[:200]!a} holds no adapter: give a folder with adapter_config.json")


class _Cut(RouterSettings, CutSettings):
    """A cut, and what else is done to the experts that stay; the order is that of its hash."""

    by: Criteria = option(
        "activations",
        f"Criterion that ranks the experts, with --sweep several or all: {CRITERIA_HERE}.",
        panel=RANK,
    )
    apply_at: Positions | None = apply_at_option()
    adapter: Annotated[str, AfterValidator(in_recipe_only(_adapter))] | None = option(
        None, "LoRA adapter of the unpruned model to cut too, into adapter/ of the output.",
        panel=CHECKPOINT, metavar="FOLDER",
    )  # fmt: skip


class PruneSettings(CheckpointSettings, _Cut):
    """Remove experts, and say what that did."""

    examples: ClassVar = (
        "expertcut prune --keep-active",
        "expertcut prune --sparsity 0.5 --by reap --layout exact --out models/half",
        "expertcut prune --sweep 0.75,0.5,0.25 --by reap,frequency",
    )

    sweep: str | None = option(
        None, "Score cuts that keep these shares, as 0.75,0.5,0.25, and write no checkpoint.",
        panel=SWEEP, in_recipe=False,
    )  # fmt: skip
    quiz: Source | None = option(
        None, "Quiz that --sweep scores.  [default: the profile's]", panel=SWEEP, in_recipe=False
    )
    split: str | None = option(
        None, "Split that --sweep scores.  [default: test]", panel=SWEEP, in_recipe=False
    )
    shots: int | None = option(
        None, "Shots of --sweep.  [default: the profile's]", panel=SWEEP, in_recipe=False, ge=0
    )
    subjects: Texts | None = option(
        None, "Subjects of --sweep, separated by commas.  [default: the profile's]",
        panel=SWEEP, separator=",", in_recipe=False,
    )  # fmt: skip
    limit: Count | None = option(
        None, "Only the first N questions of each subject in --sweep.",
        panel=SWEEP, metavar="N", in_recipe=False,
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_criterion_cuts(self) -> Self:
        if self.sweep is None and ("," in self.by or self.by == "all"):
            refuse(f"--by {self.by} names several criteria: only --sweep scores several")
        return self

    def check(self) -> None:
        """That the options go together.

        Raises:
            SettingsError: which does not.
        """
        scored = (self.quiz, self.split, self.shots, self.subjects, self.limit)
        if self.sweep is not None:
            self._check_sweep()
        elif any(value is not None for value in scored):
            raise SettingsError(
                "--quiz, --split, --shots, --subjects and --limit say what --sweep scores: add "
                "--sweep or leave them out"
            )
        else:
            super().check()
            if self.adapter is not None and self.plan_only:
                raise SettingsError(
                    "--adapter goes into a checkpoint, which --plan-only does not write: leave one "
                    "out"
                )

    def _check_sweep(self) -> None:
        self.check_layout()
        for name in _NOT_IN_SWEEP:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise SettingsError(
                    f"{flag_of(type(self), name)} does not go with --sweep, which writes no "
                    "checkpoint: leave it out"
                )


@dataclass(frozen=True)
class Choice:
    """The experts to remove, before anything is written."""

    profile: "Profile"
    pruning: "Pruning"
    plan: "EditPlan"
    tilted: "list[RouterEdit]"
    scaled: "list[RouterEdit]"


def run(
    settings: PruneSettings, ui: UI | None = None, beside: Mapping[str, bytes] | None = None
) -> "Built | Sweep | Path":
    """Makes a checkpoint, a plan or a sweep; `beside` are files to lie beside the plan."""
    ui = ui or SilentUI()
    settings.check()
    if settings.sweep is not None:
        return _sweep(settings, ui)
    return write(choose(settings, ui), settings, ui, beside)


def choose(settings: PruneSettings, ui: UI) -> Choice:
    """Ranks the experts of the profile and chooses those that stay; writes nothing."""
    from expertcut.checkpoints.size import choose_cut, with_protection
    from expertcut.edits.router_edits import scalings, tilts, with_tilts

    if settings.adapter is not None:  # refused before the profile is read
        from expertcut.checkpoints.lora import read_adapter

        read_adapter(Path(settings.adapter))
    profile = choosing_profile(settings, ui, settings.held_out)
    tilted = tilts(profile, settings.boost or [], settings.suppress or [])
    scaled = scalings(profile, settings.scale or [])
    settings, notes = with_protection(profile, settings)
    ui.say([], notes)
    ui.quiet()
    chosen = choose_cut(profile, settings, settings.load_as())
    ui.say([], chosen.notes)
    plan = chosen.pruning.draft
    if tilted or scaled or settings.apply_at:
        plan = with_tilts(plan, tilted, scaled, settings.apply_at)
    return Choice(profile, chosen.pruning, plan, tilted, scaled)


def write(
    choice: Choice, settings: PruneSettings, ui: UI, beside: Mapping[str, bytes] | None = None
) -> "Built | Path":
    """Writes the checkpoint or the plan of a choice, and says what was removed."""
    from expertcut.reporting.edit_tables import scale_sentences, tilt_sentences

    plan = choice.plan
    folder = output_folder(choice.profile, plan.slug, settings, ui)
    _say_removed(choice.profile, choice.pruning, ui)
    options = settings.build_options(beside or {}, settings.adapter)
    built = write_edit(choice.profile, plan, folder, options, ui, is_plan=settings.plan_only)
    sentences = tilt_sentences(choice.tilted, built, plan.numbers)
    ui.say([], [*sentences, *scale_sentences(choice.scaled, built, plan.numbers)])
    return built or folder


def _say_removed(profile: "Profile", pruning: "Pruning", ui: UI) -> None:
    from expertcut.edits.selection import removed_traffic
    from expertcut.reporting.edit_tables import pruning_sentences, touched_sentences, touched_table

    removed = removed_traffic(profile, pruning.draft.edits)
    ui.say([], pruning_sentences(pruning))
    ui.say([touched_table(removed)], touched_sentences(pruning, removed))


def _sweep(settings: PruneSettings, ui: UI) -> "Sweep":
    """Scores every cell that is missing, then writes the table and the figure."""
    from expertcut.checkpoints.size import with_protection
    from expertcut.evaluation.search_results import Grid
    from expertcut.evaluation.sweep import Asking, Sweeping

    assert settings.sweep is not None
    grid = Grid.of(settings.by, settings.sweep)
    profile = choosing_profile(settings, ui, settings.held_out)
    settings, notes = with_protection(profile, settings)
    ui.say([], notes)
    ui.quiet()
    quiz = scored_quiz(settings, profile)
    asking = Asking(quiz, settings.limit, settings.load_as(), ui.is_first)
    folder = settings.out or Path("sweeps") / profile.path.resolve().name
    sweeping = Sweeping(profile, grid, settings, asking)
    for step in sweeping.steps(folder):
        ui.watch(step.run, step.name, len(quiz), folder)
    if ui.is_first:
        _save(sweeping.found, folder, ui)
    return sweeping.found


def scored_quiz(settings: PruneSettings, profile: "Profile") -> "Quiz":
    """As profiled where nothing else is given, but split test; the fifth that is held out."""
    from expertcut.data import Selection, load_quiz
    from expertcut.edits.splits import held_out_quiz
    from expertcut.profiling.storage import ProfilePart

    given = (settings.quiz, settings.split, settings.shots, settings.subjects, settings.limit)
    if isinstance(profile, ProfilePart) and all(value is None for value in given):
        return held_out_quiz(profile)
    info = profile.info.quiz
    is_same = settings.quiz in (None, info.id)
    subjects = tuple(info.subjects) if is_same else ()
    if settings.subjects is not None:
        subjects = tuple(settings.subjects)
    shots = info.shots if settings.shots is None else settings.shots
    revision = info.revision if is_same else None
    which = (settings.quiz or info.id, settings.split or "test", shots, subjects)
    return load_quiz(Selection(*which, settings.limit, revision, profile.truncate))


def _save(found: "Sweep", folder: Path, ui: UI) -> None:
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
    ui.say([sweep_table(found)], [*sweep_sentences(found), f"written to {folder}"])
