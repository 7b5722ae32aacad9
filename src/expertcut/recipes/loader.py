"""A recipe's file → a recipe; whatever the file holds, at worst one line comes of it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from expertcut.errors import RecipeError
from expertcut.files import line_with_secret, read_file, wide_encoding
from expertcut.recipes.recipe_schema import Recipe
from expertcut.settings import IN_RECIPE, fault_text

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
            _stop(event, "anchors and aliases are not read here: write it out")
        if getattr(event, "tag", None) is not None:
            _stop(event, "tags are not read here: leave it out")
        if self.depth >= MAX_DEPTH:
            _stop(event, f"more than {MAX_DEPTH} levels, one inside the other")
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


def _stop(event: Any, problem: str) -> None:
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
