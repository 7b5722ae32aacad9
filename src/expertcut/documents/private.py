"""Files and folders that nobody else can read until they are complete and have their name."""

import os
from pathlib import Path
from typing import BinaryIO

_UMASK = os.umask(0o077)  # it can only be read by setting it
os.umask(_UMASK)
_FILE, _FOLDER = 0o666, 0o777


def create_private(file: Path) -> BinaryIO:
    """A new file of mode 0600, opened for writing.

    Raises:
        FileExistsError: something, were it a link, has that name.
    """
    as_bytes = getattr(os, "O_BINARY", 0)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | as_bytes, 0o600)
    return os.fdopen(descriptor, "wb")


def share(path: Path) -> None:
    """Gives a file or folder the mode that it would have had without this."""
    path.chmod((_FOLDER if path.is_dir() else _FILE) & ~_UMASK)
