"""`expertcut profile`: run a quiz through a model and record its experts."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

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
from expertcut.errors import SettingsError
from expertcut.settings import FilePath, like, option

if TYPE_CHECKING:
    from expertcut.models.contract_check import Contract
    from expertcut.models.load import LoadOptions
    from expertcut.profiling.measure import MeasureOptions
    from expertcut.profiling.storage import Profile


_OF_QUIZ = (
    *("quiz", "split", "limit", "shots", "subjects", "truncate", "quiz_revision"),
    *("stats", "perturb"),
)


class ContractSettings(commands.ModelSettings):
    """The contract of a model whose blocks are in no shape that is known."""

    contract: FilePath | None = model_option(
        None, "Code that declares the MoE blocks, where none are found.",
        metavar="FILE.py", is_recorded="set",
    )  # fmt: skip

    def read_contract(self) -> "Contract | None":
        """The contract, if one is given; refused where code is not trusted."""
        from expertcut.models.contract_check import read_contract

        if self.contract is None:
            return None
        if not self.trust_remote_code:
            raise SettingsError(
                f"--contract {self.contract} is code that runs: read it, then --trust-remote-code"
            )
        return read_contract(self.contract)


_PARALLEL = like(r"(tensor|expert)(:\d{1,4})?", "must be tensor or expert, or like tensor:4")


class ParallelSettings(commands.ModelSettings):
    """Whether the processes of torchrun hold one model together."""

    parallel: Annotated[str, _PARALLEL] | None = model_option(
        None,
        "Spread one model over the processes of torchrun: tensor or expert; tensor:4 makes groups "
        "of 4, which share the work.",
    )

    def load_as(self) -> "LoadOptions":
        """The options of the loader."""
        load_as = super().load_as()
        if self.parallel is None:
            return load_as
        for name in ("device_map", "max_memory", "offload", "layerwise", "contract"):
            if getattr(self, name, None):
                raise SettingsError(
                    f"--parallel {self.parallel} and --{name.replace('_', '-')} are two ways: give "
                    "one of them"
                )
        return replace(load_as, parallel=self.parallel)

    def check_one_group(self, what: str) -> None:
        """Refuses groups where they cannot share the work."""
        if self.parallel is not None and ":" in self.parallel:
            raise SettingsError(
                f"--parallel {self.parallel}: {what} is the work of one group: give --parallel "
                f"{self.parallel.partition(':')[0]}, and start as many processes as hold the model"
            )


class ProfileSettings(
    ContractSettings,
    commands.LayerwiseSettings,
    TextSettings,
    SplitSettings,
    ParallelSettings,
):
    """Measure what experts do in a quiz or in texts."""

    examples: ClassVar = (
        "expertcut profile MODEL --quiz my.jsonl --shots 0",
        "expertcut profile allenai/OLMoE-1B-7B-0125-Instruct --split val --device cuda",
        "expertcut profile MODEL --text code.jsonl=7 --text chat.jsonl=3 --tokens 1M",
    )

    model: str = option(
        "allenai/OLMoE-1B-7B-0125-Instruct", "Checkpoint folder or Hub id.",
        is_argument=True, in_recipe=False,
    )  # fmt: skip
    revision: str | None = model_option(None, "Branch, tag or commit of a model of the Hub.")
    stats: Literal["answer", "all"] | None = option(
        None, "Keep statistics of the answer position only, or of all tokens.  [default: all]",
        panel="Profile",
    )  # fmt: skip
    perturb: list[Literal["shuffle-choices", "bf16"]] = option(
        [], "Ask again with choices shuffled or in bfloat16; repeatable.", panel="Profile"
    )
    loss: bool = text_option(
        True, "Do not predict next tokens of --text, which is faster.", flags=("--no-loss",)
    )
    routes: FilePath | None = option(
        None, "Take what vLLM or SGLang returned: .npz of routed_experts and token_ids.",
        panel="Profile", metavar="FILE", in_recipe=False, is_recorded="set",
    )  # fmt: skip
    out: FilePath | None = output_option(
        None, "Output folder; a run started there is resumed.  [default: in profiles/]"
    )

    def measuring(self, ui: UI) -> "tuple[LoadOptions, MeasureOptions]":
        """How to load and to measure, as recorded where a run is resumed."""
        from expertcut.profiling.measure import MeasureOptions, resumed

        options = MeasureOptions(self.stats, self.batch_tokens, self.threads, waits=ui.is_first)
        load_as = self.load_as()
        return (load_as, options) if self.out is None else resumed(self.out, load_as, options)

    def check_routes(self) -> None:
        """Refuses options of texts or a quiz beside routes, which were chosen already."""
        texts = ("text", "tokens", "seed", "assistant_only", "max_tokens", "loss")
        self.check_unset((*_OF_QUIZ, *texts, "layerwise", "hidden_states", "parallel"), "--routes")

    def check_without_quiz(self) -> None:
        """Refuses options of a quiz beside texts: one command makes one profile."""
        for name in _OF_QUIZ:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise SettingsError(
                    f"--{name.replace('_', '-')} is for a quiz, and --text reads texts: profile "
                    "each in a run of its own, and blend them in prune"
                )


def run(settings: ProfileSettings, ui: UI = SILENT) -> "Profile":
    """Profiles the model on a quiz or on texts, resuming an interrupted run."""
    if settings.routes is not None:
        settings.check_routes()
    settings.check_text()
    if settings.text or settings.routes is not None:
        settings.check_without_quiz()
        return _profile_text(settings, ui)
    ui.quiet()
    from expertcut.models.load import find_source
    from expertcut.profiling import measure
    from expertcut.profiling.findings import KINDS
    from expertcut.profiling.storage import load_profile
    from expertcut.reporting.edit_tables import accuracy_text
    from expertcut.reporting.profile_tables import cut_text

    if settings.layerwise and settings.perturb:
        raise SettingsError("--perturb asks a model again, and --layerwise runs it once: give one")
    load_as, options = settings.measuring(ui)
    contract = settings.read_contract()
    source = find_source(settings.model, settings.revision, contract)
    quiz = settings.load_quiz()
    measurement = measure.measure(source, quiz, settings.limit, load_as, options)
    if "bf16" in settings.perturb and measurement.info.settings.dtype == "bfloat16":
        raise SettingsError(
            "--perturb bf16 changes nothing: the model runs in bfloat16: profile with "
            "--dtype float32 or leave it out"
        )
    folder: Path = settings.out or measure.default_folder(measurement.info, source)
    name, total = measurement.moe.source.name, len(quiz)
    ui.watch(partial(measurement.run, folder), f"profiling {name}", total, folder)
    for kind in KINDS:
        if kind in settings.perturb:
            steps = partial(measure.perturb, measurement, kind, folder, load_as)
            ui.watch(steps, f"again with {kind}", total, folder)
    profile = load_profile(folder)
    if ui.is_first:
        answers, n = profile.answers, len(profile.answers.answer_N)
        text = f"{n:,} {quiz.split} questions of {quiz.id} at {quiz.shots} shots"
        facts = [("quiz", f"{text}{cut_text(answers.n_cut)}")]
        facts += [("accuracy", accuracy_text(answers.accuracy, n, answers.chance))]
        by = () if profile.info.settings.stats == "answer" else ("--by", "reap")
        prune = ["prune", "--sparsity", "0.5", *by, "--profile", str(folder)]
        ui.end(facts, folder, ["show", str(folder)], prune)
    return profile


def _profile_text(settings: ProfileSettings, ui: UI) -> "Profile":
    """Profiles the model on texts, or by given routes."""
    ui.quiet()
    import torch

    from expertcut.models.load import find_source, load
    from expertcut.profiling.given_routes import RoutesProfiling, read_routes
    from expertcut.profiling.measure_text import TextMeasurement, default_folder
    from expertcut.profiling.storage import load_profile
    from expertcut.reporting.text_profile_tables import next_criterion, profile_facts

    load_as, options = settings.measuring(ui)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    routes = None if settings.routes is None else read_routes(settings.routes)
    moe = load(find_source(settings.model, settings.revision, settings.read_contract()), load_as)
    measurement: RoutesProfiling | TextMeasurement
    if routes is not None:
        measurement = RoutesProfiling(moe, routes, options)
    else:
        corpus = settings.load_corpus(moe.tokenizer)
        measurement = TextMeasurement(moe, corpus, options, has_loss=settings.loss)
    folder: Path = settings.out or default_folder(measurement.info, moe.source)
    n_rows = sum(map(len, measurement.corpus.rows.values()))
    steps = partial(measurement.run, folder)
    ui.watch(steps, f"profiling {moe.source.name}", n_rows, folder, "rows")
    profile = load_profile(folder)
    if ui.is_first:
        by = next_criterion(profile)
        prune = ["prune", "--sparsity", "0.5", *by, "--profile", str(folder)]
        ui.end(profile_facts(profile), folder, ["show", str(folder)], prune)
    return profile


def profiled_first(settings: commands.ModelFirstSettings, ui: UI) -> dict[str, list[str] | None]:
    """The `profile` of the model, made or resumed, and no more what it is made from; or nothing."""
    settings.check_model()
    if settings.model is None:
        return {}
    names = {*ProfileSettings.model_fields} - {"out", "seed"}  # an edit's seed is its own
    given = settings.model_dump(include=names, exclude_none=True)
    unset = dict.fromkeys(("model", *commands.ScoredSettings.model_fields))
    made = run(ProfileSettings.read(**given), ui)
    return unset | {"text": [], "profile": [str(made.path)]}
