"""`expertcut prune`: a checkpoint with fewer experts, or its plan."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import model_validator

from expertcut.commands import (
    SILENT,
    UI,
    BlendedSettings,
    CheckpointSettings,
    Files,
    LayerwiseSettings,
    sweep,
)
from expertcut.commands.profile import profiled_first
from expertcut.commands.sweep import SweepSettings
from expertcut.edits import edit_settings
from expertcut.edits.layouts import Positions
from expertcut.errors import ModelError, SettingsError
from expertcut.reporting.tables import labelled
from expertcut.settings import flag_of, in_recipe_only, option, refuse

if TYPE_CHECKING:
    from expertcut.checkpoints.build import Built
    from expertcut.edits.plan import EditPlan
    from expertcut.edits.router_edits import RouterEdit
    from expertcut.edits.selection import Pruning
    from expertcut.evaluation.search_results import Sweep
    from expertcut.profiling.storage import Profile

_NOT_IN_SWEEP = (
    *("keep_active", "keep", "keep_fraction", "sparsity", "max_bytes", "boost", "suppress"),
    *("scale", "apply_at", "adapter", "force", "verify", "plan_only", "wide", "model"),
    *("layerwise", "hidden_states"),
)


def _check_adapter(text: str) -> None:
    if not (Path(text) / "adapter_config.json").is_file():
        refuse(f"{text[:200]!a} holds no adapter: give a folder with adapter_config.json")


class _Cut(edit_settings.RouterSettings, edit_settings.CutSettings):
    """A cut, and router edits of the experts that stay. A recipe's hash follows this order."""

    by: edit_settings.Criteria = option(
        "activations",
        f"Criterion that ranks the experts: {edit_settings.CRITERIA_HERE}.",
        panel=edit_settings.RANK,
    )
    apply_at: Positions | None = edit_settings.apply_at_option()
    adapter: Annotated[str, in_recipe_only(_check_adapter)] | None = option(
        None, "LoRA adapter of the unpruned model to prune too, written to adapter/ of the output.",
        panel=edit_settings.CHECKPOINT, metavar="FOLDER",
    )  # fmt: skip


class PruneSettings(LayerwiseSettings, BlendedSettings, CheckpointSettings, _Cut):
    """Remove experts from the profiled model."""

    examples: ClassVar = (
        "expertcut prune --keep-active",
        "expertcut prune MODEL --quiz my.jsonl --shots 0 --keep 32 --by reap",
        "expertcut prune --profile code=2 --profile chat=1 --sparsity 0.5 --by reap",
    )
    hidden: ClassVar = ("sweep",)

    sweep: str | None = option(None, "Shares to keep, as `expertcut sweep`.", in_recipe=False)

    @model_validator(mode="after")
    def _one_criterion_cuts(self) -> Self:
        if self.sweep is None and ("," in self.by or self.by == "all"):
            refuse(f"--by {self.by} names several criteria: run `expertcut sweep` to score several")
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
            edit_settings.read_fractions(self.sweep, "--sweep")
            return
        self.check_model()
        super().check()
        self.check_blend([self.by], is_sequential=self.sequential)
        if self.blend == "maxmin" and self.keep_active:
            raise SettingsError("--blend maxmin ranks experts: give it without --keep-active")
        if self.adapter is not None and self.plan_only:
            raise SettingsError(
                "--adapter goes into a checkpoint, which --plan-only does not write: leave one out"
            )

    def check_profile(self, profile: "Profile") -> None:
        """Refuses a number of experts that some layer cannot keep."""
        from expertcut.edits.selection import check_wanted

        check_wanted(self, profile.info.model.blocks)


@dataclass(frozen=True)
class Choice:
    """The experts to remove, before anything is written."""

    profile: "Profile"
    pruning: "Pruning"
    plan: "EditPlan"
    biases: "list[RouterEdit]"
    scalings: "list[RouterEdit]"


def run(
    settings: PruneSettings, ui: UI = SILENT, extra_files: Files = None
) -> "Built | Sweep | Path":
    """Makes a checkpoint or a plan."""
    settings.check()
    if settings.sweep is not None:
        given = settings.model_dump(include={*SweepSettings.model_fields})
        return sweep.run(SweepSettings(fractions=settings.sweep, **given), ui)
    settings = settings.updated(**profiled_first(settings, ui))
    return write(choose(settings, ui), settings, ui, extra_files)


def choose(settings: PruneSettings, ui: UI) -> Choice:
    """Ranks the experts of the profile and chooses which stay; writes nothing."""
    if settings.adapter is not None:  # refused before the profile is read
        from expertcut.checkpoints.lora import read_adapter

        read_adapter(Path(settings.adapter))
    profile = settings.choosing_profile(ui)
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
    return Choice(profile, pruning, plan, biases=biased, scalings=scaled)


def write(
    choice: Choice, settings: PruneSettings, ui: UI, extra_files: Files = None
) -> "Built | Path":
    """Writes the checkpoint or the plan, and reports what was removed."""
    from expertcut.checkpoints.build import build, write_plan
    from expertcut.edits.selection import removed_traffic
    from expertcut.reporting import edit_tables as tables
    from expertcut.reporting.overlap_tables import kept_table, traffic_lines

    profile, pruning, plan = choice.profile, choice.pruning, choice.plan
    folder = settings.output_folder(profile, plan.slug, ui)
    settings.say_profile(profile, ui)
    removed = removed_traffic(profile, plan.edits)
    if settings.wide:
        ui.say([tables.touched_table(removed)], tables.pruning_sentences(pruning))
    is_text = profile.info.text is not None
    cut = tables.cut_line(pruning, profile.info.model.blocks, is_text=is_text)
    traffic = traffic_lines(profile, plan.edits, "removed experts")
    touched = tables.touched_sentences(pruning, removed)
    ui.say([], [cut, *traffic, *(labelled("", sentence) for sentence in touched)])
    if plan.blend is not None:
        ui.say([kept_table(plan.blend, plan.criterion)], [])
    make = write_plan if settings.plan_only else build
    built = make(profile, plan, folder, settings.build_options(extra_files, settings.adapter))
    if built and settings.wide:
        ui.say(tables.held_out_tables(built), [])
    if not built:
        ui.say([], [_planned_size(profile, plan)])
    sentences = tables.adapter_sentences(built) if built else []
    if plan.blend is not None and built and built.proof:
        heaviest = plan.blend.profiles[0].name
        things = built.scored_on.things if built.scored_on else "questions"
        sentences.append(f"Held-out {things} are those of {heaviest}: judge the others with eval.")
    sentences += tables.tilt_sentences(choice.biases, built, plan.numbers)
    sentences += tables.scale_sentences(choice.scalings, built, plan.numbers)
    settings.say_result(built, folder, profile, sentences, ui)
    return built or folder


def _planned_size(profile: "Profile", plan: "EditPlan") -> str:
    """What the checkpoint of a plan would weigh, or why that is not known."""
    from expertcut.checkpoints.size import planned_sizes
    from expertcut.reporting.edit_tables import size_line

    try:
        return size_line(*planned_sizes(profile, plan))
    except ModelError as error:
        return labelled("size", f"not known: {error}")
