"""Output that cannot be written stops no work: encodings, closed pipes, full disks, no streams."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, cast
from unittest.mock import patch

import numpy as np
import pytest
import torch

from expertcut.checkpoints.build import Built
from expertcut.cli import main
from expertcut.cli.progress import LastingStream
from expertcut.data import Selection, load_quiz
from expertcut.edits.plan import load_plan
from expertcut.edits.splits import ScoredSplit
from expertcut.profiling.schema import quiz_info
from expertcut.reporting.edit_tables import outcome_lines
from expertcut.stats import HeldOutAccuracy, HeldOutResult, LogprobShift, compare
from tests.conftest import Commands
from tests.support.hand_made import block, profile_info, random_profile

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


def test_the_last_lines_of_prune_do_not_grow_with_the_model(
    quiz_folder: Path, tmp_path: Path, expertcut: Commands
) -> None:
    """48 layers of 128 experts; the profile is taken as the newest, beside an unfinished one."""
    quiz = quiz_info(load_quiz(Selection(str(quiz_folder), "val", 0, limit=1)), 1)
    info = profile_info([block(i, 128, 8) for i in range(48)], {"any": 1})
    info = info.model_copy(update={"quiz": quiz})
    taken = random_profile(tmp_path / "profiles/a", info).path
    (taken / "run.json").write_text('{"finished": 1.0}')
    (tmp_path / "profiles/b").mkdir()
    (tmp_path / "profiles/b/profile.json").write_bytes((taken / "profile.json").read_bytes())
    prune = ("prune", "--keep-fraction", 0.5, "--layout", "exact", "--budget", "global")
    said = expertcut(*prune, "--by", "reap", "--plan-only", "--out", "plan")
    counts = [len(edit.keep) for edit in load_plan(tmp_path / "plan").blocks.values()]
    assert len(set(counts)) > 1 and sum(counts) == 3072
    words = " ".join(said.split())
    assert words.startswith("profile profiles/a (newest; 3 questions, accuracy ")
    assert "; newer but not finished: profiles/b cut 3,072 of 6,144 experts stay in 48 lay" in words
    assert f"{min(counts)} to {max(counts)} in each, by reap over all tokens; " in words
    assert " of 3 questions size not known: makers/tiny" in words
    assert words.endswith(" written plan next expertcut show plan")
    outcome = outcome_lines(scored(), (100, 4_000_000), (75, 3_000_000))
    lines = [*said.splitlines(), *"\n".join(outcome).splitlines()]
    assert 10 < len(lines) <= 40 and max(map(len, lines)) <= 80
    wide = expertcut(*prune, "--by", "reap", "--plan-only", "--out", "wide", "--wide")
    assert wide.count("model.layers.47.mlp") == 2 and said.split()[:9] == wide.split()[:9]


def scored() -> Built:
    """A checkpoint that answers 1 of 8 held-out questions less than its base."""
    base_N, edited_N = np.arange(8) < 4, np.arange(8) < 3
    change = compare(base_N, edited_N)
    shift = LogprobShift(
        against="the unedited base",
        questions=8,
        max_abs_logprob_diff=1.25,
        median_abs_logprob_diff=0.5,
        flipped=2,
    )
    both = HeldOutAccuracy(base=float(base_N.mean()), change=change)
    proof = HeldOutResult(held_out_split="val", held_out=(shift,), answered=both)
    return Built(Path("o"), cast(Any, None), [], proof, "", ScoredSplit("val", 8, 0))


def test_a_checkpoint_says_its_size_accuracy_verdict_and_distance() -> None:
    low, high = (100 * end for end in compare(np.arange(8) < 4, np.arange(8) < 3).ci95)
    said = outcome_lines(scored(), (4_000_000_000, 13_800_000_000), (3_000_000_000, 10_350_000_000))
    assert [" ".join(line.split()) for line in said] == [
        "size 10.3 GB, was 13.8 GB (−25 %); 3.0 B parameters, were 4.0 B",
        "accuracy 37.5 %, was 50.0 % on 8 held-out questions (val): −12.5 points "
        f"(−{-low:.1f} … +{high:.1f})",
        f"verdict undecided at a margin of 1 point: could be {-low:.1f} points worse; about 24,000 "
        "questions would decide",
        "distance |Δ log p| against the unedited base: median 0.5000, largest 1.2500, "
        "2 answers flipped",
    ]
    for chance, who in ((0.15, "the checkpoint is"), (0.25, "both are")):
        proof = cast(HeldOutResult, scored().proof).model_copy(update={"chance": chance})
        _, accuracy, verdict, _ = outcome_lines(replace(scored(), proof=proof), (1, 1), (1, 1))
        words = " ".join(accuracy.split())
        assert words.endswith(f"; {who} no better than guessing ({100 * chance:g} %)"), words
        assert ("both only guess here" in " ".join(verdict.split())) == (chance == 0.25)
    used = replace(scored(), scored_on=ScoredSplit("val", 8, 3))
    assert "on 8 val questions, 3 of them used to choose" in outcome_lines(used, (1, 1), (1, 1))[1]
    unscored = replace(scored(), proof=None, why_unscored="nothing judges it")
    (_, line) = outcome_lines(unscored, (1, 1), (1, 1))
    assert line.startswith("accuracy  The new checkpoint was not scored") and "judges" in line
