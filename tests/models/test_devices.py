"""Which device a process takes, and models that are larger than one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expertcut.checkpoints.prune_edit import constant_experts
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.errors import ModelError, SettingsError
from expertcut.models.devices import find_device, own_device, runs_on, spread
from expertcut.models.hooks import observe_experts
from expertcut.models.load import LoadOptions, find_source, load
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import load_profile
from expertcut.scoring.router_bias import Tilts, tilted
from tests.support.processes import chunk_bytes

Checkpoints = Callable[..., Path]


@pytest.mark.parametrize(
    ("environment", "n_devices", "device"),
    [
        ({}, 0, "cpu"),
        ({}, 4, "cuda:0"),
        ({"LOCAL_RANK": "3"}, 4, "cuda:3"),
        ({"SLURM_LOCALID": "2"}, 4, "cuda:2"),
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 4, "cuda:1"),
        ({"LOCAL_RANK": "3"}, 1, "cuda:0"),  # the launcher shows each its own
        ({"LOCAL_RANK": "1"}, 0, "cpu"),
    ],
)
def test_each_process_of_a_host_takes_its_own_device(
    environment: dict[str, str], n_devices: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_devices)
    assert own_device("auto") == device
    assert own_device("cpu") == "cpu"
    assert own_device("cuda:5") == "cuda:5"  # said outright
    if n_devices:
        assert own_device("cuda") == device


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        ({"device_map": "auto", "device": "cpu"}, {}, "leave out --device cpu"),
        ({"device_map": "auto", "max_memory": "20GiB"}, {}, "must be like 0=20GiB,cpu=60GiB"),
        ({"device_map": "auto", "max_memory": "gpu=1"}, {}, "must be like 0=20GiB,cpu=60GiB"),
        ({"max_memory": "cpu=1GiB"}, {}, "add --device-map"),
        ({"offload": Path("x")}, {}, "add --device-map"),
        ({"device_map": "auto"}, {"LOCAL_WORLD_SIZE": "2"}, "one process a host"),
    ],
)
def test_ways_to_spread_that_do_not_go_together_are_refused(
    options: dict[str, Any],
    environment: dict[str, str],
    words: str,
    checkpoint: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=words):
        load(find_source(str(checkpoint("olmoe"))), LoadOptions(**options))


def test_a_device_that_holds_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match="--device meta holds no weights"):
        find_device("meta")


def test_limits_are_those_of_accelerate() -> None:
    found = spread("auto", "auto", "0=20GiB, cpu=1000", Path("rest"))
    assert found == {
        "device_map": "auto",
        "max_memory": {0: "20GiB", "cpu": 1000},
        "offload_folder": "rest",
    }
    assert spread("cuda:1", None, None, None) == {}


def test_what_fits_in_no_memory_asks_for_a_folder(checkpoint: Checkpoints) -> None:
    options = LoadOptions(device_map="auto", max_memory="cpu=1000")
    with pytest.raises(ModelError, match="name a folder for the rest with --offload"):
        load(find_source(str(checkpoint("olmoe"))), options)


@pytest.fixture(scope="module")
def quiz(quiz_folder: Path) -> Quiz:
    return load_quiz(Selection(str(quiz_folder), shots=1, limit=4))


def profiled(path: Path, quiz: Quiz, out: Path, options: LoadOptions) -> Measurement:
    torch.set_num_threads(1)
    moe = load(find_source(str(path)), options)
    measurement = Measurement(moe, quiz, 4, MeasureOptions(threads=1))
    list(measurement.run(out))
    return measurement


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "jamba"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_weights_that_wait_on_disk_give_the_bytes_of_a_model_in_memory(
    family: str, share: float, checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path
) -> None:
    path = checkpoint(family)
    whole = profiled(path, quiz, tmp_path / "whole", LoadOptions())
    n_bytes = sum(p.numel() * p.element_size() for p in whole.moe.model.parameters())
    options = LoadOptions(
        device_map="auto",
        max_memory=f"cpu={int(share * n_bytes)}",
        offload=tmp_path / "offload",
    )
    waiting = profiled(path, quiz, tmp_path / "waiting", options)
    on_disk = [p for p in waiting.moe.model.parameters() if p.device.type == "meta"]
    assert on_disk
    assert (len(on_disk) < len(list(waiting.moe.model.parameters()))) == (share > 0)
    assert waiting.moe.device == torch.device("cpu")
    assert chunk_bytes(tmp_path / "waiting") == chunk_bytes(tmp_path / "whole")
    assert load_profile(tmp_path / "waiting").info == load_profile(tmp_path / "whole").info


def test_watching_and_tilting_fetch_weights_once_and_leave_no_trace(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    path = checkpoint("olmoe")
    options = LoadOptions(device_map="auto", max_memory="cpu=1", offload=tmp_path / "offload")
    moe, whole = load(find_source(str(path)), options), load(find_source(str(path)), LoadOptions())
    ids = torch.arange(40)[None]
    plain, expected = moe.model(ids).logits, whole.model(ids).logits
    assert torch.equal(plain, expected)
    block = moe.blocks[0]
    assert runs_on(block.experts) == torch.device("cpu")
    fetched = []
    hook: Any = block.experts._hf_hook
    fetch = hook.pre_forward
    hook.pre_forward = lambda *args, **more: fetched.append(1) or fetch(*args, **more)
    calls: list[int] = []
    with observe_experts(moe.blocks, lambda call: calls.append(call.layer)):
        assert torch.equal(moe.model(ids).logits, expected)
    assert calls.count(0) > 4
    assert len(fetched) == 1  # not once an expert
    bias_E = torch.zeros(block.n_experts)
    bias_E[3] = 5.0
    logits = []
    for its in (moe, whole):
        with tilted(its.blocks, Tilts({0: bias_E})):
            logits.append(its.model(ids).logits)
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], plain)
    assert torch.equal(moe.model(ids).logits, plain)


def test_experts_made_constant_are_so_where_weights_wait_on_disk(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    path, ids = checkpoint("olmoe"), torch.arange(40)[None]
    options = LoadOptions(device_map="auto", max_memory="cpu=1", offload=tmp_path / "offload")
    logits = []
    for moe in (load(find_source(str(path)), options), load(find_source(str(path)), LoadOptions())):
        constants = {block.name: {0: torch.ones(32), 3: torch.zeros(32)} for block in moe.blocks}
        with constant_experts(moe.blocks, constants):
            logits.append(moe.model(ids).logits)
    assert torch.equal(*logits)
    assert not torch.allclose(logits[1], moe.model(ids).logits)
