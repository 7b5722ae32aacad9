"""What a recipe may say: its values, the sections of its stages, its variants.

The sections of a recipe: one for each stage, with its keys and defaults. Keys are the commands'
options, with underscores. A section that is named without a value has all its defaults; one that is
not named is no stage of the run.

A section that is named without a value has all its defaults; one that is not named is no stage.
"""

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from expertcut.data.sources import HELD_OUT_SHARE

# Those of edits.criteria, which would bring scipy along; a test holds them together.
CRITERIA = (
    "activations",
    "gate_mass",
    "weighted_accuracy",
    "output_norm",
    "output_norm_mean",
    "reap",
    "easy_ep",
    "easy_ep_postnorm",
    "ranked_choice",
    "aimer",
    "reconstruction",
    "random",
)
_PATH = re.compile(r"[/~.].*|.*\.(jsonl|csv)")
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"
KINDS = ("prune", "merge", "reweight", "heal")  # of variants
OWN_FILES = ("profile", "show", "eval", "report", "publish", "results", "recipe", "manifest")


def _as_text(value: Any) -> Any:
    """An expert that YAML took for a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_list(value: Any) -> Any:
    """One value where several may stand."""
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


def _like(pattern: str, should: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            _refuse_value(f"{text[:100]!a} {should}")
        return text

    return check


def _known(name: str) -> str:
    if name not in CRITERIA:
        near = get_close_matches(name, CRITERIA, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"take one of {', '.join(CRITERIA)}"
        _refuse_value(f"{name[:60]!a} is no criterion: {hint}")
    return name


def _there(text: str) -> str:
    """A path is there; anything else may be an id of the hub."""
    if _PATH.fullmatch(text) and not Path(text).expanduser().exists():
        _refuse_value(f"{text[:200]!a} is not there: give an existing path, or an id of the hub")
    return text


def _below(text: str) -> str:
    """A folder that a stranger's recipe may have written to."""
    path = Path(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text or text.startswith("~"):
        _refuse_value(
            f"{text[:200]!a} lies outside this folder: a recipe writes below where you stand"
        )
    return text


def _adapter(text: str) -> str:
    """A folder of this machine that peft wrote."""
    if not (Path(text) / "adapter_config.json").is_file():
        _refuse_value(f"{text[:200]!a} holds no adapter: give a folder with adapter_config.json")
    return text


def _refuse_value(text: str) -> None:
    raise PydanticCustomError("value", "{text}", {"text": text})


Text = Annotated[str, BeforeValidator(_as_text)]
Texts = Annotated[list[Text], BeforeValidator(_as_list)]
_Expert = Annotated[
    Text,
    AfterValidator(
        _like(
            r"\s*(\d{1,9}:)?\d{1,9}(=[+-]?[\d.]+([eE][+-]?\d+)?)?\s*",
            "is no expert: write 12, 3:12 or 3:12=0.25",
        )
    ),
]
Experts = Annotated[list[_Expert], BeforeValidator(_as_list), Field(min_length=1)]
Criterion = Annotated[str, AfterValidator(_known)]
Source = Annotated[str, AfterValidator(_there)]
Folder = Annotated[str, AfterValidator(_below)]
AdapterFolder = Annotated[str, AfterValidator(_adapter)]
DtypeName = Annotated[
    str,
    AfterValidator(_like(r"auto|stored|b?float\d+\w*", "is no dtype: take auto or float32")),
]
Repository = Annotated[
    str,
    AfterValidator(
        _like(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", "is no repository: write OWNER/NAME, as on the Hub")
    ),
]


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


def _refuse_variant(text: str) -> None:
    raise PydanticCustomError("recipe", "{text}", {"text": text})
