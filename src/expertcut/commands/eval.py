"""`expertcut eval`: score checkpoints on the same questions and compare them with the first."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expertcut import commands
from expertcut.commands import SILENT, UI, SplitSettings, model_option, output_option
from expertcut.settings import FilePath, Texts, option

if TYPE_CHECKING:
    from expertcut.evaluation.results import Results


class EvalSettings(commands.JudgedSettings, SplitSettings):
    """Compare checkpoints on the same questions."""

    examples: ClassVar = (
        "expertcut eval BASE models/half",
        "expertcut eval BASE models/half models/merged --quiz my.jsonl --limit 100",
        "expertcut eval BASE models/half --lm-eval-json lm-eval.json",
    )

    models: Texts = option(
        ..., "Checkpoint folders or Hub ids; the first is the base.",
        is_argument=True, metavar="BASE [OTHER]...", in_recipe=False, min_length=1,
    )  # fmt: skip
    revision: str | None = model_option(None, "Branch, tag or commit of a base of the Hub.")
    out: FilePath = output_option(
        Path("results.json"), "Results file; chunks beside it are resumed.", metavar="FILE"
    )
    lm_eval_json: FilePath | None = output_option(
        None,
        "Write the results in the form of lm-evaluation-harness too, one file per model.",
        metavar="FILE",
    )


def run(settings: EvalSettings, ui: UI = SILENT) -> "Results | None":
    """Scores every model and writes the results; None in all but the first process."""
    ui.quiet()
    from expertcut.evaluation.evaluate import check_places, find_models, save, score
    from expertcut.evaluation.results import Scored, Scoring
    from expertcut.profiling.measure import MeasureOptions
    from expertcut.reporting.eval_tables import result_facts, results_table

    check_places(settings.out, settings.lm_eval_json)
    sources = find_models(settings.models, settings.revision)
    quiz = settings.load_quiz()
    options = MeasureOptions("none", settings.batch_tokens, settings.threads, ui.is_first)
    scoring = Scoring(quiz, settings.limit, settings.load_as(), options)
    folder = settings.out.with_suffix(".chunks")
    scored: list[Scored] = []
    for source in sources:
        steps = partial(score, source, scoring, folder)
        done = ui.watch(steps, f"scoring {source.name}", len(quiz), folder)
        scored += [step for step in done if isinstance(step, Scored)]
    if not ui.is_first:
        return None
    written = f"{settings.out}{', which replaces an earlier one' if settings.out.exists() else ''}"
    results = save(scoring, scored, settings.out, settings.lm_eval_json)
    margin, table = settings.margin / 100, results_table(results, settings.margin / 100)
    settings.say(ui, [table])
    facts = [("quiz", table.note), *result_facts(results, margin)]
    following = [["report", str(settings.out)]]
    edited = [source for source in sources if (source.path / "plan.json").is_file()]
    following += [["publish", str(s.path), "--dry-run"] for s in edited[-1:]]
    ui.end(facts, written, *following)
    return results
