"""Files: bounded reads, strict JSON, private temporary files, atomic writes, no secrets."""

import codecs
import errno
import json
import os
import re
import secrets
import stat
from contextlib import suppress
from io import BufferedReader
from math import isinf
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from expertcut.errors import OutputError

MAX_DOCUMENT_BYTES = 32 << 20  # a profile, plan, proof or sweep of any size is far below
MAX_DEPTH = 100
# Only where the system has them.
_UNWAITING, _AS_BYTES = getattr(os, "O_NONBLOCK", 0), getattr(os, "O_BINARY", 0)
_MOST_DIGITS = 19  # of 64 bits; beyond, sums and prints of it fail in ways of their own
_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
MARK_BYTES = 4  # the longest of them
_UMASK = os.umask(0o077)  # it can only be read by setting it
_SECRET = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"  # tokens of the Hub
    r"|(?<=://)[^\s/@:\"'<>]*:[^\s/@\"'<>]+(?=@)"  # name and password in an address
)
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST = 8  # a value below would hide words
HIDDEN = "***"


def open_file(file: Path) -> BufferedReader:
    """An ordinary file, or what a link to one leads to, opened for reading.

    Raises:
        OSError: not there, not to be read, or a folder, a pipe or a device, which might never end.
    """
    try:
        # Opening a pipe for reading waits for a writer, unless it is asked not to.
        descriptor = os.open(file, os.O_RDONLY | _UNWAITING | _AS_BYTES)
    except ValueError:  # a NUL in its name
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(file)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(file))
        raise OSError(errno.EINVAL, "Not an ordinary file", str(file))
    return os.fdopen(descriptor, "rb")


def read_file(file: Path, most_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
    """All of an ordinary file.

    Raises:
        OSError: as `open_file`, or it is larger than `most_bytes`.
    """
    with open_file(file) as stream:
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"More than {most_bytes >> 10} KiB", str(file))
    return content


def wide_encoding(head: bytes) -> str | None:
    """`UTF-16` or `UTF-32` where a file's first bytes are such text, else None.

    Told by the byte order mark; without one, by ASCII whose every other byte is zero.
    """
    marked = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    zeros = [byte == 0 for byte in head[:MARK_BYTES]]
    is_bare = zeros in ([False, True, False, True], [True, False, True, False])
    return marked or ("UTF-16" if is_bare else None)


def parse_json(content: bytes) -> Any:
    """JSON as RFC 8259 has it, in which no name stands twice in an object.

    Raises:
        ValueError: anything else; NaN, Infinity, numbers beyond 64 bits, more than 100 levels.
    """
    text = content.decode("utf-8")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_distinct,
            parse_constant=_no_number,
            parse_int=_integer,
            parse_float=_float,
        )
    except RecursionError:
        raise _too_deep() from None
    _check_depth(value)
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:60]!a} stands twice in one object")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS + 1 or not -(1 << 63) <= int(text) < 1 << 64:
        raise ValueError(f"{text[:20]}… has more than 64 bits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise ValueError(f"{text[:20]} is too large for a number")
    return value


def _check_depth(value: Any) -> None:
    """Level by level, because recursion is what a deep value breaks."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise _too_deep()


def _inside(value: Any) -> list[Any]:
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in held if isinstance(inner, dict | list)]


def _too_deep() -> ValueError:
    return ValueError(f"more than {MAX_DEPTH} levels, one inside the other")


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


def without_secrets(text: str) -> str:
    """The text with `***` where a token or a password stands."""
    for name in _VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    return _SECRET.sub(HIDDEN, text)


def line_with_secret(text: str) -> int | None:
    """The number of the first line that holds one, from 1; None where there is none."""
    for number, line in enumerate(text.splitlines(), start=1):
        if without_secrets(line) != line:
            return number
    return None


def write_atomically(path: Path, content: bytes, scratch: Path | None = None) -> None:
    """Under a temporary name, beside it or in `scratch`, synced, renamed.

    Raises:
        OutputError: the place cannot be written.
    """
    # Hosts that share a folder may share a pid, so that does not tell their files apart.
    name = f".{path.name}.{secrets.token_hex(4)}.tmp"
    temporary = (scratch or path.parent) / name
    try:
        for folder in (path.parent, temporary.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with create_private(temporary) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        share(temporary)
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # where a file stands in place of the folder, not even this
            temporary.unlink()
        if isinstance(error, OSError):
            raise OutputError(f"{path} cannot be written: {error.strerror}") from None
        raise
