"""`expertcut merge`: a checkpoint in which several experts become one."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expertcut.commands import (
    UI,
    CheckpointSettings,
    SilentUI,
    choosing_profile,
    output_folder,
)
from expertcut.edits import edit_settings

if TYPE_CHECKING:
    from expertcut.checkpoints.build import Merged


class MergeSettings(CheckpointSettings, edit_settings.MergeSettings):
    """Make one expert of several, and say what that did."""

    examples: ClassVar = (
        "expertcut merge --keep 32",
        "expertcut merge --keep 32 --by hc_smoe --router mean --out models/merged",
    )


def run(
    settings: MergeSettings, ui: UI | None = None, beside: Mapping[str, bytes] | None = None
) -> "Merged":
    """Makes the checkpoint, or the plan alone; `beside` are files to lie beside the plan."""
    ui = ui or SilentUI()
    from expertcut.checkpoints.build import merge
    from expertcut.reporting.edit_tables import (
        groups_table,
        merging_sentences,
        proof_sentences,
        proof_tables,
    )

    profile = choosing_profile(settings, ui, settings.held_out)
    folder: Path = output_folder(profile, settings.slug, settings, ui)
    ui.quiet()
    options = settings.build_options(beside or {})
    merged = merge(profile, settings, folder, options, is_plan=settings.plan_only)
    ui.say([groups_table(profile, merged)], [])
    if not settings.plan_only:
        sentences = [*proof_sentences(merged.built), *merging_sentences(profile, merged)]
        ui.say(proof_tables(merged.built), sentences)
    ui.say([], [f"written to {folder}"])
    return merged
