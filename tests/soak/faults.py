"""Faults one by one: `python -m tests.soak.faults`.

Each ends a run with exit status 2 and one line; what was finished stays; once the fault is gone
the same command ends with the bytes of an undisturbed run.
"""

import argparse
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.soak.commands import (
    Command,
    Files,
    commands,
    comparable,
    files,
    finished,
    run,
)
from tests.soak.commands import partial as partial_files
from tests.soak.injected import (
    PAGE_BYTES,
    CannotInject,
    Injection,
    as_nobody,
    cut_before_shards,
    disk,
    full,
    read_only,
    removed_before_chunks,
    removed_before_load,
    removed_before_shards,
    removed_on_open,
    restored,
    small_files,
)

NO_SPACE, READ_ONLY = "No space left on device", "Read-only file system"
TOO_LARGE, DENIED, GONE = "File too large", "Permission denied", "No such file or directory"


@dataclass(frozen=True)
class Fault:
    """Which command meets what; `words` (a pattern) stand in its one line."""

    what: str
    command: str
    injection: Injection
    words: str
    needs_disk: bool = False

    @property
    def name(self) -> str:
        return f"{self.command}: {self.what}"


@dataclass
class Found:
    """What became of a fault; without faults of ours `wrong` is empty."""

    fault: str
    line: str = ""
    kept: int = 0
    skipped: str = ""
    wrong: list[str] = field(default_factory=list)


