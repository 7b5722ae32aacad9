"""Output that cannot be written stops no work: encodings, closed pipes, full disks, no streams."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import patch

import pytest
import torch

from expertcut.cli import main
from expertcut.cli.progress import LastingStream

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@pytest.fixture(scope="module")
def place(
    checkpoint: Callable[..., Path], quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a profile."""
    folder = tmp_path_factory.mktemp("output")
    asked = ("--quiz", str(quiz_folder), "--shots", "0", "--limit", "3", "--threads", "1")
    status, _ = run(folder, io.StringIO(), "profile", str(checkpoint("olmoe")), *asked)
    assert status == 0
    return folder


def run(folder: Path, out: Any, *words: str) -> tuple[int, str]:
    """Exit status and stderr of a command that prints to `out`."""
    err = io.StringIO()
    with (
        chdir(folder),
        patch.object(sys, "argv", ["expertcut", *words]),
        patch.object(sys, "stdout", out),
        patch.object(sys, "stderr", err),
        pytest.raises(SystemExit) as stopped,
    ):
        main()
    torch.set_num_threads(1)
    return int(stopped.value.code or 0), err.getvalue()


def closed_pipe() -> TextIO:
    """As the first of `a | b` has it when b has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")


def words(place: Path) -> dict[str, list[str]]:
    """Commands that print, and what they write."""
    profile = next((place / "profiles").iterdir())
    return {
        "prune": ["prune", "--keep", "5", "--no-verify"],
        "plan": ["prune", "--keep", "5", "--plan-only"],
        "show": ["show", str(profile)],
        "csv": ["show", str(profile), "--format", "csv"],
        "help": ["prune", "--help"],
        "nothing": [],
    }


def written(out: Path) -> bool:
    return (out / "plan.json").is_file()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_encoding_prints_and_the_work_is_done(place: Path, encoding: str) -> None:
    for name, line in words(place).items():
        out = io.BytesIO()
        stream = io.TextIOWrapper(out, encoding=encoding)
        folder = place / f"{name}-{encoding}"
        to = ["--out", str(folder)] if line[:1] == ["prune"] and "--help" not in line else []
        status, said = run(place, stream, *line, *to)
        assert (status, said) == (0, ""), name
        stream.flush()
        assert len(out.getvalue().decode(encoding)) > 50
        assert not to or written(folder)


@pytest.mark.parametrize(
    ("opened", "status", "says"),
    [
        pytest.param(closed_pipe, 0, "", id="pipe"),
        pytest.param(
            lambda: FULL.open("w"),
            2,
            "expertcut: stdout cannot be written: No space left on device: what was printed is "
            "lost, what was written to files is whole\n",
            id="full",
            marks=needs_full,
        ),
    ],
)
def test_a_checkpoint_is_written_where_nothing_can_be_printed(
    place: Path, opened: Callable[[], TextIO], status: int, says: str, request: Any
) -> None:
    for name, line in words(place).items():
        with opened() as out:
            folder = place / f"{name}-{request.node.callspec.id}"
            to = ["--out", str(folder)] if line[:1] == ["prune"] and "--help" not in line else []
            assert run(place, out, *line, *to) == (status, says), name
        assert not to or written(folder)


def test_an_error_is_an_error_whatever_becomes_of_output(place: Path) -> None:
    with closed_pipe() as out:
        status, said = run(place, out, "prune", "--keep", "99")
    assert status == 2
    assert "99" in said and said.count("\n") == 1


def test_a_stream_that_failed_says_nothing_more_and_keeps_its_first_fault() -> None:
    stream = LastingStream(closed_pipe())
    for _ in range(3):
        assert stream.write("word\n") == 5
        stream.flush()
    assert isinstance(stream.fault, BrokenPipeError)
    assert not stream.isatty()
    stream.stream.close()  # what was buffered goes nowhere, without an error


@needs_full
@pytest.mark.parametrize(
    ("how", "status"),
    [
        (">/dev/full 2>/dev/full", 2),
        ("2>/dev/full", 0),
        (">&- 2>&- <&-", 0),
        ("2>&-", 0),
        ("| true", 0),
    ],
)
def test_a_process_ends_well_whatever_its_streams_are(
    tmp_path: Path, how: str, status: int
) -> None:
    line = f'set -o pipefail; "{sys.executable}" -m expertcut prune --help {how}'
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == status
    assert done.stderr == b""  # no traceback, nothing at exit


def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "from expertcut.cli.progress import lasting_output\n"
        "with lasting_output(), open('weights', 'wb') as file:\n"
        "    assert file.fileno() > 2\n"
        "    print('words')\n"
    )
    line = f'"{sys.executable}" -c "$0" <&- >&- 2>&-'
    done = subprocess.run(["bash", "-c", line, code], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert (tmp_path / "weights").read_bytes() == b""


def test_the_C_locale_prints_and_replaces(tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "expertcut", "show", "n\u00f6"],
        cwd=tmp_path,
        env={**os.environ, **plain, "NO_COLOR": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"expertcut: nothing to show in n")
    assert done.stderr.count(b"\n") == 1
