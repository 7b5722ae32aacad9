"""The memory of healing: the loss by chunks of positions, and the rows in memory at once."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertcut.healing import micro_batch
from expertcut.healing.adapters import adapted
from expertcut.healing.micro_batch import MICRO_BATCH_FILE, MemoryEstimate, _chosen
from expertcut.healing.objectives import (
    LiveTeacher,
    Projection,
    TopLogprobs,
    chunked_loss,
    distillation,
    top_logprobs,
)
from expertcut.healing.recovery import Healed
from expertcut.models import devices
from expertcut.scoring import projection
from tests.conftest import FAMILIES, Commands, open_model
from tests.support.healed_models import (
    SHORT,
    SMALL,
    Stop,
    changed,
    cut,
    healed,
    settings_for,
    stopped_after,
)

Checkpoints = Callable[..., Path]
CPU = torch.device("cpu")
CHUNK = 7  # positions
WIDTH = 32
QUICK = ("olmoe", "granitemoe", "gpt_oss", "phimoe", "jamba")
FULL_MEMORY = torch.OutOfMemoryError("out of memory")


@pytest.fixture(scope="module")
def stock(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return cut(checkpoint("olmoe"), quiz_folder, tmp_path_factory.mktemp("stock"))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(projection._CHUNK_BYTES, "cpu", 4 * 290 * CHUNK)


class Largest(TorchDispatchMode):
    """The most rows of logits that one tensor holds."""

    def __init__(self, n_logits: int) -> None:
        super().__init__()
        self.n_logits, self.n_rows = n_logits, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            shape = tensor.shape if isinstance(tensor, Tensor) else ()
            if shape[-1:] == (self.n_logits,) and shape[-2:-1] != (WIDTH,):  # not the weights
                self.n_rows = max(self.n_rows, tensor.numel() // self.n_logits)
        return found


def capped(moe: Any) -> None:
    """As models that cap their logits behind the projection."""

    class Capped(type(moe.model)):  # type: ignore[misc]
        def forward(self, *given: Any, **named: Any) -> Any:
            found = super().forward(*given, **named)
            found.logits = 3 * torch.tanh(found.logits / 3)
            return found

    moe.model.__class__ = Capped


def apart(moe: Any) -> None:
    """Logits that depend on more than the decoder's output: both halves are not the whole."""

    class Apart(type(moe.model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **named: Any) -> Any:
            found = super().forward(input_ids=input_ids, **named)
            found.logits = found.logits + input_ids.sum()
            return found

    moe.model.__class__ = Apart


def batch_of(n_rows: int = 2, n_tokens: int = 15) -> dict[str, Tensor]:
    ids_BS = torch.randint(2, 280, (n_rows, n_tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}


def check_equal_to_the_models_own_logits(moe: Any, *, is_split: bool = True) -> None:
    """Loss and gradients by chunks are those of the model's logits of all positions."""
    batch = batch_of()
    at_BS = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    at_BS[:, -1] = False
    model = adapted(moe, SMALL)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    torch.manual_seed(0)
    for weight in trained:
        torch.nn.init.normal_(weight, std=0.1)
    model.eval()  # without the noise of some routers
    logits_MV = model(**batch, use_cache=False).logits[at_BS]
    said = top_logprobs(logits_MV.detach().roll(1, dims=0), 20)
    next_M = torch.zeros(len(logits_MV), dtype=torch.long)
    whole = distillation(logits_MV, next_M, said).sum()
    wanted = torch.autograd.grad(whole, trained)

    halves = Projection(moe)
    assert halves.is_split == is_split
    with Largest(moe.model.config.vocab_size) as largest:
        hidden_BSH = halves.hidden(model, batch["input_ids"], batch["attention_mask"])
        loss = chunked_loss(
            halves, model, hidden_BSH[at_BS],
            lambda logits_NV, at: distillation(logits_NV, next_M[at], said[at]).double().sum(),
        )  # fmt: skip
        (loss / 3).backward()
    assert not is_split or 0 < largest.n_rows <= CHUNK
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    for weight, gradient in zip(trained, wanted, strict=True):
        assert gradient.abs().max() > 0
        assert weight.grad is not None
        assert (weight.grad * 3 - gradient).abs().max() < 1e-5 * gradient.abs().max()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", QUICK)
def test_the_loss_by_chunks_is_that_of_the_models_own_logits(
    checkpoint: Checkpoints, family: str
) -> None:
    changes = {"logits_scaling": 8.0} if family == "granitemoe" else {}
    check_equal_to_the_models_own_logits(open_model(checkpoint(family, **changes)))


@pytest.mark.slow
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in QUICK])
def test_so_it_is_in_every_family(checkpoint: Checkpoints, family: str) -> None:
    check_equal_to_the_models_own_logits(open_model(checkpoint(family)))


