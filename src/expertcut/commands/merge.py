"""`expertcut merge`: a checkpoint in which several experts become one."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expertcut.commands import SILENT, UI, CheckpointSettings, Files
from expertcut.commands.profile import profiled_first
from expertcut.edits import edit_settings

if TYPE_CHECKING:
    from expertcut.checkpoints.build import Built


class MergeSettings(CheckpointSettings, edit_settings.MergeSettings):
    """Merge groups of experts, each into one."""

    examples: ClassVar = (
        "expertcut merge --keep 32",
        "expertcut merge --keep 32 --by hc_smoe --router mean --out models/merged",
        "expertcut merge --keep 32 --plan-only",
    )


def run(settings: MergeSettings, ui: UI = SILENT, extra_files: Files = None) -> "Built | Path":
    """Makes the checkpoint, or the plan alone."""
    settings = settings.updated(**profiled_first(settings, ui))
    profile = settings.choosing_profile(ui)
    from expertcut.checkpoints.build import choose_groups, merge, write_plan  # with torch
    from expertcut.reporting import edit_tables as tables

    folder = settings.output_folder(profile, settings.slug, ui)
    ui.quiet()
    options, built = settings.build_options(extra_files), None
    plan = choose_groups(profile, settings, folder, options.load_as)
    settings.say_profile(profile, ui)
    if settings.plan_only:
        write_plan(profile, plan, folder, options)
    else:
        built = merge(profile, settings, plan, folder, options)
    if settings.wide:
        proof = tables.held_out_tables(built) if built else []
        ui.say([tables.groups_table(profile, plan, built), *proof], [])
    traffic = tables.traffic_line(profile, plan.edits, "experts that joined another")
    ui.say([], [tables.merged_line(profile, plan), traffic])
    settings.say_result(built, folder, profile, tables.merging_sentences(profile, plan), ui)
    return built or folder
