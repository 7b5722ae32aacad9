"""`expertcut dispatch`: choose a model for each subject or skill from answers that are there."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from expertcut.commands import SILENT, UI, output_option
from expertcut.edits.edit_settings import read_size
from expertcut.errors import ModelError, OutputError, ProfileError, SettingsError
from expertcut.settings import Count, FilePath, Settings, Source, Texts, option

if TYPE_CHECKING:
    from expertcut.evaluation.dispatch_results import DispatchResult
    from expertcut.evaluation.predictions import Predictions
    from expertcut.profiling.storage import Profile
    from expertcut.stats import Array

DISPATCH = "dispatch.json"
categories_option = partial(option, panel="Categories", in_recipe=False)
models_option = partial(option, panel="Models", in_recipe=False)


class DispatchSettings(Settings):
    """Choose a model for each subject or skill, and test whether that helps."""

    examples: ClassVar = (
        "expertcut dispatch results.json",
        "expertcut dispatch a.json b.json --by skills.csv --most 2",
        "expertcut dispatch results.json --by routing --profile profiles/test",
    )

    results: Texts = option(
        ..., "Results of `eval` on one quiz, each with its predictions.parquet beside it.",
        is_argument=True, metavar="RESULTS [MORE]...", in_recipe=False, min_length=1,
    )  # fmt: skip
    by: str = categories_option(
        "subject",
        "What models are chosen by: subject; a CSV with columns question and skill; or routing, "
        "the subject as the router's probabilities of a profile tell it.",
        metavar="subject|FILE.csv|routing",
    )
    profile: FilePath | None = categories_option(
        None, "Profile of the same questions, for --by routing.", metavar="PATH"
    )
    layers: str | None = categories_option(
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
    max_bytes: str | None = models_option(
        None, "Bytes of all models that are held, as 8GB: the best set within.", metavar="SIZE"
    )
    quiz: Source | None = option(
        None, "Where the quiz lies now.  [default: as in the results]", panel="Quiz",
        in_recipe=False,
    )  # fmt: skip
    seed: int = option(0, "Seed of the folds.", ge=0, in_recipe=False)
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
        if self.by not in ("subject", "routing") and not self.by.endswith(".csv"):
            raise SettingsError(f"--by {self.by[:80]} must be subject, routing or a .csv file")
        if not self.out.name.endswith(DISPATCH):
            raise SettingsError(f"--out {self.out} must end in {DISPATCH}, as law.{DISPATCH}")


def run(settings: DispatchSettings, ui: UI = SILENT) -> "DispatchResult":
    """Chooses, cross-fits, and writes `dispatch.json` and `routes.csv`."""
    settings.check()
    max_bytes = None if settings.max_bytes is None else read_size(settings.max_bytes)
    missing = [path for path in settings.results if not Path(path).exists()]
    if missing:  # refused before anything heavy is imported
        raise OutputError(f"{missing[0]} is not there: name results of `expertcut eval`")
    ui.quiet()
    from expertcut.evaluation import dispatch_results as outcome
    from expertcut.evaluation.predictions import load_predictions
    from expertcut.files import write_atomically
    from expertcut.reporting import dispatch_tables as tables
    from expertcut.reporting.tables import as_csv

    routes = settings.out.with_name(settings.out.name.removesuffix(DISPATCH) + "routes.csv")
    if settings.out.exists():
        outcome.load_dispatch(settings.out)  # nothing else is overwritten
    predictions = load_predictions([*map(Path, settings.results)], settings.quiz)
    profile, told_N = _told_subjects(settings, predictions)
    asked = outcome.AskedDispatch(
        results=tuple(settings.results),
        by=settings.by,
        way=settings.way,
        most=settings.most,
        max_bytes=max_bytes,
        profile=None if profile is None else profile.info.short_hash,
        seed=settings.seed,
    )
    result = outcome.dispatch(predictions, _categories(settings, predictions), asked, told_N)
    result = result.model_copy(update={"union_bytes": _union_bytes(result, predictions)})
    result.save(settings.out)
    write_atomically(routes, as_csv(tables.routes_table(result)).encode())
    ui.say(tables.dispatch_tables(result), [])
    facts = tables.dispatch_facts(result)
    ui.end(facts, f"{settings.out}, {routes}", ["report", str(settings.out)])
    return result


def _categories(settings: DispatchSettings, predictions: "Predictions") -> Mapping[str, "Array"]:
    """Masks of the questions of each subject or skill."""
    import numpy as np

    subject_N = predictions.answered.subject_N
    if settings.by in ("subject", "routing"):
        return {str(name): subject_N == name for name in np.unique(subject_N)}
    from expertcut.evaluation.predictions import read_skills

    numbers_N = np.arange(len(subject_N))
    skills = read_skills(Path(settings.by), predictions)
    return {skill: np.isin(numbers_N, [*own]) for skill, own in skills.items()}


def _told_subjects(
    settings: DispatchSettings, predictions: "Predictions"
) -> "tuple[Profile | None, Any]":
    """The subject of each question, as a place in name order, as a reader of α tells it."""
    if settings.profile is None:
        return None, None
    import numpy as np

    from expertcut.edits.reweight_select import read_layers
    from expertcut.edits.splits import profiled_quiz
    from expertcut.evaluation.dispatching import folds_of, read_labels
    from expertcut.evaluation.predictions import question_keys
    from expertcut.profiling.storage import load_profile

    profile = load_profile(settings.profile)
    asked = question_keys(profiled_quiz(profile))
    place = {key[:3]: n for n, key in reversed([*enumerate(asked)])}
    keys = [(q.subject, q.content_hash, q.answer) for q in predictions.questions]
    if unknown := [key for key in keys if key not in place]:
        raise ProfileError(
            f"{settings.profile} did not ask {len(unknown):,} of the {len(keys):,} questions, "
            f"first of subject {unknown[0][0]}: profile the split that was evaluated"
        )
    n_layers = len(profile.info.model.blocks)
    layers = read_layers(settings.layers) or tuple(range(n_layers))
    if max(layers) >= n_layers:
        raise SettingsError(
            f"--layers {max(layers)}: {settings.profile} has MoE layers 0 to {n_layers - 1}"
        )
    alpha_NLE = profile.array("alpha_NLE")[[place[key] for key in keys]][:, list(layers)]
    answered = predictions.answered
    _, label_N = np.unique(answered.subject_N, return_inverse=True)
    feature_NX = alpha_NLE.reshape(len(keys), -1).astype(np.float64)
    return profile, read_labels(feature_NX, label_N, folds_of(answered, settings.seed))


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
