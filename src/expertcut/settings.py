"""The base of every command's settings: each option declared once, with its help and its limits.

The command line, the sections of a recipe and the Python API are all built from the fields.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

import pydantic
from pydantic_core import PydanticCustomError

from expertcut.errors import SettingsError

IN_RECIPE = "recipe"  # the validation context in which only fields with `in_recipe` are keys


def refuse(text: str) -> NoReturn:
    """Fails a validation with this text."""
    raise PydanticCustomError("value", "{text}", {"text": text})


def numbers_in(text: str) -> Iterator[tuple[str, float]]:
    """Each part of a list with commas, and its number: NaN for what is none, or not finite."""
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        yield part.strip(), number if math.isfinite(number) else math.nan


def _as_text(value: Any) -> Any:
    """Texts such as `3`, which YAML reads as numbers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def as_list(value: Any) -> Any:
    """A single value as a list of one."""
    if isinstance(value, tuple):
        return list(value)
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


def like(pattern: str, problem: str) -> pydantic.AfterValidator:
    """A check of a text against a pattern; `problem` ends the error message."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            refuse(f"{text[:100]!a} {problem}")
        return text

    return pydantic.AfterValidator(check)


def in_recipe_only(check: Callable[[str], None]) -> pydantic.AfterValidator:
    """A check of the values that a recipe gives, and of no others."""

    def checked(value: Any, info: pydantic.ValidationInfo) -> Any:
        if info.context == IN_RECIPE:
            check(str(value))
        return value

    return pydantic.AfterValidator(checked)


def _check_exists(text: str) -> None:
    if re.fullmatch(r"[/~.].*|.*\.(jsonl|csv)", text) and not Path(text).expanduser().exists():
        refuse(f"{text[:200]!a} does not exist: give an existing path, or an id of the Hub")


def _check_is_here(text: str) -> None:
    if not Path(text).expanduser().exists():
        refuse(f"{text[:200]!a} does not exist: give an existing path")


def _check_below_here(text: str) -> None:
    """An untrusted recipe writes only below the working directory."""
    path = Path(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text or text.startswith("~"):
        refuse(f"{text[:200]!a} lies outside this folder: a recipe writes below where you stand")


Text = Annotated[str, pydantic.BeforeValidator(_as_text)]
Texts = Annotated[list[Text], pydantic.BeforeValidator(as_list)]
FilePath = Annotated[Path, pydantic.BeforeValidator(lambda v: Path(v) if isinstance(v, str) else v)]
Count = Annotated[int, pydantic.Field(ge=1)]
Source = Annotated[str, in_recipe_only(_check_exists)]
ReadPath = Annotated[FilePath, in_recipe_only(_check_is_here)]
ReadPaths = Annotated[
    list[Annotated[Text, in_recipe_only(_check_is_here)]], pydantic.BeforeValidator(as_list)
]
Folder = Annotated[str, in_recipe_only(_check_below_here)]
WorkFolder = Annotated[FilePath, in_recipe_only(_check_below_here)]


class Settings(pydantic.BaseModel):
    """Base of all settings: values have their own type, an unknown key names the nearest one."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _knows_its_keys(cls, values: Any, info: pydantic.ValidationInfo) -> Any:
        if values is None:
            return {}
        if not isinstance(values, Mapping):
            return values  # pydantic says what it is instead
        known = cls.keys(in_recipe=info.context == IN_RECIPE)
        renamed = {}
        for key, value in values.items():
            if key not in known:
                key = str(key)[:60]
                near = get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"it may have {', '.join(known)}"
                refuse(f"unknown key {key!a}: {hint}")
            if known[key] in renamed:
                refuse(f"{key} is given twice: as {key} and under its other name")
            renamed[known[key]] = value
        return renamed

    @classmethod
    def keys(cls, *, in_recipe: bool = False) -> dict[str, str]:
        """Accepted keys and their fields: the fields' names, and the names of their flags."""
        names = [
            n for n in cls.model_fields if option_details(cls, n)["in_recipe"] or not in_recipe
        ]
        others = {
            flag.removeprefix("--").replace("-", "_"): name
            for name in names
            for flag in option_details(cls, name)["flags"]
            if "/" not in flag and not flag.startswith("--no-")
        }
        return others | dict(zip(names, names, strict=True))

    @classmethod
    def read(cls, **values: Any) -> Self:
        """Settings of these values; a SettingsError names the option whose value is wrong."""
        try:
            return cls.model_validate(values)
        except pydantic.ValidationError as error:
            fault = error.errors(include_url=False)[0]
            place = fault["loc"][0] if fault["loc"] else None
            option_name = f"{flag_of(cls, str(place))}: " if place in cls.model_fields else ""
            raise SettingsError(f"{option_name}{fault_text(fault)}") from None

    @classmethod
    def of_recipe(cls, values: Any) -> Self:
        """Settings of a recipe's values; pydantic's error names the key whose value is wrong."""
        return cls.model_validate(values, context=IN_RECIPE)

    def updated(self, **values: Any) -> Self:
        """A copy with these values, which are not validated."""
        return self.model_copy(update=values)

    def recipe_values(self) -> dict[str, Any]:
        """The recorded fields as JSON values, in the order in which a recipe hashes them."""
        names = {name for name in type(self).model_fields if self._is_recorded(name)}
        return self.model_dump(mode="json", include=names)

    def check_unset(self, names: Sequence[str], flag: str) -> None:
        """Refuses options that another one leaves no room for."""
        for name in names:
            if getattr(self, name) != self._default(name):
                raise SettingsError(
                    f"{flag_of(type(self), name)} does not go with {flag}: leave one of them out"
                )

    def _is_recorded(self, name: str) -> bool:
        how = option_details(type(self), name)["is_recorded"]
        return bool(how) and (how != "set" or getattr(self, name) != self._default(name))

    def _default(self, name: str) -> Any:
        return type(self).model_fields[name].default


