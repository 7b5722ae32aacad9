"""`expertcut eval`: score checkpoints on the same questions and compare them with the first."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expertcut import commands
from expertcut.commands import SILENT, UI, SplitSettings, model_option, output_option
from expertcut.errors import SettingsError
from expertcut.settings import Count, FilePath, Texts, flag_of, option

if TYPE_CHECKING:
    from expertcut.evaluation.generation_prompts import Prompts
    from expertcut.evaluation.generation_run import GenerateOptions
    from expertcut.evaluation.results import Part, QuizResults, Results
    from expertcut.models.load import Source

generation_option = partial(option, panel="Generation", in_recipe=False)


class EvalSettings(commands.JudgedSettings, SplitSettings):
    """Compare checkpoints on the same questions."""

    examples: ClassVar = (
        "expertcut eval BASE models/half",
        "expertcut eval BASE models/half models/merged --quiz my.jsonl --limit 100",
        "expertcut eval BASE models/half --lm-eval-json lm-eval.json",
        "expertcut eval BASE models/half --generate prompts.jsonl --max-new-tokens 256",
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

    generate: FilePath | None = generation_option(
        None, "Prompts for the models to answer: lines of JSON with prompt, text or messages.",
        metavar="FILE",
    )  # fmt: skip
    max_new_tokens: Count = generation_option(512, "Tokens of an output, at most.", metavar="N")
    temperature: float = generation_option(0.0, "Temperature of sampling; 0 is greedy.", ge=0)
    seed: int = generation_option(0, "Seed of sampling.", ge=0, le=2**31)
    base_url: Texts = generation_option(
        [], "URL of each model's server, in their order; one for all is enough.  "
        "[default: run the models here]",
        metavar="URL",
    )  # fmt: skip

    def generate_options(self) -> "GenerateOptions":
        """How outputs are written."""
        from expertcut.evaluation.generation_run import GenerateOptions

        return GenerateOptions(
            self.load_as(),
            self.max_new_tokens,
            self.temperature,
            self.seed,
            self.batch_tokens,
            self.threads,
        )

    @property
    def parts_asked(self) -> list[str]:
        """The options that ask for more than a quiz, as given."""
        return [f"--{name}" for name in ("generate",) if getattr(self, name)]

    def check(self) -> None:
        """Refuses options that do not go together."""
        own = ("max_new_tokens", "temperature", "seed", "base_url")
        given = [name for name in own if name in self.model_fields_set]
        if given and self.generate is None:
            flag = flag_of(type(self), given[0])
            raise SettingsError(f"{flag} is for --generate: name a file of prompts")
        if len(self.base_url) not in (0, 1, len(self.models)):
            raise SettingsError(
                f"{len(self.base_url)} --base-url for {len(self.models)} models: give one for all "
                "models, or one for each, in their order"
            )
        if self.base_url:
            from expertcut.evaluation.completions_server import Server

            for url in self.base_url:
                _ = Server(url).api  # refuses what is no address

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

    settings.check()
    check_places(settings.out, settings.lm_eval_json)
    sources = find_models(settings.models, settings.revision)
    prompts = _read_prompts(settings, sources)  # refused before a quiz is scored
    scored = _score_quiz(settings, sources, ui) if settings.asks_quiz else None
    if not ui.is_first:  # further processes share the work of a quiz, and nothing else
        return None
    results = scored or results_of([described(source) for source in sources])
    for part in _parts(settings, prompts, ui):
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


def _parts(settings: EvalSettings, prompts: "Prompts | None", ui: UI) -> Iterator["Part"]:
    """What is asked beside the quiz, one part after the other."""
    if prompts is not None:
        yield _generate(settings, prompts, ui)


def _read_prompts(settings: EvalSettings, sources: Sequence["Source"]) -> "Prompts | None":
    """The prompts as every model reads them; None without any."""
    if settings.generate is None:
        return None
    from expertcut.evaluation.generation_prompts import read_for

    return read_for(settings.generate, sources, settings.load_as(), settings.max_new_tokens)


def _generate(settings: EvalSettings, prompts: "Prompts", ui: UI) -> "Part":
    """Every model answers, one in memory at a time; outputs are written, then judged."""
    from expertcut.evaluation.completions_server import Server
    from expertcut.evaluation.generation import Generated
    from expertcut.evaluation.generation_run import generate, judge, save_outputs

    options, folder = settings.generate_options(), settings.out.with_suffix(".chunks")
    n, urls = len(prompts.models), settings.base_url
    servers: list[Server | None] = [Server(url, n > len(urls)) for url in urls] or [None]
    found: list[Generated] = []
    for model, server in zip(prompts.models, servers * (n // len(servers)), strict=True):
        with ui.parts(f"generating with {model.source.name}", folder) as report:
            for step in generate(model, options, folder, server):
                if isinstance(step, Generated):
                    found.append(step)
                elif server is not None:  # a model here reports every token
                    report(step.done, step.total)
    return judge(found, save_outputs(prompts, found, options, settings.out))


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