@pytest.mark.usefixtures("small_chunks")
def test_what_a_model_does_to_its_logits_is_done_to_chunks(checkpoint: Checkpoints) -> None:
    moe = open_model(checkpoint("olmoe"))
    capped(moe)
    assert moe.model(**batch_of()).logits.abs().max() < 3
    check_equal_to_the_models_own_logits(moe)
    moe = open_model(checkpoint("olmoe"))
    apart(moe)
    check_equal_to_the_models_own_logits(moe, is_split=False)


@pytest.mark.usefixtures("small_chunks")
def test_a_teacher_says_the_same_however_it_is_asked(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, batch = LiveTeacher(open_model(checkpoint("olmoe")), 20), batch_of(4)
    batch["attention_mask"][0, 9:] = 0
    at_BS = batch["attention_mask"].bool()
    logits_BSV = live.moe.model(**batch).logits
    wanted = top_logprobs(logits_BSV[at_BS], 20)

    def check(found: TopLogprobs) -> None:
        assert found.ids_MR.equal(wanted.ids_MR)
        assert found.logprob_MR.allclose(wanted.logprob_MR, atol=1e-5)

    with Largest(290) as largest:
        check(live(batch, at_BS))
    assert 0 < largest.n_rows <= CHUNK
    with full_memory_above(1, monkeypatch) as asked:
        check(live(batch, at_BS))
    assert asked == [4, 2, 1, 1, 2, 1, 1]


class full_memory_above:
    """Passes over more rows fail; tells how many rows each pass had."""

    def __init__(self, n_rows: int, patch: pytest.MonkeyPatch) -> None:
        self.n_rows, self.patch = n_rows, patch
        self.asked: list[int] = []

    def __enter__(self) -> list[int]:
        sound = Projection.hidden

        def hidden(halves: Projection, run: Any, input_ids: Tensor, *more: Any) -> Tensor:
            self.asked.append(len(input_ids))
            is_probe = input_ids.shape == (2, 3)
            if len(input_ids) > self.n_rows and not is_probe:
                raise FULL_MEMORY
            return sound(halves, run, input_ids, *more)

        self.patch.setattr(Projection, "hidden", hidden)
        return self.asked

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_bytes(first: Path, second: Path) -> bool:
    ours, theirs = weights(first), weights(second)
    return all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def by_rows(stock: Path, quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Healed:
    asked = settings_for(quiz_folder, micro_batch=1)
    return healed(stock, asked, tmp_path_factory.mktemp("by_rows") / "out")


def test_a_step_without_memory_is_done_again_with_half_the_rows(
    stock: Path,
    quiz_folder: Path,
    tmp_path: Path,
    by_rows: Healed,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = settings_for(quiz_folder, micro_batch=4)
    with full_memory_above(1, monkeypatch), caplog.at_level(logging.WARNING):
        found = healed(stock, asked, tmp_path / "out").curve
    assert found == by_rows.curve and found.micro_batch == 1
    assert same_bytes(tmp_path / "out", by_rows.folder)
    assert [f"repeated with {n}" in caplog.text for n in (2, 1)] == [True, True]


def test_without_memory_for_one_row_it_ends_in_a_line_and_goes_on_later(
    stock: Path, quiz_folder: Path, tmp_path: Path, expertcut: Commands
) -> None:
    words = ("heal", stock, "--quiz", quiz_folder, "--shots", 1, "--rank", 2, "--no-verify")
    words = (*words, "--steps", 2, "--batch", 2, "--objective", "lm", "--out", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch, full_memory_above(0, patch):
        printed = expertcut(*words, status=2)
    line = printed.splitlines()[-1]
    assert "not enough memory to train on one row of" in line and "--gradient-checkpointing" in line
    assert not (tmp_path / "out").exists()
    # What only says how memory is spent is another way to the same result.
    printed = expertcut(*words, "--save-memory", "--micro-batch", 2)
    assert "2 rows a step, 2 at once (--micro-batch-size)" in printed
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.fixture
def free_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    def set_free(n_bytes: float) -> None:
        monkeypatch.setattr(micro_batch, "free_bytes", lambda device: n_bytes)

    yield set_free


def test_a_run_that_goes_on_keeps_the_rows_that_it_began_with(
    stock: Path,
    quiz_folder: Path,
    tmp_path: Path,
    by_rows: Healed,
    free_memory: Callable[[float], None],
) -> None:
    asked = settings_for(quiz_folder)
    free_memory(0)
    with pytest.raises(Stop):
        healed(stock, asked, tmp_path / "out", report=stopped_after(3))
    free_memory(1e12)
    told: list[str] = []
    assert healed(stock, asked, tmp_path / "out", tell=told.append).curve == by_rows.curve
    assert told == ["4 rows a step, 1 at once (as before the interruption)"]
    assert same_bytes(tmp_path / "out", by_rows.folder)


def test_a_run_goes_on_with_other_rows_if_it_must_or_is_told_to_and_says_so(
    stock: Path,
    quiz_folder: Path,
    tmp_path: Path,
    by_rows: Healed,
    free_memory: Callable[[float], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = settings_for(quiz_folder)
    free_memory(1e12)
    with pytest.raises(Stop):
        healed(stock, asked, tmp_path / "out", report=stopped_after(3))
    record = tmp_path / "out.healing" / "steps" / MICRO_BATCH_FILE
    assert record.read_text() == '{"rows":4}\n'
    two = changed(asked, micro_batch=2)
    with pytest.raises(Stop):
        healed(stock, two, tmp_path / "out", report=stopped_after(3))
    assert "2 rows at once, 4 before the interruption" in caplog.text
    free_memory(0)
    found = healed(stock, asked, tmp_path / "out").curve
    assert "1 rows at once, 2 before the interruption" in caplog.text
    assert found.losses == pytest.approx(by_rows.curve.losses, rel=1e-4)
    assert len(set(found.losses)) == SHORT["steps"]


def test_as_many_rows_are_taken_as_fit_into_half_of_the_free_memory(
    free_memory: Callable[[float], None],
) -> None:
    needs = MemoryEstimate(fixed_bytes=10**8, row_bytes=10**8, longest=100)
    for free, recorded, rows in (
        (0, None, 1),
        (5e8, None, 1),
        (6.1e8, None, 2),
        (9e8, None, 2),  # three fit, and do not cut 16
        (1.1e9, None, 4),
        (1e12, None, 4),  # 0.75 GB and no more, however much is free
        (1e12, 16, 16),
        (1.8e9, 16, 16),
        (1.6e9, 16, 4),
        (1e12, 3, 3),
    ):
        free_memory(free)
        assert _chosen(needs, 16, CPU, recorded)[0] == rows
    free_memory(1e12)
    light = replace(needs, row_bytes=1)
    assert [_chosen(replace(light, longest=n), 16, CPU, None)[0] for n in (10, 300, 900, 9000)] == [
        *(16, 8, 4, 1)
    ]
    assert _chosen(None, 16, CPU, None)[0] == 1


def test_a_gpu_has_no_other_limit_than_its_own_free_memory(
    free_memory: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # each with a GPU of its own
    gpu, needs = torch.device("cuda"), MemoryEstimate(10**8, row_bytes=10**9, longest=100)
    for free, rows in ((0, 1), (2.1e9, 1), (4.3e9, 2), (9e9, 4), (32.1e9, 8), (1e12, 16)):
        free_memory(free)
        assert _chosen(needs, 16, gpu, None)[0] == rows
    assert _chosen(replace(needs, longest=2048), 16, gpu, None)[0] == 8


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_ends_at_the_limit_of_a_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    inner, outer = tmp_path / "memory" / "jobs" / "one", tmp_path / "memory" / "jobs"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    lines = "5:memory:/jobs/one\n3:cpuset:/\n"
    if version == 2:
        inner, outer = tmp_path / "jobs" / "one", tmp_path / "jobs"
        names, lines = ("memory.max", "memory.current", "inactive_file"), "0::/jobs/one\n"
    inner.mkdir(parents=True)
    (tmp_path / "own").write_text(lines)
    monkeypatch.setattr(devices, "_CGROUPS", tmp_path)
    monkeypatch.setattr(devices, "_OWN_CGROUPS", tmp_path / "nothing")
    most = devices.free_bytes(CPU)
    monkeypatch.setattr(devices, "_OWN_CGROUPS", tmp_path / "own")
    assert devices.free_bytes(CPU) > 100_000
    for group, limit in ((inner, "max"), (outer, "5000")):
        for name, value in ((names[0], limit), (names[1], "3000")):
            (group / name).write_text(value + "\n")
        (group / "memory.stat").write_text(f"{names[2]} 500\nother 7\n")
    assert devices.free_bytes(CPU) == 5000 - 3000 + 500 < most
