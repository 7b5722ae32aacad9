"""The schema of a recipe: the model and the quiz, a section per command, the variants.

A section has the keys and defaults of its command; without it there is no such stage.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from expertcut.commands import BatchSettings, QuizSettings
from expertcut.commands.compress import CompressSettings
from expertcut.commands.dispatch import DispatchSettings
from expertcut.commands.eval import EvalSettings
from expertcut.commands.heal import HealSettings
from expertcut.commands.merge import MergeSettings
from expertcut.commands.place import PlaceSettings
from expertcut.commands.profile import ProfileSettings
from expertcut.commands.prune import PruneSettings
from expertcut.commands.publish import PublishSettings, Repo
from expertcut.commands.reweight import ReweightSettings
from expertcut.commands.route import RouteSettings
from expertcut.commands.show import ShowSettings
from expertcut.commands.tracing import TraceSettings
from expertcut.errors import RecipeError, SettingsError
from expertcut.files import read_file, wide_encoding, without_secrets
from expertcut.settings import (
    FilePath,
    Folder,
    ReadPaths,
    Settings,
    Source,
    Texts,
    fault_text,
    option,
    refuse,
)

VariantKind = Literal["prune", "merge", "reweight", "route", "compress", "heal"]
KINDS: tuple[VariantKind, ...] = get_args(VariantKind)
_RESERVED = ("profile", "show", "eval", "report", "publish", "results", "recipe", "manifest")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]


class ProfileSection(ProfileSettings):
    """`expertcut profile` of the recipe's model."""

    stats: Literal["answer", "all"] | None = option("all", "As of the command.")


class ShowSection(ShowSettings):
    """`expertcut show` of the profile, printed and kept as Markdown, JSON and CSV."""

    path: FilePath = option(Path(), "The profile of the run.", in_recipe=False)


class ProveSection(Settings):
    """`reweight --cross-fit`: the whole procedure cross-fitted and compared with random experts."""

    draws: int = option(99, "Draws of random experts.", flags=("--random-draws",), ge=99, le=10**6)
    seed: Annotated[int, Field(ge=0)] = 0


class HealSection(HealSettings):
    """`expertcut heal` of the variant `of`.

    `quiz`, `shots` and `subjects` default to those of the recipe, `eval_quiz` and `eval_split` to
    those that its `eval` scores. In a recipe without a quiz `text` defaults to the profile's.
    """

    of: Name
    checkpoint: str = option("", "The variant's.", in_recipe=False)

    def scored(self, recipe: "Recipe") -> tuple[str | None, str]:
        """The quiz and split to keep out of training; without a quiz, that of the training."""
        quiz, split = None, "test"
        if recipe.eval and recipe.has_quiz:
            quiz, split = recipe.quiz, recipe.eval.split
        return self.eval_quiz or quiz, self.eval_split or split

    def texts_of(self, recipe: "Recipe") -> tuple[str, ...]:
        """Its texts; those of the profile where it names nothing and the recipe has no quiz."""
        is_own = self.quiz or self.text or recipe.has_quiz
        return self.text if is_own else tuple(recipe.profile.text)

    def recipe_values(self) -> dict[str, Any]:
        """The recorded fields, `of` first, as in the hashes of older runs."""
        return {"of": self.of} | super().recipe_values()


class EvalSection(EvalSettings):
    """`expertcut eval` of the model and all variants."""

    models: Texts = option([], "The model and the variants.", in_recipe=False)
    backend: Literal["hf", "vllm"] = option("hf", "As of the command.", is_recorded="set")


class _CheckedSection(Settings):
    """A section whose options are refused together as those of its command."""

    def check(self) -> None:
        """Refuses options that do not go together; its command's settings do."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        try:
            self.check()
        except SettingsError as error:
            refuse(str(error))
        return self


class DispatchSection(DispatchSettings, _CheckedSection):
    """`expertcut dispatch` of the run's evaluation, and of `results` of others on the same quiz."""

    results: ReadPaths = option([], "Results of other evaluations.")


class TraceSection(TraceSettings, _CheckedSection):
    """`expertcut trace` of the recipe's model, on its quiz or on texts."""

    def texts_of(self, recipe: "Recipe") -> list[str]:
        """Its texts; those of the profile where it names none and the recipe has no quiz."""
        return self.text or ([] if recipe.has_quiz else recipe.profile.text)


class PlaceSection(PlaceSettings, _CheckedSection):
    """`expertcut place` of the run's trace."""

    trace: FilePath = option(Path(), "The run's.", in_recipe=False)


class ReportSection(Settings):
    """`expertcut report` of the run folder."""


class PublishSection(PublishSettings):
    """`expertcut publish` of one variant."""

    variant: Name
    checkpoint: FilePath = option(Path(), "The variant's.", in_recipe=False)
    repo: Repo = option(..., "Repository on the Hub.")

    def recipe_values(self) -> dict[str, Any]:
        """The recorded fields, `variant` first, as in the hashes of older runs."""
        return {"variant": self.variant} | super().recipe_values()


