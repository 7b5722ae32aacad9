"""What a recipe may say: the model and the quiz, the commands' settings by section, the variants.

A section has the keys and the defaults of its command's settings. One that is named without a value
has all its defaults; one that is not named is no stage of the run.
"""

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from expertcut.commands import BatchSettings, QuizSettings
from expertcut.commands.eval import EvalSettings
from expertcut.commands.heal import HealSettings
from expertcut.commands.merge import MergeSettings
from expertcut.commands.profile import ProfileSettings
from expertcut.commands.prune import PruneSettings
from expertcut.commands.publish import PublishSettings
from expertcut.commands.reweight import ReweightSettings
from expertcut.commands.show import ShowSettings
from expertcut.errors import RecipeError
from expertcut.files import line_with_secret, read_file, wide_encoding
from expertcut.settings import (
    IN_RECIPE,
    FilePath,
    Folder,
    Settings,
    Source,
    Texts,
    fault_text,
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

    draws: int = option(99, "Draws of random experts.", flags=("--random-draws",), ge=99, le=10**6)
    seed: Annotated[int, Field(ge=0)] = 0


class HealSection(HealSettings):
    """`expertcut heal` of the variant that `of` names.

    Without a `quiz` of its own it is the recipe's, and so are `shots`, and of that quiz `subjects`.
    Nothing of what the recipe's `eval` scores is trained on, unless `eval_quiz` and `eval_split`
    say otherwise.
    """

    of: Name
    checkpoint: str = option("", "The variant's.", in_recipe=False)

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
    prove: ProveSection | None = option(
        None, "Cross-fit the procedure of `reweight`.", flags=("--cross-fit",)
    )

    @model_validator(mode="before")
    @classmethod
    def _keeps_empty_sections(cls, values: Any) -> Any:
        return _filled(values, (*KINDS, "prove", "cross_fit"))

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


MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
_MOST_DIGITS = 18
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def read_recipe(file: Path) -> Recipe:
    """A recipe from its file.

    Raises:
        RecipeError: no such file, one that is too large or no YAML, or a key or value that does
            not belong there.
    """
    content = _parsed(file, read_bytes(file))
    if not isinstance(content, dict):
        raise RecipeError(f"{file} holds {_kind(content)}, must be keys and values: model: ...")
    try:
        return Recipe.model_validate(content, context=IN_RECIPE)
    except ValidationError as error:
        raise RecipeError(f"{file} is no recipe{_fault(error)}") from None


def _fault(error: ValidationError) -> str:
    """Where and what, and which value it is, if a short one."""
    fault = error.errors(include_url=False)[0]
    place = ".".join(map(_printable, fault["loc"]))
    return f"{f' at {place}' if place else ''}: {fault_text(fault)}"


def read_bytes(file: Path) -> bytes:
    """The file, if it has a recipe's size.

    Raises:
        RecipeError: it cannot be read, or is larger.
    """
    try:
        return read_file(file, MAX_BYTES)
    except OSError as error:
        raise RecipeError(f"{file} cannot be read as a recipe: {error.strerror}") from None


def _parsed(file: Path, content: bytes) -> Any:
    if (encoding := wide_encoding(content)) is not None:
        raise RecipeError(f"{file} is {encoding} text, must be UTF-8: save it as UTF-8")
    try:
        text = content.decode("utf-8")
        _refuse_secrets(file, text)
        return yaml.load(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is no YAML: byte {error.start} is not UTF-8") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{file} is no YAML that is read here: {_said(error)}") from None
    except ValueError as error:  # a number that Python does not read
        raise RecipeError(f"{file} holds a value that cannot be read: {error}") from None


def _refuse_secrets(file: Path, text: str) -> None:
    """The recipe is copied beside all that it makes, and published with it."""
    if (line := line_with_secret(text)) is not None:
        raise RecipeError(
            f"{file} holds a token or a password in line {line}, and its copies would too: take it "
            "out, and log in with `hf auth login` or set HF_TOKEN"
        )


def _said(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return _printable(str(error).splitlines()[0])
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {_printable(error.problem)}"


def _printable(text: object) -> str:
    """With control characters, which a terminal would obey, as escapes."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(text))


def _kind(content: Any) -> str:
    return "nothing" if content is None else f"a {type(content).__name__}"


class _Loader(yaml.SafeLoader):
    """Plain data alone, as YAML 1.2 reads it.

    No tags, no anchors (a few of them can stand for billions of values), no key twice, not too
    deep. YAML 1.1, PyYAML's own, takes 3:12 for 192 and `no` for false.
    """

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (a class attribute of PyYAML)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node, counted and without anchors.

        Raises:
            ComposerError: an anchor, an alias, a tag, or too many levels.
        """
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
        """A word, all of whose characters are some.

        Raises:
            ConstructorError: an escape that stands for half a character, or for none.
        """
        value = super().construct_scalar(node)
        if isinstance(value, str) and _NO_TEXT.search(value):
            raise yaml.constructor.ConstructorError(
                None, None, "an escape that is no character", node.start_mark
            )
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are texts, each there once.

        Raises:
            ConstructorError: a key that is none, or comes twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!a} comes twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _refuse_yaml(event: Any, problem: str) -> None:
    raise yaml.composer.ComposerError(None, None, problem, event.start_mark)


def _plain(tag: str, form: str, read: Callable[[str], Any]) -> None:
    """Teaches the loader which words are of a type, and what they mean."""
    name = f"tag:yaml.org,2002:{tag}"
    _Loader.add_implicit_resolver(name, re.compile(f"^(?:{form})$"), None)

    def construct(loader: Any, node: Any) -> Any:
        return read(loader.construct_scalar(node))

    _Loader.add_constructor(name, construct)


_plain("null", r"null|Null|NULL|~|", lambda _: None)
_plain("bool", r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true")


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"{text[:_MOST_DIGITS]}… has too many digits")
    return int(text)


_plain("int", r"[-+]?[0-9]+", _whole)
_plain("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", float)
