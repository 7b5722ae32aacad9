"""Short versions of `make soak`: kills, full disks, vanished files, two runs, memory, clocks."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from expertcut.cli import main
from expertcut.data import Selection, load_quiz
from expertcut.errors import ModelError, OutputError
from expertcut.models.devices import give_back, is_out_of_memory
from expertcut.profiling import locks as claiming
from expertcut.profiling.locks import Claims, Timing, alone
from expertcut.scoring.engine import Engine, ask
from tests.conftest import open_model
from tests.soak.faults import Bench, meet
from tests.soak.kills import Tally, kill
from tests.soak.together import SCENES
from tests.support.processes import PROCESSES

FAST = Timing(beat_s=0.02, dead_after_s=0.3)
SHORT = (
    "profile: disk full at 80%",
    "prune: disk full at 80%",
    "heal: disk full at 50%",
    "prune --sweep: disk full at 50%",
    "run: disk full at 50%",
    "prune: read-only folder",
    "run: read-only folder",
    "prune: file size limit",
    "prune: weights removed while it reads",
    "prune: weights cut while it reads",
    "prune: a chunk removed while it reads",
    "profile: questions removed while it reads",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def test_killed_at_random_moments_and_run_again_every_command_ends_with_the_same_bytes(
    bench: Bench,
) -> None:
    tallies: list[Tally] = []
    for number, command in enumerate(bench.commands.values()):
        (root := bench.root / f"kills-{number}").mkdir()
        tallies.append(kill(command, root, 1, seed=5))
    assert [tally.losses for tally in tallies] == [[]] * 5
    assert all(tally.landed for tally in tallies)
    assert sum(tally.landed_in_work for tally in tallies) > 0  # not all before the first byte


@pytest.mark.parametrize("name", SHORT)
def test_a_fault_ends_in_one_line_and_leaves_nothing_half_done(name: str, bench: Bench) -> None:
    (fault,) = [fault for fault in bench.faults() if fault.name == name]
    found = meet(bench, fault)
    if found.skipped:
        pytest.skip(found.skipped)
    assert found.wrong == []
    assert found.line.startswith("expertcut: ")


@pytest.mark.parametrize("name", ["two prune", "two run", "two sweeps", "clock profile"])
def test_runs_that_share_a_folder_or_a_jumping_clock_lose_nothing(name: str, bench: Bench) -> None:
    found = SCENES[name](bench)
    assert found.wrong == []
    assert found.kept > 3


# One run at a time


def holding(folder: Path) -> None:
    """In a process of its own: holds a folder until it is killed."""
    with alone(folder, "recipe"):
        (folder / "held").touch()
        time.sleep(60)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, "psutil.Process"]]:
    process = PROCESSES.Process(target=holding, args=(tmp_path / "run",), daemon=True)
    process.start()
    while not (tmp_path / "run" / "held").exists():
        time.sleep(0.01)
    yield tmp_path / "run", psutil.Process(process.pid)
    process.kill()
    process.join()


def test_a_second_run_is_refused_at_once_while_the_first_lives_and_no_longer(
    held: tuple[Path, "psutil.Process"],
) -> None:
    folder, process = held
    began_s = time.monotonic()
    words = f"at work there .process {process.pid} on "
    with pytest.raises(OutputError, match=words), alone(folder, "recipe"):
        raise AssertionError("it was let in")
    assert time.monotonic() - began_s < 5
    process.kill()
    process.wait(10)
    with alone(folder, "recipe"):
        assert (folder / "claims").is_dir()
    assert not (folder / "claims").exists()


def test_one_on_another_machine_is_waited_for_as_long_as_it_may_be_dead(tmp_path: Path) -> None:
    (claims := tmp_path / "claims").mkdir()
    elsewhere = {**claiming._here(), "host": "elsewhere"}
    (claims / "recipe.0").write_text(json.dumps(elsewhere))
    with alone(tmp_path, "recipe", FAST):
        assert {path.name for path in claims.iterdir()} == {"recipe.0", "recipe.1"}
    assert not claims.exists()
    claims.mkdir()
    other = Claims(claims, FAST)
    (claims / "recipe.0").write_text(json.dumps(elsewhere))
    other._held["recipe"] = claims / "recipe.0"  # its heart beats
    refused = pytest.raises(OutputError, match=r"process \d+ on elsewhere")
    with other, refused, alone(tmp_path, "recipe", FAST):
        raise AssertionError("it was let in")


def test_who_lives_is_told_by_no_clock_that_can_be_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times of day that processes began at move with the clock; a live claim must not."""
    with Claims(tmp_path, FAST) as one, Claims(tmp_path, FAST) as other:
        assert one.take("birds")
        began = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: began(self) - 3600)
        monkeypatch.setattr(time, "time", lambda: 0.0)
        assert psutil.Process().create_time() < began(psutil.Process()) - 3000
        assert not other.take("birds")


# Memory, and errors that nobody caught


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),  # oneDNN
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_an_end_of_memory_is_told_from_faults_of_ours(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory
    give_back()


def test_where_a_pass_must_not_come_in_halves_one_line_names_the_option(
    checkpoint: Callable[..., Path], quiz_folder: Path
) -> None:
    moe = open_model(checkpoint("olmoe"))

    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    moe.blocks[-1].module.register_forward_pre_hook(fail)
    with pytest.raises(ModelError, match=r"not enough memory .* --batch-tokens below 700"):
        ask(Engine(moe, 700), load_quiz(Selection(str(quiz_folder), shots=1)))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "x.html"), "x.html: No space left on device: mend"),
        (OSError(30, "Read-only file system"), "Read-only file system: mend"),
        (MemoryError("too much"), "not enough memory (too much): free some, or give a smaller"),
        (RuntimeError("could not create a primitive"), "not enough memory (could not create"),
        (RuntimeError("ours"), None),
        (OSError(9, "Bad file descriptor"), None),
    ],
)
def test_what_the_machine_did_is_one_line_wherever_it_comes_and_our_faults_keep_their_trace(
    error: Exception,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("expertcut.cli.TerminalUI.quiet", fails)
    monkeypatch.setattr(sys, "argv", ["expertcut", "profile"])
    with pytest.raises(type(error) if said is None else SystemExit) as ended:
        main()
    if said is not None:
        assert ended.value.code == 2  # type: ignore[attr-defined]
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"expertcut: {said}")


def test_who_holds_a_claim_is_named_and_known_to_live(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims") as claims:
        assert claims.take("audit")
        assert claims.holder("audit") == (f"process {os.getpid()} on {platform.node()}", True)
        assert claims.holder("nobody's") == ("another process", False)
