"""`expertcut reweight`: a checkpoint whose router favours or avoids experts."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expertcut.commands import SILENT, UI, CheckpointSettings
from expertcut.commands.profile import profiled_first
from expertcut.edits import edit_settings
from expertcut.edits.layouts import LAYOUTS

if TYPE_CHECKING:
    from expertcut.checkpoints.build import Built
    from expertcut.evaluation.reweight_search import Reweighting
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
    reweighting: "Reweighting"
    folder: Path


def working_folder(out: Path) -> Path:
    """Hidden sibling of the output that keeps the scored tilts of an unfinished run."""
    place = out.resolve()
    return place.with_name(f".{place.name}.tuning")


def run(
    settings: ReweightSettings, ui: UI = SILENT, beside: Mapping[str, bytes] | None = None
) -> "Built | Path | None":
    """Makes a checkpoint or a plan; None where nothing was chosen and nothing written."""
    settings.check_model()
    settings.check()
    settings = settings.completed(**profiled_first(settings, ui))
    choice = choose(settings, ui)
    made = write(choice, settings, ui, beside)
    if settings.is_deciding:
        shutil.rmtree(working_folder(choice.folder), ignore_errors=True)
    return made


def choose(settings: ReweightSettings, ui: UI) -> Choice:
    """Chooses experts and strengths; writes nothing, but refuses a folder that is not empty."""
    settings.check()
    from expertcut.edits.reweight_select import check_settings
    from expertcut.edits.router_edits import procedure_name

    check_settings(settings)
    profile = settings.choosing_profile(ui)
    from expertcut.evaluation.reweight_search import by_hand, chosen, decide, prepared  # torch
    from expertcut.reporting.edit_tables import decision_sentences, decision_tables

    if settings.is_by_hand:
        edit = by_hand(profile, settings)
        assert edit.draft is not None
        return Choice(profile, edit, settings.output_folder(profile, edit.draft.slug, ui))
    procedure = prepared(profile, settings)
    name = procedure_name(profile, settings, procedure).replace(":", ".").replace(" ", "-")
    marks = (LAYOUTS[settings.layout].mark, "answer" if settings.apply_at == "answer" else "")
    folder = settings.output_folder(profile, "-".join(filter(None, (name, *marks))), ui)
    ui.quiet()
    decision = None
    if settings.is_deciding:
        kept_in, load_as = working_folder(folder), settings.load_as()
        with ui.parts("cross-fitting" if settings.prove else "tuning", kept_in) as report:
            decision = decide(profile, procedure, settings, load_as, report, kept_in)
        ui.say(decision_tables(decision), decision_sentences(decision))
    return Choice(profile, chosen(profile, settings, procedure, decision), folder)


def write(
    choice: Choice, settings: ReweightSettings, ui: UI, beside: Mapping[str, bytes] | None = None
) -> "Built | Path | None":
    """Writes the checkpoint or the plan; if nothing changes, only the files beside them."""
    from expertcut.checkpoints.build import build, write_beside, write_plan
    from expertcut.reporting import edit_tables as tables

    profile, edit, folder = choice.profile, choice.reweighting, settings.out or choice.folder
    settings.say_profile(profile, ui)
    options = settings.build_options({**edit.beside, **(beside or {})})
    if edit.draft is None:
        if not options.beside:
            ui.say([], ["nothing is written"])
            return None
        write_beside(profile, folder, options)
        ui.say([], [f"no checkpoint is made; the proof, if any, is in {folder}"])
        return folder
    make = write_plan if settings.plan_only else build
    built = make(profile, edit.draft, folder, options)
    scores = [*tables.proof_sentences(built), *tables.adapter_sentences(built)] if built else []
    router = tables.tilt_sentences(edit.tilts, built, edit.draft.numbers)
    scaled = tables.scale_sentences(edit.scalings, built, edit.draft.numbers)
    sentences = [*scores, f"written to {folder}", *router, *scaled]
    ui.say(tables.proof_tables(built) if built else [], sentences)
    return built or folder
