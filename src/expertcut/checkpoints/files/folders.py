"""An output folder that is there as a whole or not at all."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from expertcut.errors import OutputError

logger = logging.getLogger(__name__)


def check_free(folder: Path, *, is_forced: bool = False, inputs: tuple[Path, ...] = ()) -> None:
    """That a folder may be written: absent, empty, or to be replaced.

    What is read meanwhile (`inputs`), and the working directory, is never replaced.

    Raises:
        OutputError: something is there.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: remove it or name another --out")
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
def new_folder(folder: Path, *, is_forced: bool = False) -> Iterator[Path]:
    """A temporary sibling that takes the folder's name when the block ends well, else is removed.

    The old folder goes only then. What is written must be synced; the name is, here.

    Raises:
        OutputError: the place cannot be written, or was taken meanwhile.
    """
    place = folder.resolve()  # `.` and links have no place of their own
    temporary = _sibling(place, "tmp")
    for left in sorted(place.parent.glob(f".{escape(place.name)}.*.tmp")):
        logger.warning("%s was left by a run that was killed or still runs", left)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        check_free(folder, is_forced=is_forced)
        _replace(place, temporary)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a loss of power."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(place: Path, temporary: Path) -> None:
    sync_folder(temporary)
    old = _sibling(place, "old")
    if place.exists():
        place.rename(old)
    try:
        temporary.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
    sync_folder(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sibling(place: Path, ending: str) -> Path:
    return place.with_name(f".{place.name}.{os.getpid()}.{ending}")
