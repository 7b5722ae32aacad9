"""Faults done to a run: disks that fill, files that vanish, memory that ends, clocks that jump."""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager as Context
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from expertcut.checkpoints import shards
from expertcut.profiling import measure, storage

NOBODY = 65534
PAGE_BYTES = 4096
AN_HOUR_S = 3600


class CannotInject(Exception):
    """This machine does not let it be done."""


@dataclass(frozen=True)
class Injection:
    """What is done around a run, by the folder that it writes into, and in its process first."""

    around: Callable[[Path], Context[object]] = lambda _: nullcontext()
    within: Callable[[], None] | None = None


# Around a run: its folder's parent is a disk of its own, which is mended afterwards.


@contextmanager
def disk(parent: Path, pages: int) -> Iterator[None]:
    """A small one in memory."""
    _mount("-t", "tmpfs", "-o", f"size={pages * PAGE_BYTES}", "tmpfs", str(parent))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", parent], check=True)


@contextmanager
def full(parent: Path, pages: int) -> Iterator[None]:
    """It has room for so much, and afterwards for everything."""
    _mount("-o", f"remount,size={pages * PAGE_BYTES}", str(parent))
    try:
        yield
    finally:
        _mount("-o", f"remount,size={1 << 28}", str(parent))


@contextmanager
def read_only(parent: Path) -> Iterator[None]:
    _mount("-o", "remount,ro", str(parent))
    try:
        yield
    finally:
        _mount("-o", "remount,rw", str(parent))


@contextmanager
def restored(file: Path, _parent: Path) -> Iterator[None]:
    """What the run does to a file that it reads is undone afterwards."""
    copy = file.with_name(f"{file.name}.copy")
    shutil.copy2(file, copy)
    try:
        yield
    finally:
        copy.replace(file)


def _mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotInject(f"mount {' '.join(words)}: {done.stderr.strip()}")


# Within its process


def small_files(size_bytes: int) -> None:
    """No file may become larger, as under a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


def as_nobody() -> None:
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def little_memory(free_bytes: int) -> None:
    """So much more than the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + free_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def on_open(seen: str, act: Callable[[], object]) -> None:
    """Acts when the process first opens a path that ends so, before it does."""
    waiting = [act]

    def watch(event: str, args: tuple[object, ...]) -> None:
        if event == "open" and waiting and str(args[0]).endswith(seen):
            waiting.pop()()

    sys.addaudithook(watch)


def removed_on_open(seen: str, file: Path) -> None:
    on_open(seen, partial(file.unlink, missing_ok=True))


def before_shards(act: Callable[[], object]) -> None:
    """Acts after a checkpoint was laid out and before any of it is copied."""
    check = shards.check_space

    def checked(folder: Path, size_bytes: int) -> None:
        check(folder, size_bytes)
        act()

    shards.check_space = checked


def removed_before_shards(file: Path) -> None:
    before_shards(partial(file.unlink, missing_ok=True))


def cut_before_shards(file: Path) -> None:
    before_shards(partial(os.truncate, file, file.stat().st_size // 2))


def removed_before_load(file: Path) -> None:
    load = measure.load

    def late(*args: object) -> object:
        file.unlink()
        return load(*args)  # type: ignore[arg-type]

    measure.load = late  # type: ignore[assignment]


def removed_before_chunks(file: Path) -> None:
    """Safetensors' own reader opens files where no audit hook sees it."""
    read = storage.read_chunk

    def late(*args: object) -> object:
        file.unlink(missing_ok=True)
        return read(*args)  # type: ignore[arg-type]

    storage.read_chunk = late  # type: ignore[assignment]


def clock_set_back() -> None:
    """By an hour, after the first chunk; file times come from the same clock."""
    now, touch, opened = time.time, os.utime, time.monotonic()

    def back() -> float:
        return now() - AN_HOUR_S * (time.monotonic() - opened > 0.3)

    def touched(path: Path, *_: object) -> None:
        touch(path, (back(), back()))

    time.time, os.utime = back, touched  # type: ignore[assignment]
