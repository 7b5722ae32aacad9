"""Killed at any moment and started again: only what is missing runs, and every byte is the same."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import pytest

from expertcut.cli import main
from expertcut.errors import ProfileError
from expertcut.profiling import locks as claiming
from expertcut.profiling.locks import Claims, Timing
from expertcut.profiling.storage import load_profile
from tests.conftest import slow_but
from tests.support.processes import (
    CHUNKS,
    DEATHS,
    LONG,
    N_QUESTIONS,
    PROCESSES,
    Task,
    chunk_bytes,
    ended,
    is_whole,
    logged,
    long_quiz,
    measurement,
    start,
)

Checkpoints = Callable[..., Path]
FAST = Timing(beat_s=0.02, dead_after_s=0.3)
NAME = "green_birds-0.safetensors"


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return long_quiz(tmp_path_factory.mktemp("quiz") / "birds")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> Path:
    return checkpoint("olmoe")


@pytest.fixture(scope="module")
def undisturbed(model: Path, quiz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "p"
    steps = list(measurement(model, quiz).run(out))
    assert [step.done for step in steps][-1] == N_QUESTIONS
    assert list(chunk_bytes(out)) == CHUNKS and is_whole(out)
    return out


@pytest.fixture
def copy(undisturbed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "copy"))


# Killed


ALIKE = {"in the first chunk", "before a claim is given back"}  # as later, as earlier


@pytest.mark.parametrize("moment", slow_but({*DEATHS} - ALIKE, DEATHS))
def test_a_run_that_was_killed_goes_on_with_what_is_missing_to_the_same_bytes(
    moment: str, model: Path, quiz: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p"
    assert ended(start(Task(model, quiz, out, die=moment))) == -signal.SIGKILL
    kept = chunk_bytes(out) if (out / "chunks").exists() else {}
    assert len(kept) == DEATHS[moment][1]
    assert not is_whole(out)
    assert list((out / "claims").iterdir())  # what the dead left
    for log in tmp_path.glob("p.*"):
        log.unlink()
    assert ended(start(Task(model, quiz, out))) == 0
    assert logged(out, "chunks") == sorted(set(CHUNKS) - set(kept))
    assert chunk_bytes(out) == chunk_bytes(undisturbed)
    assert (out / "profile.json").read_bytes() == (undisturbed / "profile.json").read_bytes()
    assert is_whole(out)


def test_the_order_of_chunks_changes_no_byte(
    model: Path, quiz: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p"
    assert ended(start(Task(model, quiz, out, is_backwards=True))) == 0
    (log,) = tmp_path.glob("p.*.chunks")
    in_order = log.read_text().splitlines()
    assert (in_order[-1], sorted(in_order)) == (f"{LONG}-0.safetensors", CHUNKS)
    assert chunk_bytes(out) == chunk_bytes(undisturbed)


# Damaged, or of something else


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def swap(file: Path) -> None:
    """A sound chunk, of another subject."""
    shutil.copy(file.with_name("old_clocks-0.safetensors"), file)


def next_chunk(file: Path) -> None:
    """A sound chunk of the same subject."""
    shutil.copy(file.with_name("green_birds-1.safetensors"), file)


@pytest.mark.parametrize(
    "harm",
    [
        (cut, "incomplete|deserializing"),
        (flip, "its checksum does not hold"),
        (swap, "belongs to another"),
        (next_chunk, "belongs to another"),
    ],
)
def test_a_chunk_that_is_not_what_it_should_be_is_done_again_with_a_warning(
    harm: tuple[Callable[[Path], None], str],
    model: Path,
    quiz: Path,
    copy: Path,
    undisturbed: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage, reason = harm
    finished = load_profile(copy).finished_at
    damage(copy / "chunks" / NAME)
    assert chunk_bytes(copy) != chunk_bytes(undisturbed)
    with pytest.raises(ProfileError, match="is damaged"):
        _ = load_profile(copy).chunks
    *_, last = measurement(model, quiz).run(copy)
    assert (last.done, last.measured) == (N_QUESTIONS, 256)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert re.search(rf"{NAME} is damaged \(.*({reason}).*\): measuring it again", warnings[0])
    assert chunk_bytes(copy) == chunk_bytes(undisturbed)
    assert is_whole(copy)
    assert finished is not None
    assert (load_profile(copy).finished_at or 0) > finished


def test_a_chunk_of_the_same_questions_under_other_settings_is_done_again(
    model: Path, quiz: Path, copy: Path, undisturbed: Path, tmp_path: Path
) -> None:
    other = measurement(model, quiz)
    other.info = other.info.model_copy(
        update={"settings": other.info.settings.model_copy(update={"torch": "2.6.0"})}
    )
    list(other.run(tmp_path / "other"))
    shutil.copy(tmp_path / "other" / "chunks" / NAME, copy / "chunks" / NAME)
    *_, last = measurement(model, quiz).run(copy)
    assert last.measured == 256
    assert chunk_bytes(copy) == chunk_bytes(undisturbed)


def test_a_finished_profile_is_only_read(model: Path, quiz: Path, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [copy, *copy.rglob("*")]}
    *_, last = measurement(model, quiz).run(copy)
    assert (last.done, last.measured) == (N_QUESTIONS, 0)
    assert {path: path.stat().st_mtime_ns for path in [copy, *copy.rglob("*")]} == before


# Claims


def holder_gone(folder: Path) -> None:
    """In a process of its own: a claim that is never given back."""
    Claims(folder).take("birds")


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Claims, Claims]]:
    """Two holders of one folder."""
    with Claims(tmp_path / "claims", FAST) as one, Claims(tmp_path / "claims", FAST) as other:
        yield one, other


def test_one_of_many_gets_a_claim_and_the_next_when_it_is_given_back(
    two: tuple[Claims, Claims],
) -> None:
    one, other = two
    assert one.take("birds")
    assert not other.take("birds")
    assert other.take("clocks")
    one.release("birds")
    assert other.take("birds")
    assert not one.take("birds")
    for name in ("birds", "clocks"):
        other.release(name)
    assert list(one.folder.iterdir()) == []


def test_a_claim_is_respected_while_its_holder_lives_however_long(
    two: tuple[Claims, Claims],
) -> None:
    one, other = two
    assert one.take("birds")
    end = time.monotonic() + 3 * FAST.dead_after_s
    while time.monotonic() < end:
        assert not other.take("birds")
        time.sleep(FAST.beat_s)


def test_a_claim_without_a_heartbeat_is_taken_over_by_exactly_one(tmp_path: Path) -> None:
    stopped = Claims(tmp_path / "claims", FAST)  # its thread is never started
    assert stopped.take("birds")
    others = [Claims(tmp_path / "claims", FAST) for _ in range(3)]
    for other in others:
        assert not other.take("birds")  # nobody is dead at first sight
    time.sleep(FAST.dead_after_s * 1.2)
    assert [other.take("birds") for other in others] == [True, False, False]
    stopped.release("birds")  # it wakes up: what was its claim is no longer
    with Claims(tmp_path / "claims", FAST) as late:
        assert not late.take("birds")
    others[0].release("birds")
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_stop_while_a_claim_is_written_gives_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        assert len(list((tmp_path / "claims").iterdir())) == 1
        raise KeyboardInterrupt

    def opened(path: Path, mode: str = "r", **how: str) -> IO[str]:
        file = opening(path, mode, **how)
        if mode == "x":
            monkeypatch.setattr(file, "write", stopped)
        return file

    opening = Path.open
    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(KeyboardInterrupt), Claims(tmp_path / "claims", FAST) as claims:
        claims.take("birds")
    assert not (tmp_path / "claims").exists()


def test_the_claim_of_a_process_that_is_gone_is_taken_over_at_once(tmp_path: Path) -> None:
    process = PROCESSES.Process(target=holder_gone, args=(tmp_path,))
    process.start()
    process.join(60)
    (claim,) = tmp_path.iterdir()
    with Claims(tmp_path) as claims:
        assert claims.take("birds")
        claims.release("birds")
    assert not claim.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"host": "elsewhere"},
        {"kernel": "another boot"},
        None,  # still empty
    ],
)
def test_a_process_that_cannot_be_seen_from_here_is_judged_by_its_heartbeat(
    change: dict[str, object] | None, tmp_path: Path
) -> None:
    process = PROCESSES.Process(target=holder_gone, args=(tmp_path,))
    process.start()
    process.join(60)
    (claim,) = tmp_path.iterdir()
    holder = json.loads(claim.read_text())
    claim.write_text("" if change is None else json.dumps({**holder, **change}))
    with Claims(tmp_path, FAST) as claims:
        assert not claims.take("birds")
        os.utime(claim)  # it lives
        time.sleep(FAST.dead_after_s * 0.7)
        assert not claims.take("birds")
        time.sleep(FAST.dead_after_s * 0.7)
        assert not claims.take("birds")
        time.sleep(FAST.dead_after_s * 0.7)
        assert claims.take("birds")


def test_a_later_process_with_the_same_pid_is_not_the_holder(tmp_path: Path) -> None:
    with Claims(tmp_path, FAST) as one, Claims(tmp_path, FAST) as other:
        assert one.take("birds")
        (claim,) = tmp_path.iterdir()
        holder = json.loads(claim.read_text())
        assert holder["pid"] == os.getpid()
        claim.write_text(json.dumps({**holder, "started": holder["started"] - 3600}))
        assert other.take("birds")


def test_heartbeats_are_seconds_apart_and_many_fit_into_a_life() -> None:
    assert 1 <= Timing().beat_s <= Timing().dead_after_s / 5
    assert Timing().dead_after_s <= 60


def test_a_process_on_its_way_out_counts_as_gone(tmp_path: Path) -> None:
    """A zombie still has its pid."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = psutil.Process(sleeper.pid)
    holder = {
        **claiming._here(),
        "pid": sleeper.pid,
        "started": claiming._started(sleeper.pid),
    }
    assert not claiming._is_gone(json.dumps(holder))
    sleeper.kill()
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert claiming._is_gone(json.dumps(holder))
    sleeper.wait()
    assert claiming._is_gone(json.dumps(holder))


