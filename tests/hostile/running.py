"""A command line in this process or in one of its own, with its time and memory bounded."""

import contextlib
import io
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn
from unittest.mock import patch

import psutil
import torch

from expertcut.cli import main

TIMEOUT_S = 60
LARGE = 4 << 10
MORE_MEMORY = 2 << 30  # bytes that one refusal may reserve
ADDRESS_SPACE = 12 << 30  # of a whole process; torch alone reserves several GiB


@dataclass(frozen=True)
class Ended:
    """What a command line came to; `memory` is its peak in bytes, in a process of its own."""

    status: int
    stdout: str
    stderr: str
    seconds: float
    memory: int = 0


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` with its bytes; a link is where it points."""
    return {str(p.relative_to(folder)): _content(p) for p in sorted(folder.rglob("*"))}


def _content(path: Path) -> bytes | None:
    if path.is_symlink():
        return str(path.readlink()).encode()
    if not path.is_file():
        return None
    found = path.stat()
    if found.st_size > LARGE:  # to read all of it takes longer than to refuse, and some are holes
        return f"{found.st_size} {found.st_mtime_ns}".encode()
    return path.read_bytes()


def run(folder: Path, words: Sequence[str]) -> Ended:
    """In this process, from `folder`."""
    out, err = io.StringIO(), io.StringIO()
    _silence_datasets()
    start = time.monotonic()
    with (
        contextlib.chdir(folder),
        patch.object(sys, "argv", ["expertcut", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _warnings_in(err),
        _bounded(),
    ):
        try:
            main()
            status = 0
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        except Exception:  # as a process of its own would end
            traceback.print_exc(file=err)
            status = 1
    torch.set_num_threads(1)
    return Ended(status, out.getvalue(), err.getvalue(), time.monotonic() - start)


def _silence_datasets() -> None:
    """What the command asks of that library before it is imported, where a test has done that."""
    if (datasets := sys.modules.get("datasets")) is not None:
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)


@contextlib.contextmanager
def _warnings_in(err: io.StringIO) -> Iterator[None]:
    """pytest keeps what is logged to itself; a user sees it on stderr."""
    handler = logging.StreamHandler(err)
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """No more than `MORE_MEMORY` and `TIMEOUT_S`; beyond, an error that no command catches."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"still running after {TIMEOUT_S} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MORE_MEMORY, hard))
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(TIMEOUT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run_forked(folder: Path, words: Sequence[str]) -> Ended:
    """In a fork of this process, from `folder`: what has been imported is there already.

    Its memory is its own peak with all that this process held when it was forked.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if (child := os.fork()) == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            _become(folder, words)
        _, status, usage = os.wait4(child, 0)
        seconds = time.monotonic() - start
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
    return Ended(os.waitstatus_to_exitcode(status), *texts, seconds, usage.ru_maxrss * 1024)


def _become(folder: Path, words: Sequence[str]) -> NoReturn:
    """The command line, as the end of this process; late, it is killed."""
    status = 1
    try:
        os.chdir(folder)
        limit = psutil.Process().memory_info().vms + MORE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(TIMEOUT_S)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        logging.getLogger().handlers.clear()
        sys.argv = ["expertcut", *words]
        main()
        status = 0
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    except BaseException:  # as Python itself ends
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_alone(folder: Path, words: Sequence[str]) -> Ended:
    """In a process of its own, from `folder`, as a user runs it; killed when it is late."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "expertcut", *words],
            cwd=folder,
            stdout=out,
            stderr=err,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE,) * 2),
        )
        late = threading.Timer(TIMEOUT_S, process.kill)
        late.start()
        _, status, usage = os.wait4(process.pid, 0)
        late.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - start
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
    return Ended(process.returncode, *texts, seconds, usage.ru_maxrss * 1024)