class Bench:
    """The five commands, and what each leaves when nothing disturbs it."""

    def __init__(self, root: Path) -> None:
        root.chmod(0o755)  # so that nobody can read it
        self.root, self.log = root, root / "log.txt"
        self.commands = {command.name: command for command in commands(root)}
        for path in root.rglob("*"):  # safetensors are written for their owner only
            path.chmod(0o755 if path.is_dir() else 0o644)
        self._whole: dict[str, Files] = {}
        self.pages: dict[str, int] = {}

    def whole(self, command: Command, out: Path) -> Files:
        """What it leaves in such a folder, and how much room that takes."""
        if command.name not in self._whole:
            shutil.rmtree(out, ignore_errors=True)  # of another scene
            status, said = run(command.argv(out), self.log)
            assert status == 0, said
            self._whole[command.name] = comparable(found := files(out))
            self.pages[command.name] = sum(-(-len(c) // PAGE_BYTES) for c in found.values())
            shutil.rmtree(out)
        return self._whole[command.name]

    def faults(self) -> list[Fault]:
        """All of them, by the sizes of what the commands write."""
        for command in self.commands.values():
            self.whole(command, self.root / "place" / "out")
        weights = self.root / "model" / "model.safetensors"
        chunk = self.root / "profile" / "chunks" / "tall_trees-0.safetensors"
        question = self.root / "quiz" / "test" / "tall_trees_test.csv"
        return [
            *(self._full(name, share) for name in self.commands for share in (0.5, 0.8)),
            *(self._read_only(name) for name in self.commands),
            *(self._quota(name) for name in self.commands),
            *(self._denied(name) for name in self.commands),
            self._reading("prune", "weights removed", weights, removed_before_shards, GONE),
            self._reading("prune", "weights cut", weights, cut_before_shards, "became shorter"),
            self._reading("run", "weights removed", weights, removed_before_shards, GONE),
            self._reading("profile", "weights removed", weights, removed_before_load, "neither"),
            self._reading("prune", "a chunk removed", chunk, removed_before_chunks, "is damaged"),
            self._opening("profile", "questions removed", question, "old_cups_test.csv", GONE),
            self._opening("run", "questions removed", question, "old_cups_test.csv", GONE),
        ]

    def _full(self, name: str, share: float) -> Fault:
        """A disk with room for so much of what the command writes."""
        injection = Injection(partial(full, pages=int(self.pages[name] * share)))
        words = f"{NO_SPACE}|needs [0-9,]+ bytes but [0-9,]+ are free"
        return Fault(f"disk full at {share:.0%}", name, injection, words, needs_disk=True)

    def _read_only(self, name: str) -> Fault:
        return Fault("read-only folder", name, Injection(read_only), READ_ONLY, needs_disk=True)

    def _quota(self, name: str) -> Fault:
        sizes = sorted(len(content) for content in self._whole[name].values())
        limit = Injection(within=partial(small_files, sizes[-1] - 1))
        return Fault("file size limit", name, limit, TOO_LARGE)

    def _denied(self, name: str) -> Fault:
        return Fault("another's folder", name, Injection(within=as_nobody), DENIED)

    def _reading(
        self, name: str, what: str, file: Path, act: "partial[None] | object", words: str
    ) -> Fault:
        injection = Injection(partial(restored, file), partial(act, file))  # type: ignore[arg-type]
        return Fault(f"{what} while it reads", name, injection, words)

    def _opening(self, name: str, what: str, file: Path, seen: str, words: str) -> Fault:
        injection = Injection(partial(restored, file), partial(removed_on_open, seen, file))
        return Fault(f"{what} while it reads", name, injection, words)


def meet(bench: Bench, fault: Fault) -> Found:
    """Injects it, looks at what is left, and runs the command again without it."""
    found, command = Found(fault.name), bench.commands[fault.command]
    parent = bench.root / "place"
    shutil.rmtree(parent, ignore_errors=True)
    parent.mkdir()
    out = parent / "out"
    whole = bench.whole(command, out)
    try:
        with ExitStack() as stack:
            if fault.needs_disk:
                stack.enter_context(disk(parent, 1 << 16))
            _break(bench, fault, command, found)
            left = files(out)
            found.wrong += [f"{name} is not whole" for name in partial_files(left, whole)]
            _mend(bench, command, found, finished(out, left), whole)
    except CannotInject as error:
        found.skipped = str(error)
    return found


def _break(bench: Bench, fault: Fault, command: Command, found: Found) -> None:
    out = bench.root / "place" / "out"
    with fault.injection.around(out.parent):
        status, said = run(command.argv(out), bench.log, fault.injection.within)
    # A slow machine says how far it came before it is refused.
    lines = [line for line in said.splitlines() if not line.startswith("WARNING")]
    lines = [line for line in lines if not line.endswith("tokens/s")] or lines
    found.line = lines[-1] if lines else ""
    if status != 2 or len(lines) != 1 or not re.search(fault.words, found.line):
        found.wrong.append(f"it ended with {status} and said: {said}")


def _mend(
    bench: Bench, command: Command, found: Found, before: dict[str, int], whole: Files
) -> None:
    out = bench.root / "place" / "out"
    status, said = run(command.argv(out), bench.log)
    if status != 0:
        found.wrong.append(f"the rerun ended with {status}: {said}")
    left = files(out)
    again = comparable(left)
    found.wrong += [
        f"{name} differs after the rerun"
        for name in sorted(again.keys() | whole.keys())
        if again.get(name) != whole.get(name)
    ]
    after = finished(out, left)
    lost = [name for name, place in before.items() if after.get(name) != place]
    found.wrong += [f"{name} was finished and was made again" for name in lost]
    found.kept = len(before) - len(lost)


def soak(only: str = "") -> Iterator[Found]:
    """Every fault in turn, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="expertcut-faults-") as folder:
        bench = Bench(Path(folder))
        for fault in bench.faults():
            if only in fault.name:
                yield meet(bench, fault)


def table(rows: Sequence[Found]) -> str:
    lines = ["| fault | files kept | what is said |", "| --- | --- | --- |"]
    for found in rows:
        said = found.skipped or re.sub(r"/tmp/expertcut-faults-\w+", "…", found.line)
        lines.append(f"| {found.fault} | {found.kept} | {said.removeprefix('expertcut: ')} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="faults whose name holds this")
    began_s = time.monotonic()
    only = parser.parse_args().only
    from tests.soak import together  # which is made of what stands here

    rows = [*soak(only), *together.soak(only)]
    print(table(rows))
    wrong = [f"{found.fault}: {what}" for found in rows for what in found.wrong]
    n_skipped = sum(bool(found.skipped) for found in rows)
    counts = f"{len(rows) - n_skipped} faults injected, {n_skipped} not possible here"
    print(f"{counts}, {len(wrong)} losses, {time.monotonic() - began_s:.0f} s")
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
