"""The base of every command's settings: each option declared once, with its help and its limits.

The command line, the sections of a recipe and the Python API are all built from the fields.
"""

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from expertcut.errors import SettingsError

_PATH = re.compile(r"[/~.].*|.*\.(jsonl|csv)")
IN_RECIPE = "recipe"
"""The validation context in which only fields with `in_recipe` are keys."""


def refuse(text: str) -> NoReturn:
    """Fails a validation with this text."""
    raise PydanticCustomError("value", "{text}", {"text": text})


def _as_text(value: Any) -> Any:
    """An expert that YAML took for a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def as_list(value: Any) -> Any:
    """One value where several may stand."""
    if isinstance(value, tuple):
        return list(value)
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


def _as_path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) else value


def like(pattern: str, should: str) -> Callable[[str], str]:
    """A check of a text against a pattern; `should` says what a wrong one should be."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            refuse(f"{text[:100]!a} {should}")
        return text

    return check


def in_recipe_only(check: Callable[[str], None]) -> Callable[[Any, ValidationInfo], Any]:
    """A check that a recipe's value must pass, and nobody else's."""

    def checked(value: Any, info: ValidationInfo) -> Any:
        if info.context == IN_RECIPE:
            check(str(value))
        return value

    return checked


def _there(text: str) -> None:
    """A path is there; anything else may be an id of the Hub."""
    if _PATH.fullmatch(text) and not Path(text).expanduser().exists():
        refuse(f"{text[:200]!a} is not there: give an existing path, or an id of the Hub")


def _below_here(text: str) -> None:
    """A folder that an untrusted recipe may write to."""
    path = Path(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text or text.startswith("~"):
        refuse(f"{text[:200]!a} lies outside this folder: a recipe writes below where you stand")


Text = Annotated[str, BeforeValidator(_as_text)]
Texts = Annotated[list[Text], BeforeValidator(as_list)]
FilePath = Annotated[Path, BeforeValidator(_as_path)]
Count = Annotated[int, Field(ge=1)]
Source = Annotated[str, AfterValidator(in_recipe_only(_there))]
Folder = Annotated[str, AfterValidator(in_recipe_only(_below_here))]
WorkFolder = Annotated[FilePath, AfterValidator(in_recipe_only(_below_here))]


class Settings(BaseModel):
    """Base of all settings: values have their own type, an unknown key names the nearest one."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True
    )

    @model_validator(mode="before")
    @classmethod
    def _knows_its_keys(cls, values: Any, info: ValidationInfo) -> Any:
        if values is None:
            return {}
        if not isinstance(values, Mapping):
            return values  # pydantic says what it is instead
        known = cls.keys(in_recipe=info.context == IN_RECIPE)
        renamed = {}
        for key, value in values.items():
            if key not in known:
                raise PydanticCustomError("unknown_key", "{text}", {"text": _unknown(key, known)})
            if known[key] in renamed:
                refuse(f"{key} is given twice: as {key} and under its other name")
            renamed[known[key]] = value
        return renamed

    @classmethod
    def keys(cls, *, in_recipe: bool = False) -> dict[str, str]:
        """The field of each accepted key: fields' names, and those of their flags."""
        names = {
            name: name
            for name in cls.model_fields
            if shown(cls, name)["in_recipe"] or not in_recipe
        }
        others = {
            flag.removeprefix("--").replace("-", "_"): name
            for name in names
            for flag in shown(cls, name)["flags"]
            if "/" not in flag and not flag.startswith("--no-")
        }
        return others | names

    @classmethod
    def read(cls, **values: Any) -> Self:
        """Settings of these values.

        Raises:
            SettingsError: naming the option whose value is wrong.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            place = fault["loc"][0] if fault["loc"] else None
            option_name = f"{flag_of(cls, str(place))}: " if place in cls.model_fields else ""
            raise SettingsError(f"{option_name}{fault_text(fault)}") from None

    def completed(self, **values: Any) -> Self:
        """These settings with more of them given."""
        return self.model_copy(update=values)

    def recipe_values(self) -> dict[str, Any]:
        """What a recipe's section says, defaults too, as in JSON; hashes depend on the order."""
        names = [n for n in type(self).model_fields if shown(type(self), n)["is_recorded"]]
        values = self.model_dump(mode="json", include={*names})
        return {name: values[name] for name in names}


def fault_text(fault: Mapping[str, Any]) -> str:
    """What a validation found wrong, and which value it is, if a short one."""
    text = str(fault["msg"]).replace("Input should be", "must be")
    value = fault["input"]
    is_short = isinstance(value, str | int | float) and len(str(value)) <= 60
    return f"{text}, not {value!a}" if is_short and fault["type"] != "value" else text


def _unknown(key: object, known: Mapping[str, str]) -> str:
    key = str(key)[:60]
    if near := get_close_matches(key, known, n=1, cutoff=0.5):
        return f"unknown key {key!a}: did you mean {near[0]}?"
    return f"unknown key {key!a}: it may have {', '.join(known)}"


def option(
    default: Any,
    text: str,
    *,
    panel: str = "Options",
    flags: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    metavar: str | None = None,
    separator: str | None = None,
    is_argument: bool = False,
    in_recipe: bool = True,
    is_recorded: bool | None = None,
    **limits: Any,
) -> Any:
    """A field of settings: its default, its help, and where it is shown.

    `flags` are its spellings on the command line, `--` and the field's name where none is given;
    they are keys too. `aliases` are older spellings, accepted and hidden. A flag `--no-…` of a
    field that is true by default turns it off. A list is given by repeating the flag, or in one
    value with a `separator`. A field that is `in_recipe` is a key of the command's section, and
    unless `is_recorded` says otherwise part of the section's hash. `limits` are pydantic's.
    """
    extra: dict[str, Any] = {
        **{"panel": panel, "flags": flags, "aliases": aliases, "metavar": metavar},
        **{"separator": separator, "is_argument": is_argument, "in_recipe": in_recipe},
        "is_recorded": in_recipe if is_recorded is None else is_recorded,
    }
    return Field(default, description=text, json_schema_extra=extra, **limits)


_PLAIN = option(None, "").json_schema_extra


def shown(settings: type[Settings], name: str) -> dict[str, Any]:
    """What `option` says of a field, and its defaults for a field declared without it."""
    extra = settings.model_fields[name].json_schema_extra
    return dict(extra) if isinstance(extra, dict) else dict(_PLAIN)


def flag_of(settings: type[Settings], name: str) -> str:
    """The spelling of a field on the command line."""
    extra = shown(settings, name)
    if extra["is_argument"]:
        return name.upper()
    flags = [flag.partition("/")[0] for flag in extra["flags"]]
    return flags[0] if flags else f"--{name.replace('_', '-')}"
