"""What benchmarks rest on: operations are counted right, and scripts run where there is no GPU."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import against_vllm, compression, gpu_full_size, placement, released_sizes
from benchmarks.common import timed
from benchmarks.work import Shape, count

from expertcut.edits import placement as placing
from expertcut.scoring.packing import Encoded

SHAPE = Shape(width=8, inner=4, layers=3, experts=6, top_k=2, words=50)
PROMPTS = ((1, 2, 3, 4), (1, 2, 5), (1, 2, 3, 6, 7, 8))


@pytest.mark.parametrize("keeps_all", [True, False])
def test_operations_are_those_of_each_token_one_by_one(keeps_all: bool) -> None:
    weights = attention = experts = tokens = 0
    n_prefix = 2
    rows = [(place, False) for place in range(n_prefix)]
    for ids in PROMPTS:
        rows += [(place, place == len(ids) - 1) for place in range(n_prefix, len(ids))]
    for place, is_answer in rows:
        tokens += 1
        for layer in range(SHAPE.layers):
            weights += 2 * 4 * 8 * 8
            if layer < SHAPE.layers - 1 or keeps_all or is_answer:
                attention += 4 * 8 * (place + 1)
                experts += 2 * (8 * 6 + 2 * 3 * 8 * 4)
    found = count(SHAPE, Encoded(PROMPTS, ((0, 1),) * 3), keeps_all=keeps_all)
    assert found.tokens == tokens == 2 + 2 + 1 + 4
    assert (found.projections, found.attention, found.experts) == (weights, attention, experts)
    assert found.head == 2 * 3 * 8 * 50
    assert found.total == weights + attention + experts + found.head


def test_a_process_is_timed_and_its_failure_told(tmp_path: Path) -> None:
    code = "import time; x = bytearray(50_000_000); time.sleep(0.4); print('done')"
    took = timed([sys.executable, "-c", code], 1, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "done\n"
    assert took.elapsed_s >= 0.4 and took.peak_mb > 50
    with pytest.raises(RuntimeError, match="went wrong"):
        timed([sys.executable, "-c", "raise ValueError('went wrong')"], 1, tmp_path / "log")


def test_an_engine_that_answers_nan_or_loads_what_it_must_refuse_is_not_passed() -> None:
    reference = {"tokens.0": torch.zeros(3), "last.0": torch.tensor([0.0, -1.0, -2.0])}
    near = {name: tensor + 1e-6 for name, tensor in reference.items()}
    wrong = {**reference, "last.0": torch.tensor([-1.0, 0.0, -2.0])}
    silent = {**reference, "last.0": torch.full((3,), float("nan"))}
    found = {
        name: against_vllm.compared(answers, reference, [0, 1])
        for name, answers in {"near": near, "wrong": wrong, "silent": silent}.items()
    }
    assert found["near"][1] == 0 and found["wrong"] == (1.0, 1)
    judged = against_vllm.judged
    for engine, cut in (("vllm33", "mean"), ("vllm32", "stock"), ("vllm33", "earlier")):
        assert judged(engine, "olmoe", cut, None, found["near"][0]) is True
        for name in ("wrong", "silent"):
            assert judged(engine, "olmoe", cut, None, found[name][0]) is False
        assert judged(engine, "olmoe", cut, "it does not load", None) is False
    assert judged("vllm32", "olmoe", "mean", None, found["near"][0]) is False
    assert judged("vllm32", "olmoe", "mean", "out of memory", None) is False
    assert judged("vllm32", "olmoe", "mean", "no parameter 'mlp.constant_experts'", None) is True


def test_the_script_for_a_gpu_runs_on_a_small_shape(
    real_mmlu: Path, real_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--quiz", real_mmlu, "--tokenizer", real_tokenizer, "--out", tmp_path / "gpu.json"]
    words += ["--device", "cpu", "--layers", "2", "--width", "64", "--limit", "1", "--threads", 1]
    words += ["--subjects", "astronomy,virology", "--batch-tokens", "300"]
    monkeypatch.setattr(sys, "argv", ["gpu_full_size", *map(str, words)])
    gpu_full_size.main()
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert row[0] == 2 and row[1] > 600 and row[2] > 0


@pytest.mark.parametrize("seed", range(4))
def test_the_program_of_exflow_has_the_optimum_of_place_where_loads_are_not_bounded(
    seed: int,
) -> None:
    counts = [np.random.default_rng(seed).integers(0, 50, (6, 6)).astype(float)]
    loads = [counts[0].sum(1), counts[0].sum(0)]
    found = placement.exflow(counts, 6, 2, 60)
    assert found.status == 0
    ours = placing.place(counts, loads, placing.Devices(2), [2.0, 2.0])
    assert -found.fun == pytest.approx(ours.objective)
    device_LE = placement.bisected(counts, 2, 60)
    assert device_LE is not None
    same_EF = device_LE[0][:, None] == device_LE[1]
    assert (counts[0] * same_EF).sum() / counts[0].sum() == pytest.approx(-found.fun)


def test_planted_outliers_change_no_output() -> None:
    rng = torch.Generator().manual_seed(0)
    names = [f"m.experts.{e}.{part}_proj.weight" for e in range(4) for part in ("up", "down")]
    before = {name: torch.randn(64, 64, generator=rng).bfloat16() for name in names}
    after = compression.with_outliers(before, 0)
    changed = [name for name in names if not torch.equal(before[name], after[name])]
    assert len(changed) == 4, "both matrices of half of the experts"
    for down in (name for name in names if "down" in name):
        up = down.replace("down", "up")
        inner_64 = torch.randn(64, generator=rng).double()  # what the gate lets through
        outputs = [
            own[down].double() @ (inner_64 * (own[up].double() @ inner_64))
            for own in (before, after)
        ]
        assert torch.allclose(*outputs, rtol=1e-12)
    assert max(after[name].abs().max() for name in changed if "down" in name) > 32


def test_the_page_says_what_the_command_plans_for_a_released_size(tmp_path: Path) -> None:
    sizes, page = released_sizes.released_sizes(), released_sizes.PAGE.read_text(encoding="utf-8")
    planned = released_sizes.plan(sizes[0], tmp_path)
    assert planned.kept == (48, 32) and planned.allowed == range(8, 65)
    assert planned.cut_bytes[1] < planned.cut_bytes[0] < planned.size_bytes < 14e9
    assert (tmp_path / "model" / "model.safetensors").stat().st_blocks < 1e4  # a hole
    for row in (released_sizes.size_row(planned), released_sizes.way_row(planned)):
        assert f"| {' | '.join(row)} |" in page
    for size in sizes:
        assert f"| [{size.name}]({size.link}) | {size.stored} | " in page
