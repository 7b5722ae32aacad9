"""`expertcut compress`: experts stored in fewer bytes, each by the option that costs least."""

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
from expertcut.edits import edit_settings
from expertcut.errors import SettingsError
from expertcut.reporting.tables import labelled, save_table
from expertcut.settings import FilePath

if TYPE_CHECKING:
    from expertcut.checkpoints.build import Built
    from expertcut.checkpoints.compression_problem import CompressionProblem, Options
    from expertcut.edits.compression import CompressionFile
    from expertcut.edits.plan import EditPlan
    from expertcut.evaluation.search_results import CompressionSweep
    from expertcut.profiling.storage import Profile


class CompressSettings(ScoredTextSettings, CheckpointSettings, edit_settings.CompressSettings):
    """Store experts in fewer bytes under one budget."""

    examples: ClassVar = (
        "expertcut compress --max-bytes 4GB --for vllm",
        "expertcut compress --bits 2.5 --options 1,2,3 --by pmq",
        "expertcut compress --sweep 8GB,6GB,4GB,3GB",
    )

    out: FilePath | None = output_option(
        None, "Output folder; a sweep started there is resumed.  [default: in checkpoints/, plans/ "
        "or sweeps/]",
    )  # fmt: skip

    def check_model(self) -> None:
        """Options of a quiz or texts name what judges a sweep, and else a profile to make first."""
        if self.sweep is None:
            if self.text:
                raise SettingsError("--text judges a sweep: add --sweep SIZES, or leave it out")
            super().check_model()
        elif self.model is not None:
            raise SettingsError(
                f"--sweep reads a profile, not a model: profile {self.model} first, or leave it out"
            )


@dataclass(frozen=True)
class Choice:
    """The options of all experts, before anything is written."""

    profile: "Profile"
    problem: "CompressionProblem"
    chosen: "Options"
    file: "CompressionFile"
    folder: Path

    @property
    def draft(self) -> "EditPlan":
        """The plan."""
        return self.problem.draft(
            self.chosen.option_U, self.chosen.size_bytes, self.chosen.found.gap
        )


def run(
    settings: CompressSettings, ui: UI = SILENT, extra_files: Files = None
) -> "Built | Path | CompressionSweep":
    """Makes a checkpoint or a plan, or scores several sizes."""
    settings.check_model()
    settings.check()
    settings.check_scored()
    if settings.sweep is not None:
        return sweep(settings, ui)
    settings = settings.updated(**profiled_first(settings, ui))
    return write(choose(settings, ui), settings, ui, extra_files)


def choose(settings: CompressSettings, ui: UI) -> Choice:
    """Measures errors and picks options; without `--from` and `--no-verify` it runs the model."""
    profile = settings.choosing_profile(ui)
    from expertcut.checkpoints import compression_problem as problems
    from expertcut.checkpoints.build import engine_as_profiled
    from expertcut.evaluation import compression_run as stages

    file, problem = problems.start(profile, settings)
    folder = settings.output_folder(profile, settings.slug, ui)
    ui.quiet()
    problem.check_budget()
    (budget,) = settings.sizes or (None,)
    is_scored = settings.verify and bool(len(problem.calibration.questions.held_out))
    engine = measured = None
    if file is None or is_scored:
        engine = engine_as_profiled(profile, problem.source, settings.load_as())
        inputs = stages.stored_inputs(problem, engine)
    if file is None and engine is not None:
        with ui.parts("measuring", folder) as report:
            file = stages.measure(problem, engine, inputs, report)
    assert file is not None, "measured or read"
    error_UO = problems.errors_of(file, problem)
    chosen = problem.choose(error_UO, budget)
    if engine is not None:
        measured = stages.block_errors(problem, engine, inputs, file, chosen)
    file = problems.solved(file, problem, chosen, measured)
    if engine is not None and is_scored:
        peers = problem.peers(error_UO, budget, chosen)
        with ui.parts("scoring", folder) as report:
            scores = stages.score_peers(problem, engine, peers, report)
            file = file.model_copy(update={"peers": scores})
    return Choice(profile, problem, chosen, file, folder)


def write(
    choice: Choice, settings: CompressSettings, ui: UI, extra_files: Files = None
) -> "Built | Path":
    """Writes the checkpoint or the plan, and reports options, peers and where it loads."""
    from expertcut.checkpoints.build import Built, build, write_plan
    from expertcut.edits.compression import COMPRESSION_FILE
    from expertcut.reporting import compress_tables as tables
    from expertcut.reporting.edit_tables import unit

    profile, problem, draft = choice.profile, choice.problem, choice.draft
    folder = settings.out or choice.folder
    files, extra = {COMPRESSION_FILE: choice.file.json_bytes()}, extra_files or {}
    for name, content in problem.serving_files(choice.chosen).items():
        files[f"gptq-{name}" if name in extra else name] = content  # beside a run's own recipe
    # Of a checkpoint for llama.cpp nothing differs from the base before it is quantised.
    verify = settings.verify and settings.loader != "llama.cpp"
    options = settings.updated(verify=verify).build_options({**files, **extra})
    make = write_plan if settings.plan_only else build
    built = make(profile, draft, folder, options)
    settings.say_profile(profile, ui)
    settings.say(ui, tables.tables(choice.file, draft.edits))
    assert draft.compression is not None
    was_loaded = isinstance(built, Built) and built.proof is not None
    facts = [
        *tables.facts(draft.compression, choice.file, draft.edits, was_loaded=was_loaded),
        *(("", command) for command in problem.commands(choice.chosen, folder)),
    ]
    if settings.loader == "llama.cpp":
        facts.append(("gguf", f"{unit(draft.compression.bytes, 'B')} of tensors"))
    ui.say([], [labelled(*fact) for fact in facts])
    settings.say_result(built, folder, profile, [], ui)
    return built or folder


def sweep(settings: CompressSettings, ui: UI) -> "CompressionSweep":
    """Scores every missing size, then writes the table and the figure."""
    profile = settings.choosing_profile(ui)
    from expertcut.evaluation.compression_run import CompressionSweepRun
    from expertcut.profiling.measure import MeasureOptions
    from expertcut.reporting import compress_tables as tables

    ui.quiet()
    folder = settings.out or Path("sweeps") / f"{profile.path.resolve().name}-compress"
    scoring = settings.scoring(profile, MeasureOptions(waits=ui.is_first))
    with ui.parts("measuring", folder) as report:
        sweeping = CompressionSweepRun(profile, settings, scoring, folder, report)
    for step in sweeping.steps(folder):
        ui.watch(step.run, step.name, sweeping.judge.n, folder, sweeping.judge.unit)
    found, margin = sweeping.sweep, settings.margin / 100
    if ui.is_first:
        settings.say_profile(profile, ui)
        figure = tables.sweep_figure(found)
        save_table(folder / "compress_sweep.csv", tables.sweep_csv(found), figure)
        settings.say(ui, [tables.sweep_table(found, margin)])
        ui.end(tables.sweep_facts(found), folder, ["show", str(folder)])
    return found
