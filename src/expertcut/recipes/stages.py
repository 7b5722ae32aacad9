"""The stages of a recipe: their settings, what each reads, and what it makes in the run folder."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from expertcut.commands import SplitSettings
from expertcut.data import Selection
from expertcut.data.sources import Weighted
from expertcut.recipes.recipe_schema import (
    DispatchSection,
    EvalSection,
    Recipe,
    TraceSection,
    Variant,
    VariantKind,
)

Kind = Literal[
    "profile", "show", VariantKind, "eval", "dispatch", "trace", "place", "report", "publish"
]
PROFILE, TRACE, RESULTS, REPORT = "profile", "trace", "results.json", "report.html"
DISPATCH, ROUTES, PLACEMENT = "dispatch.json", "routes.csv", "placement"
# The recipe's keys in a stage's hash, in the order of older runs.
_LOADED = ("model", "revision", "trust_remote_code", "dtype", "device", "device_map")
_QUIZ = ("quiz", "quiz_revision", "shots", "subjects", "truncate")
_SCORED = (*_LOADED, "threads", "batch_tokens", *_QUIZ)


@dataclass(frozen=True)
class Stage:
    """One stage: what it reads, and the files and folders of the run folder that it makes."""

    name: str
    kind: Kind
    settings: Mapping[str, Any]  # all its values from the recipe
    makes: tuple[str, ...]
    after: tuple[str, ...] = ()  # the stages that it reads
    questions: tuple[Selection, ...] = ()  # of the recipe's quiz
    optional_questions: tuple[Selection, ...] = ()  # of splits that the quiz may lack
    reads_model: bool = False
    keeps: tuple[str, ...] = ()  # folders that let it resume
    leaves: tuple[str, ...] = ()  # files in another stage's folder
    reads: tuple[str, ...] = ()  # other quizzes and files
    texts: tuple[str, ...] = ()  # data sets of texts; files and folders that are read whole
    adapter: str | None = None  # an adapter's folder


def variant_folder(name: str) -> str:
    """A variant's folder in the run folder."""
    return f"variants/{name}"


def stages_of(recipe: Recipe) -> list[Stage]:
    """All stages in order."""
    stages = [_profile_stage(recipe)]
    if recipe.show:
        settings = recipe.show.recipe_values()
        stages.append(Stage("show", "show", settings, makes=("show",), after=("profile",)))
    traces = [_trace_stage(recipe, recipe.trace)] if recipe.trace else []
    if any(variant.is_balancing for variant in recipe.variants):
        stages += traces
    for variant in recipe.variants:
        make = _variant_stage if variant.heal is None else _heal_stage
        stages.append(make(recipe, variant))
    results = tuple(stage.name for stage in stages if stage.kind not in ("show", "trace"))
    if recipe.eval:
        stages.append(_eval_stage(recipe, recipe.eval, after=results))
        results += ("eval",)
    if recipe.dispatch:
        stages.append(_dispatch_stage(recipe.dispatch))
        results += ("dispatch",)
    stages += [stage for stage in traces if stage not in stages]
    results += tuple(stage.name for stage in traces)
    if recipe.place:
        settings = recipe.place.recipe_values()
        stages.append(Stage("place", "place", settings, makes=(PLACEMENT,), after=("trace",)))
        results += ("place",)
    if recipe.report:
        settings = recipe.report.recipe_values()
        stages.append(Stage("report", "report", settings, makes=(REPORT, "report"), after=results))
    after = [stage.name for stage in stages if stage.kind in ("eval", "dispatch", "report")]
    for published in recipe.publish:
        folder = variant_folder(published.variant)
        stages.append(
            Stage(
                *(f"publish {published.variant}", "publish"),
                settings=published.recipe_values(),
                makes=(f"publish/{published.variant}.json",),
                after=(published.variant, *after),
                leaves=(f"{folder}/README.md", *([f"{folder}/{REPORT}"] if recipe.report else [])),
            )
        )
    return stages


def _profile_stage(recipe: Recipe) -> Stage:
    """Profiles on the recipe's quiz, or on the section's own texts."""
    stage = _scoring_stage(recipe, "profile", recipe.profile, makes=(PROFILE,))
    texts = recipe.profile.text
    return replace(_without_quiz(stage), texts=_names(texts)) if texts else stage


def _trace_stage(recipe: Recipe, section: TraceSection) -> Stage:
    """Traces the recipe's quiz, or texts."""
    stage = _scoring_stage(recipe, "trace", section, makes=(TRACE,))
    texts = section.texts_of(recipe)
    return replace(_without_quiz(stage), texts=_names(texts)) if texts else stage


