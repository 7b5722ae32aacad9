"""`expertcut sweep`: score a grid of cuts by several criteria, and write no checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expertcut.commands import (
    SILENT,
    UI,
    BlendedSettings,
    ProfiledQuizSettings,
    ScoredTextSettings,
    argument,
    no_profile,
    output_option,
)
from expertcut.commands.profile import ParallelSettings
from expertcut.edits import edit_settings
from expertcut.reporting.tables import save_table
from expertcut.settings import FilePath, flag_of, option

if TYPE_CHECKING:
    from expertcut.evaluation.search_results import Sweep
    from expertcut.profiling.storage import Profile


class SweepSettings(
    BlendedSettings,
    ProfiledQuizSettings,
    ScoredTextSettings,
    edit_settings.RankSettings,
    ParallelSettings,
):
    """Score a grid of cuts by criterion and size, without checkpoints."""

    examples: ClassVar = (
        "expertcut sweep 0.75,0.5,0.25 --by reap,frequency",
        "expertcut sweep 0.5 --by all --layout exact --budget global",
        "expertcut sweep 0.5 --by reap --profile profiles/code --text held.jsonl",
    )

    fractions: str = argument(
        "0.75,0.5,0.25", "Shares of the experts to keep, separated by commas.",
        aliases=("--fractions",),
    )  # fmt: skip
    by: edit_settings.Criteria = option(
        "activations",
        f"Criteria to score, separated by commas, or all: {edit_settings.CRITERIA_HERE}.",
        panel=edit_settings.RANK,
    )
    out: FilePath | None = output_option(
        None, "Output folder; a sweep started there is resumed.  [default: in sweeps/]"
    )

    def cut(self) -> edit_settings.CutSettings:
        """What all cuts of the grid share; the criterion is set for each."""
        names = {*edit_settings.RankSettings.model_fields} - {"by"}
        return edit_settings.CutSettings(**self.model_dump(include=names))


def run(settings: SweepSettings, ui: UI = SILENT) -> "Sweep":
    """Scores every missing cell, then writes the table and the figure."""
    settings.check_layout()
    settings.check_sequential()
    settings.check_scored()
    if "/" in settings.fractions or Path(settings.fractions).is_dir():
        raise no_profile(settings.fractions)
    fractions = edit_settings.read_fractions(settings.fractions, "FRACTIONS")
    from expertcut.edits.criteria import read_criteria

    criteria = read_criteria(settings.by)  # options are refused before imports
    settings.check_blend(criteria, is_sequential=settings.sequential)
    from expertcut.evaluation.search_results import Grid

    grid = Grid(criteria, fractions)
    profile = settings.choosing_profile(ui)
    from expertcut.checkpoints.size import with_protection  # torch, not to refuse options
    from expertcut.evaluation.sweep_run import SweepRun
    from expertcut.profiling.measure import MeasureOptions
    from expertcut.reporting import eval_tables as tables

    cut, notes = with_protection(profile, settings.cut())
    ui.say([], notes)
    ui.quiet()
    scoring = settings.scoring(profile, MeasureOptions(waits=ui.is_first))
    folder = settings.out or Path("sweeps") / "+".join(p.path.resolve().name for p in profile.parts)
    sweeping = SweepRun(profile, grid, cut, scoring)
    for step in sweeping.steps(folder):
        ui.watch(step.run, step.name, sweeping.judge.n, folder, sweeping.judge.unit)
    sweep = sweeping.sweep
    if ui.is_first:
        settings.say_profile(profile, ui)
        save_table(folder / "sweep.csv", tables.sweep_csv(sweep), tables.sweep_figure(sweep))
        _say(sweep, settings, profile, folder, ui)
    return sweep


def _say(sweep: "Sweep", settings: SweepSettings, profile: "Profile", folder: Path, ui: UI) -> None:
    """Reports the cells, and how to prune as in the smallest within the margin, else the best."""
    from expertcut.reporting import eval_tables as tables

    margin, given = settings.margin / 100, settings.model_dump(exclude_defaults=True)
    table, (leak, *bests) = tables.sweep_table(sweep, margin), tables.sweep_sentences(sweep, margin)
    settings.say(ui, [table])
    label = "quiz" if sweep.asked.text is None else "text"
    facts = [(label, f"{table.note} {leak}"), *(("best", text) for text in bests)]
    cell = tables.cell_to_prune(sweep, margin)
    words = ["prune", "--sparsity", f"{1 - cell.fraction:g}", "--by", cell.by]
    for name in (n for n in given if n in edit_settings.RankSettings.model_fields and n != "by"):
        for value in given[name] if isinstance(given[name], list) else [given[name]]:
            words += [flag_of(SweepSettings, name), *([] if value is True else [str(value)])]
    for named in settings.profile or [str(profile.path)]:
        words += ["--profile", named]
    words += ["--blend", settings.blend] if settings.blend else []
    ui.end(facts, folder, words)
