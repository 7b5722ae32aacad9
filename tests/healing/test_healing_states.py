"""What a run of `heal` leaves behind, what it goes on from, and what it must never destroy."""

import os
import shutil
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import EarlyStoppingCallback, OlmoeConfig, TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.training_args import ParallelMode

from expertcut.errors import ModelError, OutputError, SettingsError
from expertcut.healing.heal_settings import HealSettings
from expertcut.healing.recovery import Healed, Options, heal
from expertcut.healing.state import evaluations_since_best
from expertcut.healing.trainer import HealTrainer, _arguments
from expertcut.models.load import LoadOptions
from expertcut.profiling.locks import alone
from tests.conftest import write_quiz
from tests.support.healed_models import (
    SHORT,
    SIX,
    Stop,
    Sudden,
    changed,
    cut,
    healed,
    settings_for,
    stopped_after,
)

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="module")
def stock(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return cut(checkpoint("olmoe"), quiz_folder, tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("of", ["base", "teacher", "cache", "quiz", "eval_quiz"])
def test_what_is_read_is_never_replaced(
    stock: Path, checkpoint: Checkpoints, quiz_folder: Path, tmp_path: Path, of: str
) -> None:
    asked, out = settings_for(quiz_folder), tmp_path / "out"
    (out / "inside").mkdir(parents=True)
    (out / "inside" / "precious").touch()
    if of == "base":
        out = checkpoint("olmoe")
    elif of == "teacher":
        other = checkpoint("olmoe", seed=3)
        asked, out = changed(asked, teacher=str(other)), other
    elif of == "cache":
        asked = changed(asked, teacher_cache=out / "inside")
    elif of == "quiz":
        asked = settings_for(out / "inside")
    else:
        asked = changed(asked, eval_quiz=str(out / "inside"))
    before = sorted(out.rglob("*"))
    with pytest.raises(OutputError, match="so --force spares it"):
        heal(str(stock), asked, out, Options(LoadOptions(), is_forced=True))
    assert sorted(out.rglob("*")) == before != []


def test_an_empty_working_directory_can_be_what_is_written(
    stock: Path, quiz_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    asked = settings_for(quiz_folder, steps=1)
    healed(stock, asked, Path())
    assert (tmp_path / "here" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    monkeypatch.chdir(tmp_path)  # the one that was here is gone


@pytest.fixture(scope="module")
def whole(stock: Path, quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Healed:
    return healed(stock, settings_for(quiz_folder, **SIX), tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture(scope="module")
def stopped(
    stock: Path, quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HealSettings, Path]:
    """What was asked for, and what lies beside the output after five of six steps."""
    asked = settings_for(quiz_folder, **SIX)
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.raises(Stop):
        healed(stock, asked, out, report=stopped_after(5))
    return asked, out.with_name("out.healing")


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    stock: Path, quiz_folder: Path, tmp_path: Path, whole: Healed, step: int
) -> None:
    asked = settings_for(quiz_folder, **SIX)
    with pytest.raises(Stop):
        healed(stock, asked, tmp_path / "parts", report=stopped_after(step))
    assert not (tmp_path / "parts").exists()
    left = list((tmp_path / "parts.healing").rglob("*"))
    assert not [file for file in left if file.suffix in (".pt", ".pth", ".bin", ".pkl")]
    assert step < 2 or any(file.name == "optimizer.safetensors" for file in left)
    for name, half in (("checkpoint-8", None), ("checkpoint-9", '{"epoch":')):
        folder = tmp_path / "parts.healing" / "steps" / name  # as a kill while it is written
        folder.mkdir(parents=True)
        if half:
            (folder / "trainer_state.json").write_text(half)
    seen: list[int] = []
    found = healed(stock, asked, tmp_path / "parts", report=lambda done, _: seen.append(done))
    assert seen[0] == step // 2 * 2 + 1
    assert found.curve == whole.curve and len(set(whole.curve.losses)) == 6
    first, second = (load_file(p / "model.safetensors") for p in (whole.folder, found.folder))
    assert all(first[name].equal(second[name]) for name in first)
    assert not (tmp_path / "parts.healing").exists()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimizer.json", lambda content: b'{"groups": 1}'),
        ("optimizer.safetensors", lambda content: content[:-9]),
        ("adapter_model.safetensors", lambda content: b""),
        ("trainer_state.json", lambda content: b"[]"),
    ],
)
def test_a_state_that_is_damaged_is_passed_over_for_the_one_before(
    stock: Path,
    tmp_path: Path,
    whole: Healed,
    stopped: tuple[HealSettings, Path],
    name: str,
    damage: Callable[[bytes], bytes],
) -> None:
    asked, left = stopped
    shutil.copytree(left, tmp_path / "out.healing")
    file = tmp_path / "out.healing" / "steps" / "checkpoint-4" / name
    file.write_bytes(damage(file.read_bytes()))
    seen: list[int] = []
    found = healed(stock, asked, tmp_path / "out", report=lambda done, _: seen.append(done))
    assert seen[0] == 3 and found.curve == whole.curve


def test_another_run_does_not_go_on_with_what_one_left(
    stock: Path, quiz_folder: Path, tmp_path: Path
) -> None:
    asked = settings_for(quiz_folder)
    with pytest.raises(Stop):
        healed(stock, asked, tmp_path / "out", report=stopped_after(3))
    other = changed(asked, learning_rate=2e-2)
    with pytest.raises(OutputError, match="is another healing: its training"):
        healed(stock, other, tmp_path / "out")


@pytest.mark.parametrize("what", ["val", "test", "dtype"])
def test_a_run_does_not_go_on_with_other_questions_or_another_dtype(
    stock: Path, tmp_path: Path, what: str
) -> None:
    quiz = write_quiz(tmp_path / "quiz")
    asked = settings_for(quiz)
    with pytest.raises(Stop):
        healed(stock, asked, tmp_path / "out", report=stopped_after(3))
    dtype = "auto"
    if what == "dtype":
        dtype, said = "bfloat16", r"its dtype was torch\.float32, now it is torch\.bfloat16"
    else:
        file = next((quiz / what).glob("*.csv"))
        first, rest = file.read_text().split("\n", 1)
        letter = {"A": "B"}.get(first[-1], "A")
        file.write_text(f"{first[:-1]}{letter}\n{rest}")
        said = "its rows_hash was" if what == "val" else "its scored_hash was"
    with pytest.raises(OutputError, match=f"is another healing: {said}"):
        healed(stock, asked, tmp_path / "out", load_as=LoadOptions(dtype=dtype))


def test_two_runs_do_not_fill_one_folder(
    stock: Path, stopped: tuple[HealSettings, Path], tmp_path: Path
) -> None:
    asked, left = stopped
    shutil.copytree(left, tmp_path / "out.healing")
    before = sorted((tmp_path / "out.healing").rglob("*"))
    with (
        alone(tmp_path / "out.healing", "healing"),
        pytest.raises(OutputError, match=r"out\.healing: another run is at work there"),
    ):
        healed(stock, asked, tmp_path / "out")
    assert sorted((tmp_path / "out.healing").rglob("*")) == before
    assert healed(stock, asked, tmp_path / "out").curve.steps == 6


# Held-out rows gain until some step, and no more: it ends two looks later.
WILD = {"steps": 12, "check_every": 1, "patience": 2, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def wild(stock: Path, quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Healed:
    out = tmp_path_factory.mktemp("wild") / "out"
    found = healed(stock, settings_for(quiz_folder, Sudden, **WILD), out)
    assert found.curve.best_step == found.curve.steps - 2 < 10
    return found


def steps_seen(stock: Path, asked: HealSettings, out: Path, as_in: Healed) -> list[int]:
    """The steps that a run does anew, until it has what an undisturbed one has."""
    seen: list[int] = []
    found = healed(stock, asked, out, report=lambda done, _: seen.append(done))
    assert found.curve == as_in.curve
    ours, theirs = (load_file(p / "model.safetensors") for p in (out, as_in.folder))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    return seen


def test_a_stop_takes_no_look_off_the_patience(
    stock: Path, quiz_folder: Path, tmp_path: Path, wild: Healed
) -> None:
    asked, last = settings_for(quiz_folder, Sudden, **WILD), wild.curve.steps
    with pytest.raises(Stop):
        healed(stock, asked, tmp_path / "out", report=stopped_after(last))
    assert steps_seen(stock, asked, tmp_path / "out", wild) == [last]


@pytest.mark.parametrize("harm", ["none", "moved", "best"])
def test_a_run_that_was_killed_while_it_wrote_is_written_as_it_was(
    stock: Path,
    quiz_folder: Path,
    tmp_path: Path,
    wild: Healed,
    harm: str,
) -> None:
    asked, out = settings_for(quiz_folder, Sudden, **WILD), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr("expertcut.healing.recovery._write", stopped_after_all)
        healed(stock, asked, out)
    steps = tmp_path / "out.healing" / "steps"
    best, last = wild.curve.best_step, wild.curve.steps
    kept = {path.name for path in steps.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{n}" for n in (best, last)}
    if harm == "moved":
        out = tmp_path / "elsewhere" / "new"
        out.parent.mkdir()
        (tmp_path / "out.healing").rename(out.with_name("new.healing"))
    elif harm == "best":
        (steps / f"checkpoint-{best}" / "adapter_model.safetensors").unlink()
    anew = list(range(1, last + 1)) if harm == "best" else []
    assert steps_seen(stock, asked, out, wild) == anew


def stopped_after_all(*_: object) -> None:
    raise Stop


def test_patience_counts_as_transformers_does() -> None:
    for losses in product([1.0, 2.0, 3.0], repeat=5):
        theirs, state = EarlyStoppingCallback(9), TrainerState()
        for step, loss in enumerate(losses, 1):
            state.log_history.append({"step": step, "eval_loss": loss})
            theirs.check_metric_value(TrainingArguments(greater_is_better=False), state, None, loss)
            state.best_metric = min(loss, *losses[: step - 1], loss)
            assert evaluations_since_best(state) == theirs.early_stopping_patience_counter


def test_states_are_told_by_their_steps_and_by_nothing_else(
    stock: Path, stopped: tuple[HealSettings, Path], tmp_path: Path, whole: Healed
) -> None:
    asked, left = stopped
    steps = shutil.copytree(left, tmp_path / "out.healing") / "steps"
    shutil.copytree(steps / "checkpoint-4", steps / "checkpoint-4-backup")
    later = time.time() + 1e6  # the clock is set back meanwhile
    for path in steps.iterdir():
        os.utime(path, (later, later))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr("expertcut.healing.recovery._write", stopped_after_all)
        healed(stock, asked, tmp_path / "out")
    assert whole.curve.best_step == 2
    kept = {f"checkpoint-{n}" for n in (2, 6, "4-backup")}
    assert {path.name for path in steps.glob("checkpoint-*")} == kept
    assert steps_seen(stock, asked, tmp_path / "out", whole) == []


@pytest.mark.parametrize(
    "broken_at",
    [
        (True, torch.nan, r"step 5: its loss is nan"),
        (True, torch.inf, r"step 5: its loss is inf"),
        (False, torch.inf, r"step 6: the loss of held-out rows is inf"),
    ],
)
def test_a_loss_that_is_no_number_ends_the_run_and_harms_no_state(
    stock: Path,
    stopped: tuple[HealSettings, Path],
    tmp_path: Path,
    whole: Healed,
    broken_at: tuple[bool, float, str],
) -> None:
    asked, left = stopped
    is_training, broken, said = broken_at
    shutil.copytree(left, tmp_path / "out.healing")

    def objective(self: HealTrainer, *given: Any) -> Tensor:
        found = sound(self, *given)
        return found * broken if self.model.training is is_training else found

    sound = HealTrainer._objective
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HealTrainer, "_objective", objective)
        for _ in range(2):  # and it does so again, from the same state
            with pytest.raises(ModelError, match=f"training broke at {said}: nothing is written"):
                healed(stock, asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert steps_seen(stock, asked, tmp_path / "out", whole) == [5, 6]


def test_a_gradient_that_is_no_number_ends_the_run(
    stock: Path, quiz_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def objective(self: HealTrainer, *given: Any) -> Tensor:
        found = sound(self, *given)
        found.register_hook(lambda gradient: gradient * torch.nan) if found.requires_grad else None
        return found

    sound = HealTrainer._objective
    monkeypatch.setattr(HealTrainer, "_objective", objective)
    with pytest.raises(ModelError, match="step 1: the norm of its gradient is nan"):
        healed(stock, settings_for(quiz_folder), tmp_path / "out")


def test_one_process_trains_on_the_device_of_its_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a host of four devices; here is none.
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
    for name, value in (("set_device", None), ("device_count", 4), ("is_bf16_supported", False)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert TrainingArguments(str(tmp_path)).n_gpu == 4
    config = OlmoeConfig(hidden_size=32)
    on_0, on_1 = (
        SimpleNamespace(device=torch.device(name), model=SimpleNamespace(config=config))
        for name in ("cuda:0", "cuda:1")
    )
    settings = settings_for(tmp_path)
    arguments = _arguments(on_0, settings, tmp_path)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, SHORT["batch"])
    assert arguments.parallel_mode == ParallelMode.NOT_PARALLEL
    with pytest.raises(SettingsError, match="--device cuda:1: training would run on cuda:0"):
        _arguments(on_1, settings, tmp_path)