def _eval_stage(recipe: Recipe, section: EvalSection, after: tuple[str, ...]) -> Stage:
    """Judges on the recipe's quiz, if it has one, and on all that the section names."""
    files = (section.generate, section.include_path)
    makes = (RESULTS, *(["predictions.parquet"] if recipe.has_quiz else []))
    stage = _scoring_stage(
        *(recipe, "eval", section),
        makes=(*makes, *(["generations.jsonl"] if section.generate else [])),
        keeps=("results.chunks",),
        after=after,
        texts=(*_names(section.text), *(str(file) for file in files if file is not None)),
    )
    return stage if recipe.has_quiz else _without_quiz(stage)


def _dispatch_stage(section: DispatchSection) -> Stage:
    """Chooses from the answers of eval, and from results of other evaluations."""
    from expertcut.evaluation.results import predictions_file  # with numpy

    results = [Path(name) for name in section.results]
    files = [*results, *map(predictions_file, results)]
    files += [] if section.profile is None else [section.profile / "profile.json"]
    files += [Path(section.by)] if section.by.endswith(".csv") else []
    return Stage(
        *("dispatch", "dispatch", section.recipe_values()),
        makes=(DISPATCH, ROUTES),
        after=("eval",),
        reads=tuple(map(str, files)),
    )


def _without_quiz(stage: Stage) -> Stage:
    settings = {k: v for k, v in stage.settings.items() if k not in _QUIZ}
    return replace(stage, settings=settings, questions=())


def _names(weighted: Iterable[str]) -> tuple[str, ...]:
    return tuple(Weighted.read(text).name for text in weighted)


def _scoring_stage(recipe: Recipe, kind: Kind, section: SplitSettings, **more: Any) -> Stage:
    """Scores questions of the recipe's quiz with its settings."""
    settings = _recipe_keys(recipe, *_SCORED) | section.recipe_values()
    questions = (recipe.selection(section.split, section.limit),)
    return Stage(kind, kind, settings, questions=questions, reads_model=True, **more)


def _heal_stage(recipe: Recipe, variant: Variant) -> Stage:
    """Trains on the recipe's quiz unless it names others; can resume."""
    section = variant.heal
    assert section is not None
    folder = variant_folder(variant.name)
    texts = _names(section.texts_of(recipe))
    is_own = not section.quiz and not texts
    # With subjects of its own it may read more of that quiz than other stages: it depends on all.
    quizzes = (*_names(section.quiz), *([recipe.quiz] if is_own and section.subjects else []))
    lines = tuple(text for text in texts if text.endswith(".jsonl"))  # hashed as in older runs
    _, split = section.scored(recipe)
    others = (section.eval_quiz,) if section.eval_quiz else ()
    is_scored = recipe.has_quiz and not section.eval_quiz
    settings = _recipe_keys(recipe, *_LOADED, "threads") | variant.recipe_values()
    return Stage(
        *(variant.name, variant.kind, settings | {"scored": split}),
        makes=(folder,),
        after=("profile", section.of),
        questions=(recipe.selection(section.split, section.limit),) if is_own else (),
        optional_questions=(recipe.selection(split),) if is_scored else (),
        reads_model=True,
        keeps=(f"{folder}.healing",),
        reads=quizzes + lines + others,
        texts=tuple(text for text in texts if text not in lines),
    )


def _variant_stage(recipe: Recipe, variant: Variant) -> Stage:
    """Tunes and scores on splits of the quiz other than the profile's."""
    own = recipe.profile.split
    settings = _recipe_keys(recipe, *_LOADED) | variant.recipe_values()
    if settings[variant.kind].get("held_out", 0) is None:  # keeps the hashes of older runs
        del settings[variant.kind]["held_out"]
    # Texts choose, tune and score alone, and so does a trace.
    is_own = bool(recipe.profile.text) or variant.is_balancing
    other = tuple(recipe.selection(s) for s in ("val", "test") if s != own)
    return Stage(
        *(variant.name, variant.kind, settings),
        makes=(variant_folder(variant.name),),
        after=("trace",) if variant.is_balancing else ("profile",),
        questions=() if is_own else (recipe.selection(own, recipe.profile.limit),),
        optional_questions=() if is_own else other,
        reads_model=True,
        adapter=variant.prune.adapter if variant.prune else None,
    )


def _recipe_keys(recipe: Recipe, *keys: str) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", include={*keys})
    # Without `truncate` the hashes of older runs stay valid.
    return {k: values[k] for k in keys if k != "truncate" or recipe.truncate is not None}
