"""The stages of a recipe: their settings, what each reads, and what it makes in the run folder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from expertcut.commands import SplitSettings
from expertcut.data import Selection
from expertcut.data.sources import Weighted
from expertcut.recipes.recipe_schema import Recipe, Variant, VariantKind

Kind = Literal["profile", "show", VariantKind, "eval", "report", "publish"]
PROFILE, RESULTS, REPORT = "profile", "results.json", "report.html"
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
    texts: tuple[str, ...] = ()  # files, folders and data sets of texts
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
    for variant in recipe.variants:
        make = _variant_stage if variant.heal is None else _heal_stage
        stages.append(make(recipe, variant))
    results = tuple(stage.name for stage in stages if stage.kind != "show")
    if recipe.eval:
        files = {"makes": (RESULTS, "predictions.parquet"), "keeps": ("results.chunks",)}
        stages.append(_scoring_stage(recipe, "eval", recipe.eval, after=results, **files))
        results += ("eval",)
    if recipe.report:
        settings = recipe.report.recipe_values()
        stages.append(Stage("report", "report", settings, makes=(REPORT, "report"), after=results))
    after = [stage.name for stage in stages if stage.kind in ("eval", "report")]
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
    if not (texts := recipe.profile.text):
        return stage
    settings = {k: v for k, v in stage.settings.items() if k not in _QUIZ}
    names = tuple(Weighted.read(text).name for text in texts)
    return replace(stage, settings=settings, questions=(), texts=names)


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
    is_own = not section.quiz and not section.text
    # With subjects of its own it may read more of that quiz than other stages: it depends on all.
    read = [*section.quiz, *section.text, *([recipe.quiz] if is_own and section.subjects else [])]
    _, split = section.scored(recipe)
    others = (section.eval_quiz,) if section.eval_quiz else ()
    settings = _recipe_keys(recipe, *_LOADED, "threads") | variant.recipe_values()
    return Stage(
        *(variant.name, variant.kind, settings | {"scored": split}),
        makes=(folder,),
        after=("profile", section.of),
        questions=(recipe.selection(section.split, section.limit),) if is_own else (),
        optional_questions=() if section.eval_quiz else (recipe.selection(split),),
        reads_model=True,
        keeps=(f"{folder}.healing",),
        reads=tuple(Weighted.read(text).name for text in read) + others,
    )


def _variant_stage(recipe: Recipe, variant: Variant) -> Stage:
    """Tunes and scores on splits of the quiz other than the profile's."""
    own = recipe.profile.split
    settings = _recipe_keys(recipe, *_LOADED) | variant.recipe_values()
    if settings[variant.kind].get("held_out", 0) is None:  # keeps the hashes of older runs
        del settings[variant.kind]["held_out"]
    is_text = bool(recipe.profile.text)  # and so chosen, tuned and scored on these
    other = tuple(recipe.selection(s) for s in ("val", "test") if s != own)
    return Stage(
        *(variant.name, variant.kind, settings),
        makes=(variant_folder(variant.name),),
        after=("profile",),
        questions=() if is_text else (recipe.selection(own, recipe.profile.limit),),
        optional_questions=() if is_text else other,
        reads_model=True,
        adapter=variant.prune.adapter if variant.prune else None,
    )


def _recipe_keys(recipe: Recipe, *keys: str) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", include={*keys})
    # Without `truncate` the hashes of older runs stay valid.
    return {k: values[k] for k in keys if k != "truncate" or recipe.truncate is not None}
