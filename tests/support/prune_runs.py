"""Runs of `expertcut prune` on a tiny model: in processes that can be killed, and in this one."""

import gc
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from expertcut.cli import main
from expertcut.data import Selection, load_quiz
from expertcut.profiling.measure import Measurement, MeasureOptions
from tests.conftest import make_checkpoint, open_model
from tests.support.processes import PROCESSES

PAGE_BYTES = 4096
Contents = dict[str, str]  # SHA-256 of each file
_SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
_STEPS = {"os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


@dataclass(frozen=True)
class Runs:
    """Where to run: `root` holds `model`, its `profile`, and what keeping 6 and 5 experts writes.

    The model is large enough to be killed while a cut of it is written; `out` is where to.
    """

    root: Path
    out: Path

    @property
    def old(self) -> Contents:
        return contents(self.root / "6")

    @property
    def new(self) -> Contents:
        return contents(self.root / "5")

    def command(self, *options: str, keep: int = 5) -> list[str]:
        profile, out = str(self.root / "profile"), str(self.out)
        return ["prune", "--keep", str(keep), "--profile", profile, "--out", out, *options]

    def start(
        self, *options: str, keep: int = 5, step: int = 0, sent: int = signal.SIGKILL
    ) -> BaseProcess:
        """A process that may get a signal before one of its changes of a name on disk."""
        arguments = (self.command(*options, keep=keep), step, sent)
        process = PROCESSES.Process(target=run_command, args=arguments, daemon=True)
        process.start()
        return process

    def python_m_killed_while_it_writes(self, *options: str) -> int:
        """The exit status of `python -m expertcut`."""
        command = [sys.executable, "-m", "expertcut", *self.command(*options)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not self.siblings():
                time.sleep(0.001)
            process.kill()
        return process.returncode

    def prune(self, *options: str) -> tuple[object, str, str]:
        """In this process: exit status, stdout and stderr."""
        stdout, stderr = StringIO(), StringIO()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(sys, "argv", ["expertcut", *self.command(*options)])
            with redirect_stdout(stdout), redirect_stderr(stderr):
                main()
        return stopped.value.code, stdout.getvalue(), stderr.getvalue()

    def lay(self, *, has_old: bool) -> None:
        """Makes `out` the old checkpoint or absent, and removes all that lies beside it."""
        for path in self.out.parent.iterdir():
            shutil.rmtree(path)
        if has_old:
            shutil.copytree(self.root / "6", self.out)

    def state(self, old: Contents, new: Contents) -> str:
        """What a killed run left; where a replacement left nothing, both lie whole beside it."""
        found = contents(self.out)
        assert self.out.exists() == bool(found)
        if found or not old:
            assert found in (old, new)
            return "new" if found == new else "old"
        assert {p.suffix: contents(p) for p in self.siblings()} == {".old": old, ".tmp": new}
        return "absent"

    def timed(self, process: BaseProcess) -> tuple[float, float]:
        """How long it runs, and how long it writes."""
        began_s = time.perf_counter()
        self.until_it_writes(process)
        writes_s = time.perf_counter()
        process.join()
        assert process.exitcode == 0
        return time.perf_counter() - began_s, time.perf_counter() - writes_s

    def killed(self, n: int, times_s: tuple[float, float], *options: str) -> Iterator[None]:
        """So many runs that end at random moments of these times, three of four of the writing."""
        chance = random.Random(0)
        for i in range(n):
            process = self.start(*options)
            if i % 4:
                self.until_it_writes(process)
            process.join(times_s[i % 4 > 0] * (i + chance.random()) / n)
            process.kill()
            process.join()
            yield

    def siblings(self) -> list[Path]:
        return sorted(self.out.parent.glob(".out.*"))

    def until_it_writes(self, process: BaseProcess) -> None:
        while process.is_alive() and not self.siblings():
            time.sleep(0.001)


def make_runs(quiz_folder: Path, root: Path) -> Runs:
    moe = open_model(make_checkpoint(root / "model", "olmoe", **_SIZES))
    quiz = load_quiz(Selection(str(quiz_folder), split="val", shots=1))
    list(Measurement(moe, quiz, None, MeasureOptions(threads=1)).run(root / "profile"))
    for keep in (6, 5):
        (runs := Runs(root, root / str(keep))).start("--no-verify", keep=keep).join()
        assert {"config.json", "plan.json", "tokenizer.json"} < set(contents(runs.out))
        assert len(load_file(runs.out / "model.safetensors")) > 20
    return runs


@contextmanager
def small_disk(place: Path, pages: int) -> Iterator[None]:
    command = ["mount", "-t", "tmpfs", "-o", f"size={pages * PAGE_BYTES}", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def run_command(arguments: list[str], step: int, sent: int) -> None:
    """Runs a command line; sends itself a signal before that change of a name on disk."""
    steps = count(1)

    def watch(event: str, _: tuple[object, ...]) -> None:
        if event in _STEPS and next(steps) == step:
            os.kill(os.getpid(), sent)

    # A suite that runs in the background of a shell inherits that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()  # else build's own gc.collect() copies every page of the server's
    sys.addaudithook(watch)
    sys.argv = ["expertcut", *arguments]
    main()


def contents(folder: Path) -> Contents:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
