"""The pydantic base of every JSON file: validated and loaded, or refused in one line; saved."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic

from expertcut.errors import ExpertcutError
from expertcut.files import parse_json, read_file, write_atomically

# Left out of JSON if None: hashes and bytes stay those of older versions.
_OMITTED = {"truncate", "cut", "selection", "chosen_by", "healed_from", "chance", "sequential"}
_OMITTED |= {"text", "tasks", "generation", "text_tokens", "blend", "judged"}  # of later versions
_OMITTED |= {
    "places",
    "routing",
    "beta",
    "shared",
    "compression",
    "balance",
    "contract",
    "declared",
    "parallel",
}


def _no_bool(value: object) -> object:
    if isinstance(value, bool):  # True equals 1
        raise ValueError("must be a number")
    return value


Format1 = Annotated[Literal[1], pydantic.BeforeValidator(_no_bool)]


class Record(pydantic.BaseModel):
    """Base of JSON documents and their parts: frozen, without unknown keys and NaN."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def load(cls, file: Path, refusal: type[ExpertcutError], is_not: str) -> Self:
        """Loads a JSON file with strict types, or raises a `refusal`; `is_not` names the kind."""
        try:
            content = read_file(file)
            parse_json(content)
            return cls.model_validate_json(content, strict=True)
        except OSError as error:
            raise refusal(f"{file} cannot be read: {error.strerror}") from None
        except pydantic.ValidationError as error:  # a ValueError too, so it comes first
            raise refusal(f"{file} {is_not}: {first_fault(error)}") from None
        except ValueError as error:
            raise refusal(f"{file} {is_not}: invalid JSON: {error}") from None

    def save(self, file: Path, scratch: Path | None = None) -> None:
        """Writes the JSON file as `write_atomically` does."""
        write_atomically(file, self.json_bytes(), scratch)

    def json_bytes(self) -> bytes:
        """The content of the JSON file."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    @pydantic.model_serializer(mode="wrap")
    def _without_omitted(self, values: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = values(self)
        return {k: v for k, v in fields.items() if v is not None or k not in _OMITTED}


class Identified(Record):
    """A local folder, or with a revision a repository of the Hub."""

    id: str
    revision: str | None

    @property
    def label(self) -> str:
        """The id; of an absolute path its last part."""
        is_folder = self.revision is None and Path(self.id).is_absolute()
        return Path(self.id).name if is_folder else self.id

    @pydantic.model_validator(mode="after")
    def _is_on_the_hub(self) -> Self:
        if self.revision is None:
            return self
        is_id = re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", self.id, re.A)
        if not is_id or ".." in self.id:
            raise ValueError(f"{self.id[:80]!a} is not an id of the Hub, but has a revision")
        if not re.fullmatch(r"\w[\w.-]{0,250}(/\w[\w.-]{0,250}){0,9}", self.revision, re.A):
            raise ValueError(f"{self.revision[:80]!a} is not a revision")
        return self


def first_fault(error: pydantic.ValidationError) -> str:
    """The first error of a validation, in one line."""
    fault = error.errors(include_url=False)[0]
    # Of a union pydantic names the class that it tried last, which no file holds.
    parts = [str(part)[:80] for part in fault["loc"]]
    place = ".".join(part for part in parts if not part[:1].isupper()) or "the file"
    return f"{place}: {fault['msg'].removeprefix('Value error, ')[:300]}"
