"""The base of every command's settings: each option declared once, with its help and its limits.

The command line, the sections of a recipe and the Python API are all built from the fields.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """Base of all settings: values have their own type, an unknown key names the nearest one."""

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
                raise PydanticCustomError("unknown_key", "{text}", {"text": cls._unknown(key)})
        return values

    @classmethod
    def _unknown(cls, key: object) -> str:
        known, key = tuple(cls.model_fields), str(key)[:60]
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
    in_recipe: bool = True,
    **limits: Any,
) -> Any:
    """A field of settings: its default, its help, and where it is shown.

    `flags` are its spellings on the command line, `--` and the field's name where none is given;
    `aliases` are older spellings, accepted and hidden. `limits` are pydantic's: ge, le, min_length.
    """
    shown = {"panel": panel, "flags": flags, "aliases": aliases, "metavar": metavar}
    extra: dict[str, Any] = {**shown, "in_recipe": in_recipe}
    return Field(default, description=text, json_schema_extra=extra, **limits)
