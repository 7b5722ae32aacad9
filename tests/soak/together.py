"""Runs that are not alone, lose a worker, run out of memory or see the clock set back."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from expertcut.profiling.storage import load_profile
from tests.conftest import make_checkpoint
from tests.soak.commands import Command, comparable, files, run, start
from tests.soak.commands import partial as partial_files
from tests.soak.faults import Bench, Found
from tests.soak.injected import clock_set_back, little_memory

Scene = Callable[[Bench], Found]
REFUSED = {  # what the second of two is told; the others share the work
    "prune": "is not empty: remove it|Directory not empty",
    "run": "another run is at work there|was just changed by another run",
}
MIDDLE = {"hidden_size": 256, "intermediate_size": 1024, "num_experts_per_tok": 4}
LIMITS_MB = (4, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)


def _place(bench: Bench) -> Path:
    parent = bench.root / "place"
    shutil.rmtree(parent, ignore_errors=True)
    parent.mkdir()
    return parent / "out"


def two_at_once(bench: Bench, name: str) -> Found:
    """Two processes, one command, one folder."""
    found, command = Found(f"{name}: two runs into one folder"), bench.commands[name]
    whole, out = bench.whole(command, bench.root / "place" / "out"), _place(bench)
    logs = [bench.root / f"log-{i}.txt" for i in range(2)]
    runs = [start(command.argv(out), log) for log in logs]
    for one in runs:
        one.join(300)
    codes = sorted(one.exitcode or 0 for one in runs)
    said = "".join(log.read_text() for log in logs)
    found.line = " ".join(said.split()) or "nothing: they share the work"
    wanted = [0, 2] if name in REFUSED else [0, 0]
    if codes != wanted or not re.search(REFUSED.get(name, "^$"), said):
        found.wrong.append(f"they ended with {codes} and said: {said}")
    if comparable(left := files(out)) != whole:
        found.wrong.append(f"what they left is not what one leaves: {sorted(left)}")
    found.kept = len(left)
    return found


def clock_back(bench: Bench, name: str) -> Found:
    """Two processes, both of which see the clock jump; they must agree whose work is whose."""
    found, command = Found(f"{name}: clock set back by an hour"), bench.commands[name]
    whole, out = bench.whole(command, bench.root / "place" / "out"), _place(bench)
    logs = [bench.root / f"log-{i}.txt" for i in range(2)]
    n_runs = 2 if name not in REFUSED else 1
    runs = [start(command.argv(out), log, clock_set_back) for log in logs[:n_runs]]
    for one in runs:
        one.join(300)
    said = "".join(log.read_text() for log in logs[:n_runs])
    found.line = said or "nothing"
    if any(one.exitcode for one in runs):
        found.wrong.append(f"it ended with {[one.exitcode for one in runs]} and said: {said}")
    if comparable(left := files(out)) != whole:
        found.wrong.append("what is left is not what an undisturbed run leaves")
    for file in out.rglob("run.json"):
        times = json.loads(file.read_text())
        if not 0 <= times["elapsed_s"] < 60:
            found.wrong.append(f"{file} says {times['elapsed_s']} s")
    found.kept = len(left)
    return found


def worker_killed(bench: Bench) -> Found:
    """One of two processes of a real `accelerate launch` gets SIGKILL after the first chunk."""
    found, command = Found("profile: a worker killed under accelerate"), bench.commands["profile"]
    whole, out = bench.whole(command, bench.root / "place" / "out"), _place(bench)
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with bench.log.open("w") as log:
        launched = subprocess.Popen(
            [*launch, *command.argv(out)], stderr=log, stdout=log, env=environment
        )
        is_killed = _kill_a_worker(launched, out)
        status = launched.wait(120)
    said = bench.log.read_text()
    lines = [line for line in said.splitlines() if line.startswith("expertcut: ")]
    found.line = lines[0] if lines else f"accelerate ended with {status}"
    if not is_killed:
        found.skipped = f"no worker was killed in time; {said[-300:]}"
        return found
    if status == 0 or len(lines) > 1:
        found.wrong.append(f"accelerate ended with {status} and said: {said[-1500:]}")
    left = files(out)
    found.wrong += [f"{name} is not whole" for name in partial_files(left, whole)]
    before = {name: (out / name).stat().st_ino for name in left if "chunks/" in name}
    again, why = run(command.argv(out), bench.log)
    if again != 0 or comparable(files(out)) != whole:
        found.wrong.append(f"the rerun ended with {again}, its files differ: {why}")
    lost = [name for name, place in before.items() if (out / name).stat().st_ino != place]
    found.wrong += [f"{name} was finished and was made again" for name in lost]
    found.kept = len(before) - len(lost)
    return found


def _kill_a_worker(launched: "subprocess.Popen[bytes]", out: Path) -> bool:
    """The second one, so that the first still speaks."""
    while launched.poll() is None:
        if list(out.glob("chunks/*.safetensors")):
            for child in psutil.Process(launched.pid).children(recursive=True):
                try:
                    if child.environ().get("RANK") == "1":
                        child.send_signal(signal.SIGKILL)
                        return True
                except psutil.Error:  # it has just ended
                    continue
        time.sleep(0.002)
    return False


def little_by_little(bench: Bench, name: str) -> Found:
    """The address space ends at ten different sizes: answers as always, or one line."""
    found, place = Found(f"{name}: memory ends"), _place(bench)
    model = bench.root / "middle"
    if not model.exists():
        make_checkpoint(model, "olmoe", **MIDDLE)
    command = Command(name, _on(model, bench, name))
    status, said = run(command.argv(whole := place.with_name("whole")), bench.log)
    assert status == 0, said
    n_halved = n_refused = 0
    for limit_mb in LIMITS_MB:
        out = place.with_name(f"{limit_mb}")
        status, said = run(command.argv(out), bench.log, partial(little_memory, limit_mb << 20))
        lines = [line for line in said.splitlines() if not line.startswith("WARNING")]
        n_halved += status == 0 and "halves" in said
        n_refused += status == 2
        is_said = len(lines) == 1 and re.search("memory|cannot be loaded", lines[0])
        if status not in (0, 2) or (status == 2 and not is_said):
            found.wrong.append(f"at {limit_mb} MB it ended with {status} and said: {said}")
        found.line = lines[0] if status == 2 and "batch" in lines[0] else found.line
        if status == 0 and name == "profile":
            found.wrong += _other_answers(whole, out, limit_mb)
    n = len(LIMITS_MB)
    found.line = f"of {n} limits {n_refused} refused, {n_halved} in halves; {found.line}"
    return found


def _on(model: Path, bench: Bench, name: str) -> tuple[str, ...]:
    asked = ("--quiz", str(bench.root / "quiz"), "--shots", "1", "--threads", "1")
    profile = ("profile", str(model), *asked, "--batch-tokens", "16384")
    if name == "profile":
        return profile
    made = bench.root / "middle-profile"
    status, said = run([*Command("", profile).argv(made), "--limit", "20"], bench.log)
    assert status == 0, said
    return ("prune", "--keep", "5", "--profile", str(made))


def _other_answers(whole: Path, out: Path, limit_mb: int) -> list[str]:
    mine, theirs = (load_profile(path).array("choice_logprob_NC") for path in (out, whole))
    moved = float(np.abs(mine - theirs).max())
    return [f"at {limit_mb} MB answers moved by {moved:.1g}"] if moved > 1e-4 else []


SCENES: dict[str, Scene] = {
    **{f"two {name}": partial(two_at_once, name=name) for name in ("profile", "prune", "run")},
    "two sweeps": partial(two_at_once, name="prune --sweep"),
    **{f"clock {name}": partial(clock_back, name=name) for name in ("profile", "run")},
    "accelerate": worker_killed,
    **{f"memory {name}": partial(little_by_little, name=name) for name in ("profile", "prune")},
}


def soak(only: str = "") -> Iterator[Found]:
    """Every scene in turn, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="expertcut-faults-") as folder:
        bench = Bench(Path(folder))
        for name, scene in SCENES.items():
            if only in name:
                yield scene(bench)