# Stopped by hand


@pytest.fixture
def nearly(copy: Path) -> Path:
    """A profile that lacks its longest chunk."""
    (copy / "chunks" / NAME).unlink()
    (copy / "run.json").unlink()
    return copy


def ask(model: Path, quiz: Path, out: Path) -> list[str]:
    where = ["--quiz", str(quiz), "--shots", "1", "--out", str(out)]
    return ["expertcut", "profile", str(model), *where, "--threads", "1"]


def wait_for_work(out: Path, is_running: Callable[[], bool]) -> None:
    while not list(out.glob(f"claims/{NAME}.*")) and is_running():
        time.sleep(0.005)


def is_kept(out: Path, text: str) -> bool:
    where = f"finished chunks are kept in {out}: run the same command again to go on"
    return text == f"expertcut: interrupted: {where}\n"


def test_ctrl_c_ends_with_one_line_and_the_next_run_goes_on(
    model: Path, quiz: Path, undisturbed: Path, nearly: Path
) -> None:
    command = [sys.executable, "-m", *ask(model, quiz, nearly)]
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background of a shell inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for_work(nearly, lambda: run.poll() is None)
    run.send_signal(signal.SIGINT)
    stdout, stderr = run.communicate(timeout=120)
    assert (run.returncode, stdout) == (130, "")
    assert is_kept(nearly, stderr), stderr
    assert {path.name for path in nearly.iterdir()} == {"profile.json", "chunks"}
    *_, last = measurement(model, quiz).run(nearly)
    assert last.measured == 256
    assert chunk_bytes(nearly) == chunk_bytes(undisturbed)


@dataclass(frozen=True)
class Command:
    """The command in a process of its own, its stderr in a file."""

    argv: list[str]
    stderr: Path
    rank: str = "0"

    def __call__(self) -> None:
        sys.argv, os.environ["RANK"] = self.argv, self.rank
        with self.stderr.open("w") as sys.stderr:
            main()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_job_that_is_ended_from_outside_says_so_once(
    rank: str, model: Path, quiz: Path, nearly: Path, tmp_path: Path
) -> None:
    """Torchrun and Slurm send SIGTERM to every process."""
    process = start(Command(ask(model, quiz, nearly), tmp_path / "stderr", rank))
    wait_for_work(nearly, process.is_alive)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process) == 143
    said = (tmp_path / "stderr").read_text()
    assert is_kept(nearly, said) if rank == "0" else said == ""
    assert {path.name for path in nearly.iterdir()} == {"profile.json", "chunks"}


def test_a_stop_before_there_is_anything_to_keep_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("expertcut.cli.TerminalUI.quiet", stopped)
    monkeypatch.setattr(sys, "argv", ["expertcut", "profile"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert capsys.readouterr() == (
        "",
        "expertcut: interrupted: run the same command again to go on\n",
    )
