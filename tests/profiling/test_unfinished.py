"""A run that is killed, fails or meets a full disk: what it writes is there whole or not at all."""

import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from expertcut.checkpoints import build
from expertcut.checkpoints import shards as shards_module
from expertcut.checkpoints.shards import Rewrite, Shard, check_written, lay_out, write_shards
from expertcut.edits.plan import load_plan
from expertcut.errors import OutputError, PlanError
from expertcut.models.safetensors_index import INDEX_FILE, read_stored
from tests.support.prune_runs import PAGE_BYTES, Runs, contents, make_runs, small_disk

REPLACE = ("--no-verify", "--force")
NORM = "model.norm.weight"
NO_SPACE = "cannot be written: No space left on device"
UNASKED = "The new checkpoint was not scored on any question.\n"
Written = tuple[Path, list[Shard]]
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def first_runs(quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(quiz_folder, tmp_path_factory.mktemp("root"))


@pytest.fixture
def runs(first_runs: Runs, tmp_path: Path) -> Runs:
    return replace(first_runs, out=tmp_path / "out")


@pytest.fixture
def written(checkpoint: Callable[..., Path], tmp_path: Path) -> Written:
    """A checkpoint in several files, as it was laid out."""
    shards = lay_out(read_stored(checkpoint("olmoe")), Rewrite(), 60_000)
    write_shards(tmp_path, shards)
    check_written(tmp_path, shards)
    return tmp_path, shards


def fails(*_: object, **__: object) -> None:
    raise PlanError("it failed")


@pytest.mark.parametrize(("n", "options"), [(20, ("--no-verify",)), (6, ()), (12, REPLACE)])
def test_a_run_killed_at_any_moment_leaves_what_was_there_or_a_whole_checkpoint(
    runs: Runs, n: int, options: tuple[str, ...]
) -> None:
    old = runs.old if (has_old := options == REPLACE) else {}
    runs.lay(has_old=has_old)
    times_s = runs.timed(runs.start(*options))
    new = contents(runs.out)
    assert {**new, "plan.json": ""} == {**runs.new, "plan.json": ""}
    runs.lay(has_old=has_old)
    seen: Counter[tuple[str, bool]] = Counter()
    for _ in runs.killed(n, times_s, *options):
        seen[runs.state(old, new), bool(runs.siblings())] += 1
        runs.lay(has_old=has_old)
    assert seen["old", True] > 0  # killed while it wrote


@pytest.mark.parametrize(
    ("sent", "states"),
    [(signal.SIGKILL, ["old", "absent", "new"]), (signal.SIGINT, ["old", "new"])],
)
def test_a_replacement_that_ends_between_two_steps_leaves_the_old_or_the_new(
    runs: Runs, sent: int, states: list[str]
) -> None:
    seen: Counter[str] = Counter()
    for step in count(1):
        runs.lay(has_old=True)
        process = runs.start(*REPLACE, step=step, sent=sent)
        process.join()
        seen[runs.state(runs.old, runs.new)] += 1
        if process.exitcode == 0:
            break
    assert list(seen) == states
    assert seen["absent"] <= 1  # between the two renames, both whole beside it


def test_python_m_killed_while_it_writes_leaves_a_whole_checkpoint_or_none(runs: Runs) -> None:
    assert runs.python_m_killed_while_it_writes("--no-verify") == -signal.SIGKILL
    runs.state({}, runs.new)


def test_what_killed_runs_left_is_named(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    for step in count(1):  # the first ones are killed before there is anything to leave
        runs.start("--no-verify", step=step).join()
        if len(runs.siblings()) == 2:
            break
    one, other = runs.siblings()
    (old := one.with_suffix(".old")).mkdir()
    assert runs.prune("--no-verify")[0] == 0
    assert {*runs.out.parent.iterdir()} == {one, other, old, runs.out}
    for left in (one, other, old):
        assert f"{left} was left by a run that was killed or still runs" in caplog.text


@pytest.mark.parametrize(
    ("free", "ballast", "why"),
    [
        (-1, 0, " needs {} bytes but {} are free there: make room or name another --out"),
        (1, 0, f"/tokenizer.json {NO_SPACE}"),
        (9, 10, f" {NO_SPACE}"),  # another fills it meanwhile
    ],
)
def test_a_full_disk_is_said_in_one_line_and_nothing_changes(
    runs: Runs, monkeypatch: Patch, free: int, ballast: int, why: str
) -> None:
    needed_bytes = (runs.root / "5" / "model.safetensors").stat().st_size
    pages = -(-needed_bytes // PAGE_BYTES) + free

    def write(folder: Path, shards: list[Shard]) -> None:
        (runs.out.parent / "ballast").write_bytes(bytes(ballast * PAGE_BYTES))
        write_shards(folder, shards)

    monkeypatch.setattr(shards_module, "write_shards", write)
    with small_disk(runs.out.parent, pages):
        runs.out.mkdir()
        (runs.out / "mine").touch()
        status, _, stderr = runs.prune(*REPLACE)
        left = {*runs.out.parent.rglob("*")} - {runs.out.parent / "ballast"}
    line = why.format(f"{needed_bytes:,}", f"{pages * PAGE_BYTES:,}")
    assert (status, stderr) == (2, f"expertcut: {runs.out}{line}\n")
    assert left == {runs.out, runs.out / "mine"}


def test_what_the_disk_lost_is_found_in_time(runs: Runs, monkeypatch: Patch) -> None:
    def write(folder: Path, shards: list[Shard]) -> None:
        write_shards(folder, shards)
        os.truncate(folder / shards[0].name, shards[0].size_bytes - 1)

    monkeypatch.setattr(shards_module, "write_shards", write)
    status, _, stderr = runs.prune("--no-verify")
    assert status == 2
    assert stderr.startswith(f"expertcut: {runs.out}/model.safetensors was not written whole")
    assert not any(runs.out.parent.iterdir())


def test_only_a_finished_checkpoint_replaces_another(runs: Runs, monkeypatch: Patch) -> None:
    runs.lay(has_old=True)
    advice = "remove it, name another --out or replace it with --force"
    assert runs.prune()[::2] == (2, f"expertcut: {runs.out} is not empty: {advice}\n")
    for stage in ("export", "save_plan"):
        with monkeypatch.context() as patch:
            patch.setattr(build, stage, fails)
            assert runs.prune(*REPLACE)[::2] == (2, "expertcut: it failed\n")
        assert [*runs.out.parent.iterdir()] == [runs.out]
        assert contents(runs.out) == runs.old
    assert runs.prune(*REPLACE)[0] == 0
    assert [*runs.out.parent.iterdir()] == [runs.out]
    assert contents(runs.out) == runs.new


def test_force_spares_what_is_read_and_where_one_stands(
    runs: Runs, quiz_folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    (work := tmp_path / "a" / "work").mkdir(parents=True)
    (work / "mine").touch()
    (home := tmp_path / "b" / "home").mkdir(parents=True)
    (link := tmp_path / "link").symlink_to(runs.root / "model")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    before = [contents(folder) for folder in (runs.root, quiz_folder, tmp_path)]
    read = (link, *(runs.root / name for name in (".", "model", "profile")), quiz_folder)
    for place in (*read, quiz_folder.parent, work, work.parent, home.parent):
        for more in ((), ("--plan-only",)):
            status, _, stderr = replace(runs, out=place).prune(*REPLACE, *more)
            assert status == 2
            assert stderr.startswith(f"expertcut: {place} holds /")
            assert stderr.endswith(", so --force spares it: name another --out\n")
    _, _, stderr = replace(runs, out=work / "mine").prune(*REPLACE)
    assert stderr.endswith("mine is a file: remove it or name another --out\n")
    assert before == [contents(folder) for folder in (runs.root, quiz_folder, tmp_path)]


def test_a_mount_point_is_refused_at_once(runs: Runs) -> None:
    runs.out.mkdir()
    with small_disk(runs.out, 1):
        status, _, stderr = runs.prune("--force")
    assert status == 2
    assert stderr.startswith(f"expertcut: {runs.out} is a mount point")


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (NORM, None, "not there, must be ((32,), 'F32')"),
        (NORM, torch.ones(31), "((31,), 'F32'), must be ((32,), 'F32')"),
        (NORM, torch.ones(32).half(), "((32,), 'F16'), must be ((32,), 'F32')"),
        ("more", torch.ones(2), "((2,), 'F32'), must be absent"),
    ],
)
def test_a_tensor_that_was_not_written_as_laid_out_is_named(
    written: Written, name: str, tensor: torch.Tensor | None, words: str
) -> None:
    folder, shards = written
    file = folder / json.loads((folder / INDEX_FILE).read_text())["weight_map"][NORM]
    tensors = {**load_file(file), name: tensor}
    save_file({n: t for n, t in tensors.items() if t is not None}, file)
    with pytest.raises(OutputError, match=re.escape(f"{file}: {name} is {words}")):
        check_written(folder, shards)


def test_a_file_or_index_that_was_not_written_whole_is_named(written: Written) -> None:
    folder, shards = written
    for name in (shards[1].name, INDEX_FILE):
        right = (folder / name).read_bytes()
        for wrong in (right[:-4], b""):
            (folder / name).write_bytes(wrong)
            with pytest.raises(OutputError, match=f"{folder / name} was not written whole"):
                check_written(folder, shards)
        (folder / name).write_bytes(right)
    (folder / INDEX_FILE).write_bytes(right.replace(NORM.encode(), b"another"))
    with pytest.raises(OutputError, match=f"{INDEX_FILE} does not name the tensors"):
        check_written(folder, shards)


@pytest.mark.parametrize("layout", ["stock", "exact"])
def test_no_verify_loads_no_model(runs: Runs, monkeypatch: Patch, layout: str) -> None:
    monkeypatch.setattr(build, "load", fails)
    assert runs.prune("--layout", layout)[::2] == (2, "expertcut: it failed\n")
    status, stdout, _ = runs.prune("--layout", layout, "--no-verify")
    assert (status, UNASKED in stdout) == (0, True)
    assert load_plan(runs.out).proof.model_dump() == {"fits": ()}


def test_a_model_too_large_for_memory_is_cut_unproved_with_a_warning(
    runs: Runs, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "load", fails)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    status, stdout, _ = runs.prune("--device", "cpu")
    assert (status, UNASKED in stdout) == (0, True)
    assert "does not fit in the free memory as float32: the checkpoint is not scored" in caplog.text
    assert contents(runs.out) == runs.new
