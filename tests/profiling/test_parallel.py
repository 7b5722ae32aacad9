"""Processes that hold one model together count as one process does, and end together."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers.utils import logging as transformers_logging

from expertcut.cli import main
from expertcut.data import Selection, load_quiz
from expertcut.errors import ModelError
from expertcut.models.parallel import local
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import load_profile
from tests.conftest import FAMILIES as EVERY_FAMILY
from tests.conftest import open_model, write_quiz
from tests.support.processes import kill_at, start

Checkpoints = Callable[..., Path]
# Stored by projection, renormalised, as w1 to w3, with shared expert and bias, fused with biases.
FAMILIES = ("olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
KINDS = ("tensor", "expert")
HAS_NO_PLAN = ("gpt_oss", "tensor")


@dataclass(frozen=True)
class Rank:
    """One process of a launch, with the environment that torchrun gives it, and its work."""

    rank: int
    size: int
    port: int
    work: Callable[[], None]

    def __call__(self) -> None:
        where = {"RANK": self.rank, "LOCAL_RANK": self.rank, "WORLD_SIZE": self.size}
        where |= {"LOCAL_WORLD_SIZE": self.size, "MASTER_ADDR": "127.0.0.1"}
        where |= {"MASTER_PORT": self.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ.update({name: str(value) for name, value in where.items()})
        torch.set_num_threads(1)
        transformers_logging.set_verbosity_error()
        self.work()


def launched(works: Sequence[Callable[[], None]]) -> list[int | None]:
    """Runs a process for each work, which can meet each other; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # It outlives every process, as that of torchrun's agent does.
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    ranks: list[BaseProcess] = []
    for rank, work in enumerate(works):
        ranks.append(start(Rank(rank, len(works), port, work)))
    for process in ranks:
        process.join(240)
    del store
    return [process.exitcode for process in ranks]


def measured(model: Path, quiz: Path, out: Path, **how: str) -> Measurement:
    questions = load_quiz(Selection(str(quiz), shots=1))
    measurement = Measurement(open_model(model, **how), questions, None, MeasureOptions(threads=1))
    for _ in measurement.run(out):
        pass
    return measurement


@dataclass(frozen=True)
class Profiles:
    """Profiles of all families in one process, which notes the share of the experts it holds."""

    models: dict[str, Path]
    quiz: Path
    out: Path

    def __call__(self) -> None:
        for family, model in self.models.items():
            for kind in KINDS:
                out = self.out / f"{family}-{kind}"
                try:
                    moe = measured(model, self.quiz, out, parallel=kind).moe
                except ModelError as error:
                    said = str(error)
                else:
                    weights = moe.blocks[0].experts.down_proj
                    said = f"{local(weights).numel() / weights.numel():g}"
                Path(f"{out}.{os.environ['RANK']}").write_text(said)


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quiz(tmp_path_factory.mktemp("quiz") / "birds", {"dev": 1, "test": 4})


