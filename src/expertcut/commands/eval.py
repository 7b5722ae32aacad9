"""`expertcut eval`: score checkpoints on the same questions and compare them with the first."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from expertcut import commands
from expertcut.commands import (
    SILENT,
    UI,
    SplitSettings,
    TextSettings,
    model_option,
    output_option,
    text_option,
)
from expertcut.commands.profile import ContractSettings, ParallelSettings
from expertcut.errors import SettingsError
from expertcut.settings import Count, FilePath, ReadPath, Texts, flag_of, option

if TYPE_CHECKING:
    from expertcut.evaluation.generation_prompts import Prompts
    from expertcut.evaluation.generation_run import GenerateOptions
    from expertcut.evaluation.results import Part, QuizResults, Results
    from expertcut.evaluation.tasks import TaskOptions
    from expertcut.evaluation.text_eval import TextScoring
    from expertcut.models.load import Source

    Model = tuple[str, Source | None]
    """The name of a model, and its checkpoint if it is one here."""

task_option = partial(option, panel="Tasks", is_recorded="set")
generation_option = partial(option, panel="Generation", is_recorded="set")


class EvalSettings(
    ContractSettings,
    commands.JudgedSettings,
    commands.LayerwiseSettings,
    TextSettings,
    SplitSettings,
    ParallelSettings,
):
    """Compare checkpoints on the same questions or texts."""

    examples: ClassVar = (
        "expertcut eval BASE models/half models/merged --quiz my.jsonl --limit 100",
        "expertcut eval BASE models/half --text held.jsonl --tasks gsm8k,ifeval",
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
    tasks: Texts = task_option(
        [], "Tasks of lm-evaluation-harness, separated by commas; no quiz then, unless --quiz.",
        separator=",",
    )  # fmt: skip
    include_path: ReadPath | None = task_option(
        None, "Folder of further task YAMLs.", metavar="FOLDER"
    )
    backend: Literal["hf", "vllm", "local-completions"] = task_option(
        "hf", "What runs the models: transformers, vLLM, or servers at --base-url."
    )
    base_url: Texts = task_option(
        [], "Completions URL of each model's server, in their order; one for all is enough.",
        metavar="URL", in_recipe=False,
    )  # fmt: skip
    apply_chat_template: bool = task_option(False, "Ask in the tokenizer's chat template.")
    confirm_run_unsafe_code: bool = task_option(
        False, "Run tasks that execute what a model writes."
    )
    samples: bool = task_option(
        False, "The arguments are samples_*.jsonl of lm-evaluation-harness, or folders of them.",
        in_recipe=False,
    )  # fmt: skip
    generate: ReadPath | None = generation_option(
        None, "Prompts for the models to answer: lines of JSON with prompt, text or messages.",
        metavar="FILE",
    )  # fmt: skip
    max_new_tokens: Count = generation_option(512, "Tokens of an output, at most.", metavar="N")
    temperature: float = generation_option(0.0, "Temperature of sampling; 0 is greedy.", ge=0)

    def task_options(self) -> "TaskOptions":
        """What is asked of lm-evaluation-harness."""
        from expertcut.evaluation.tasks import TaskOptions

        return TaskOptions(
            tuple(self.tasks),
            self.backend,
            self.include_path,
            self.limit,
            self.apply_chat_template,
            self.confirm_run_unsafe_code,
            self.load_as(),
            self.threads,
        )

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

    top_k_logprobs: int = text_option(
        64, "Keep the base's K likeliest tokens for KL; the others count as one.", ge=1, metavar="K"
    )

    @property
    def parts_asked(self) -> list[str]:
        """The options that ask for more than a quiz."""
        names = ("text", "tasks", "samples", "generate")
        return [f"--{name}" for name in names if getattr(self, name)]

    def text_scoring(self, *, waits: bool) -> "TextScoring":
        """The texts, and how models are run on them."""
        from expertcut.evaluation.text_eval import TextScoring
        from expertcut.profiling.measure import MeasureOptions

        options = MeasureOptions("none", self.batch_tokens, self.threads, waits)
        return TextScoring(self.text_selection(), self.top_k_logprobs, self.load_as(), options)

    def check(self) -> None:
        """Refuses options that do not go together."""
        self.check_text()
        if self.parallel and (self.tasks or self.generate):
            raise SettingsError(
                f"--parallel {self.parallel} is for a quiz and for --text: --tasks and --generate "
                "run each model in one process"
            )
        if self.samples and (self.tasks or self.generate or self.text or self.asks_quiz):
            raise SettingsError(
                "--samples judges files that are there: give no --text, --tasks, --generate or "
                "--quiz"
            )
        for_tasks = ["include_path", "apply_chat_template", "confirm_run_unsafe_code"]
        for_tasks += [] if self.generate else ["base_url"]
        if not self.tasks and (given := [name for name in for_tasks if getattr(self, name)]):
            raise SettingsError(f"{flag_of(type(self), given[0])} is for --tasks: name some")
        for_prompts = {"max_new_tokens", "temperature"} & self.model_fields_set
        if self.generate is None and for_prompts:
            flag = flag_of(type(self), min(for_prompts))
            raise SettingsError(f"{flag} is for --generate: name a file of prompts")
        if self.layerwise and (self.tasks or self.generate):
            raise SettingsError(
                "--layerwise is for --quiz and --text: run --tasks and --generate without it"
            )
        self._check_servers()
        if self.lm_eval_json is not None and not self.asks_quiz:
            raise SettingsError("--lm-eval-json is for a quiz: name one with --quiz")

    def _check_servers(self) -> None:
        is_served, n = self.backend == "local-completions", len(self.base_url)
        if (is_served or self.tasks) and is_served != bool(n):
            raise SettingsError(
                "--base-url URL is for --backend local-completions, or for --generate: give one "
                "for all models, or one for each"
            )
        if n not in (0, 1, len(self.models)):
            raise SettingsError(
                f"{n} --base-url for {len(self.models)} models: give one for all models, or one "
                "for each, in their order"
            )
        if self.generate and n:
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
    from expertcut.evaluation.evaluate import check_places, described
    from expertcut.evaluation.results import results_of
    from expertcut.reporting.eval_tables import evaluation_facts, evaluation_tables

    settings.check()
    check_places(settings.out, settings.lm_eval_json)
    if settings.tasks:
        from expertcut.evaluation.tasks import check_tasks

        check_tasks(settings.task_options())
    models = _models(settings)
    sources = [source for _, source in models if source is not None]
    prompts = _read_prompts(settings, sources)  # refused before a quiz is scored
    scored = _score_quiz(settings, sources, ui) if settings.asks_quiz else None
    judged = _judge_text(settings, sources, ui) if settings.text else None
    if not ui.is_first:  # further processes share the work of a quiz and of texts alone
        return None
    results = scored or results_of([described(*model) for model in models])
    for part in filter(None, (judged, *_parts(settings, models, prompts, ui))):
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
    following += [["publish", str(s.path), "--dry-run"] for s in edited[-1:]]
    ui.end([*facts, *evaluation_facts(results, margin)], written, *following)
    return results


def _models(settings: EvalSettings) -> list["Model"]:
    """Every model by name, with its checkpoint unless it is only samples, or only on a server."""
    from expertcut.evaluation.evaluate import find_models

    names, is_served = settings.models, settings.backend == "local-completions"
    here = [] if settings.samples else names
    if is_served and not settings.asks_quiz and not settings.generate:
        here = [name for name in names if Path(name).is_dir()]
    sources = find_models(here, settings.revision, settings.read_contract())
    found = dict(zip(here, sources, strict=True))
    return [(name, found.get(name)) for name in names]


def _parts(
    settings: EvalSettings, models: Sequence["Model"], prompts: "Prompts | None", ui: UI
) -> Iterator["Part"]:
    """What is asked beside the quiz, one part after the other."""
    if settings.samples:
        from expertcut.evaluation.samples import judge, read_samples

        yield judge([read_samples(Path(path)) for path in settings.models], settings.margin / 100)
    if settings.tasks:
        yield _run_tasks(settings, models, ui)
    if prompts is not None:
        yield _generate(settings, prompts, ui)


def _run_tasks(settings: EvalSettings, models: Sequence["Model"], ui: UI) -> "Part":
    """Every model runs the tasks, one in memory at a time; then all are judged."""
    from expertcut.evaluation.samples import judge, read_samples
    from expertcut.evaluation.tasks import Tested, run_tasks

    options, folder, found = settings.task_options(), settings.out.with_suffix(".chunks"), []
    urls: list[str | None] = [*settings.base_url] or [None]
    urls = urls * len(models) if len(urls) == 1 else urls
    with ui.parts("running tasks", folder) as report:
        for done, (model, url) in enumerate(zip(models, urls, strict=True)):
            report(done, len(models))
            found.append(read_samples(run_tasks(Tested(*model, url), options, folder)))
    return judge(found, settings.margin / 100)


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


def _judge_text(settings: EvalSettings, sources: Sequence["Source"], ui: UI) -> "Part | None":
    """Losses of every model on the texts; None in all but the first process."""
    from expertcut.evaluation.text_eval import TextEvaluation
    from expertcut.models.devices import give_back

    # Where models are compared each process needs all of the base's chunks.
    scoring = settings.text_scoring(waits=ui.is_first or len(sources) > 1)
    evaluation = TextEvaluation(sources, scoring, settings.out.with_suffix(".chunks"))
    for source in sources:
        measurement, store = evaluation.prepare(source)
        steps = partial(measurement.run, store)
        ui.watch(steps, f"reading as {source.name}", measurement.n_rows, store, "rows")
        if ui.is_first:
            evaluation.note(measurement, store)
        del measurement, steps
        give_back()
    return evaluation.part() if ui.is_first else None


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
