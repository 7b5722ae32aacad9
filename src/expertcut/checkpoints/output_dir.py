"""An output folder that appears as a whole or not at all."""

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from safetensors import SafetensorError

from expertcut.errors import OutputError
from expertcut.files import share

logger = logging.getLogger(__name__)

_NEW, _OLD = ".tmp", ".old"  # endings of the two siblings
_TOKEN_BYTES = 4


def check_writable(folder: Path, *, is_forced: bool = False, inputs: tuple[Path, ...] = ()) -> None:
    """Raises OutputError unless a folder is absent, empty, or may be replaced; `inputs` may not."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: remove it or name another --out")
    if os.name == "posix" and folder.resolve().is_mount():
        raise OutputError(f"{folder} is a mount point, which no folder can replace: name one in it")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not is_forced:
        raise OutputError(
            f"{folder} is not empty: remove it, name another --out or replace it with --force"
        )
    for needed in (*inputs, Path.cwd(), Path.home()):
        if needed.resolve().is_relative_to(folder.resolve()):
            raise OutputError(f"{folder} holds {needed}, so --force spares it: name another --out")


@contextmanager
def atomic_dir(folder: Path, *, is_forced: bool = False) -> Iterator[Path]:
    """A hidden sibling that takes the folder's name after the block, or is removed on an error.

    Only then is the old folder removed. Files must be synced by the block; the name is synced here.
    """
    place = folder.resolve()  # `.` and links have no place of their own
    # No process id: in a container it is the same each time.
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(_TOKEN_BYTES)}{_NEW}")
    for left in sorted(place.parent.glob(f".{escape(place.name)}.{'?' * 2 * _TOKEN_BYTES}.*")):
        if left.suffix in (_NEW, _OLD):
            logger.warning("%s was left by a run that was killed or still runs", left)
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(mode=0o700)
        yield temporary
        check_writable(folder, is_forced=is_forced)
        share(temporary)
        if place.exists() and not is_forced:
            place.rmdir()  # fails where another run has taken the name since it was looked at
        _replace(place, temporary, is_forced=is_forced)
    except OSError as error:
        raise failed(error, folder, temporary) from None
    except OutputError as error:  # by the name that the user gave
        raise OutputError(str(error).replace(str(temporary), str(folder))) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def failed(error: OSError, folder: Path, *ours: Path) -> OutputError:
    """The error for a system error while writing a folder (or `ours`), or reading for it."""
    reason = error.strerror or error
    name = os.fsdecode(error.filename) if error.filename else None
    places = (folder, folder.resolve(), *ours)
    if name is None or any(p.is_relative_to(name) or Path(name).is_relative_to(p) for p in places):
        return OutputError(f"{folder} cannot be written: {reason}")
    return OutputError(
        f"{name} cannot be read: {reason}: {folder} was not written, run the same command again "
        "once the file is there"
    )


@contextmanager
def system_errors(folder: Path) -> Iterator[None]:
    """Turns system errors inside safetensors' errors into OSError of the folder."""
    try:
        yield
    except SafetensorError as error:  # «I/O error: No space left on device (os error 28)»
        found = re.search(r"I/O error: .*\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from None


def sync_folder(folder: Path) -> None:
    """Syncs the names in a folder to the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(place: Path, temporary: Path, *, is_forced: bool) -> None:
    sync_folder(temporary)
    old = temporary.with_suffix(_OLD)
    try:
        if is_forced and place.exists():  # else what another run has just put there would go
            place.rename(old)
        temporary.rename(place)
    finally:  # Ctrl-C too may come between the two
        if old.exists() and not place.exists():
            old.rename(place)
    sync_folder(place.parent)
    shutil.rmtree(old, ignore_errors=True)
