"""The stages of a recipe: what each takes from it, reads of others, and makes in the run folder."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from expertcut.data import Selection
from expertcut.data.sources import Weighted
from expertcut.errors import RecipeError
from expertcut.recipes.recipe_schema import HealSection, Recipe, Variant

Kind = Literal["profile", "show", "prune", "merge", "reweight", "heal", "eval", "report", "publish"]
PROFILE, VARIANTS = "profile", "variants"
RESULTS, REPORT, CARD = "results.json", "report.html", "README.md"
# The recipe's own keys in a stage's hash: their order in the manifest is that of older runs.
_LOADED = ("model", "revision", "trust_remote_code", "dtype", "device", "device_map")
_RUN = ("threads", "batch_tokens")
_ASKED = ("quiz", "quiz_revision", "shots", "subjects", "truncate")
_JUDGES = ("val", "test")  # splits that fit and judge, where the quiz has them


@dataclass(frozen=True)
class Asking:
    """Questions that a stage reads; without `is_needed` there may be none."""

    split: str
    limit: int | None = None
    is_needed: bool = True

    def selection(self, recipe: Recipe) -> Selection:
        """As the quiz takes it."""
        kind = (recipe.shots, tuple(recipe.subjects), self.limit, recipe.quiz_revision)
        return Selection(recipe.quiz, self.split, *kind, recipe.truncate)


@dataclass(frozen=True)
class Stage:
    """One stage: `settings` are all that it takes from the recipe, `after` the stages it reads.

    `makes` are its files and folders in the run folder, `leaves` those in another stage's folder,
    `keeps` are those that help it to go on. `reads` are quizzes and files of its own, `adapter` is
    the folder of one that it reads.
    """

    name: str
    kind: Kind
    settings: Mapping[str, Any]
    makes: tuple[str, ...]
    after: tuple[str, ...] = ()
    asks: tuple[Asking, ...] = ()
    reads_model: bool = False
    keeps: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    adapter: str | None = None


def stages_of(recipe: Recipe) -> list[Stage]:
    """All stages in order."""
    return list(_stages(recipe))


def find_stage(name: str, stages: list[Stage]) -> int:
    """The place of the stage of that name, else of the first of that kind.

    Raises:
        RecipeError: there is none.
    """
    for of in ([s.name for s in stages], [str(s.kind) for s in stages]):
        if name in of:
            return of.index(name)
    names = [stage.name for stage in stages]
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
    raise RecipeError(f"--from {name[:80]!a}: the recipe has no such stage: {hint}")


def variant_folder(name: str) -> str:
    """Where a variant lies in the run folder."""
    return f"{VARIANTS}/{name}"


def _stages(recipe: Recipe) -> Iterator[Stage]:
    yield Stage(
        *("profile", "profile"),
        settings=_taken(recipe, *_LOADED, *_RUN, *_ASKED) | recipe.profile.recipe_values(),
        makes=(PROFILE,),
        asks=(Asking(recipe.profile.split, recipe.profile.limit),),
        reads_model=True,
    )
    if recipe.show:
        settings = recipe.show.recipe_values()
        yield Stage("show", "show", settings, makes=("show",), after=("profile",))
    for variant in recipe.variants:
        yield _variant_stage(recipe, variant)
    names = tuple(variant.name for variant in recipe.variants)
    if recipe.eval:
        yield Stage(
            *("eval", "eval"),
            settings=_taken(recipe, *_LOADED, *_RUN, *_ASKED) | recipe.eval.recipe_values(),
            makes=(RESULTS, "predictions.parquet"),
            after=("profile", *names),
            asks=(Asking(recipe.eval.split, recipe.eval.limit),),
            reads_model=True,
            keeps=("results.chunks",),
        )
    shown = ("profile", *names, *(["eval"] if recipe.eval else []))
    if recipe.report:
        settings = recipe.report.recipe_values()
        yield Stage("report", "report", settings, makes=(REPORT, "report"), after=shown)
    yield from _publish_stages(recipe)


def _publish_stages(recipe: Recipe) -> Iterator[Stage]:
    tells = [name for name in ("eval", "report") if getattr(recipe, name)]
    for published in recipe.publish:
        folder = variant_folder(published.variant)
        yield Stage(
            *(f"publish {published.variant}", "publish"),
            settings=published.recipe_values(),
            makes=(f"publish/{published.variant}.json",),
            after=(published.variant, *tells),
            leaves=(f"{folder}/{CARD}", *([f"{folder}/{REPORT}"] if recipe.report else [])),
        )


def _heal_stage(recipe: Recipe, variant: Variant, asked: HealSection) -> Stage:
    """Without other quizzes it is trained on the recipe's; what it has done is gone on from.

    With subjects of its own it may read more of that quiz than the others do, so all of it counts.
    """
    folder = variant_folder(variant.name)
    is_own = not asked.quiz and not asked.text
    read = [*asked.quiz, *asked.text, *([recipe.quiz] if is_own and asked.subjects else [])]
    trained = [Asking(asked.split, asked.limit)] if is_own else []
    _, split = asked.scored(recipe.quiz, recipe.eval.split if recipe.eval else None)
    others = (asked.eval_quiz,) if asked.eval_quiz else ()
    scored = [] if asked.eval_quiz else [Asking(split, None, is_needed=False)]
    return Stage(
        *(variant.name, "heal"),
        settings=_taken(recipe, *_LOADED, "threads") | variant.recipe_values() | {"scored": split},
        makes=(folder,),
        after=("profile", asked.of),
        asks=(*trained, *scored),
        reads_model=True,
        keeps=(f"{folder}.healing",),
        reads=tuple(Weighted.read(text).name for text in read) + others,
    )


def _variant_stage(recipe: Recipe, variant: Variant) -> Stage:
    """What fits and judges it comes from splits of the quiz that the profile may not have seen."""
    if variant.heal is not None:
        return _heal_stage(recipe, variant, variant.heal)
    own, limit = recipe.profile.split, recipe.profile.limit
    others = [Asking(split, None, is_needed=False) for split in _JUDGES if split != own]
    return Stage(
        *(variant.name, variant.kind),  # type: ignore[arg-type]
        settings=_taken(recipe, *_LOADED) | _settings(variant),
        makes=(variant_folder(variant.name),),
        after=("profile",),
        asks=(Asking(own, limit), *others),
        reads_model=True,
        adapter=variant.prune.adapter if variant.prune else None,
    )


def _settings(variant: Variant) -> dict[str, Any]:
    """Without what is held out where it is not said, as in runs from before it could be."""
    found = variant.recipe_values()
    section = found[variant.kind]
    if section.get("held_out", 0) is None:
        del section["held_out"]
    return found


def _taken(recipe: Recipe, *keys: str) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", include={*keys})
    # Runs from before there was `truncate` stay as they are.
    return {k: values[k] for k in keys if k != "truncate" or recipe.truncate is not None}
