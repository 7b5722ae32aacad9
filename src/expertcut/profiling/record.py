"""What is written as JSON: profiles, plans, results and all else that must read back the same."""

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

_OF_CUTTING = {"truncate", "cut"}


class Record(BaseModel):
    """Base of what is written as JSON: unknown keys and NaN are errors, values never change.

    What says how prompts are cut is left out where none may be, so that hashes and bytes are those
    of records from before there was such a thing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _unless_silent(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = values(self)
        return {k: v for k, v in found.items() if v is not None or k not in _OF_CUTTING}


def first_fault(error: ValidationError) -> str:
    """The first thing that a validation found, in one line."""
    fault = error.errors()[0]
    place = ".".join(map(str, fault["loc"])) or "the file"
    return f"{place}: {fault['msg']}"