@pytest.fixture(scope="module")
def together(checkpoint: Checkpoints, quiz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The profiles that two processes write of every family, in one launch."""
    out = tmp_path_factory.mktemp("together")
    work = Profiles({family: checkpoint(family) for family in FAMILIES}, quiz, out)
    assert launched([work, work]) == [0, 0]
    return out


def differences(alone: Path, other: Path) -> Iterator[tuple[str, float]]:
    """Each array of each chunk, and how far its values are off, by the largest of them."""
    for chunk in sorted((alone / "chunks").iterdir()):
        before, after = load_file(chunk), load_file(other / "chunks" / chunk.name)
        assert before.keys() == after.keys()
        for name, wanted in before.items():
            is_count = wanted.dtype.kind in "iu" or "tokens" in name
            if is_count or not wanted.size:
                assert np.array_equal(wanted, after[name]), name
                continue
            assert np.array_equal(np.isfinite(wanted), np.isfinite(after[name])), name
            own, found = (np.nan_to_num(x, posinf=0, neginf=0) for x in (wanted, after[name]))
            # A gap is a difference of scores, which lie between 0 and 1.
            largest = 1.0 if "gap" in name else max(float(np.abs(own).max()), 1e-30)
            yield name, float(np.abs(own - found).max()) / largest


def check_equals_one(family: str, together: Path, model: Path, quiz: Path, alone: Path) -> None:
    measured(model, quiz, alone)
    for kind in KINDS:
        out = together / f"{family}-{kind}"
        said = {Path(f"{out}.{rank}").read_text() for rank in (0, 1)}
        if (family, kind) == HAS_NO_PLAN:
            assert len(said) == 1
            assert "no plan to spread the experts of gpt_oss by --parallel tensor" in said.pop()
            continue
        assert said == {"0.5"}  # of the experts' weights, in each
        off = list(differences(alone, out))
        assert {name for name, _ in off} >= {"question_weighted_norm_LE", "question_votes_LE"}
        worst = max(off, key=lambda found: found[1])
        assert worst[1] < 1e-5, worst
        assert load_profile(out).info.settings.parallel == f"{kind}:2"


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_that_hold_one_model_profile_it_as_one_does(
    family: str, together: Path, checkpoint: Checkpoints, quiz: Path, tmp_path: Path
) -> None:
    check_equals_one(family, together, checkpoint(family), quiz, tmp_path / "alone")


@pytest.mark.slow
def test_two_processes_profile_every_other_family_as_one_does(
    checkpoint: Checkpoints, quiz: Path, tmp_path: Path
) -> None:
    models = {family: checkpoint(family) for family in EVERY_FAMILY if family not in FAMILIES}
    work = Profiles(models, quiz, tmp_path)
    assert launched([work, work]) == [0, 0]
    for family, model in models.items():
        check_equals_one(family, tmp_path, model, quiz, tmp_path / family)


@dataclass(frozen=True)
class Command:
    """A command line in one process; what it prints goes to files. It may die in a chunk."""

    words: Sequence[object]
    said: Path
    dies_in: dict[str, int] = field(default_factory=dict)  # by rank

    def __call__(self) -> None:
        rank = os.environ["RANK"]
        sys.stdout = Path(f"{self.said}.out.{rank}").open("w")  # noqa: SIM115
        sys.stderr = Path(f"{self.said}.err.{rank}").open("w")  # noqa: SIM115
        if rank in self.dies_in:
            measure = kill_at(self.dies_in[rank], Measurement.measure, is_after=False)
            Measurement.measure = measure  # type: ignore[method-assign, assignment]
        sys.argv = ["expertcut", *map(str, self.words)]
        try:
            main()
        finally:
            sys.stdout.close()
            sys.stderr.close()

    def texts(self, stream: str) -> list[str]:
        files = sorted(self.said.parent.glob(f"{self.said.name}.{stream}.*"))
        return [file.read_text() for file in files]


@pytest.mark.parametrize("dead", ["0", "1"])
def test_when_a_process_dies_the_others_end_with_one_line_and_what_is_finished_stays(
    dead: str, checkpoint: Checkpoints, quiz: Path, tmp_path: Path
) -> None:
    out, words = tmp_path / "p", ["profile", checkpoint("olmoe"), "--quiz", quiz, "--shots", 1]
    words += ["--threads", 1, "--parallel", "expert", "--out", out]
    command = Command(words, tmp_path / "killed", {dead: 3})
    codes = launched([command] * 2)
    assert codes[int(dead)] == -signal.SIGKILL
    assert codes[1 - int(dead)] == 2
    (line,) = "".join(command.texts("err")).splitlines()
    assert f"another process of --parallel has ended: finished chunks are kept in {out}" in line
    assert len(list((out / "chunks").iterdir())) == 2
    assert load_profile(out).missing


def test_four_processes_in_two_groups_share_the_chunks_and_print_once(
    together: Path, checkpoint: Checkpoints, quiz: Path, tmp_path: Path
) -> None:
    out, words = tmp_path / "p", ["profile", checkpoint("olmoe"), "--quiz", quiz, "--shots", 1]
    words += ["--threads", 1, "--parallel", "tensor:2", "--out", out]
    command = Command(words, tmp_path / "groups")
    assert launched([command] * 4) == [0] * 4, command.texts("err")
    assert [bool(text) for text in command.texts("out")] == [True, False, False, False]
    assert max(off for _, off in differences(together / "olmoe-tensor", out)) == 0
    assert not load_profile(out).missing


@pytest.mark.parametrize(
    ("parallel", "problem"),
    [
        ("tensor:3", "makes no equal groups: give tensor:N with an N above 1 that divides 2"),
        ("tensor", "no plan to spread the experts of gpt_oss by --parallel tensor: take"),
    ],
)
def test_what_cannot_be_spread_is_refused_by_all_processes_in_one_line_in_all(
    parallel: str, problem: str, checkpoint: Checkpoints, quiz: Path, tmp_path: Path
) -> None:
    words = ["profile", checkpoint("gpt_oss"), "--quiz", quiz, "--parallel", parallel]
    command = Command([*words, "--shots", 1, "--out", tmp_path / "p"], tmp_path / "refused")
    assert launched([command] * 2) == [2, 2]
    (line,) = "".join(command.texts("err")).splitlines()
    assert line.startswith("expertcut: ") and problem in line
    assert not (tmp_path / "p").exists()


def table(file: Path) -> list[list[float | str]]:
    """The cells of a CSV file, numbers as such."""

    def value(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text

    return [[value(text) for text in line.split(",")] for line in file.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_eval_sweep_audit_and_tuning_of_two_processes_find_what_one_finds(
    kind: str, checkpoint: Checkpoints, tmp_path: Path, expertcut: Callable[..., str]
) -> None:
    quiz, model = write_quiz(tmp_path / "quiz"), checkpoint("olmoe")
    profile = tmp_path / "p"
    expertcut("profile", model, "--quiz", quiz, "--shots", 1, "--out", profile)
    said = {}
    for name, words, file in (
        ("eval", [model, model, "--quiz", quiz, "--shots", 1], None),
        ("sweep", ["0.75,0.5", "--by", "reap,aimer"], "sweep.csv"),
        ("audit", ["--sample", 4, "--questions", 8, "--by", "reap,aimer"], "audit.csv"),
        ("reweight", ["--suppress", "0:2", "--tune", "--plan-only"], None),
    ):
        given = [] if name == "eval" else ["--profile", profile]
        alone, both = tmp_path / name, tmp_path / f"{name}-{kind}"
        said[name] = expertcut(name, *words, *given, "--out", alone)
        how = ["--threads", 1, "--parallel", kind, "--out", both]
        command = Command([name, *words, *given, *how], tmp_path / f"{name}-said")
        assert launched([command] * 2) == [0, 0], command.texts("err")
        first, other = command.texts("out")
        assert first and not other
        if file is None:
            assert first.replace(f"-{kind}", "") == said[name]
            continue
        for was, now in zip(table(alone / file), table(both / file), strict=True):
            texts = [cell for cell in was if isinstance(cell, str)]
            assert texts == [cell for cell in now if isinstance(cell, str)]
            numbers, own = ([v for v in row if isinstance(v, float)] for row in (was, now))
            assert own == pytest.approx(numbers, rel=1e-4, abs=1e-5)
