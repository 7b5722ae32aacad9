"""Bytes from one open file to the end of another, in the kernel where the system can do that."""

import errno
import os
from collections.abc import Callable, Iterable
from io import FileIO

Range = tuple[int, int]  # first byte, number of bytes

_STEP_BYTES = 64 << 20  # so that Ctrl-C is answered
_BUFFER_BYTES = 4 << 20
_ANNOUNCED_BYTES = 16 << 20  # of one range
_CANNOT = {
    *(errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EBADF),
    *(errno.EPERM, errno.ETXTBSY, errno.ENOTSOCK),
}


def copy_ranges(source: FileIO, target: FileIO, ranges: Iterable[Range]) -> None:
    """Appends byte ranges of `source` to `target`.

    Raises:
        EOFError: the source ends before a range does.
        OSError: as reading and writing raise it.
    """
    for begin, size_bytes in ranges:
        done = 0
        for move in (_copy_file_range, _sendfile):
            done += _as_far_as_it_goes(move, source, target, (begin + done, size_bytes - done))
        _copy_by_buffer(source, target, (begin + done, size_bytes - done))


def announce_ranges(source: FileIO, ranges: Iterable[Range]) -> None:
    """Lets the system fetch what will be read soon, as far as it wants to; returns at once."""
    if hasattr(os, "posix_fadvise"):
        for begin, size_bytes in ranges:
            size_bytes = min(size_bytes, _ANNOUNCED_BYTES)
            os.posix_fadvise(source.fileno(), begin, size_bytes, os.POSIX_FADV_WILLNEED)


def read_ranges(source: FileIO, ranges: Iterable[Range]) -> bytearray:
    """The bytes of the ranges, one after another.

    Raises:
        EOFError: the source ends before a range does.
        OSError: as reading raises it.
    """
    ranges = list(ranges)
    content = bytearray(sum(size_bytes for _, size_bytes in ranges))
    rest = memoryview(content)
    for begin, size_bytes in ranges:
        source.seek(begin)
        _read_into(source, rest[:size_bytes])
        rest = rest[size_bytes:]
    return content


def write_all(target: FileIO, content: memoryview) -> None:
    """Writes every byte: one call of the system moves 2 GB at most."""
    while content:
        content = content[target.write(content) :]


def _as_far_as_it_goes(
    move: Callable[[int, int, int, int], int], source: FileIO, target: FileIO, wanted: Range
) -> int:
    """How many bytes came over before this way of copying gave up."""
    (begin, size_bytes), done = wanted, 0
    try:
        while done < size_bytes:
            step = min(_STEP_BYTES, size_bytes - done)
            moved = move(source.fileno(), target.fileno(), begin + done, step)
            if moved == 0:
                break
            done += moved
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    return done


def _copy_file_range(source: int, target: int, begin: int, size_bytes: int) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    return os.copy_file_range(source, target, size_bytes, offset_src=begin)


def _sendfile(source: int, target: int, begin: int, size_bytes: int) -> int:
    if not hasattr(os, "sendfile"):
        return 0
    return os.sendfile(target, source, begin, size_bytes)


def _copy_by_buffer(source: FileIO, target: FileIO, wanted: Range) -> None:
    begin, size_bytes = wanted
    source.seek(begin)
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, size_bytes)))
    while size_bytes:
        part = buffer[:size_bytes]
        _read_into(source, part)
        write_all(target, part)
        size_bytes -= len(part)


def _read_into(source: FileIO, content: memoryview) -> None:
    while content:
        n = source.readinto(content)
        if not n:
            raise EOFError
        content = content[n:]