def fault_text(fault: Mapping[str, Any]) -> str:
    """A validation error's message, with the value if it is short."""
    text = str(fault["msg"]).replace("Input should be", "must be")
    value = fault["input"]
    is_short = isinstance(value, str | int | float) and len(str(value)) <= 60
    return f"{text}, not {value!a}" if is_short and fault["type"] != "value" else text


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
    is_recorded: bool | Literal["set"] = True,
    **limits: Any,
) -> Any:
    """A field of settings: its default, its help, and where it is shown.

    `flags` are its spellings on the command line and in recipes, by default `--` and its name;
    `--no-…` turns off a field that is true by default. `aliases` are older spellings, hidden. A
    list is given by repeating the flag, by one value with a `separator`, or as two values by a
    `metavar` of two words. `in_recipe` makes it a key of the recipe's section, and unless
    `is_recorded` is False a part of the section's hash; "set" records it only where it differs from
    its default, so that a new option keeps the hashes of older runs. `limits` are pydantic's.
    """
    extra: dict[str, Any] = {
        **{"panel": panel, "flags": flags, "aliases": aliases, "metavar": metavar},
        **{"separator": separator, "is_argument": is_argument, "in_recipe": in_recipe},
        "is_recorded": in_recipe and is_recorded,
    }
    return pydantic.Field(default, description=text, json_schema_extra=extra, **limits)


_OPTION_DEFAULTS = option(None, "").json_schema_extra


def option_details(settings: type[Settings], name: str) -> dict[str, Any]:
    """The arguments of `option` for a field, or its defaults for a field declared without it."""
    extra = settings.model_fields[name].json_schema_extra
    return dict(extra) if isinstance(extra, dict) else dict(_OPTION_DEFAULTS)


def flag_of(settings: type[Settings], name: str) -> str:
    """The spelling of a field on the command line."""
    extra = option_details(settings, name)
    if extra["is_argument"]:
        return name.upper()
    flags = [flag.partition("/")[0] for flag in extra["flags"]]
    return flags[0] if flags else f"--{name.replace('_', '-')}"
