"""The stages of a recipe: their settings, what each reads, and what it makes in the run folder."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from expertcut.data import Selection
from expertcut.data.sources import Weighted
from expertcut.errors import RecipeError
from expertcut.recipes.recipe_schema import Recipe, Variant

Kind = Literal["profile", "show", "prune", "merge", "reweight", "heal", "eval", "report", "publish"]
PROFILE, RESULTS, REPORT, CARD = "profile", "results.json", "report.html", "README.md"
# The recipe's keys in a stage's hash, in the order of older runs.
_LOADED = ("model", "revision", "trust_remote_code", "dtype", "device", "device_map")
_QUIZ = ("quiz", "quiz_revision", "shots", "subjects", "truncate")
_SCORED = (*_LOADED, "threads", "batch_tokens", *_QUIZ)


@dataclass(frozen=True)
class Questions:
    """Questions of the recipe's quiz; `is_needed` refuses a quiz without the split."""

    split: str
    limit: int | None = None
    is_needed: bool = True

    def selection(self, recipe: Recipe) -> Selection:
        """The questions as `load_quiz` takes them."""
        which = (recipe.quiz, self.split, recipe.shots, tuple(recipe.subjects), self.limit)
        return Selection(*which, recipe.quiz_revision, recipe.truncate)


@dataclass(frozen=True)
class Stage:
    """One stage: `settings` are all its values from the recipe, `after` the stages that it reads.

    `makes` are its files and folders in the run folder, `leaves` its files in another stage's
    folder, `keeps` its folders that let it resume. `reads` are other quizzes and files than the
    recipe's, `adapter` is an adapter's folder.
    """

    name: str
    kind: Kind
    settings: Mapping[str, Any]
    makes: tuple[str, ...]
    after: tuple[str, ...] = ()
    questions: tuple[Questions, ...] = ()
    reads_model: bool = False
    keeps: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    adapter: str | None = None


def find_stage(name: str, stages: list[Stage]) -> int:
    """The place of the stage of that name, else of the first of that kind, else RecipeError."""
    names, kinds = [stage.name for stage in stages], [str(stage.kind) for stage in stages]
    for found in (names, kinds):
        if name in found:
            return found.index(name)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
    raise RecipeError(f"--from {name[:80]!a}: the recipe has no such stage: {hint}")


def variant_folder(name: str) -> str:
    """A variant's folder in the run folder."""
    return f"variants/{name}"


def stages_of(recipe: Recipe) -> list[Stage]:
    """All stages in order."""
    return list(_stages(recipe))


def _stages(recipe: Recipe) -> Iterator[Stage]:
    yield Stage(
        *("profile", "profile"),
        settings=_recipe_keys(recipe, *_SCORED) | recipe.profile.recipe_values(),
        makes=(PROFILE,),
        questions=(Questions(recipe.profile.split, recipe.profile.limit),),
        reads_model=True,
    )
    if recipe.show:
        settings = recipe.show.recipe_values()
        yield Stage("show", "show", settings, makes=("show",), after=("profile",))
    for variant in recipe.variants:
        make = _variant_stage if variant.heal is None else _heal_stage
        yield make(recipe, variant)
    names = tuple(variant.name for variant in recipe.variants)
    if recipe.eval:
        yield Stage(
            *("eval", "eval"),
            settings=_recipe_keys(recipe, *_SCORED) | recipe.eval.recipe_values(),
            makes=(RESULTS, "predictions.parquet"),
            after=("profile", *names),
            questions=(Questions(recipe.eval.split, recipe.eval.limit),),
            reads_model=True,
            keeps=("results.chunks",),
        )
    evaluated = ["eval"] if recipe.eval else []
    if recipe.report:
        after = ("profile", *names, *evaluated)
        settings = recipe.report.recipe_values()
        yield Stage("report", "report", settings, makes=(REPORT, "report"), after=after)
    reported = ["report"] if recipe.report else []
    for published in recipe.publish:
        folder = variant_folder(published.variant)
        yield Stage(
            *(f"publish {published.variant}", "publish"),
            settings=published.recipe_values(),
            makes=(f"publish/{published.variant}.json",),
            after=(published.variant, *evaluated, *reported),
            leaves=(f"{folder}/{CARD}", *([f"{folder}/{REPORT}"] if recipe.report else [])),
        )


def _heal_stage(recipe: Recipe, variant: Variant) -> Stage:
    """Trains on the recipe's quiz unless it names others; can resume.

    With subjects of its own it may read more of that quiz than other stages, so it depends on all.
    """
    section = variant.heal
    assert section is not None
    folder = variant_folder(variant.name)
    is_own = not section.quiz and not section.text
    read = [*section.quiz, *section.text, *([recipe.quiz] if is_own and section.subjects else [])]
    trained = [Questions(section.split, section.limit)] if is_own else []
    _, split = section.scored(recipe)
    others = (section.eval_quiz,) if section.eval_quiz else ()
    scored = [] if section.eval_quiz else [Questions(split, None, is_needed=False)]
    settings = _recipe_keys(recipe, *_LOADED, "threads") | variant.recipe_values()
    return Stage(
        *(variant.name, "heal"),
        settings=settings | {"scored": split},
        makes=(folder,),
        after=("profile", section.of),
        questions=(*trained, *scored),
        reads_model=True,
        keeps=(f"{folder}.healing",),
        reads=tuple(Weighted.read(text).name for text in read) + others,
    )


def _variant_stage(recipe: Recipe, variant: Variant) -> Stage:
    """Tunes and scores on splits of the quiz other than the profile's."""
    own, limit = recipe.profile.split, recipe.profile.limit
    others = [Questions(s, None, is_needed=False) for s in ("val", "test") if s != own]
    settings = _recipe_keys(recipe, *_LOADED) | variant.recipe_values()
    if settings[variant.kind].get("held_out", 0) is None:  # keeps the hashes of older runs
        del settings[variant.kind]["held_out"]
    return Stage(
        *(variant.name, variant.kind),  # type: ignore[arg-type]
        settings=settings,
        makes=(variant_folder(variant.name),),
        after=("profile",),
        questions=(Questions(own, limit), *others),
        reads_model=True,
        adapter=variant.prune.adapter if variant.prune else None,
    )


def _recipe_keys(recipe: Recipe, *keys: str) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", include={*keys})
    # Without `truncate` the hashes of older runs stay valid.
    return {k: values[k] for k in keys if k != "truncate" or recipe.truncate is not None}
