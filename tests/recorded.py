"""What today's version writes, recorded, and compared byte for byte with what another writes.

    python -m tests.recorded write DIR              record into DIR, which must be new or empty
    python -m tests.recorded compare OLD NEW        two recorded sets
    python -m tests.recorded compare OLD            a recorded set with one that is recorded now
    python -m tests.recorded rules                  which bytes do not count, and why

OLD and NEW are folders or their recorded.json alone, which holds the SHA-256 of every file: enough
to say which files differ, while folders also say where. Status 0: equal, but for what names a flag;
1: something differs; 2: the sets cannot be compared.

Only the command line is run, so module names may change. Paths are recorded as commands write
them, and go into hashes and names of folders; so every set is made in the same folder (`--work`),
one at a time. Floating-point bytes depend on the machine: sets of other versions or CPUs are
refused.
"""

import argparse
import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from tests.recorded_bytes import RULES, comparable, first_difference
from tests.recorded_commands import Step, absent, is_input, steps_of
from tests.recorded_inputs import WORLDS, make_inputs

INDEX = "recorded.json"
WORK = Path(tempfile.gettempdir()) / "expertcut-recorded"
MOST_SHOWN = 40
# Their versions and the CPU decide last bits, or bytes of figures and tables.
PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "peft"),
    *("accelerate", "datasets", "matplotlib", "pyarrow", "pydantic"),
)
# Imported once, so that a command in a fork begins at once. Nothing of expertcut.
_PRELOADED = (
    *PACKAGES,
    *("scipy.stats", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"),
    *("jinja2", "psutil", "rich.console", "rich.table", "rich.progress", "typer", "yaml"),
)
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else that library warns in every fork
    "TZ": "UTC",
}


class Refused(Exception):
    """Why nothing can be recorded or compared, in one line."""


@dataclass(frozen=True)
class Entry:
    """One file: the size and SHA-256 of what counts in it, once without what names a flag."""

    size_bytes: int
    sha256: str
    sha256_without_flags: str


@dataclass(frozen=True)
class RecordedSet:
    """A recorded set: its files by path, and, unless only recorded.json is there, where they lie.

    `made_with` are versions, CPU and folder, on which bytes depend.
    """

    made_with: Mapping[str, str]
    files: Mapping[str, Entry]
    folder: Path | None = None

    def part(self, patterns: Sequence[str]) -> "RecordedSet":
        """Only the files whose paths match.

        Raises:
            Refused: none does.
        """
        files = {path: entry for path, entry in self.files.items() if _is_among(path, patterns)}
        if not files:
            raise Refused(f"the set has no {' or '.join(patterns)}")
        return RecordedSet(self.made_with, files, self.folder)

    def content(self, path: str, *, has_flags: bool) -> bytes:
        """What counts in a file."""
        assert self.folder is not None
        return _comparable(self.folder, path, has_flags=has_flags)


@dataclass
class Comparison:
    """Paths that differ, each with where, if that is known."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    differ: dict[str, str] = field(default_factory=dict)
    differ_in_flags: dict[str, str] = field(default_factory=dict)
    n_files: int = 0
    size_bytes: int = 0

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs but what names a flag."""
        return not (self.missing or self.extra or self.differ)


