"""Claims and run locks of processes that share a folder, on one host or several.

A claim is a file `<name>.<n>` that only one process can create; its holder touches it every two
seconds. If the holder is dead, the next process creates `<name>.<n + 1>`, so nobody removes a live
claim; the highest number counts. Claims only save work: two processes that measure the same chunk
would write equal bytes.
"""

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from expertcut.errors import OutputError

logger = logging.getLogger(__name__)

CLAIMS = "claims"  # name of the folder
POLL_S = 0.25


@dataclass(frozen=True)
class Timing:
    """Interval of heartbeats, and the silence after which a holder counts as dead."""

    beat_s: float = 2
    dead_after_s: float = 20


class Claims:
    """The claims of this process in one folder, kept alive by a thread in the context."""

    def __init__(self, folder: Path, timing: Timing | None = None) -> None:
        self.folder = folder
        self.timing = timing or Timing()
        self._held: dict[str, Path] = {}
        self._seen: dict[Path, tuple[int, float]] = {}
        self._is_over = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(self, *_error: object) -> None:
        for name in list(self._held):
            self.release(name)
        self._is_over.set()
        self._heart.join()
        with suppress(OSError):  # missing, or with claims of others
            self.folder.rmdir()

    def take(self, name: str) -> bool:
        """Takes a claim; False if another process has it."""
        claims = self._claims(name)
        if claims and self._is_alive(claims[-1]):
            return False
        path = self.folder / f"{name}.{_number(claims[-1]) + 1 if claims else 0}"
        self._held[name] = path  # first, so an interruption at any point releases it
        if not self._create(path):
            del self._held[name]
            return False
        if self._claims(name)[-1:] != [path]:  # a higher number is held
            self.release(name)
            return False
        if claims:
            logger.info("%s: its process is gone, taken over", name)
        return True

    def _create(self, path: Path) -> bool:
        # Before the file is created: an empty claim could only expire by its heartbeat.
        text = json.dumps(_here())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            if not self.folder.is_dir():
                raise OutputError(f"{self.folder} is in the way: name another --out") from None
            return False
        except FileNotFoundError:  # another process removed the folder in between
            return False
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from None
        return True

    def holder(self, name: str) -> tuple[str, bool]:
        """The holder as text, and whether it is a live process of this host."""
        try:
            held = json.loads(self._claims(name)[-1].read_text())
            words = f"process {held['pid']} on {held['host']}"
            return words, _is_here(held) and psutil.pid_exists(held["pid"])
        except (IndexError, OSError, ValueError, KeyError, TypeError):
            return "another process", False  # released, or being written

    def release(self, name: str) -> None:
        """Releases a claim and removes the dead ones that it replaced."""
        mine = self._held.pop(name)
        for path in self._claims(name):
            if _number(path) <= _number(mine):
                with suppress(OSError):  # gone, or not writable
                    path.unlink()

    def clear(self) -> None:
        """Removes all claims and temporary files, when everything is done."""
        for path in self._files():
            if path.suffix == ".tmp" or path.suffix[1:].isdigit():
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        try:
            return list(self.folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _claims(self, name: str) -> list[Path]:
        own = [p for p in self._files() if p.stem == name and p.suffix[1:].isdigit()]
        return sorted(own, key=_number)

    def _is_alive(self, claim: Path) -> bool:
        # Clocks of hosts differ, so a heartbeat is only compared with that of the last look.
        try:
            with claim.open() as file:  # opening makes a network file system ask its server
                heartbeat_ns, text = os.fstat(file.fileno()).st_mtime_ns, file.read()
        except OSError:
            return True  # released just now: the next look will tell
        if _is_gone(text):
            return False
        before_ns, since = self._seen.get(claim, (None, 0.0))
        if before_ns != heartbeat_ns:
            self._seen[claim] = (heartbeat_ns, time.monotonic())
            return True
        return time.monotonic() - since < self.timing.dead_after_s

    def _beat(self) -> None:
        while not self._is_over.wait(self.timing.beat_s):
            for path in list(self._held.values()):
                with suppress(OSError):  # at worst another process repeats the work
                    os.utime(path)


def _number(claim: Path) -> int:
    return int(claim.suffix[1:])


def _here() -> dict[str, Any]:
    """An identity of this process across hosts, containers and reused pids."""
    pid = os.getpid()
    return {"host": platform.node(), "kernel": _kernel(), "pid": pid, "started": _started(pid)}


def _started(pid: int) -> float:
    """The start time of a process; on Linux in seconds since boot, which no clock change moves."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return psutil.Process(pid).create_time()


def _kernel() -> str:
    """The scope of pids: one boot and one pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _is_here(holder: dict[str, Any]) -> bool:
    return (holder["host"], holder["kernel"]) == (platform.node(), _kernel())


def _is_gone(text: str) -> bool:
    """Whether the holder ran here and has ended; False also if unknown."""
    try:
        holder = json.loads(text)
        if not _is_here(holder):
            return False
        process = psutil.Process(holder["pid"])
        # Within 5 s, because some systems know only the time of day.
        is_other = abs(_started(holder["pid"]) - holder["started"]) > 5
        return is_other or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (ValueError, KeyError, TypeError, psutil.Error):
        return False  # being written, or not visible: the heartbeat decides


@contextmanager
def alone(folder: Path, what: str, timing: Timing | None = None) -> Iterator[None]:
    """Locks a folder against other runs in the context; OutputError if another holds the lock.

    A killed run's lock blocks for seconds at most. Created folders that stay empty are removed.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with Claims(folder / CLAIMS, timing) as claims:
            end = time.monotonic() + claims.timing.dead_after_s + 2 * claims.timing.beat_s
            while not claims.take(what):
                holder, is_here = claims.holder(what)
                if is_here or time.monotonic() > end:
                    raise OutputError(
                        f"{folder}: another run is at work there ({holder}): wait until it has "
                        "ended, or name another --out"
                    )
                time.sleep(POLL_S)
            yield
    finally:
        with suppress(OSError):  # not empty
            for place in made:
                place.rmdir()
