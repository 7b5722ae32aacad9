"""What a recipe may say: sections, their keys and defaults.

Keys are the commands' options, with underscores. A section that is named without a value has all
its defaults; one that is not named is no stage of the run.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from expertcut.recipe.values import (
    AdapterFolder,
    Criterion,
    DtypeName,
    Experts,
    Repository,
    Source,
    Text,
    Texts,
)

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"
KINDS = ("prune", "merge", "reweight")  # of variants
OWN_FILES = ("profile", "show", "eval", "report", "publish", "results", "recipe", "manifest")


class Section(BaseModel):
    """Base of all sections: values have their own type, an unknown key names the nearest one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _knows_its_keys(cls, values: Any) -> Any:
        if values is None:
            return {}
        if not isinstance(values, Mapping):
            return values  # pydantic says what it is instead
        for key in values:
            if key not in cls.model_fields:
                raise PydanticCustomError("unknown_key", "{text}", {"text": _unknown(key, cls)})
        return values


def _unknown(key: object, section: type[Section]) -> str:
    known, key = tuple(section.model_fields), str(key)[:60]
    if near := get_close_matches(key, known, n=1, cutoff=0.5):
        return f"unknown key {key!a}: did you mean {near[0]}?"
    return f"unknown key {key!a}: it may have {', '.join(known)}"


Name = Annotated[str, Field(pattern=NAME)]
Count = Annotated[int, Field(ge=1)]
Layout = Literal["stock", "exact"]
Place = Literal["answer", "all"]


class ProfileSection(Section):
    """`expertcut profile`."""

    split: str = "test"
    limit: Count | None = None
    stats: Literal["answer", "all"] = "all"
    perturb: list[Literal["shuffle-choices", "bf16"]] = []


class ShowSection(Section):
    """`expertcut show` of the profile, printed and kept as Markdown, JSON and CSV."""

    subjects: bool = False


class PruneSection(Section):
    """`expertcut prune`."""

    keep_active: bool = False
    keep: Count | None = None
    keep_fraction: float | None = None
    max_bytes: str | None = None
    budget: Literal["layer", "global"] = "layer"
    min_keep: Count | None = None
    by: Criterion = "activations"
    positions: Place | None = None
    protect: Texts = []
    seed: Annotated[int, Field(ge=0)] = 0
    layout: Layout = "stock"
    removed: Literal["zero", "mean"] | None = None
    fold: Literal["answer", "all", "off"] | None = None
    boost: Experts | None = None
    suppress: Experts | None = None
    scale: Experts | None = None
    apply_at: Place | None = None
    adapter: AdapterFolder | None = None
    verify: bool = True


class MergeSection(Section):
    """`expertcut merge`."""

    keep: Count
    by: Literal["m_smoe", "hc_smoe"] = "m_smoe"
    router: Literal["fitted", "mean", "dominant"] = "fitted"
    align: bool | None = None
    verify: bool = True


class ReweightSection(Section):
    """`expertcut reweight`."""

    boost: Experts | None = None
    suppress: Experts | None = None
    scale: Experts | None = None
    boost_best: Annotated[int, Field(ge=0)] = 0
    suppress_worst: Annotated[int, Field(ge=0)] = 0
    by: str | None = None
    min_appearances: float | None = None
    layers: Text | None = None
    contrast: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    strength: float | None = None
    tune: bool = False
    apply_at: Place | None = None
    layout: Layout = "stock"
    verify: bool = True


class ProveSection(Section):
    """`reweight --prove`: the whole procedure cross-fitted and held against random experts."""

    draws: Annotated[int, Field(ge=99)] = 99
    seed: int = 0


class Variant(Section):
    """One intervention: a name, what it does, and whether that is proved."""

    name: Name
    prune: PruneSection | None = None
    merge: MergeSection | None = None
    reweight: ReweightSection | None = None
    prove: ProveSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _keeps_empty_sections(cls, values: Any) -> Any:
        return _filled(values, (*KINDS, "prove"))

    @model_validator(mode="after")
    def _does_one_thing(self) -> Self:
        if [getattr(self, kind) is None for kind in KINDS].count(False) != 1:
            _refuse("a variant does one thing: give it prune, merge or reweight")
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


class EvalSection(Section):
    """`expertcut eval` of the model and all variants."""

    split: str = "test"
    limit: Count | None = None


class ReportSection(Section):
    """`expertcut report` of the run folder."""


class PublishSection(Section):
    """`expertcut publish` of one variant."""

    variant: Name
    repo: Repository
    private: bool = False
    revision: str | None = None
    force: bool = False
    dry_run: bool = False


class Recipe(Section):
    """All of it; paths are relative to the working directory, as in the commands."""

    model: Source
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: DtypeName = "auto"
    device: str = "auto"
    device_map: Literal["auto"] | None = None
    max_memory: str | None = None
    offload: str | None = None
    threads: Count | None = None
    batch_tokens: Count | None = None
    quiz: Source = "mmlu"
    quiz_revision: str | None = None
    shots: Annotated[int, Field(ge=0)] = 5
    subjects: Texts = []
    out: str | None = None
    profile: ProfileSection = ProfileSection()
    show: ShowSection | None = None
    variants: list[Variant] = []
    eval: EvalSection | None = None
    report: ReportSection | None = None
    publish: list[PublishSection] = []

    @model_validator(mode="before")
    @classmethod
    def _keeps_empty_sections(cls, values: Any) -> Any:
        return _filled(values, ("profile", "show", "eval", "report"))

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        names = [variant.name for variant in self.variants]
        if twice := [name for name in names if names.count(name) > 1]:
            _refuse(f"two variants are called {twice[0]}: give each a name of its own")
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
