"""Claims and run locks: which process works on what in a folder that several share.

Claims: which process works on what in a folder that several share, on one host or on many. A claim
is a file `<what>.<n>` that only one process can create. Its holder touches it every two seconds.
Where the holder is gone, the next process creates `<what>.<n + 1>`, which again only one can do, so
that nobody removes what another holds; the highest number counts.

Claims save work and nothing else: two processes that did the same chunk would write equal bytes.
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
from types import TracebackType
from typing import Any, Self

import psutil

from expertcut.errors import OutputError

logger = logging.getLogger(__name__)

CLAIMS = "claims"  # their folder's name
_SAME_START_S = 5  # where only the time of day is known, which may be set a little
_POLL_S = 0.25


@dataclass(frozen=True)
class Timing:
    """How often a holder says that it is alive, and how long without makes it dead."""

    beat_s: float = 2
    dead_after_s: float = 20


class Claims:
    """This process's claims in one folder, kept alive by a thread while the `with` lasts."""

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in list(self._held):
            self.release(name)
        self._is_over.set()
        self._heart.join()
        with suppress(OSError):  # not there, or others have claims
            self.folder.rmdir()

    def take(self, name: str) -> bool:
        """Claims it; False where another process has it.

        Raises:
            OutputError: the place cannot be written.
        """
        claims = self._claims(name)
        if claims and self._is_alive(claims[-1]):
            return False
        path = self.folder / f"{name}.{_number(claims[-1]) + 1 if claims else 0}"
        self._held[name] = path  # before it is there, so that a stop at any point gives it back
        if not self._create(path):
            del self._held[name]
            return False
        if self._claims(name)[-1:] != [path]:  # this number came free while a higher one is held
            self.release(name)
            return False
        if claims:
            logger.info("%s: its process is gone, taken over", name)
        return True

    def _create(self, path: Path) -> bool:
        # Made before the file is there: of one whose holder died over it, only the heartbeat tells.
        text = json.dumps(_here())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            if not self.folder.is_dir():
                raise OutputError(f"{self.folder} is in the way: name another --out") from None
            return False
        except FileNotFoundError:  # the last to leave removed the folder in between
            return False
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from None
        return True

    def holder(self, name: str) -> tuple[str, bool]:
        """Who has it, in words, and whether that is a process which is seen to live here."""
        claims = self._claims(name)
        try:
            held = json.loads(claims[-1].read_text())
            words = f"process {held['pid']} on {held['host']}"
            return words, _is_here(held) and psutil.pid_exists(held["pid"])
        except (IndexError, OSError, ValueError, KeyError, TypeError):
            return "another process", False  # given back, or still being written

    def release(self, name: str) -> None:
        """Gives it back, and removes the dead claims that it replaced."""
        mine = self._held.pop(name)
        for path in self._claims(name):
            if _number(path) <= _number(mine):
                with suppress(OSError):  # gone, or in a place that cannot be written
                    path.unlink()

    def clear(self) -> None:
        """Removes all claims and half-written files, for everything is done."""
        with suppress(FileNotFoundError):
            for path in self.folder.iterdir():
                if path.suffix == ".tmp" or path.suffix[1:].isdigit():
                    path.unlink(missing_ok=True)

    def _claims(self, name: str) -> list[Path]:
        """Claims of one name, the one that counts last."""
        try:
            found = [path for path in self.folder.iterdir() if path.stem == name]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted((path for path in found if path.suffix[1:].isdigit()), key=_number)

    def _is_alive(self, claim: Path) -> bool:
        """Whether its holder is at work, as far as this process can know by now.

        Time is this process's own: clocks of hosts differ, so the heartbeat is only compared with
        what it was when this process looked before.
        """
        try:
            with claim.open() as file:  # opened, because a network file system then asks its server
                touched_ns, text = os.fstat(file.fileno()).st_mtime_ns, file.read()
        except OSError:
            return True  # given back this moment: the next look will tell
        if _is_gone(text):
            return False
        before_ns, since = self._seen.get(claim, (None, 0.0))
        if before_ns != touched_ns:
            self._seen[claim] = (touched_ns, time.monotonic())
            return True
        return time.monotonic() - since < self.timing.dead_after_s

    def _beat(self) -> None:
        while not self._is_over.wait(self.timing.beat_s):
            for path in list(self._held.values()):
                with suppress(OSError):  # at worst another process does the same work
                    os.utime(path)


def _number(claim: Path) -> int:
    return int(claim.suffix[1:])


def _here() -> dict[str, Any]:
    """This process, told apart from those of other hosts and containers, and from later ones."""
    return {
        "host": platform.node(),
        "kernel": _kernel(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _started(pid: int) -> float:
    """When a process began, by a clock that nobody can set, where there is one.

    On Linux seconds since boot: times of day are reckoned from that and move when the clock is set.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return psutil.Process(pid).create_time()


def _kernel() -> str:
    """Where pids mean what they mean here: one boot, one pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether its pid means here what it meant to the holder."""
    return (holder["host"], holder["kernel"]) == (platform.node(), _kernel())


def _is_gone(text: str) -> bool:
    """True where the holder ran here and is no more; False also means unknown."""
    try:
        holder = json.loads(text)
        if not _is_here(holder):
            return False
        process = psutil.Process(holder["pid"])
        is_other = abs(_started(holder["pid"]) - holder["started"]) > _SAME_START_S
        return is_other or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (ValueError, KeyError, TypeError, psutil.Error):
        return False  # still being written, or not to be seen: the heartbeat decides


@contextmanager
def alone(folder: Path, what: str, timing: Timing | None = None) -> Iterator[None]:
    """Keeps other runs out of a folder while the block lasts.

    One that was killed is in nobody's way: here that is seen at once, on another machine when its
    claim has not been touched for some seconds, which are waited for.

    Folders that it had to make and that are empty at the end are gone again.

    Raises:
        OutputError: another run is at work there, or the place cannot be written.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with _claimed(folder, what, timing):
            yield
    finally:
        with suppress(OSError):  # the first that holds something, and so those above it
            for place in made:
                place.rmdir()


@contextmanager
def _claimed(folder: Path, what: str, timing: Timing | None) -> Iterator[None]:
    with Claims(folder / CLAIMS, timing) as claims:
        patience_s = claims.timing.dead_after_s + 2 * claims.timing.beat_s
        end = time.monotonic() + patience_s
        while not claims.take(what):
            holder, is_here = claims.holder(what)
            if is_here or time.monotonic() > end:
                raise OutputError(
                    f"{folder}: another run is at work there ({holder}): wait until it has ended, "
                    "or name another --out"
                )
            time.sleep(_POLL_S)
        yield
