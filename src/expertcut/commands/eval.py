"""`expertcut eval`: score checkpoints on the same questions and compare them with the first."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expertcut import commands
from expertcut.commands import SILENT, UI, SplitSettings, model_option, output_option
from expertcut.settings import FilePath, Texts, option

if TYPE_CHECKING:
    from expertcut.evaluation.results import Part, QuizResults, Results
    from expertcut.models.load import Source


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

    @property
    def parts_asked(self) -> list[str]:
        """The options that ask for more than a quiz, as given."""
        return []

    @property
    def asks_quiz(self) -> bool:
        """Whether the quiz is asked: it is named, or nothing else is asked."""
        return "quiz" in self.model_fields_set or not self.parts_asked


def run(settings: EvalSettings, ui: UI = SILENT) -> "Results | None":
    """Judges every model and writes the results; None in all but the first process."""
    ui.quiet()
    from expertcut.evaluation.evaluate import check_places, described, find_models
    from expertcut.evaluation.results import results_of
    from expertcut.reporting.eval_tables import evaluation_facts, evaluation_tables

    check_places(settings.out, settings.lm_eval_json)
    sources = find_models(settings.models, settings.revision)
    scored = _score_quiz(settings, sources, ui) if settings.asks_quiz else None
    if not ui.is_first:  # further processes share the work of a quiz, and nothing else
        return None
    results = scored or results_of([described(source) for source in sources])
    for part in _parts(settings, sources, ui):
        results = results.with_part(part)
    is_new = not settings.out.exists()
    results.save(settings.out)
    written = f"{settings.out}{'' if is_new else ', which replaces an earlier one'}"
    margin = settings.margin / 100
    tables = evaluation_tables(results, margin)
    settings.say(ui, tables)
    facts = [("quiz", tables[0].note)] if scored else []
    following = [["report", str(settings.out)]]
    edited = [source for source in sources if (source.path / "plan.json").is_file()]
    following += [["publish", str(s.path), "--dry-run"] for s in edited[-1:] if scored]
    ui.end([*facts, *evaluation_facts(results, margin)], written, *following)
    return results


def _parts(settings: EvalSettings, sources: Sequence["Source"], ui: UI) -> Iterator["Part"]:
    """What is asked beside the quiz, one part after the other."""
    yield from ()


def _score_quiz(
    settings: EvalSettings, sources: Sequence["Source"], ui: UI
) -> "QuizResults | None":
    """Answers of every model to the quiz; None in all but the first process."""
    from expertcut.evaluation.evaluate import save_answers, score
    from expertcut.evaluation.results import Scored, Scoring
    from expertcut.profiling.measure import MeasureOptions

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
    return save_answers(scoring, scored, settings.out, settings.lm_eval_json)
