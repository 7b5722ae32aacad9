"""Commands that measure and show: `profile`, `eval`, `show`, `audit`."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertcut.cli.options import (
    DEFAULT_MODEL,
    BatchTokens,
    Device,
    DeviceMap,
    Dtype,
    Format,
    Layout,
    LayoutOption,
    Limit,
    LmEvalJson,
    MaxMemory,
    Offload,
    Perturb,
    PositionsOption,
    ProfileDir,
    QuizName,
    ResultsFile,
    Shots,
    Split,
    StatsOption,
    Subjects,
    Threads,
    TruncateMore,
    TruncateOption,
    TrustRemoteCode,
    option,
    read_choosing_profile,
    read_quiz,
    value,
)
from expertcut.cli.progress import is_first, print_tables, quiet, watched
from expertcut.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expertcut.evaluation.results import Results, Scored, Scoring
    from expertcut.evaluation.search_results import Audit
    from expertcut.models.load import LoadOptions, Source
    from expertcut.profiling.findings import Kind
    from expertcut.profiling.measure import Measurement


def profile(
    model: Annotated[str, typer.Argument(help="A checkpoint folder or hub id.")] = DEFAULT_MODEL,
    quiz: QuizName = "mmlu",
    split: Split = "test",
    shots: Shots = 5,
    subjects: Subjects = None,
    limit: Limit = None,
    truncate: TruncateOption = None,
    stats: StatsOption = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload: Offload = None,
    batch_tokens: BatchTokens = None,
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    perturb: Perturb = None,
    out: Annotated[Path | None, option("Folder; a run begun there is resumed.")] = None,
) -> None:
    """Measure what experts do in a quiz."""
    from expertcut.models.load import LoadOptions, find_source
    from expertcut.profiling.measure import (
        MeasureOptions,
        check_kinds,
        default_folder,
        measure,
        resumed,
    )

    load_as = LoadOptions(dtype, device, trust_remote_code, device_map, max_memory, offload)
    options = MeasureOptions(stats.value if stats else None, batch_tokens, threads, is_first())
    if out is not None:
        load_as, options = resumed(out, load_as, options)
    quiet()
    source = find_source(model)
    questions = read_quiz(quiz, split, shots, subjects, limit, truncate)
    measurement = measure(source, questions, limit, load_as, options)
    kinds = check_kinds(measurement, [kind.value for kind in perturb or []])
    _run(measurement, out or default_folder(measurement.info, source), kinds, load_as)


def _run(
    measurement: "Measurement", folder: Path, kinds: "list[Kind]", load_as: "LoadOptions"
) -> None:
    """Measures, asks again as often as wanted, and says how the model did."""
    from expertcut.profiling.measure import perturb as again
    from expertcut.profiling.statistics import answers
    from expertcut.profiling.storage import load_profile
    from expertcut.reporting.profile_tables import answered_sentence

    name, total = measurement.moe.source.name, len(measurement.quiz)
    watched(partial(measurement.run, folder), f"profiling {name}", total, folder)
    for kind in kinds:
        steps = partial(again, measurement, kind, folder, load_as)
        watched(steps, f"again with {kind}", total, folder)
    if is_first():
        found = answers(load_profile(folder))
        print(answered_sentence(folder, found))


def show(
    path: Annotated[Path, typer.Argument(help="A profile, plan, checkpoint or results.")],
    format: Annotated[Format, option("How to print it.", "--format")] = Format.table,
    subjects: Annotated[
        bool, option("Also each subject of a profile; json always has them.", "--subjects")
    ] = False,
    criteria: Annotated[
        bool,
        option(
            "How each criterion ranks a profile's experts, and how far they agree.", "--criteria"
        ),
    ] = False,
) -> None:
    """Print what the other commands wrote."""
    from expertcut.reporting.views import find_shown

    found = find_shown(path, subjects, criteria)
    if format is Format.json:
        print(json.dumps(found.json(), indent=1, allow_nan=False))
    elif format is Format.csv:
        from expertcut.reporting.tables import as_csv

        print(as_csv(found.flat()), end="")
    else:
        print_tables(found.tables(), format)


def eval(
    models: Annotated[
        list[str],
        typer.Argument(help="The first is the base.", metavar="BASE [OTHER]..."),
    ],
    quiz: QuizName = "mmlu",
    split: Split = "test",
    shots: Shots = 5,
    subjects: Subjects = None,
    limit: Limit = None,
    truncate: TruncateOption = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload: Offload = None,
    batch_tokens: BatchTokens = None,
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    out: ResultsFile = Path("results.json"),
    lm_eval_json: LmEvalJson = None,
) -> None:
    """Compare checkpoints on the same questions."""
    from expertcut.evaluation.evaluate import check_places, find_models, save
    from expertcut.evaluation.results import Scoring
    from expertcut.models.load import LoadOptions
    from expertcut.profiling.measure import MeasureOptions

    quiet()
    check_places(out, lm_eval_json)
    sources = find_models(models)
    questions = read_quiz(quiz, split, shots, subjects, limit, truncate)
    load_as = LoadOptions(dtype, device, trust_remote_code, device_map, max_memory, offload)
    options = MeasureOptions("none", batch_tokens, threads, is_first())
    scoring, folder = Scoring(questions, limit, load_as, options), out.with_suffix(".chunks")
    scored = _scored(scoring, sources, folder)
    if is_first():
        _say(save(scoring, scored, out, lm_eval_json), out)


def _scored(scoring: "Scoring", sources: "Sequence[Source]", folder: Path) -> "list[Scored]":
    """Every model in its turn."""
    from expertcut.evaluation.evaluate import score
    from expertcut.evaluation.results import Scored

    scored: list[Scored] = []
    for source in sources:
        steps = partial(score, source, scoring, folder)
        found = watched(steps, f"scoring {source.name}", len(scoring.quiz), folder)
        scored += [step for step in found if isinstance(step, Scored)]
    return scored


def _say(found: "Results", out: Path) -> None:
    from expertcut.reporting.eval_tables import result_sentences, results_table

    print_tables([results_table(found)], Format.table)
    for sentence in result_sentences(found):
        print(sentence)
    print(f"written to {out}")


def audit(
    profile: ProfileDir = None,
    sample: Annotated[int, option("Experts to remove, one at a time.", min=1)] = 64,
    by: Annotated[str, option("Criteria to judge, separated by commas, or all.")] = "all",
    fractions: Annotated[
        str, option("Shares that stay at the budgets of the regrets.")
    ] = "0.75,0.5,0.25",
    questions: Annotated[int, option("Held-out questions at most.", min=2)] = 256,
    positions: PositionsOption = None,
    layout: LayoutOption = Layout.stock,
    seed: Annotated[int, option("Seed of the sample, of --by random and of intervals.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    truncate: TruncateMore = None,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[Path | None, option("Folder; an audit begun there is resumed.")] = None,
) -> None:
    """Remove experts one by one, and say who foretold what that does."""
    from expertcut.edits.criteria import CRITERIA
    from expertcut.edits.ranking import Way
    from expertcut.evaluation.ablation import Auditing, AuditOptions
    from expertcut.evaluation.search_results import ALL, read_criteria, read_fractions
    from expertcut.models.load import LoadOptions

    if seed < 0:
        raise SettingsError(f"--seed {seed} must be at least 0")
    names = read_criteria(by, CRITERIA)
    shares = read_fractions(fractions, "--fractions")
    found = read_choosing_profile(profile, threads, truncate)
    way = Way(names[0], value(positions), layout.value, seed=seed)
    load_as = LoadOptions(dtype, device, trust_remote_code)
    quiet()
    options = AuditOptions(names, shares, way, load_as, sample, questions, by == ALL)
    auditing = Auditing(found, options)
    folder = out or Path("audits") / found.path.resolve().name
    watched(lambda see: auditing.run(folder, see), "auditing", auditing.n_questions, folder)
    _save(auditing.found, folder)


def _save(found: "Audit", folder: Path) -> None:
    from expertcut.files import write_atomically
    from expertcut.reporting.eval_tables import (
        audit_csv,
        audit_figure,
        audit_sentences,
        audit_tables,
    )
    from expertcut.reporting.tables import as_csv

    files = {"audit.csv": as_csv(audit_csv(found)).encode(), **audit_figure(found)}
    for name, content in files.items():
        write_atomically(folder / name, content)
    print_tables(audit_tables(found), Format.table)
    for sentence in audit_sentences(found):
        print(sentence)
    print(f"written to {folder}")
