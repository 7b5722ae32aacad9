"""JSON files of this tool, held as pydantic models: read and checked, or refused in one line."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from expertcut.errors import ExpertcutError
from expertcut.files import parse_json, read_file

Document = TypeVar("Document", bound=BaseModel)
HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.A)
# Left out of JSON where nothing is said, so that hashes and bytes stay those of older records.
_UNSAID = {"truncate", "cut", "selection", "chosen_by", "healed_from"}
REVISION = re.compile(r"\w[\w.-]{0,250}(/\w[\w.-]{0,250}){0,9}", re.A)


def _no_truth(value: object) -> object:
    """True equals 1, and is no version."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Format1 = Annotated[Literal[1], BeforeValidator(_no_truth)]


class Record(BaseModel):
    """Base of what is written as JSON: unknown keys and NaN are errors, values never change.

    What older versions did not say is left out where it is None (`_UNSAID`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _unless_silent(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = values(self)
        return {k: v for k, v in found.items() if v is not None or k not in _UNSAID}


class Identified(Record):
    """A folder here, or with a revision what the Hub calls so, and nothing that leads elsewhere."""

    id: str
    revision: str | None

    @property
    def label(self) -> str:
        """Its id; of a folder that is recorded by its whole path the last part."""
        is_whole = self.revision is None and Path(self.id).is_absolute()
        return Path(self.id).name if is_whole else self.id

    @model_validator(mode="after")
    def _is_on_the_hub(self) -> Self:
        if self.revision is None:
            return self
        if not HUB_ID.fullmatch(self.id) or ".." in self.id:
            raise ValueError(f"{self.id[:80]!a} is no id of the Hub, but has a revision")
        if not REVISION.fullmatch(self.revision):
            raise ValueError(f"{self.revision[:80]!a} is no revision")
        return self


def load_record(
    file: Path, kind: type[Document], refusal: type[ExpertcutError], is_not: str
) -> Document:
    """What a file of JSON holds; `is_not` says in words what a wrong one is not.

    Types are strict: a number in quotes is text, and `true` no number.

    Raises:
        ExpertcutError: of the kind `refusal`: it cannot be read, or does not hold together.
    """
    try:
        content = read_file(file)
        parse_json(content)
        return kind.model_validate_json(content, strict=True)
    except OSError as error:
        raise refusal(f"{file} cannot be read: {error.strerror}") from None
    except ValidationError as error:  # a ValueError too, so it comes first
        raise refusal(f"{file} {is_not}: {first_fault(error)}") from None
    except ValueError as error:
        raise refusal(f"{file} {is_not}: it is no JSON that is read here: {error}") from None


def first_fault(error: ValidationError) -> str:
    """The first thing that a validation found, in one line."""
    fault = error.errors(include_url=False)[0]
    place = ".".join(str(part)[:80] for part in fault["loc"]) or "the file"
    return f"{place}: {fault['msg'][:300]}"
