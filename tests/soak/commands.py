"""The commands that are broken on purpose: tiny inputs, quick processes, what they must leave."""

import gc
import json
import os
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from expertcut.cli import main
from tests.conftest import make_checkpoint
from tests.support.processes import PROCESSES, long_quiz

RECIPE = """
model: {model}
quiz: {quiz}
shots: 1
threads: 1
profile: {{split: test, limit: 20}}
show:
variants:
- name: cut
  prune: {{keep: 5, verify: false}}
eval: {{split: dev}}
"""
# What holds times, hosts, or how far a run is; the rest must be equal to the last byte.
RUN_FILES, GROWING = {"run.json"}, {"sweep.json", "audit.json", "manifest.json"}
_TIMES = {"elapsed_s", "finished", "mtime_ns", "ctime_ns"}
Files = dict[str, bytes]


@dataclass(frozen=True)
class Command:
    """A command line without its --out, and the finished work in such a folder."""

    name: str
    words: tuple[str, ...]

    def argv(self, out: Path) -> list[str]:
        return ["expertcut", *self.words, "--out", str(out)]


@dataclass(frozen=True)
class Started:
    """A command in a process of its own, what it prints in a file; `before` is called first."""

    argv: list[str]
    log: Path
    before: Callable[[], None] | None = None

    def __call__(self) -> None:
        sys.argv = self.argv
        torch.set_num_threads(1)
        gc.freeze()  # else build's own gc.collect() copies every page of the server's
        with self.log.open("w") as sys.stderr, Path(os.devnull).open("w") as sys.stdout:
            if self.before is not None:
                self.before()
            try:
                main()
            except Exception:  # what escapes is a fault of ours: shown while the file is open
                traceback.print_exc()
                raise SystemExit(1) from None


def start(argv: list[str], log: Path, before: Callable[[], None] | None = None) -> BaseProcess:
    process = PROCESSES.Process(target=Started(argv, log, before), daemon=True)
    process.start()
    return process


def run(argv: list[str], log: Path, before: Callable[[], None] | None = None) -> tuple[int, str]:
    """The exit status, and what stands on stderr."""
    process = start(argv, log, before)
    process.join(300)
    return process.exitcode if process.exitcode is not None else 999, log.read_text()


def commands(root: Path) -> list[Command]:
    """The five, on a tiny model, a quiz of six chunks, a profile of it and a cut."""
    model = make_checkpoint(root / "model", "olmoe")
    quiz = long_quiz(root / "quiz")
    for file in (quiz / "test").iterdir():  # val, for what must not be chosen and scored on
        text = re.sub(r"^(\d+): ", r"9\1: ", file.read_text(), flags=re.M)
        (quiz / "val").mkdir(exist_ok=True)
        lines = text.splitlines(keepends=True)[:10]
        (quiz / "val" / file.name.replace("_test", "_val")).write_text("".join(lines))
    recipe = root / "small.yaml"
    recipe.write_text(RECIPE.format(model=model, quiz=quiz))
    asked = ("--quiz", str(quiz), "--shots", "1")
    profile = Command("profile", ("profile", str(model), *asked, "--threads", "1"))
    made = root / "profile"
    status, said = run([*profile.argv(made), "--limit", "20"], root / "log")
    assert status == 0, said
    of = ("--profile", str(made))
    prune = Command("prune", ("prune", "--keep", "5", *of))
    status, said = run([*prune.argv(root / "cut"), "--no-verify"], root / "log")
    assert status == 0, said
    briefly = ("--steps", "4", "--check-every", "1", "--batch", "4", "--rank", "2")
    grid = ("--sweep", "0.75,0.5", "--by", "activations,random", "--split", "val")
    return [
        profile,
        prune,
        Command("prune --sweep", ("prune", *grid, *of)),
        Command("heal", ("heal", str(root / "cut"), *asked, *briefly, "--threads", "1")),
        Command("run", ("run", str(recipe))),
    ]


def searches(root: Path) -> list[Command]:
    """Two that score one loaded model again and again, of the profile of `commands`."""
    of = ("--profile", str(root / "profile"))
    tuned = ("--suppress-worst", "1", "--by", "accuracy", "--layers", "1", "--tune", "--cross-fit")
    ranked = ("--by", "random,aimer,reconstruction", "--questions", "40", "--sample", "12")
    return [
        Command("reweight", ("reweight", *tuned, "--no-verify", *of)),
        Command("audit", ("audit", *ranked, *of)),
    ]


def files(out: Path) -> Files:
    """What stands under a final name in a folder: no claims, nothing hidden."""
    found = {}
    for file in sorted(out.rglob("*")):
        parts = file.relative_to(out).parts
        if file.is_file() and "claims" not in parts and not any(p[0] == "." for p in parts):
            found["/".join(parts)] = file.read_bytes()
    return found


def comparable(found: Files) -> Files:
    """Without `run.json`, and without the times that a manifest notes."""
    kept = {name: content for name, content in found.items() if _name(name) not in RUN_FILES}
    if "manifest.json" in kept:
        manifest = _timeless(json.loads(kept["manifest.json"]))
        kept["manifest.json"] = json.dumps(manifest, indent=1).encode()
    return kept


def _timeless(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        key: _timeless(its)
        for key, its in value.items()
        if key not in _TIMES and _name(key) not in RUN_FILES
    }


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def partial(found: Files, whole: Files) -> Iterator[str]:
    """Names of files of a killed run that are not what the undisturbed run has there."""
    for name, content in comparable(found).items():
        if _name(name) in GROWING:
            if not _is_part(json.loads(content), json.loads(whole[name])):
                yield name
        elif whole.get(name) != content:
            yield name
    for name in found:
        if _name(name) in RUN_FILES:
            json.loads(found[name])


def _is_part(early: Any, late: Any) -> bool:
    """Whether a growing file says nothing but what it says at the end, as far as it goes."""
    if isinstance(early, dict) and isinstance(late, dict):
        return all(key in late and _is_part(its, late[key]) for key, its in early.items())
    if isinstance(early, list) and isinstance(late, list):
        return all(any(_is_part(its, other) for other in late) for its in early)
    return early is None or early == late


def finished(out: Path, found: Files) -> dict[str, int]:
    """Files that a rerun must leave alone, and where they lie on disk.

    Chunks, and all that a manifest records as made by a stage that is done.
    """
    names = [name for name in found if "chunks/" in name and name.endswith(".safetensors")]
    stages = json.loads(found.get("manifest.json", b'{"stages": {}}'))["stages"]
    for record in stages.values():
        if record["output"] is not None:
            names += [name for name in record["files"] if name in found]
    return {name: (out / name).stat().st_ino for name in set(names)}


def until(process: BaseProcess, moment_s: float) -> bool:
    """Kills it after so many seconds; whether that was before its end."""
    process.join(moment_s)
    process.kill()
    process.join()
    return process.exitcode != 0


def chance_of(seed: int, name: str) -> random.Random:
    """Random moments that do not depend on which other commands are tried."""
    return random.Random(f"{seed} {name}")


def timed(argv: list[str], log: Path) -> float:
    began_s = time.perf_counter()
    status, said = run(argv, log)
    assert status == 0, said
    return time.perf_counter() - began_s
