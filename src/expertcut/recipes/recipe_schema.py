"""What a recipe may say: the model and the quiz, the commands' settings by section, the variants.

A section has the keys and the defaults of its command's settings. One that is named without a value
has all its defaults; one that is not named is no stage of the run.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from expertcut.commands.common import BatchSettings, QuizSettings
from expertcut.commands.eval import EvalSettings
from expertcut.commands.heal import HealSettings
from expertcut.commands.merge import MergeSettings
from expertcut.commands.profile import ProfileSettings
from expertcut.commands.prune import PruneSettings
from expertcut.commands.publish import PublishSettings
from expertcut.commands.reweight import ReweightSettings
from expertcut.commands.show import ShowSettings
from expertcut.settings import (
    FilePath,
    Folder,
    Settings,
    Source,
    Texts,
    below_here,
    in_recipe_only,
    option,
)

KINDS = ("prune", "merge", "reweight", "heal")  # of variants
OWN_FILES = ("profile", "show", "eval", "report", "publish", "results", "recipe", "manifest")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]


class ProfileSection(ProfileSettings):
    """`expertcut profile` of the recipe's model."""

    stats: Literal["answer", "all"] | None = option("all", "As of the command.")


class ShowSection(ShowSettings):
    """`expertcut show` of the profile, printed and kept as Markdown, JSON and CSV."""

    path: FilePath = option(Path(), "The profile of the run.", in_recipe=False)


class ProveSection(Settings):
    """`reweight --cross-fit`: the whole procedure cross-fitted and compared with random experts."""

    draws: Annotated[int, Field(ge=99, le=10**6)] = 99
    seed: Annotated[int, Field(ge=0)] = 0


class HealSection(HealSettings):
    """`expertcut heal` of the variant that `of` names.

    Without a `quiz` of its own it is the recipe's, and so are `shots`, and of that quiz `subjects`.
    Nothing of what the recipe's `eval` scores is trained on, unless `eval_quiz` and `eval_split`
    say otherwise.
    """

    of: Name
    checkpoint: str = option("", "The variant's.", in_recipe=False)
    eval_quiz: Source | None = option(None, "As of the command.")
    teacher: Source | None = option(None, "As of the command.")
    teacher_cache: Annotated[FilePath, AfterValidator(in_recipe_only(below_here))] | None = option(
        None, "As of the command, below the working directory."
    )

    def scored(self, quiz: str, split: str | None) -> tuple[str | None, str]:
        """The quiz and split that are kept out, where the recipe scores this quiz and split.

        Without a quiz (the recipe scores none) they are kept out of what is trained on.
        """
        return self.eval_quiz or (quiz if split else None), self.eval_split or split or "test"

    def recipe_values(self) -> dict[str, Any]:
        """The variant that is healed first, as in the hashes of older runs."""
        return {"of": self.of} | super().recipe_values()


class EvalSection(EvalSettings):
    """`expertcut eval` of the model and all variants."""

    models: Texts = option([], "The model and the variants.", in_recipe=False)


class ReportSection(Settings):
    """`expertcut report` of the run folder."""


class PublishSection(PublishSettings):
    """`expertcut publish` of one variant."""

    variant: Name
    checkpoint: FilePath = option(Path(), "The variant's.", in_recipe=False)

    def recipe_values(self) -> dict[str, Any]:
        """The variant first, as in the hashes of older runs."""
        return {"variant": self.variant} | super().recipe_values()


class Variant(Settings):
    """One edit: its name, what it does, and whether that is cross-fitted."""

    name: Name
    prune: PruneSettings | None = None
    merge: MergeSettings | None = None
    reweight: ReweightSettings | None = None
    heal: HealSection | None = None
    prove: ProveSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _keeps_empty_sections(cls, values: Any) -> Any:
        return _filled(values, (*KINDS, "prove"))

    @model_validator(mode="after")
    def _does_one_thing(self) -> Self:
        if [getattr(self, kind) is None for kind in KINDS].count(False) != 1:
            _refuse_variant("a variant does one thing: give it prune, merge, reweight or heal")
        if self.prove and not self.reweight:
            _refuse_variant(
                "prove repeats a way of choosing what to tilt: a cut or a merge is compared on "
                "held-out questions by itself, leave prove out"
            )
        if self.name in OWN_FILES:
            _refuse_variant(f"the name {self.name} is taken by the run itself: choose another")
        return self

    @property
    def kind(self) -> str:
        """The key that says what it does."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    def recipe_values(self) -> dict[str, Any]:
        """The name and all sections, None for those that it does not have."""
        sections = {kind: getattr(self, kind) for kind in (*KINDS, "prove")}
        values = {k: s.recipe_values() if s else None for k, s in sections.items()}
        return {"name": self.name} | values


class Recipe(BatchSettings, QuizSettings):
    """All of it; paths are relative to the working directory, as in the commands."""

    model: Source
    revision: str | None = None
    out: Folder | None = None
    profile: ProfileSection = ProfileSection()
    show: ShowSection | None = None
    variants: Annotated[list[Variant], Field(default_factory=list)]
    eval: EvalSection | None = None
    report: ReportSection | None = None
    publish: Annotated[list[PublishSection], Field(default_factory=list)]

    @classmethod
    def keys(cls, *, in_recipe: bool = False) -> dict[str, str]:
        """All fields, its own first."""
        return {name: name for name in (*cls.__annotations__, *cls.model_fields)}

    @model_validator(mode="before")
    @classmethod
    def _keeps_empty_sections(cls, values: Any) -> Any:
        return _filled(values, ("profile", "show", "eval", "report"))

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        names = [variant.name for variant in self.variants]
        if twice := [name for name in names if names.count(name) > 1]:
            _refuse_variant(f"two variants are called {twice[0]}: give each a name of its own")
        for place, variant in enumerate(self.variants):
            if variant.heal and variant.heal.of not in names[:place]:
                _refuse_variant(
                    f"{variant.name} heals {variant.heal.of!a}, which no variant before it is"
                )
        for published in self.publish:
            if published.variant not in names:
                near = get_close_matches(published.variant, names, n=1, cutoff=0.0)
                hint = f": did you mean {near[0]}?" if near else ": there are no variants"
                _refuse_variant(f"publish names {published.variant!a}, which is no variant{hint}")
        repos = [(published.repo, published.revision) for published in self.publish]
        if len(set(repos)) < len(repos):
            _refuse_variant(
                "publish names one repo twice: give each variant its own repo or revision"
            )
        return self


def _filled(values: Any, sections: tuple[str, ...]) -> Any:
    """Sections named without a value become empty ones, so that they are there."""
    if not isinstance(values, Mapping):
        return values
    return {k: {} if v is None and k in sections else v for k, v in values.items()}


def _refuse_variant(text: str) -> NoReturn:
    raise PydanticCustomError("recipe", "{text}", {"text": text})
