"""`expertcut merge`: a checkpoint in which several experts become one."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from expertcut.commands import SILENT, UI, CheckpointSettings
from expertcut.edits import edit_settings

if TYPE_CHECKING:
    from expertcut.checkpoints.build import Merged


class MergeSettings(CheckpointSettings, edit_settings.MergeSettings):
    """Merge groups of experts, each into one."""

    examples: ClassVar = (
        "expertcut merge --keep 32",
        "expertcut merge --keep 32 --by hc_smoe --router mean --out models/merged",
    )


def run(
    settings: MergeSettings, ui: UI = SILENT, beside: Mapping[str, bytes] | None = None
) -> "Merged":
    """Makes the checkpoint, or the plan alone; `beside` are files to write beside the plan."""
    profile = settings.choosing_profile(ui, settings.held_out)
    from expertcut.checkpoints.build import merge  # torch, not to refuse options
    from expertcut.reporting import edit_tables as tables

    folder = settings.output_folder(profile, settings.slug, ui)
    ui.quiet()
    options = settings.build_options(beside or {})
    merged = merge(profile, settings, folder, options, is_plan=settings.plan_only)
    ui.say([tables.groups_table(profile, merged)], [])
    if not settings.plan_only:
        merging = tables.merging_sentences(profile, merged)
        ui.say(tables.proof_tables(merged.built), [*tables.proof_sentences(merged.built), *merging])
    ui.say([], [f"written to {folder}"])
    return merged
