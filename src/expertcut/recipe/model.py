"""What a recipe may say as a whole: its variants, and what must hang together.

A section that is named without a value has all its defaults; one that is not named is no stage.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from expertcut.recipe.sections import (
    EvalSection,
    HealSection,
    MergeSection,
    Name,
    ProfileSection,
    ProveSection,
    PruneSection,
    PublishSection,
    ReportSection,
    ReweightSection,
    Section,
    ShowSection,
)
from expertcut.recipe.values import DtypeName, Folder, Source, Texts

KINDS = ("prune", "merge", "reweight", "heal")  # of variants
OWN_FILES = ("profile", "show", "eval", "report", "publish", "results", "recipe", "manifest")


class Variant(Section):
    """One intervention: a name, what it does, and whether that is proved."""

    name: Name
    prune: PruneSection | None = None
    merge: MergeSection | None = None
    reweight: ReweightSection | None = None
    heal: HealSection | None = None
    prove: ProveSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _keeps_empty_sections(cls, values: Any) -> Any:
        return _filled(values, (*KINDS, "prove"))

    @model_validator(mode="after")
    def _does_one_thing(self) -> Self:
        if [getattr(self, kind) is None for kind in KINDS].count(False) != 1:
            _refuse("a variant does one thing: give it prune, merge, reweight or heal")
        if self.prove and not self.reweight:
            _refuse(
                "prove repeats a way of choosing what to tilt: a cut or a merge is compared on "
                "held-out questions by itself, leave prove out"
            )
        if self.name in OWN_FILES:
            _refuse(f"the name {self.name} is taken by the run itself: choose another")
        return self

    @property
    def kind(self) -> str:
        """The key that says what it does."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


class Recipe(Section):
    """All of it; paths are relative to the working directory, as in the commands."""

    model: Source
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: DtypeName = "auto"
    device: str = "auto"
    device_map: Literal["auto"] | None = None
    max_memory: str | None = None
    offload: Folder | None = None
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    batch_tokens: Annotated[int, Field(ge=1, le=2**30)] | None = None
    quiz: Source = "mmlu"
    quiz_revision: str | None = None
    shots: Annotated[int, Field(ge=0)] = 5
    subjects: Annotated[Texts, Field(default_factory=list)]
    truncate: Literal["left"] | None = None
    out: Folder | None = None
    profile: ProfileSection = ProfileSection()
    show: ShowSection | None = None
    variants: Annotated[list[Variant], Field(default_factory=list)]
    eval: EvalSection | None = None
    report: ReportSection | None = None
    publish: Annotated[list[PublishSection], Field(default_factory=list)]

    @model_validator(mode="before")
    @classmethod
    def _keeps_empty_sections(cls, values: Any) -> Any:
        return _filled(values, ("profile", "show", "eval", "report"))

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        names = [variant.name for variant in self.variants]
        if twice := [name for name in names if names.count(name) > 1]:
            _refuse(f"two variants are called {twice[0]}: give each a name of its own")
        for place, variant in enumerate(self.variants):
            if variant.heal and variant.heal.of not in names[:place]:
                _refuse(f"{variant.name} heals {variant.heal.of!a}, which no variant before it is")
        for published in self.publish:
            if published.variant not in names:
                near = get_close_matches(published.variant, names, n=1, cutoff=0.0)
                hint = f": did you mean {near[0]}?" if near else ": there are no variants"
                _refuse(f"publish names {published.variant!a}, which is no variant{hint}")
        repos = [(published.repo, published.revision) for published in self.publish]
        if len(set(repos)) < len(repos):
            _refuse("publish names one repo twice: give each variant its own repo or revision")
        return self


def _filled(values: Any, sections: tuple[str, ...]) -> Any:
    """Sections named without a value become empty ones, so that they are there."""
    if not isinstance(values, Mapping):
        return values
    return {k: {} if v is None and k in sections else v for k, v in values.items()}


def _refuse(text: str) -> None:
    raise PydanticCustomError("recipe", "{text}", {"text": text})
