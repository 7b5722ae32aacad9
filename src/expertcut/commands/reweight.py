"""`expertcut reweight`: a checkpoint whose router favours or avoids experts."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expertcut.commands import (
    SILENT,
    UI,
    CheckpointSettings,
    Files,
    LayerwiseSettings,
    output_option,
)
from expertcut.commands.profile import ParallelSettings, profiled_first
from expertcut.edits import edit_settings
from expertcut.edits.layouts import LAYOUTS
from expertcut.errors import SettingsError
from expertcut.reporting.tables import labelled

if TYPE_CHECKING:
    from expertcut.checkpoints.build import Built
    from expertcut.evaluation.cross_fit import CrossFitResult
    from expertcut.evaluation.reweight_search import Reweighting
    from expertcut.profiling.storage import Profile


_FEW = 6  # sentences on single experts


class ReweightSettings(
    LayerwiseSettings, CheckpointSettings, edit_settings.ReweightSettings, ParallelSettings
):
    """Bias the router toward or away from experts."""

    examples: ClassVar = (
        "expertcut reweight --boost 3:12",
        "expertcut reweight --suppress-worst 2 --tune --cross-fit",
        "expertcut reweight --balance 0.1 --trace traces/TRACE --layout exact",
    )
    force_write: bool = output_option(
        False, "Write the checkpoint even if --cross-fit does not show that it helps."
    )

    def check(self) -> None:
        """Refuses options that do not go together, with a SettingsError."""
        super().check()
        self.check_one_group("reweight")
        if self.parallel and not (self.is_deciding and self.plan_only):
            raise SettingsError(
                f"--parallel {self.parallel} is for --tune and --cross-fit: add --plan-only, and "
                "write the checkpoint in one process, by --boost and --suppress"
            )
        if self.balance is not None and (self.profile or self.model):
            what = "--profile" if self.profile else "MODEL"
            raise SettingsError(
                f"--balance works from --trace, which names its model: leave {what} out"
            )


@dataclass(frozen=True)
class Choice:
    """The biases and factors, before anything is written."""

    profile: "Profile"
    reweighting: "Reweighting"
    folder: Path
    proof: "CrossFitResult | None" = None


def working_folder(out: Path) -> Path:
    """Hidden sibling of the output that keeps the scored tilts of an unfinished run."""
    place = out.resolve()
    return place.with_name(f".{place.name}.tuning")


def run(
    settings: ReweightSettings, ui: UI = SILENT, extra_files: Files = None
) -> "Built | Path | None":
    """Makes a checkpoint or a plan; None where nothing was chosen and nothing written."""
    settings.check_model()
    settings.check()
    settings = settings.updated(**profiled_first(settings, ui))
    choice = choose(settings, ui)
    if settings.parallel and not ui.is_first:
        return None
    made = write(choice, settings, ui, extra_files)
    is_final = choice.reweighting.draft is None or is_shown(choice, settings)
    if settings.is_deciding and is_final:  # else --force-write starts from there
        shutil.rmtree(working_folder(choice.folder), ignore_errors=True)
    return made


def choose(settings: ReweightSettings, ui: UI) -> Choice:
    """Chooses experts and strengths; writes nothing, but refuses a folder that is not empty."""
    settings.check()
    from expertcut.edits.reweight_select import check_settings
    from expertcut.edits.router_edits import procedure_name

    check_settings(settings)
    if settings.balance is not None:
        return _balanced(settings, ui)
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
        tables = decision_tables(decision)
        few = tables[-1:] if decision.proof else []  # the search has a table of its own
        ui.say(tables if settings.wide else few, decision_sentences(decision))
    edit = chosen(profile, settings, procedure, decision)
    return Choice(profile, edit, folder, decision.proof if decision else None)


def _balanced(settings: ReweightSettings, ui: UI) -> Choice:
    """Biases from a trace, which takes the place of the profile."""
    from expertcut.edits.splits import traced_profile
    from expertcut.profiling.trace import load_trace

    assert settings.trace is not None and settings.balance is not None, "checked"
    trace = load_trace(settings.trace)
    profile = traced_profile(trace)
    profile.trust_remote_code = settings.trust_remote_code
    from expertcut.evaluation.reweight_search import balanced  # torch
    from expertcut.reporting.balance_tables import balance_sentences, balance_table

    folder = settings.output_folder(profile, f"balance-{settings.balance:g}", ui)
    ui.quiet()
    with ui.parts("balancing", folder) as report:
        edit, found = balanced(profile, settings, trace, report)
    settings.say(ui, [balance_table(found)])
    ui.say([], balance_sentences(found))
    return Choice(profile, edit, folder)


def is_shown(choice: Choice, settings: ReweightSettings) -> bool:
    """Whether cross-fitting shows that the choice helps, if it was asked."""
    return choice.proof is None or choice.proof.verdict == "helps" or settings.force_write


def write(
    choice: Choice, settings: ReweightSettings, ui: UI, extra_files: Files = None
) -> "Built | Path | None":
    """Writes the checkpoint or the plan; if nothing changes, only the files beside them."""
    from expertcut.checkpoints.build import build, write_plan
    from expertcut.edits.plan import PLAN_FILE
    from expertcut.reporting import edit_tables as tables

    profile, edit, folder = choice.profile, choice.reweighting, settings.out or choice.folder
    options = settings.build_options({**edit.extra_files, **(extra_files or {})})
    facts, proof = [], choice.proof
    if proof is not None:
        judged = tables.verdict_text(proof.cross_fitted, proof.questions, settings.margin / 100)
        facts = [("verdict", f"by cross-fitting: {judged}")]
    if edit.draft is None or not is_shown(choice, settings):
        why = "no checkpoint, for no expert was chosen"
        if settings.balance is not None:
            why = f"no checkpoint, for the loads are within {settings.balance:g} already"
        if edit.draft is not None:
            force = "--force --force-write" if options.extra_files else "--force-write"
            why = f"no checkpoint, for this is not shown to help: {force} writes it, from what "
            why += f"stays in {folder.with_name(working_folder(folder).name)}"
        if edit.draft is not None and (folder / PLAN_FILE).is_file():
            ui.end(facts, f"{why}; {folder} stays as it was")  # --force replaces by a whole one
            return None
        if options.extra_files:
            write_plan(profile, None, folder, options)
            why += f"; the proof is in {folder}" if proof else ""
        ui.end(facts, why, *([["show", str(folder)]] if proof else []))
        return folder if options.extra_files else None
    make = write_plan if settings.plan_only else build
    built = make(profile, edit.draft, folder, options)
    if settings.balance is None:
        settings.say_profile(profile, ui)
    if built and settings.wide:
        ui.say(tables.held_out_tables(built), [])
    sentences = tables.adapter_sentences(built) if built else []
    sentences += tables.tilt_sentences(edit.tilts, built, edit.draft.numbers)
    sentences += tables.scale_sentences(edit.scalings, built, edit.draft.numbers)
    if len(sentences) > _FEW and not settings.wide:
        sentences[_FEW:] = [f"{len(sentences) - _FEW} more such sentences: --wide prints them."]
    ui.say([], [labelled(*fact) for fact in facts])
    settings.say_result(built, folder, profile, sentences, ui)
    return built or folder
