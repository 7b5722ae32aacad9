"""`expertcut route`: other experts at run time, judged; or a checkpoint that uses them."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expertcut.commands import (
    SILENT,
    UI,
    CheckpointSettings,
    Files,
    ScoredTextSettings,
    output_option,
)
from expertcut.commands.profile import profiled_first
from expertcut.commands.reweight import working_folder
from expertcut.edits import route_settings
from expertcut.errors import SettingsError
from expertcut.reporting.tables import labelled, save_table
from expertcut.settings import FilePath

if TYPE_CHECKING:
    from expertcut.edits.plan import EditPlan
    from expertcut.evaluation.holding import HoldingResult
    from expertcut.evaluation.route_results import OracleResult, RouteSweep
    from expertcut.evaluation.route_tuning import RouteTuning
    from expertcut.profiling.storage import Profile
    from expertcut.scoring.rerouting import Rerouting


class RouteSettings(ScoredTextSettings, CheckpointSettings, route_settings.RouteSettings):
    """Use other experts at run time: fewer, more, or by another rule."""

    examples: ClassVar = (
        "expertcut route --rule skip,top-p,top-k --sweep",
        "expertcut route --rule skip --experts 2.5",
        "expertcut route --rule top-p --tune --margin 1 --cross-fit",
    )

    out: FilePath | None = output_option(
        None, "Output folder; a sweep started there is resumed.  [default: in checkpoints/, plans/ "
        "or sweeps/]",
    )  # fmt: skip

    force_write: bool = output_option(
        False, "Write the checkpoint even if --cross-fit does not show that it holds."
    )

    @property
    def action(self) -> str:
        """The `action` of the plan."""
        words = [f"route --rule {self.rule}"]
        usual = route_settings.USUAL.get(self.rule)
        at = self.at or ("" if usual is None or self.experts or self.tune else f"{usual:g}")
        words += [f"--at {at}"] if at else []
        words += [f"--experts {self.experts}"] if self.experts is not None else []
        words += ["--shared"] if self.shared else []
        words += [f"--most {self.most}"] if self.most is not None else []
        words += ["--weights renormalised"] if self.weights != "gate" else []
        words += [f"--tune --margin {self.margin:g}"] if self.tune else []
        return " ".join(words)

    def check_model(self) -> None:
        """Options of a quiz or texts name what judges, and else a profile to make first."""
        if not self.is_judging:
            if self.text and self.tune:
                raise SettingsError(
                    "--tune counts right answers, which texts do not have: leave --text out, or "
                    "judge on them with --sweep"
                )
            if self.text:
                raise SettingsError("--text judges a sweep: add --sweep, or leave it out")
            super().check_model()
        elif self.model is not None:
            raise SettingsError(
                f"--sweep reads a profile, not a model: profile {self.model} first, or leave it out"
            )

    def check_profile(self, profile: "Profile") -> None:
        """Refuses what no rule can change, before a quiz is read."""
        self.check_blocks(profile.info.model)


@dataclass(frozen=True)
class Choice:
    """The rule with its thresholds, before anything is written; none if `--tune` finds none."""

    profile: "Profile"
    routing: "Rerouting | None"
    folder: Path
    tuned: "RouteTuning | None" = None

    @property
    def proof(self) -> "HoldingResult | None":
        """The cross-fit, if asked."""
        return self.tuned.proof if self.tuned else None


def run(settings: RouteSettings, ui: UI = SILENT, extra_files: Files = None) -> object:
    """Scores rules, or makes a checkpoint or a plan."""
    settings.check_model()
    settings.check()
    settings.check_scored()
    if settings.sweep:
        return sweep(settings, ui)
    if settings.oracle:
        return oracle(settings, ui)
    if settings.rules == ("contrast",) and (settings.plan_only or extra_files):
        raise SettingsError(
            "--rule contrast writes code that runs the model twice, neither a plan nor a "
            "checkpoint: leave out --plan-only, or the recipe's variant"
        )
    settings = settings.updated(**profiled_first(settings, ui))
    if settings.rules == ("contrast",):
        return contrast(settings, ui)
    return write(choose(settings, ui), settings, ui, extra_files)


def sweep(settings: RouteSettings, ui: UI) -> "RouteSweep":
    """Scores every missing setting, then writes the table and the figure."""
    profile = settings.choosing_profile(ui)
    if "contrast" in settings.rules and _reads_texts(profile, settings):
        raise SettingsError(
            "--rule contrast rules out tokens that are unlikely, so texts have no perplexity with "
            "it: judge on a quiz, with --quiz QUIZ"
        )
    from expertcut.evaluation.route_sweep import RouteSweepRun  # torch, not to refuse options
    from expertcut.profiling.measure import MeasureOptions
    from expertcut.reporting import route_tables as tables

    ui.quiet()
    scoring = settings.scoring(profile, MeasureOptions(waits=ui.is_first))
    folder = settings.out or _folder(profile, "route")
    sweeping = RouteSweepRun(profile, settings, scoring)
    for step in sweeping.steps(folder):
        ui.watch(step.run, step.name, sweeping.judge.n, folder, sweeping.judge.unit)
    found, margin = sweeping.sweep, settings.margin / 100
    if ui.is_first:
        settings.say_profile(profile, ui)
        save_table(folder / "route.csv", tables.sweep_csv(found), tables.sweep_figure(found))
        settings.say(ui, [tables.sweep_table(found, margin)])
        ui.end(tables.sweep_facts(found, margin), folder, ["show", str(folder)])
    return found


def contrast(settings: RouteSettings, ui: UI) -> Path:
    """Writes two runs of the model as code for `generate` of transformers."""
    profile = settings.choosing_profile(ui)
    from expertcut.checkpoints.build import write_contrast
    from expertcut.evaluation.route_sweep import Rules

    (choice,) = settings.choices(profile.info.model.blocks[0].top_k)
    folder = settings.output_folder(profile, choice.slug, ui)
    options = settings.build_options({})
    ui.quiet()
    write_contrast(
        profile, folder, options, lambda e: Rules(profile, e, settings).rerouting(choice)
    )
    settings.say_profile(profile, ui)
    call = f"model.generate(**inputs, custom_generate={str(folder)!r}, trust_remote_code=True)"
    ui.end([("use", call)], folder)
    return folder


def oracle(settings: RouteSettings, ui: UI) -> "OracleResult":
    """Scores every setting and its noise variants on a quiz, then writes what is found."""
    profile = settings.choosing_profile(ui)
    from expertcut.evaluation.results import Scoring
    from expertcut.evaluation.route_results import ORACLE_FILE
    from expertcut.evaluation.route_tuning import score_oracle
    from expertcut.profiling.measure import MeasureOptions
    from expertcut.reporting import route_tables as tables

    if _reads_texts(profile, settings):
        raise SettingsError("--oracle counts right answers: judge on a quiz, with --quiz QUIZ")
    ui.quiet()
    options = MeasureOptions()
    scoring = Scoring(settings.scored_quiz(profile), settings.limit, settings.load_as(), options)
    folder = settings.out or _folder(profile, "oracle")
    with ui.parts("the oracle", folder) as report:
        found = score_oracle(profile, settings, scoring, report, folder / "cells")
    found.save(folder / ORACLE_FILE)
    settings.say_profile(profile, ui)
    settings.say(ui, [tables.oracle_table(found)])
    ui.end(tables.oracle_facts(found), folder, ["show", str(folder)])
    return found


def _reads_texts(profile: "Profile", settings: RouteSettings) -> bool:
    return bool(settings.text or (profile.info.text is not None and not settings.scored_given))


def _folder(profile: "Profile", what: str) -> Path:
    return Path("sweeps") / f"{profile.path.resolve().name}-{what}"


def choose(settings: RouteSettings, ui: UI) -> Choice:
    """Calibrates or tunes the thresholds; writes nothing but what a search has scored."""
    profile = settings.choosing_profile(ui)
    from expertcut.evaluation.route_tuning import calibrated, tune
    from expertcut.reporting import route_tables as tables

    slug = f"{settings.rule}-tuned"
    if not settings.tune:
        (choice,) = settings.choices(profile.info.model.blocks[0].top_k)
        slug = choice.slug
    folder = settings.output_folder(profile, slug, ui)
    ui.quiet()
    if not settings.tune:
        return Choice(profile, calibrated(profile, settings, settings.load_as()), folder)
    margin, kept_in = settings.margin / 100, working_folder(folder)
    with ui.parts("cross-fitting" if settings.prove else "tuning", kept_in) as report:
        tuned = tune(profile, settings, margin, settings.load_as(), report, kept_in)
    settings.say(ui, [tables.tried_table(tuned, margin)])
    if tuned.proof is not None:
        settings.say(ui, [tables.holding_table(tuned.proof)])
        ui.say([], [labelled("verdict", tuned.proof.sentence)])
    return Choice(profile, tuned.routing, folder, tuned)


def draft_of(choice: Choice, settings: RouteSettings) -> "EditPlan":
    """The plan of a choice that has a rule."""
    from expertcut.edits.router_edits import route_draft

    routing = choice.routing
    assert routing is not None, "there is a rule"
    return route_draft(
        choice.profile,
        routing.rule,
        routing.at_by_layer,
        settings.layout,
        fit_by_layer=routing.fit_by_layer,
        action=settings.action,
        # Errors of rule fitted are fitted on tuning questions, whatever sets its threshold.
        is_tuned=settings.tune or settings.experts is not None or bool(routing.fit_by_layer),
    )


def write(choice: Choice, settings: RouteSettings, ui: UI, extra_files: Files = None) -> object:
    """Writes the checkpoint or the plan; without a rule that holds, only the proof."""
    from expertcut.checkpoints.build import build, write_plan
    from expertcut.edits.plan import HOLDING_FILE, PLAN_FILE

    profile, folder, proof = choice.profile, settings.out or choice.folder, choice.proof
    kept_in = working_folder(folder)
    files = {**(extra_files or {})} | ({HOLDING_FILE: proof.json_bytes()} if proof else {})
    options = settings.build_options(files)
    is_held = proof is None or proof.verdict == "holds" or settings.force_write
    if choice.routing is None or not is_held:
        why = "no checkpoint, for no smaller number of experts is shown to hold"
        if choice.routing is not None:
            why = "no checkpoint, for this is not shown to hold: --force --force-write writes it, "
            why += f"from what stays in {folder.with_name(kept_in.name)}"
        else:
            shutil.rmtree(kept_in, ignore_errors=True)
        if (folder / PLAN_FILE).is_file():
            ui.end([], f"{why}; {folder} stays as it was")  # --force replaces by a whole one
            return None
        if files:
            write_plan(profile, None, folder, options)
            why += f"; the proof is in {folder}" if proof else ""
        ui.end([], why)
        return folder if files else None
    make = write_plan if settings.plan_only else build
    built = make(profile, draft_of(choice, settings), folder, options)
    if settings.tune:
        shutil.rmtree(kept_in, ignore_errors=True)
    settings.say_profile(profile, ui)
    settings.say_result(built, folder, profile, [], ui)
    return built or folder
