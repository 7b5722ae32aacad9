"""A folder that a long run fills: what is finished is kept, another run's is refused."""

import hashlib
from pathlib import Path
from typing import TypeVar

from expertcut.documents import Record, load_record
from expertcut.errors import OutputError
from expertcut.files import write_atomically
from expertcut.profiling.locks import CLAIMS
from expertcut.profiling.schema import ProfileInfo

Outcome = TypeVar("Outcome", bound=Record)


def save_outcome(file: Path, found: Record) -> None:
    """Writes it as JSON, whole or not at all."""
    write_atomically(file, (found.model_dump_json(indent=1) + "\n").encode())


def load_outcome(file: Path, kind: type[Outcome]) -> Outcome:
    """What was saved.

    Raises:
        OutputError: none there, or one that does not hold together.
    """
    return load_record(file, kind, OutputError, f"is no {kind.__name__.lower()}")


def begun(file: Path, kind: type[Outcome]) -> Outcome | None:
    """What an earlier run left in the file's folder; None where there is nothing.

    Raises:
        OutputError: the folder holds something else.
    """
    if file.is_file():
        return load_outcome(file, kind)
    folder = file.parent
    if folder.is_file():
        raise OutputError(f"{folder} is a file: remove it or name another --out")
    # Names with a dot are files that another process is just writing, or was when it was killed.
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    if any(not name.startswith(".") and name != CLAIMS for name in names):
        raise OutputError(
            f"{folder} is not empty and holds no {kind.__name__.lower()}: name another --out"
        )
    return None


def check_same(folder: Path, theirs: Record, ours: Record, kind: str) -> None:
    """That what was asked in a folder is what is asked now.

    Raises:
        OutputError: naming the first thing that differs.
    """
    for key in type(ours).model_fields:
        was, now = getattr(theirs, key), getattr(ours, key)
        if was != now:
            is_long = len(f"{was}{now}") > 160
            how = "differs from what is asked now" if is_long else f"was {was}, now it is {now}"
            raise OutputError(f"{folder} is another {kind}: its {key} {how}: name another --out")


def profile_hash(info: ProfileInfo) -> str:
    """SHA-256 of all that a profile's bytes depend on."""
    return hashlib.sha256(info.model_dump_json().encode()).hexdigest()
