"""`expertcut route`: other experts at run time, judged; or a checkpoint that uses them."""

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
from expertcut.edits import route_settings
from expertcut.errors import SettingsError
from expertcut.reporting.tables import save_table
from expertcut.settings import FilePath

if TYPE_CHECKING:
    from expertcut.evaluation.route_results import RouteSweep
    from expertcut.profiling.storage import Profile


class RouteSettings(CheckpointSettings, ScoredTextSettings, route_settings.RouteSettings):
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

    @property
    def is_judging(self) -> bool:
        """Whether settings are scored, and no checkpoint is made."""
        return self.sweep or self.oracle

    def check_model(self) -> None:
        """Options of a quiz or texts name what judges, and else a profile to make first."""
        if not self.is_judging:
            if self.text:
                raise SettingsError("--text judges a sweep: add --sweep, or leave it out")
            super().check_model()
        elif self.model is not None:
            raise SettingsError(
                f"--sweep reads a profile, not a model: profile {self.model} first, or leave it out"
            )


def run(settings: RouteSettings, ui: UI = SILENT, extra_files: Files = None) -> object:
    """Scores rules, or makes a checkpoint or a plan."""
    settings.check_model()
    settings.check()
    settings.check_scored()
    if settings.sweep:
        return sweep(settings, ui)
    raise SettingsError("route writes no checkpoint in this version: add --sweep to score rules")


def sweep(settings: RouteSettings, ui: UI) -> "RouteSweep":
    """Scores every missing setting, then writes the table and the figure."""
    profile = settings.choosing_profile(ui)
    from expertcut.evaluation.route_sweep import RouteSweepRun  # torch, not to refuse options
    from expertcut.profiling.measure import MeasureOptions
    from expertcut.reporting import route_tables as tables

    ui.quiet()
    scoring = settings.scoring(profile, MeasureOptions(waits=ui.is_first))
    folder = settings.out or _folder(profile)
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


def _folder(profile: "Profile") -> Path:
    return Path("sweeps") / f"{profile.path.resolve().name}-route"
