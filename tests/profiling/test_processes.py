"""Any number of processes fill one profile: the same bytes, nothing done twice, one voice."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertcut.cli import main
from expertcut.cli.progress import Bars, Line, is_first
from expertcut.data import Selection, load_quiz
from expertcut.profiling.locks import Claims
from expertcut.profiling.storage import load_profile
from expertcut.profiling.workers import Progress, Tally, Work, chunks_of_work
from tests.support.processes import (
    CHUNKS,
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
LONGEST = f"{LONG}-0.safetensors"


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return long_quiz(tmp_path_factory.mktemp("quiz") / "birds")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> Path:
    return checkpoint("olmoe")


@pytest.fixture(scope="module")
def alone(model: Path, quiz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    out = tmp_path_factory.mktemp("alone") / "p"
    assert ended(start(Task(model, quiz, out))) == 0
    assert is_whole(out) and list(chunk_bytes(out)) == CHUNKS
    return out


# Together


@pytest.mark.parametrize("n", [2, 3])
def test_processes_that_begin_at_once_share_the_chunks_and_write_the_same_bytes(
    n: int, model: Path, quiz: Path, alone: Path, tmp_path: Path
) -> None:
    out, barrier = tmp_path / "p", PROCESSES.Barrier(n)
    joined = [start(Task(model, quiz, out, barrier=barrier)) for _ in range(n)]
    assert [ended(process) for process in joined] == [0] * n
    assert logged(out, "chunks") == CHUNKS  # none twice
    assert len(list(tmp_path.glob("p.*.chunks"))) > 1  # more than one had some
    assert chunk_bytes(out) == chunk_bytes(alone)
    assert (out / "profile.json").read_bytes() == (alone / "profile.json").read_bytes()
    assert is_whole(out)
    assert logged(out, "runs") == ["_run"]  # one of them
    run = json.loads((out / "run.json").read_text())
    assert run["questions_measured"] + run["questions_by_others"] == N_QUESTIONS


def test_of_two_that_begin_at_once_with_different_settings_one_is_refused(
    model: Path, quiz: Path, tmp_path: Path
) -> None:
    out, barrier = tmp_path / "p", PROCESSES.Barrier(2)
    joined = [start(Task(model, quiz, out, batch_tokens=n, barrier=barrier)) for n in (500, 600)]
    codes = [ended(process) for process in joined]
    assert sorted(code or 0 for code in codes) == [0, 1]
    settings = load_profile(out).info.settings
    assert settings.batch_tokens == (500, 600)[codes.index(0)]
    assert is_whole(out)


def test_a_process_that_dies_takes_down_nothing_but_its_own_chunk(
    model: Path, quiz: Path, alone: Path, tmp_path: Path
) -> None:
    out, barrier = tmp_path / "p", PROCESSES.Barrier(2)
    dies = start(Task(model, quiz, out, die="in the first chunk", barrier=barrier))
    lives = start(Task(model, quiz, out, barrier=barrier))
    assert (ended(dies), ended(lives)) == (-signal.SIGKILL, 0)
    assert logged(out, "chunks") == CHUNKS
    assert chunk_bytes(out) == chunk_bytes(alone)
    assert is_whole(out)


def test_who_waits_ends_when_all_is_there_and_who_does_not_when_nothing_is_left_to_do(
    model: Path, quiz: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p"
    (out / "claims").mkdir(parents=True)
    with Claims(out / "claims") as ours:
        assert ours.take(LONGEST)
        assert ended(start(Task(model, quiz, out, waits=False))) == 0
        assert load_profile(out).missing == [LONGEST]
        assert not (out / "run.json").exists()
        waits = start(Task(model, quiz, out))
        waits.join(2)
        assert waits.is_alive()
        assert load_profile(out).missing == [LONGEST]
        ours.release(LONGEST)
        assert ended(waits) == 0
    assert logged(out, "chunks") == CHUNKS
    assert is_whole(out)
    assert chunk_bytes(out) == chunk_bytes(alone)


# As launchers start them


def test_torchrun_gives_one_profile_of_the_same_bytes_and_one_line(
    model: Path, quiz: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    ask = ["expertcut", "profile", model, "--quiz", quiz, "--shots", "1", "--out", out]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [*command, *map(str, ask)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"quiz      {N_QUESTIONS} ")
    assert len(re.findall(rf"^written   {re.escape(str(out))}$", done.stdout, re.M)) == 1
    assert done.stderr.count("profiling") <= 1  # how far it is, by the first
    assert load_profile(out).info.settings.threads == 1  # torchrun's choice, recorded
    assert chunk_bytes(out) == chunk_bytes(alone)
    assert is_whole(out)


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0", "SLURM_PROCID": "3"}, True),  # torchrun under srun
        ({"RANK": "2"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "1"}, False),
    ],
)
def test_the_first_of_several_processes_is_known_by_what_its_launcher_says(
    environment: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first() is first


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_prints_and_writes_results(
    rank: str,
    model: Path,
    quiz: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    where = ["--quiz", str(quiz), "--shots", "1", "--subjects", "old_cups"]
    out = tmp_path / "results.json"
    for command in (
        ["profile", str(model), "--out", str(tmp_path / "p")],
        ["eval", str(model), str(model), "--out", str(out)],
    ):
        monkeypatch.setattr(sys, "argv", ["expertcut", *command, *where])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert ("quiz      5 " in said.out) == (rank == "0")
    assert (said.out == "") == (rank == "1")
    assert out.exists() == (rank == "0")
    scored = next((tmp_path / "results.chunks").iterdir())
    for folder in (tmp_path / "p", scored):
        assert is_whole(folder)  # it did its part of the work


# Cost and progress


def test_the_cost_of_chunks_is_close_to_their_tokens(model: Path, quiz: Path) -> None:
    measure = measurement(model, quiz)
    work = chunks_of_work(measure.info, measure.quiz)
    asked = {name: [(q.subject, q.row) for q in its.questions] for name, its in work.items()}
    assert sorted(q for its in asked.values() for q in its) == sorted(
        (q.subject, q.row) for q in load_quiz(Selection(str(quiz), shots=1))
    )
    tokens = {name: measure.measure(its, lambda _: None)[1] for name, its in work.items()}
    by_cost = sorted(work, key=lambda name: work[name].cost)
    assert by_cost[-1] == max(tokens, key=lambda name: tokens[name]) == LONGEST
    for name in work:  # one token a byte
        assert work[name].cost == pytest.approx(tokens[name], rel=0.2)
    single = measure.info.model_copy(
        update={"settings": measure.info.settings.model_copy(update={"way": "single"})}
    )
    alone = chunks_of_work(single, measure.quiz)
    for name in work:  # the shots again for every question
        assert alone[name].cost > work[name].cost


def tally(monkeypatch: pytest.MonkeyPatch) -> tuple[Tally, list[float]]:
    """Four chunks of one question each that cost 1, 2, 3 and 4, and a clock."""
    quiz = tuple(object() for _ in range(1))
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return Tally({str(n): Work("birds", quiz, n) for n in (1, 2, 3, 4)}), now  # type: ignore[arg-type]


def test_time_left_and_tokens_come_from_what_was_done_since_the_run_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts, now = tally(monkeypatch)
    counts.was_there = {"1"}
    there = counts.note_done("1")
    assert there == Progress(done=1, total=4, measured=0)
    assert (there.left_s, there.tokens) == (None, 0)
    now[0] += 6
    counts.tokens_by_mine["2"] = 500
    mine = counts.note_done("2")
    assert mine == Progress(done=2, total=4, measured=1)
    assert (mine.left_s, mine.tokens) == (6 * 7 / 2, 500)
    others = counts.note_done("4")
    assert others == Progress(done=3, total=4, measured=1)
    assert (others.left_s, others.tokens) == (6 * 3 / 6, 1500)
    assert counts.done < set(counts.work)
    counts.note_done("3")
    assert counts.done == set(counts.work)
    assert (counts.mine, counts.others) == (1, 2)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(screen: io.StringIO) -> list[str]:
    lines = (line.strip() for line in screen.getvalue().replace("\n", "\r").split("\r"))
    return [line for line in lines if line]


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("first")
def test_a_person_at_a_terminal_sees_questions_tokens_and_time(
    model: Path, quiz: Path, tmp_path: Path
) -> None:
    bars, seen = Bars(Screen()), []
    line = Line("profiling tiny", N_QUESTIONS, bars)
    bars.kept = line.what

    def see(step: object) -> None:
        line.see(step)  # type: ignore[arg-type]
        seen.append(bars.bars[line.what].n)

    list(line.follow(measurement(model, quiz).run(tmp_path / "p", see)))
    bars.close()
    assert seen == sorted(seen)
    assert len(set(seen)) > 2 * len(CHUNKS)  # it moves within a chunk
    last = shown(bars.terminal)[-1]
    assert "profiling tiny" in last
    pace = re.search(rf"{N_QUESTIONS}/{N_QUESTIONS} questions, 00:00 left, ([\d,]+) tokens/s", last)
    assert pace
    assert int(pace[1].replace(",", "")) > 100
    assert "None" not in bars.terminal.getvalue()


def at(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


@pytest.mark.usefixtures("first")
def test_the_bar_of_a_part_has_amount_pace_and_time_left_and_goes_when_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, bars = at(monkeypatch), Bars(Screen())
    for tenth in range(11):
        bars.advance("loading olmoe", tenth * 1e8, 1e9, "B")
        now[0] += 1
    lines = shown(bars.terminal)
    assert lines[0] == "loading olmoe"
    assert re.search(r"400M/1.00GB, 00:06 left, 100MB/s$", lines[4])
    assert not bars.bars
    bars.advance("expertcut prune", 0, 0, "")
    with bars.hidden():
        assert bars.terminal.getvalue().endswith("\r")  # it gave way
    bars.advance("writing weights", 1, 2, "B")
    assert {*bars.bars} == {"writing weights"}  # one after another
    assert "None" not in bars.terminal.getvalue()


@pytest.mark.usefixtures("first")
@pytest.mark.parametrize("screen", [Screen(), None], ids=["terminal", "file"])
def test_time_passes_where_nothing_is_reported_and_a_file_gets_a_plain_line_a_minute(
    screen: Screen | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Soon(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            return super().wait(timeout and timeout / 1000)

    monkeypatch.setenv("FORCE_COLOR", "1")  # what build servers set
    monkeypatch.setattr(threading, "Event", Soon)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr("expertcut.cli.progress.FIRST_LINE_S", 2)
    now, bars = at(monkeypatch), Bars(screen)
    out: Any = screen or sys.stderr

    def waits_for(text: str) -> None:
        for _ in range(5000):
            if text in out.getvalue():
                return
            time.sleep(0.001)
        pytest.fail(f"{text!r} is not in {out.getvalue()!r}")

    with bars.ticking("expertcut eval"):
        if screen:
            assert shown(out)[0] == "expertcut eval"  # at once
            now[0] += 7
            waits_for("expertcut eval 00:07")
        else:  # work says soon how far it is, reading does not: it may be refused
            bars.advance("loading olmoe", 1, 9, "B")
            now[0] += 3
            time.sleep(0.05)
            assert out.getvalue() == ""
            bars.advance("cell 0", 1, 9, "questions")
            now[0] += 3
            waits_for("cell 0 1/9 questions")
        for done in range(0, 101, 10):
            bars.advance("cell 1", done, 101, "questions")
            now[0] += 5
        assert screen or out.getvalue().count("\n") == 1  # none in the next minute
        now[0] += 5
        waits_for(
            "cell 1 |" if screen else "cell 1 100/101 questions, 00:00 left, 1.67 questions/s\n"
        )
        bars.advance("cell 1", 101, 101, "questions")
        while not bars.bars:  # nothing is reported: the command's own line again
            time.sleep(0.001)
        now[0] += 61
        waits_for("expertcut eval 01:01")
    assert not bars.bars and (screen or out.getvalue().count("\n") == 3)


def test_only_the_first_process_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    bars = Bars(Screen())
    assert len(list(Line("profiling tiny", 2, bars).follow(iter([Progress(1, 2, 0)])))) == 1
    assert bars.terminal.getvalue() == ""
