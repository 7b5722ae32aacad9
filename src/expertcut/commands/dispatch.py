"""`expertcut dispatch`: choose a model for each subject or skill from answers that are there."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from expertcut.commands import SILENT, UI, output_option
from expertcut.edits.edit_settings import read_layers, read_size
from expertcut.errors import ModelError, OutputError, SettingsError
from expertcut.settings import Count, FilePath, ReadPath, Settings, Source, Text, Texts, option

if TYPE_CHECKING:
    from expertcut.evaluation.dispatch_results import DispatchResult
    from expertcut.evaluation.predictions import Predictions

DISPATCH = "dispatch.json"
categories_option = partial(option, panel="Categories")
models_option = partial(option, panel="Models")


class DispatchSettings(Settings):
    """Choose a model for each subject or skill, and test whether that helps."""

    examples: ClassVar = (
        "expertcut dispatch results.json",
        "expertcut dispatch a.json b.json --by skills.csv --most 2",
        "expertcut dispatch results.json --by routing --profile profiles/test",
    )

    results: Texts = option(
        ..., "Results of `eval` on one quiz, each with its predictions.parquet beside it.",
        is_argument=True, metavar="RESULTS [MORE]...", min_length=1,
    )  # fmt: skip
    by: str = categories_option(
        "subject",
        "What models are chosen by: subject; a CSV with columns question and skill; or routing, "
        "the subject as the router's probabilities of a profile tell it.",
        metavar="subject|FILE.csv|routing",
    )
    profile: ReadPath | None = categories_option(
        None, "Profile of the same questions, for --by routing.", metavar="PATH"
    )
    layers: Text | None = categories_option(
        None, "MoE layers that --by routing reads, as 0,3,8-15.  [default: all]", metavar="L"
    )
    way: Literal["accuracy", "symbolic"] = models_option(
        "accuracy",
        "accuracy: the most accurate models of a category, shrunk to their overall accuracy. "
        "symbolic: shares of votes as Symbolic-MoE recruits.",
        flags=("--as",),
    )
    most: Count | None = models_option(
        None, "Models that vote on a question.  [default: 1; all with --as symbolic]", metavar="N"
    )
    max_bytes: Text | None = models_option(
        None, "Bytes of all models that are held, as 8GB: the best set within.", metavar="SIZE"
    )
    quiz: Source | None = option(
        None, "Where the quiz lies now.  [default: as in the results]", panel="Quiz",
        in_recipe=False,
    )  # fmt: skip
    seed: int = option(0, "Seed of the folds.", ge=0)
    out: FilePath = output_option(
        Path(DISPATCH), "File to write, with routes.csv beside it.", metavar="FILE"
    )

    def check(self) -> None:
        """Refuses options that do not go together."""
        if self.by == "routing" and self.profile is None:
            raise SettingsError("--by routing reads a profile of the same questions: add --profile")
        for name in ("profile", "layers"):
            if self.by != "routing" and getattr(self, name) is not None:
                raise SettingsError(f"--{name} is for --by routing: add it, or leave --{name} out")
        read_layers(self.layers)
        if self.by not in ("subject", "routing") and not self.by.endswith(".csv"):
            raise SettingsError(f"--by {self.by[:80]} must be subject, routing or a .csv file")
        if self.by.endswith(".csv") and not Path(self.by).is_file():
            raise SettingsError(
                f"--by {self.by[:200]} is not there: name a CSV file of questions and skills"
            )
        if self.max_bytes is not None:
            read_size(self.max_bytes)
        if not self.out.name.endswith(DISPATCH):
            raise SettingsError(f"--out {self.out} must end in {DISPATCH}, as law.{DISPATCH}")


def run(settings: DispatchSettings, ui: UI = SILENT) -> "DispatchResult":
    """Chooses, cross-fits, and writes `dispatch.json` and `routes.csv`."""
    settings.check()
    max_bytes = None if settings.max_bytes is None else read_size(settings.max_bytes)
    for path in settings.results:  # refused before anything heavy is imported
        if not Path(path).is_file():
            what = "is a folder" if Path(path).is_dir() else "is not there"
            raise OutputError(f"{path} {what}: name a results.json of `expertcut eval`")
    ui.quiet()
    from expertcut.evaluation import dispatch_results, predictions
    from expertcut.files import write_atomically
    from expertcut.profiling.storage import load_profile
    from expertcut.reporting import dispatch_tables as tables
    from expertcut.reporting.tables import as_csv

    routes = settings.out.with_name(settings.out.name.removesuffix(DISPATCH) + "routes.csv")
    if settings.out.exists():
        dispatch_results.load_dispatch(settings.out)  # nothing else is overwritten
    if routes.exists() and not tables.are_routes(routes):
        raise OutputError(f"{routes} is not of dispatch: move it away, or name another --out")
    profile = None if settings.profile is None else load_profile(settings.profile)
    found = predictions.load_predictions([*map(Path, settings.results)], settings.quiz)
    predicted_subject_N = None
    if profile is not None:
        layers = read_layers(settings.layers)
        predicted_subject_N = predictions.predict_subjects(found, profile, layers, settings.seed)
    asked = dispatch_results.DispatchRequest(
        results=tuple(settings.results),
        by=settings.by,
        way=settings.way,
        most=settings.most,
        max_bytes=max_bytes,
        profile=None if profile is None else profile.info.short_hash,
        seed=settings.seed,
    )
    categories = predictions.read_categories(settings.by, found)
    result = dispatch_results.dispatch(found, categories, asked, predicted_subject_N)
    result = result.model_copy(update={"union_bytes": _union_bytes(result, found)})
    result.save(settings.out)
    write_atomically(routes, as_csv(tables.routes_table(result)).encode())
    ui.say(tables.dispatch_tables(result), [])
    facts = tables.dispatch_facts(result)
    ui.end(facts, f"{settings.out}, {routes}", ["report", str(settings.out)])
    return result


def _union_bytes(result: "DispatchResult", predictions: "Predictions") -> int | None:
    """Bytes of the held models with shared experts once; None where a checkpoint is not there."""
    from expertcut.checkpoints.shared_experts import union_bytes
    from expertcut.models.load import Source

    sources = []
    for model, folder in zip(result.models, predictions.folders, strict=True):
        if model.is_held:
            if folder is None:
                return None
            source = Source(model.path, folder)
            try:
                if source.fingerprint != model.fingerprint:
                    return None
            except (ModelError, OSError):
                return None
            sources.append(source)
    return union_bytes(sources)
