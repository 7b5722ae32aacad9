"""The sections of a recipe: one for each stage, with its keys and defaults.

Keys are the commands' options, with underscores. A section that is named without a value has all
its defaults; one that is not named is no stage of the run.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from expertcut.data.held_out import HELD_OUT_SHARE
from expertcut.recipe.values import (
    AdapterFolder,
    Criterion,
    Experts,
    Folder,
    Repository,
    Source,
    Text,
    Texts,
)

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"


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


def _share_held_out(value: float) -> float:
    if value not in (0, HELD_OUT_SHARE):
        raise PydanticCustomError("share", f"must be {HELD_OUT_SHARE:g} or 0")
    return value


HeldOut = Annotated[float, AfterValidator(_share_held_out)] | None


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
    held_out: HeldOut = None
    verify: bool = True


class MergeSection(Section):
    """`expertcut merge`."""

    keep: Count
    by: Literal["m_smoe", "hc_smoe"] = "m_smoe"
    router: Literal["fitted", "mean", "dominant"] = "fitted"
    align: bool | None = None
    held_out: HeldOut = None
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
    held_out: HeldOut = None
    verify: bool = True


class ProveSection(Section):
    """`reweight --prove`: the whole procedure cross-fitted and held against random experts."""

    draws: Annotated[int, Field(ge=99, le=10**6)] = 99
    seed: Annotated[int, Field(ge=0)] = 0


class HealSection(Section):
    """`expertcut heal` of the variant that `of` names.

    Without a `quiz` of its own it is the recipe's, and so are `shots`, and of that quiz `subjects`.
    Nothing of what the recipe's `eval` scores is trained on, unless `eval_quiz` and `eval_split`
    say otherwise.
    """

    of: Name
    quiz: Texts = []
    split: str = "val"
    shots: Annotated[int, Field(ge=0)] | None = None
    subjects: Texts = []
    limit: Count | None = None
    text: Texts = []
    eval_quiz: Source | None = None
    eval_split: str | None = None
    objective: Literal["distill", "answer", "lm"] | None = None
    teacher: Source | None = None
    teacher_cache: Folder | None = None
    likeliest: Count = 64
    answer_weight: float | None = None
    targets: list[Literal["attention", "experts", "gate"]] = ["attention", "experts"]
    rank: Count = 16
    alpha: Count | None = None
    steps: Count = 300
    learning_rate: float | None = None
    batch: Count = 16
    micro_batch: Count | None = None
    balance: float = 0.0
    check_every: Count = 50
    patience: Count = 3
    max_tokens: Annotated[int, Field(ge=2)] = 2048
    save_memory: bool = False
    shuffle: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    verify: bool = True

    def scored(self, quiz: str, split: str | None) -> tuple[str | None, str]:
        """The quiz and split that are kept out, where the recipe scores this quiz and split.

        Without a quiz (the recipe scores none) they are kept out of what is trained on.
        """
        return self.eval_quiz or (quiz if split else None), self.eval_split or split or "test"


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