class _Sections(Settings):
    """Settings with sections; a key without a value is an empty section."""

    sections: ClassVar[tuple[str, ...]]

    @model_validator(mode="before")
    @classmethod
    def _keeps_empty_sections(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        known = cls.keys()
        empty = {k for k, v in values.items() if v is None and known.get(k) in cls.sections}
        return {k: {} if k in empty else v for k, v in values.items()}


class Variant(_Sections):
    """One edit of the model, and for a reweighting how it is cross-fitted."""

    name: Name
    prune: PruneSettings | None = None
    merge: MergeSettings | None = None
    reweight: ReweightSettings | None = None
    route: RouteSettings | None = None
    compress: CompressSettings | None = None
    heal: HealSection | None = None
    prove: ProveSection | None = option(
        None, "Cross-fit the procedure of `reweight`.", flags=("--cross-fit",)
    )
    sections: ClassVar = (*KINDS, "prove")

    @model_validator(mode="after")
    def _has_a_rule_for_a_checkpoint(self) -> Self:
        if self.route and self.route.rules == ("contrast",):
            refuse("route: rule contrast writes no checkpoint: leave the variant out")
        for kind, section in (("route", self.route), ("compress", self.compress)):
            try:
                if section is not None:
                    section.check()
            except SettingsError as error:
                refuse(f"{kind}: {error}")
        return self

    @model_validator(mode="after")
    def _does_one_thing(self) -> Self:
        if [getattr(self, kind) is None for kind in KINDS].count(False) != 1:
            refuse(f"a variant does one thing: give it {', '.join(KINDS[:-1])} or {KINDS[-1]}")
        if self.prove and not self.reweight:
            refuse(
                "prove cross-fits a reweight: other variants are compared on held-out questions "
                "anyway, leave prove out"
            )
        if self.reweight and self.is_balancing:
            self._check_balance(self.reweight)
        if self.name in _RESERVED:
            refuse(f"the name {self.name} is taken by the run itself: choose another")
        return self

    def _check_balance(self, reweight: ReweightSettings) -> None:
        """As the command does, with the run's trace."""
        try:
            reweight.updated(trace=Path("trace"), prove=bool(self.prove)).check()
        except SettingsError as error:
            refuse(f"reweight: {error}")

    @property
    def is_balancing(self) -> bool:
        """Whether it evens out the loads of the run's trace."""
        return self.reweight is not None and self.reweight.balance is not None

    @property
    def kind(self) -> VariantKind:
        """Its command."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    def recipe_values(self) -> dict[str, Any]:
        """The name and all sections, missing ones as None; later ones only if they are there."""
        sections = {name: getattr(self, name) for name in self.sections}
        for name in ("route", "compress"):  # keeps the hashes of older runs
            if sections[name] is None:
                del sections[name]
        values = {k: s.recipe_values() if s else None for k, s in sections.items()}
        return {"name": self.name} | values


class Recipe(BatchSettings, QuizSettings, _Sections):
    """The whole recipe; paths are relative to the working directory, as in the commands."""

    model: Source
    revision: str | None = None
    out: Folder | None = None
    profile: ProfileSection = ProfileSection()
    show: ShowSection | None = None
    variants: Annotated[list[Variant], Field(default_factory=list)]
    eval: EvalSection | None = None
    dispatch: DispatchSection | None = None
    trace: TraceSection | None = None
    place: PlaceSection | None = None
    report: ReportSection | None = None
    publish: Annotated[list[PublishSection], Field(default_factory=list)]
    sections: ClassVar = ("profile", "show", "eval", "dispatch", "trace", "place", "report")

    @classmethod
    def keys(cls, *, in_recipe: bool = False) -> dict[str, str]:
        """All fields, its own first."""
        own = (name for name in cls.__annotations__ if name in cls.model_fields)
        return {name: name for name in (*own, *cls.model_fields)}

    @property
    def has_quiz(self) -> bool:
        """Whether it names a quiz, or profiles no texts and so means the default one."""
        return "quiz" in self.model_fields_set or not self.profile.text

    @model_validator(mode="after")
    def _has_something_to_judge_by(self) -> Self:
        if self.eval and not (self.has_quiz or self.eval.parts_asked):
            refuse(
                "eval has nothing to judge by: give it text, tasks or generate, or name a quiz "
                "beside the model"
            )
        return self

    @model_validator(mode="after")
    def _has_answers_to_dispatch(self) -> Self:
        if self.dispatch and not (self.eval and self.has_quiz):
            refuse("dispatch requires the answers of eval to a quiz: add eval, and name a quiz")
        if self.dispatch and not (self.variants or self.dispatch.results):
            refuse("dispatch chooses between models: add variants, or results of other evaluations")
        return self

    @model_validator(mode="after")
    def _has_the_trace_that_it_reads(self) -> Self:
        if self.place and not self.trace:
            refuse("place reads a trace of the run: add trace")
        is_balancing = any(variant.is_balancing for variant in self.variants)
        if is_balancing and not (self.trace and self.trace.logits):
            refuse("balance reads a trace of the run with logits: add trace with logits: true")
        return self

    @model_validator(mode="after")
    def _names_no_variant_as_a_stage(self) -> Self:
        for kind in ("dispatch", "trace", "place"):
            if getattr(self, kind) and any(variant.name == kind for variant in self.variants):
                refuse(f"the name {kind} is taken by the run itself: choose another")
        return self

    @model_validator(mode="after")
    def _names_known_variants(self) -> Self:
        names = [variant.name for variant in self.variants]
        if twice := [name for name in names if names.count(name) > 1]:
            refuse(f"two variants are called {twice[0]}: give each a name of its own")
        for place, variant in enumerate(self.variants):
            if variant.heal and variant.heal.of not in names[:place]:
                refuse(f"{variant.name} heals {variant.heal.of!a}, which no variant before it is")
        for published in self.publish:
            if published.variant not in names:
                near = get_close_matches(published.variant, names, n=1, cutoff=0.0)
                hint = f"did you mean {near[0]}?" if near else "there are no variants"
                refuse(f"publish names {published.variant!a}, which is not a variant: {hint}")
        repos = [(published.repo, published.revision) for published in self.publish]
        if len(set(repos)) < len(repos):
            refuse("publish names one repo twice: give each variant its own repo or revision")
        return self


MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
_MOST_DIGITS = 18


def read_recipe(file: Path) -> Recipe:
    """A recipe from its file; a RecipeError names the first unknown key or wrong value."""
    content = _parsed(file, read_bytes(file))
    if not isinstance(content, dict):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise RecipeError(f"{file} holds {kind}, must be keys and values: model: ...")
    try:
        return Recipe.of_recipe(content)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = " at " + ".".join(map(_printable, fault["loc"])) if fault["loc"] else ""
        raise RecipeError(f"{file} is not a valid recipe{place}: {fault_text(fault)}") from None


def read_bytes(file: Path) -> bytes:
    """The file's content; a RecipeError if it cannot be read or is too large."""
    try:
        return read_file(file, MAX_BYTES)
    except OSError as error:
        raise RecipeError(f"{file} cannot be read as a recipe: {error.strerror}") from None


def _parsed(file: Path, content: bytes) -> Any:
    if (encoding := wide_encoding(content)) is not None:
        raise RecipeError(f"{file} is {encoding} text, must be UTF-8: save it as UTF-8")
    try:
        text = content.decode("utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            if without_secrets(line) != line:  # copies of the recipe are published
                raise RecipeError(
                    f"{file} holds a token or a password in line {number}, and its copies would "
                    "too: take it out, and log in with `hf auth login` or set HF_TOKEN"
                )
        return yaml.load(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is not YAML: byte {error.start} is not UTF-8") from None
    except yaml.YAMLError as error:
        problem: object = str(error).splitlines()[0]
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            mark = error.problem_mark
            problem = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
        raise RecipeError(f"{file} is not valid YAML: {_printable(problem)}") from None
    except ValueError as error:  # a number that Python does not read
        raise RecipeError(f"{file} holds a value that cannot be read: {error}") from None


def _printable(text: object) -> str:
    """The text with control characters as escapes."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(text))


class _Loader(yaml.SafeLoader):
    """Plain data, as in YAML 1.2; YAML 1.1, PyYAML's own, reads 3:12 as 192 and `no` as false.

    Refuses tags, anchors (a few can stand for billions of values), duplicate keys and deep nesting.
    """

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (a class attribute of PyYAML)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node without anchor and tag, and not too deep."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            _refuse_yaml(event, "anchors and aliases are not read here: write it out")
        if getattr(event, "tag", None) is not None:
            _refuse_yaml(event, "tags are not read here: leave it out")
        if self.depth >= MAX_DEPTH:
            _refuse_yaml(event, f"more than {MAX_DEPTH} levels, one inside the other")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_scalar(self, node: Any) -> Any:
        """A scalar without NUL and lone surrogates."""
        value = super().construct_scalar(node)
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            _refuse_yaml(node, "an escape that is not a character")
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are distinct words."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse_yaml(key, "a key must be a word")
            if key.value in seen:
                _refuse_yaml(key, f"the key {key.value!a} comes twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _refuse_yaml(place: Any, problem: str) -> None:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def _construct_int(loader: _Loader, node: Any) -> int:
    text = loader.construct_scalar(node)
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"{text[:_MOST_DIGITS]}… has too many digits")
    return int(text)


for _tag, _form in {
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
