"""Healing by two processes, as a launcher starts them, is healing by one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.healed_models import Stop, cut, healed, settings_for, stopped_after


def test_the_command_heals_in_a_process_of_its_own(
    checkpoint: Callable[..., Path], quiz_folder: Path, tmp_path: Path
) -> None:
    """With what the command itself imports, and no test before it."""
    folder, out = cut(checkpoint("olmoe"), quiz_folder, tmp_path), tmp_path / "out"
    asked = ["--quiz", quiz_folder, "--shots", 1, "--rank", 2, "--steps", 1, "--batch", 2]
    line = [sys.executable, "-m", "expertcut", "heal", folder, *asked, "--no-verify", "--out", out]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((out / "healing.json").read_text())["losses"]) == 1


@pytest.mark.slow  # profiling under torchrun is always tried
def test_torchrun_trains_one_model_with_the_losses_of_one_process(
    checkpoint: Callable[..., Path], quiz_folder: Path, tmp_path: Path
) -> None:
    folder = cut(checkpoint("olmoe"), quiz_folder, tmp_path)
    alone = healed(folder, settings_for(quiz_folder), tmp_path / "alone")
    asked = settings_for(quiz_folder, teacher_cache=tmp_path / "cache")
    with pytest.raises(Stop):  # both then clear up what is damaged
        healed(folder, asked, tmp_path / "out", report=stopped_after(1))
    for step in range(8, 80):
        damaged = tmp_path / "out.healing" / "steps" / f"checkpoint-{step}"
        damaged.mkdir(parents=True)
        (damaged / "optimizer.json").write_text("{")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    ask = ["expertcut", "heal", folder, "--quiz", quiz_folder, "--shots", 1, "--rank", 2]
    ask += ["--steps", 4, "--batch", 4, "--check-every", 2, "--learning-rate", 1e-2]
    ask += ["--device", "cpu", "--teacher-cache", tmp_path / "cache", "--out", tmp_path / "out"]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [*command, *map(str, ask)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nwritten   ") == 1
    assert done.stderr.count("it is ignored") == 72
    record = json.loads((tmp_path / "out" / "healing.json").read_text())
    assert record["losses"] == pytest.approx(alone.curve.losses, rel=1e-4)
    assert not (tmp_path / "out.healing").exists()
