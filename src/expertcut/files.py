"""Files: bounded reads, strict JSON, private temporary files, atomic writes, no secrets.

Also what earlier runs found, in a cache folder of the user, and the progress of long work.
"""

import codecs
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from math import isinf
from pathlib import Path
from typing import Any, NoReturn

from expertcut.errors import OutputError

MAX_DEPTH = 100
# Flags of POSIX and of Windows.
_NONBLOCK, _BINARY = getattr(os, "O_NONBLOCK", 0), getattr(os, "O_BINARY", 0)
MARK_BYTES = 4  # of the longest byte order mark
_UMASK = os.umask(0o077)  # the umask can be read only by setting it
os.umask(_UMASK)
_SECRET = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"  # tokens of the Hub
    r"|(?<=://)[^\s/@:\"'<>]*:[^\s/@\"'<>]+(?=@)"  # name and password in an address
)
HIDDEN = "***"


def open_file(file: Path) -> BufferedReader:
    """Opens a regular file, or a link to one, for reading.

    Raises OSError: missing, unreadable, or a folder, pipe or device, which might never end.
    """
    try:
        # Without the flag, opening a pipe waits for a writer.
        descriptor = os.open(file, os.O_RDONLY | _NONBLOCK | _BINARY)
    except ValueError:  # a NUL in its name
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(file)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(file))
        raise OSError(errno.EINVAL, "Not an ordinary file", str(file))
    return os.fdopen(descriptor, "rb")


def read_file(file: Path, most_bytes: int = 32 << 20) -> bytes:
    """The content of a regular file; OSError as `open_file`, or if larger than `most_bytes`."""
    with open_file(file) as stream:
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"More than {most_bytes >> 10} KiB", str(file))
    return content


def wide_encoding(head: bytes) -> str | None:
    """`UTF-16` or `UTF-32` if the first bytes of a file are such text, else None.

    Detected by the byte order mark, or by ASCII characters between zero bytes.
    """
    # First, because its little-endian mark begins with that of UTF-16.
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    zeros = [byte == 0 for byte in head[:MARK_BYTES]]
    is_bare = zeros in ([False, True, False, True], [True, False, True, False])
    has_mark = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "UTF-16" if is_bare or has_mark else None


def parse_json(content: bytes) -> Any:
    """Strict JSON (RFC 8259).

    Raises ValueError: invalid JSON, a duplicate name in an object, NaN, Infinity, a number beyond
    64 bits, or more than 100 levels.
    """
    with suppress(RecursionError):
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_distinct,
            parse_constant=_not_a_number,
            parse_int=_integer,
            parse_float=_float,
        )
        # Level by level: recursion would fail on a deep value.
        level = [value]
        for _ in range(MAX_DEPTH + 2):
            level = [v for v in level if isinstance(v, dict | list)]
            if not level:
                return value
            level = [v for x in level for v in (x.values() if isinstance(x, dict) else x)]
    raise ValueError(f"more than {MAX_DEPTH} levels, one inside the other")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        duplicate = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{duplicate[:60]!a} stands twice in one object")
    return unique


def _not_a_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")


def _integer(text: str) -> int:
    # Larger numbers overflow in numpy and torch; those of 64 bits have up to 20 characters.
    if len(text) > 20 or not -(1 << 63) <= int(text) < 1 << 64:
        raise ValueError(f"{text[:20]}… has more than 64 bits")
    return int(text)


def _float(text: str) -> float:
    if isinf(value := float(text)):
        raise ValueError(f"{text[:20]} is too large for a number")
    return value


def share(path: Path) -> None:
    """Gives a private file or folder the default mode of the process."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_UMASK)


def without_secrets(text: str) -> str:
    """The text with `***` in place of tokens and passwords."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        value = os.environ.get(name, "")
        if len(value) >= 8:  # shorter values would hide ordinary words
            text = text.replace(value, HIDDEN)
    return _SECRET.sub(HIDDEN, text)


def hub_reason(error: BaseException) -> str:
    """Why the Hub gave nothing: the first line of a library's error, or that it was not reached."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, ConnectionError | LocalEntryNotFoundError):
        return "the Hub cannot be reached, and its cache here has no copy"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_atomically(path: Path, content: bytes, scratch: Path | None = None) -> None:
    """Writes under a temporary name, beside the file or in `scratch`, syncs and renames.

    Raises OutputError: the place cannot be written.
    """
    # Not the pid: hosts that share the folder may have the same.
    temporary = (scratch or path.parent) / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        for folder in (path.parent, temporary.parent):
            folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        share(temporary)
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # fails too if the folder is a file
            temporary.unlink()
        if isinstance(error, OSError):
            raise OutputError(f"{path} cannot be written: {error.strerror}") from None
        raise


def recall(key: object) -> str:
    """What an earlier run remembered under the `repr` of the key; empty if nothing."""
    with suppress(OSError, ValueError):
        return read_file(_memory(key), 1000).decode("ascii")
    return ""


def remember(key: object, found: str) -> None:
    """Keeps a short ASCII text for later runs, where the cache can be written."""
    with suppress(OutputError):
        write_atomically(_memory(key), found.encode("ascii"))


def _memory(key: object) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = os.environ.get("EXPERTCUT_CACHE") or Path(cache, "expertcut")
    return Path(folder, hashlib.sha256(repr(key).encode()).hexdigest())


on_progress: list[Callable[[str, float, float, str], None]] = []
"""Called with what runs, how much of it is done, of how much (0: unknown), and the unit."""


def advance(what: str, done: float, total: float, unit: str = "") -> None:
    """Reports progress to the terminal, if there is one."""
    for report in on_progress:
        report(what, done, total, unit)
