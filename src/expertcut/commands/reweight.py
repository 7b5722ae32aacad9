"""`expertcut reweight`: a checkpoint whose router favours or avoids experts."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expertcut.commands import (
    UI,
    CheckpointSettings,
    SilentUI,
    choosing_profile,
    output_folder,
    write_edit,
)
from expertcut.edits import edit_settings
from expertcut.edits.layouts import LAYOUTS

if TYPE_CHECKING:
    from expertcut.checkpoints.build import Built
    from expertcut.edits.router_edits import Procedure
    from expertcut.evaluation.reweight_search import Decision, Tilted
    from expertcut.profiling.storage import Profile


class ReweightSettings(CheckpointSettings, edit_settings.ReweightSettings):
    """Bias the router toward or away from experts."""

    examples: ClassVar = (
        "expertcut reweight --boost 3:12",
        "expertcut reweight --suppress-worst 2 --tune --cross-fit",
        "expertcut reweight --scale 3:12=1.5 --out models/scaled",
    )


@dataclass(frozen=True)
class Choice:
    """The biases and factors, before anything is written."""

    profile: "Profile"
    found: "Tilted"
    folder: Path


def run(
    settings: ReweightSettings, ui: UI | None = None, beside: Mapping[str, bytes] | None = None
) -> "Built | Path | None":
    """Makes a checkpoint or a plan; None where nothing was chosen and nothing written."""
    ui = ui or SilentUI()
    return write(choose(settings, ui), settings, ui, beside)


def choose(settings: ReweightSettings, ui: UI) -> Choice:
    """Chooses experts and strengths; writes nothing, but refuses a folder that is taken."""
    settings.check()
    from expertcut.edits.router_edits import check_settings, procedure_name
    from expertcut.evaluation.reweight_search import by_hand, chosen, prepared

    check_settings(settings)
    profile = choosing_profile(settings, ui, settings.held_out)
    if settings.is_by_hand:
        found = by_hand(profile, settings)
        assert found.draft is not None
        return Choice(profile, found, output_folder(profile, found.draft.slug, settings, ui))
    procedure = prepared(profile, settings)
    name = procedure_name(profile, settings, procedure).replace(":", ".").replace(" ", "-")
    rules = LAYOUTS[settings.layout]
    mark = f"-{rules.mark}" if rules.mark else ""
    mark += "-answer" if settings.apply_at == "answer" else ""
    folder = output_folder(profile, name + mark, settings, ui)
    ui.quiet()
    decision = _decided(profile, procedure, settings, ui) if settings.is_deciding else None
    return Choice(profile, chosen(profile, settings, procedure, decision), folder)


def _decided(
    profile: "Profile", procedure: "Procedure", settings: ReweightSettings, ui: UI
) -> "Decision":
    """Chosen and cross-fitted on the tuning questions."""
    from expertcut.evaluation.reweight_search import decide
    from expertcut.reporting.edit_tables import decision_sentences, decision_tables

    # Without a proof there are no parts to show.
    bar = ui.parts("proving") if settings.prove else nullcontext(lambda done, total: None)
    with bar as report:
        found = decide(profile, procedure, settings, settings.load_as(), report)
    ui.say(decision_tables(found), decision_sentences(found))
    return found


def write(
    choice: Choice, settings: ReweightSettings, ui: UI, beside: Mapping[str, bytes] | None = None
) -> "Built | Path | None":
    """The checkpoint, or without any change what would lie beside it."""
    from expertcut.checkpoints.build import write_beside
    from expertcut.reporting.edit_tables import scale_sentences, tilt_sentences

    profile, found, folder = choice.profile, choice.found, settings.out or choice.folder
    options = settings.build_options({**found.beside, **(beside or {})})
    if found.draft is None:
        if not options.beside:
            ui.say([], ["nothing is written"])
            return None
        write_beside(profile, folder, options)
        ui.say([], [f"no checkpoint is made; the proof, if any, is in {folder}"])
        return folder
    built = write_edit(profile, found.draft, folder, options, ui, is_plan=settings.plan_only)
    numbers = found.draft.numbers
    sentences = tilt_sentences(found.tilts, built, numbers)
    ui.say([], [*sentences, *scale_sentences(found.scalings, built, numbers)])
    return built or folder