def read_set(place: Path) -> RecordedSet:
    """A recorded set from its folder, whose files are hashed anew, or from recorded.json alone.

    Raises:
        Refused: there is none.
    """
    index = place if place.is_file() else place / INDEX
    try:
        held = json.loads(index.read_text(encoding="utf-8"))
        files = {path: Entry(**entry) for path, entry in held["files"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{index} is no recorded set: {error!r}") from None
    if place.is_file():
        return RecordedSet(held["made_with"], files)
    return RecordedSet(held["made_with"], _entries(place), place)


def compare(old: RecordedSet, new: RecordedSet) -> Comparison:
    """All differences between two sets.

    Raises:
        Refused: they were made by other versions, on another CPU or in another folder.
    """
    keys = [*old.made_with, *(key for key in new.made_with if key not in old.made_with)]
    pairs = {key: (old.made_with.get(key), new.made_with.get(key)) for key in keys}
    if apart := [f"{key}: {a}, {b}" for key, (a, b) in pairs.items() if a != b]:
        raise Refused(f"the sets cannot be equal, for they were made with other {'; '.join(apart)}")
    found = Comparison(
        missing=[path for path in old.files if path not in new.files],
        extra=[path for path in new.files if path not in old.files],
    )
    for path, before in old.files.items():
        if (after := new.files.get(path)) is None:
            continue
        found.n_files += 1
        found.size_bytes += before.size_bytes
        if before.sha256 != after.sha256:
            in_flags = before.sha256_without_flags == after.sha256_without_flags
            listed = found.differ_in_flags if in_flags else found.differ
            listed[path] = _where(path, old, new, has_flags=in_flags)
    return found


def _where(path: str, old: RecordedSet, new: RecordedSet, *, has_flags: bool) -> str:
    if old.folder is None or new.folder is None:
        return "other bytes"
    contents = [each.content(path, has_flags=has_flags) for each in (old, new)]
    return first_difference(path, *contents)


def _comparable(folder: Path, path: str, *, has_flags: bool) -> bytes:
    def find(name: str) -> bytes | None:
        file = folder / name
        return file.read_bytes() if file.is_file() else None

    return comparable(path, (folder / path).read_bytes(), find, has_flags=has_flags)


def _entries(folder: Path) -> dict[str, Entry]:
    """Every file below a folder, but its own recorded.json."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    paths = [file.relative_to(folder).as_posix() for file in files]
    return {path: _entry(folder, path) for path in paths if path != INDEX}


def _entry(folder: Path, path: str) -> Entry:
    content = _comparable(folder, path, has_flags=True)
    unflagged = _comparable(folder, path, has_flags=False)
    hashes = [hashlib.sha256(each).hexdigest() for each in (content, unflagged)]
    return Entry(len(content), *hashes)


def check_whole(files: Mapping[str, Entry]) -> None:
    """Every kind of file that must be recorded is there, of every world.

    Raises:
        Refused: some are not.
    """
    held = [path for path, entry in files.items() if entry.size_bytes]
    if gone := [f"{world}/{pattern}" for world in WORLDS for pattern in absent(world, held)]:
        raise Refused(f"the set is not whole, it has no {', '.join(gone)}")


def write(
    folder: Path, work: Path, only: Sequence[str] = (), *, is_forked: bool = True
) -> RecordedSet:
    """Makes the inputs, runs the commands in `work`, and copies all of it to `folder`.

    `only` chooses commands by what they write, as `qwen3_moe/profile`; what they read must be
    among it, and the set is not whole.

    Raises:
        Refused: a place is taken, a command failed, or something that must be there is not.
    """
    if folder.exists() and any(folder.iterdir()):
        raise Refused(f"{folder} is not empty")
    with _work_folder(work):
        for world in WORLDS:
            steps = [step for step in steps_of(world) if _is_among(f"{world}/{step.out}", only)]
            if steps:
                _run_world(work / world, steps, is_forked=is_forked)
        entries = _entries(work)
        if not only:
            check_whole(entries)
        if not entries:
            raise Refused(f"no command writes {' or '.join(only)}")
        made_with = {**_made_with(), "folder": str(work)}
        index = {
            "format": 1,
            "made_with": made_with,
            "files": {path: asdict(entry) for path, entry in entries.items()},
        }
        (work / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        shutil.copytree(work, folder, dirs_exist_ok=True)
    return RecordedSet(made_with, entries, folder)


def _is_among(path: str, patterns: Sequence[str]) -> bool:
    """Whether a path, or a folder above it, matches; without patterns all do."""
    named = [*patterns, *(f"{pattern}/*" for pattern in patterns)]
    return not named or any(fnmatch(path, pattern) for pattern in named)


@contextmanager
def _work_folder(work: Path) -> Iterator[None]:
    """An empty folder while the block runs, which no other recording has.

    Raises:
        Refused: another has it.
    """
    try:
        work.mkdir(parents=True)
    except FileExistsError:
        say = "another recording is at work there, or one was killed: then remove it"
        raise Refused(f"{work} is there: {say}") from None
    try:
        yield
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _made_with() -> dict[str, str]:
    import torch

    python = ".".join(map(str, sys.version_info[:2]))
    packages = {name: version(name) for name in PACKAGES}
    return {"python": python, **packages, "cpu": torch.backends.cpu.get_cpu_capability()}


def _run_world(folder: Path, steps: list[Step], *, is_forked: bool) -> None:
    began_s = time.monotonic()
    run = _in_fork if is_forked else _anew
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        os.environ["HF_MODULES_CACHE"] = scratch  # code out of checkpoints
        # A fork too, so that this process never computes: threads do not survive a fork.
        if _forked(lambda: make_inputs(folder), folder.parent, log, log):
            raise Refused(f"the inputs of {folder.name}: {log.read_text()}")
        for step in steps:
            out = folder / step.out if step.is_printed else log
            out.parent.mkdir(parents=True, exist_ok=True)
            if status := run(folder, step.words, out, log):
                said = log.read_text(encoding="utf-8").strip()[-2000:]
                raise Refused(f"{folder.name}: {step.command}: status {status}: {said}")
            if not (folder / step.out).exists():
                raise Refused(f"{folder.name}: {step.command}: {step.out} is not there")
    elapsed_s = time.monotonic() - began_s
    _say(f"{folder.name}: {len(steps)} commands in {elapsed_s:.0f} s", sys.stderr)


def _in_fork(folder: Path, words: list[str], out: Path, log: Path) -> int:
    """`python -m expertcut` in a fork of this process: what others made is imported already."""

    def command() -> None:
        sys.argv = ["expertcut", *words]
        runpy.run_module("expertcut", run_name="__main__", alter_sys=True)

    return _forked(command, folder, out, log)


def _forked(act: Callable[[], None], folder: Path, out: Path, log: Path) -> int:
    """The exit status of what is done in a fork, from a folder."""
    sys.stdout.flush()
    sys.stderr.flush()
    if (child := os.fork()) == 0:
        _become(act, folder, out, log)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become(act: Callable[[], None], folder: Path, out: Path, log: Path) -> NoReturn:
    status = 1
    try:
        for descriptor, file in ((1, out), (2, log)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
        os.chdir(folder)
        act()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:  # as Python itself ends
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _anew(folder: Path, words: list[str], out: Path, log: Path) -> int:
    """`python -m expertcut` as a user starts it."""
    line = [sys.executable, "-m", "expertcut", *words]
    with out.open("ab") as printed, log.open("ab") as said:
        return subprocess.run(line, cwd=folder, stdout=printed, stderr=said, check=False).returncode


def _prepare(source: Path | None) -> None:
    """The environment of every command; `source` is where expertcut is imported from."""
    os.environ.update(_ENVIRONMENT)
    for name in ("FORCE_COLOR", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RANK", "SLURM_PROCID"):
        os.environ.pop(name, None)
    if source is not None:
        if not (source / "expertcut").is_dir():
            raise Refused(f"{source} holds no folder expertcut: name the src of a working tree")
        sys.path.insert(0, str(source.resolve()))
    # Absolute, for commands are run from other folders.
    sys.path[:] = [str(Path(path or ".").resolve()) for path in sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    for name in _PRELOADED:
        import_module(name)


def _report(found: Comparison) -> None:
    inputs = [path for path in found.differ if is_input(path)]
    if inputs:
        _say(f"not made from the same inputs: {', '.join(inputs[:3])} … so all else may differ")
    for what, paths in (
        ("missing", dict.fromkeys(found.missing, "")),
        ("extra", dict.fromkeys(found.extra, "")),
        ("differs", found.differ),
        ("differs in what names a flag", found.differ_in_flags),
    ):
        for path, where in list(paths.items())[:MOST_SHOWN]:
            _say(f"{what}: {path}{': ' if where else ''}{where}")
        if len(paths) > MOST_SHOWN:
            _say(f"{what}: {len(paths) - MOST_SHOWN} more")
    counts = {"missing": len(found.missing), "extra": len(found.extra)}
    counts |= {"differ": len(found.differ), "differ in flags alone": len(found.differ_in_flags)}
    _say(f"compared {found.n_files:,} files with {found.size_bytes:,} bytes: {_counted(counts)}")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in counts.items())


def _say(text: str, stream: object = None) -> None:
    (stream or sys.stdout).write(f"{text}\n")  # type: ignore[attr-defined]


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tests.recorded", description=__doc__, formatter_class=form
    )
    recording = argparse.ArgumentParser(add_help=False)
    recording.add_argument("--work", type=Path, default=WORK, help=f"where commands run [{WORK}]")
    recording.add_argument("--expertcut", type=Path, help="src of another working tree to record")
    recording.add_argument(
        *("--only", "-o"),
        action="append",
        default=[],
        metavar="PATTERN",
        help="a part, by what is written, as qwen3_moe/profile; may be repeated",
    )
    recording.add_argument("--anew", action="store_true", help="no forks: ten times as slow")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("write", parents=[recording]).add_argument("folder", type=Path)
    comparing = actions.add_parser("compare", parents=[recording])
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path, nargs="?")
    actions.add_parser("rules")
    return parser


def _record(asked: argparse.Namespace, folder: Path) -> RecordedSet:
    _prepare(asked.expertcut)
    return write(folder, asked.work.resolve(), asked.only, is_forked=not asked.anew)


def _compared(asked: argparse.Namespace) -> int:
    old = read_set(asked.old)
    with tempfile.TemporaryDirectory() as scratch:
        new = read_set(asked.new) if asked.new else _record(asked, Path(scratch) / "new")
        if asked.only:
            old, new = (each.part(asked.only) for each in (old, new))
        else:
            check_whole(old.files)
            check_whole(new.files)
        found = compare(old, new)
    _report(found)
    return 0 if found.is_equal else 1


def main(words: list[str] | None = None) -> int:
    """The exit status."""
    asked = _parser().parse_args(words)
    try:
        if asked.action == "compare":
            return _compared(asked)
        if asked.action == "rules":
            for rule in RULES:
                flags = " (only where flags do not count)" if rule.of_flags else ""
                _say(f"{rule.files}: {rule.reason}{flags}\n    {rule.pattern.decode()}")
            return 0
        recorded = _record(asked, asked.folder)
    except Refused as refused:
        _say(f"recorded: {refused}", sys.stderr)
        return 2
    size_bytes = sum(entry.size_bytes for entry in recorded.files.values())
    _say(f"recorded {len(recorded.files):,} files with {size_bytes:,} bytes in {asked.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
