"""`expertcut trace`: the experts of every token of a quiz or of texts, or of given routes."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from expertcut.commands import (
    AMOUNT,
    SILENT,
    UI,
    SplitSettings,
    TextsSettings,
    model_option,
    output_option,
    read_amount,
    text_option,
)
from expertcut.commands.profile import ContractSettings
from expertcut.errors import SettingsError
from expertcut.reporting.tables import labelled
from expertcut.settings import FilePath, Text, option

if TYPE_CHECKING:
    from expertcut.data.corpus import Corpus
    from expertcut.models.load import LoadOptions
    from expertcut.profiling.given_routes import RoutesTracing
    from expertcut.profiling.measure import MeasureOptions
    from expertcut.profiling.trace import Trace
    from expertcut.profiling.trace_recorder import QuizTracing, TextTracing, TraceOptions

MAX_LOGIT_TOKENS = 1 << 16
trace_option = partial(option, panel="Trace", is_recorded="set")


class TraceSettings(ContractSettings, TextsSettings, SplitSettings):
    """Record the experts of every token of a quiz or of texts."""

    examples: ClassVar = (
        "expertcut trace MODEL --quiz my.jsonl --shots 0",
        "expertcut trace MODEL --text code.jsonl --length 512 --tokens 1M",
        "expertcut trace MODEL --routes FILE.npz",
    )

    model: str = option(
        "allenai/OLMoE-1B-7B-0125-Instruct", "Checkpoint folder or Hub id.",
        is_argument=True, in_recipe=False,
    )  # fmt: skip
    revision: str | None = model_option(None, "Branch, tag or commit of a model of the Hub.")
    tokens: Annotated[Text, AMOUNT] = trace_option(
        "64k",
        "Stop before more tokens: of a quiz in turn of each subject, of texts at random.",
        metavar="N",
    )
    weights: bool = trace_option(False, "Keep the gate weights too.")
    logits: bool = trace_option(
        False, f"Keep the router logits too, of at most {MAX_LOGIT_TOKENS:,} tokens."
    )
    length: int = text_option(
        512, "Cut longer documents into pieces of this many tokens.", ge=2, le=1 << 20
    )
    seed: int = text_option(0, "Seed of the documents that --tokens takes.", ge=0)
    routes: FilePath | None = trace_option(
        None, "Take what vLLM returned instead: .npz of routed_experts and token_ids.",
        metavar="FILE", in_recipe=False,
    )  # fmt: skip
    out: FilePath | None = output_option(
        None, "Output folder; a run started there is resumed.  [default: in traces/]"
    )

    def check(self) -> None:
        """Refuses options that do not go together."""
        n_tokens = read_amount(self.tokens)
        if self.logits and n_tokens > MAX_LOGIT_TOKENS:
            raise SettingsError(
                f"--logits with --tokens {self.tokens}: logits are kept of at most "
                f"{MAX_LOGIT_TOKENS:,} tokens: give fewer, or leave --logits out"
            )
        quiz = ("quiz", "split", "limit", "shots", "subjects", "truncate", "quiz_revision")
        if self.routes is not None:
            self.check_unset((*quiz, "text", "tokens", "weights", "logits"), "--routes")
        elif self.text:
            self.check_unset(quiz, "--text")

    def measuring(self, ui: UI) -> "tuple[LoadOptions, MeasureOptions]":
        """How to load and to run, as recorded where a run is resumed."""
        from expertcut.profiling.measure import MeasureOptions, resumed
        from expertcut.profiling.trace import TraceInfos

        options = MeasureOptions(None, self.batch_tokens, self.threads, waits=ui.is_first)
        load_as = self.load_as()
        if self.out is None:
            return load_as, options
        return resumed(self.out, load_as, options, TraceInfos)

    @property
    def kept(self) -> "TraceOptions":
        """What is kept."""
        from expertcut.profiling.trace_recorder import TraceOptions

        return TraceOptions(self.weights, self.logits, read_amount(self.tokens))

    def load_corpus(self, tokenizer: object) -> "Corpus":
        """The texts, tokenized."""
        from expertcut.data.corpus import TextSelection, load_corpus

        how = (self.length, read_amount(self.tokens), self.seed)
        return load_corpus(TextSelection(tuple(self.text), *how, is_bound=True), tokenizer)


def run(settings: TraceSettings, ui: UI = SILENT) -> "Trace":
    """Traces the model on a quiz or on texts, resuming an interrupted run, or takes its routes."""
    settings.check()
    ui.quiet()
    from expertcut.profiling.trace import load_trace
    from expertcut.profiling.trace_recorder import default_folder
    from expertcut.reporting.trace_tables import trace_facts

    tracing = _tracing(settings, ui)
    source = tracing.moe.source
    folder: Path = settings.out or default_folder(tracing.info, source)
    n = sum(n for _, _, n in tracing.info.chunks())
    unit = {"text": "rows", "routes": "sequences"}.get(tracing.info.reads, "questions")
    ui.watch(partial(tracing.run, folder), f"tracing {source.name}", n, folder, unit)
    trace = load_trace(folder)
    if ui.is_first:
        ui.end(trace_facts(trace), folder, ["show", str(folder)])
    return trace


def _tracing(settings: TraceSettings, ui: UI) -> "QuizTracing | TextTracing | RoutesTracing":
    import torch

    from expertcut.models.load import find_source, load
    from expertcut.profiling.given_routes import RoutesTracing, read_routes
    from expertcut.profiling.trace_recorder import QuizTracing, TextTracing

    which = settings.model, settings.revision, settings.read_contract()
    if settings.routes is not None:
        routes, source = read_routes(settings.routes), find_source(*which)
        return RoutesTracing(load(source, settings.load_as()), routes, waits=ui.is_first)
    load_as, options = settings.measuring(ui)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    source = find_source(*which)
    if settings.text:
        moe = load(source, load_as)
        return TextTracing(moe, settings.load_corpus(moe.tokenizer), options, settings.kept)
    quiz = settings.load_quiz()
    tracing = QuizTracing(load(source, load_as), quiz, settings.limit, options, settings.kept)
    if (n := len(tracing.quiz)) < len(quiz):
        spent = f"{n:,} of {len(quiz):,} questions, then --tokens {settings.tokens} are spent"
        ui.say([], [labelled("bound", spent)])
    return tracing
