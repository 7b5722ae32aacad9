"""Streamed export: what is written equals the export through the loaded model, bit by bit."""

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from expertcut.checkpoints import shards
from expertcut.checkpoints.output_dir import atomic_dir
from expertcut.checkpoints.shards import Rewrite, lay_out, total_bytes, write_checkpoint
from expertcut.checkpoints.tensor_names import match_blocks
from expertcut.edits.plan import BlockEdit
from expertcut.errors import ModelError, OutputError
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import MoeModel
from expertcut.models.safetensors_index import StoredTensor, read_stored
from expertcut.models.validate import EXPERT_COUNT_FIELDS
from tests.conftest import FAMILIES, STORAGE_FORMS, open_model
from tests.support.loaded_stock import apply_stock
from tests.support.rewrites import Fitted, stock_rewrite

KEEP = (0, 1, 3, 4, 5, 7)  # three of each of DeepSeek's two groups
ALL = tuple(range(8))
EDITS = {
    "cut": (BlockEdit(keep=KEEP), BlockEdit(keep=(0, 2, 3, 5, 6, 7))),
    "cut, scaled and tilted": (
        BlockEdit(keep=KEEP, scale={3: 0.7, 7: 1.9}, bias={7: 0.6, 0: -1.3}),
        BlockEdit(keep=(0, 2, 3, 5, 6, 7), bias={2: 2.5}),
    ),
    "tilted": (BlockEdit(keep=ALL, bias={5: 1.25, 2: -0.4}), BlockEdit(keep=ALL)),
    "scaled": (BlockEdit(keep=ALL), BlockEdit(keep=ALL, scale={6: 0.3})),
}
ALL_AT_ONCE = "cut, scaled and tilted"
Checkpoints = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=["float32", "bfloat16"])
def stored_as(request: pytest.FixtureRequest, checkpoint: Checkpoints, tmp_path: Path) -> Any:
    """`stored_as(family, shard_size)`: a checkpoint in both dtypes, in one file or in many."""

    def make(family: str, shard_size: str = "5GB") -> Path:
        path, folder = checkpoint(family), tmp_path / "source"
        dtype = getattr(torch, request.param)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        model.save_pretrained(folder, max_shard_size=shard_size)
        for file in path.glob("tokenizer*"):
            shutil.copy(file, folder)
        return folder

    return make


@pytest.fixture
def olmoe(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A copy that may be damaged, in several files."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("olmoe"))
    model.save_pretrained(tmp_path / "olmoe", max_shard_size="60KB")
    return tmp_path / "olmoe"


def weights(folder: Path) -> Tensors:
    """All tensors; each stands in one file."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        assert not set(tensors) & set(found)
        found |= tensors
    return found


def edits_of(moe: MoeModel, kind: str) -> tuple[dict[str, BlockEdit], Fitted]:
    generator = np.random.default_rng(0)
    names = [block.name for block in moe.blocks]
    edits = dict(zip(names, EDITS[kind], strict=True))
    folds = {
        layer: generator.uniform(0.5, 1, len(edit.keep))
        for layer, edit in enumerate(edits.values())
        if kind.startswith("cut")
    }
    chance = torch.Generator().manual_seed(0)
    directions = {layer: torch.randn(32, generator=chance) for layer in range(len(names))}
    return edits, Fitted(folds, directions)


def config_of(source: Path, folder: Path, n_experts: int) -> None:
    config = read_config(source)
    config |= {field: n_experts for field in EXPERT_COUNT_FIELDS if field in config}
    (folder / "config.json").write_text(json.dumps(config))


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# All at once in every family, one by one with and without fused experts.
@pytest.mark.parametrize(
    ("family", "kind"),
    [(f, ALL_AT_ONCE) for f in FAMILIES]
    + [
        pytest.param(f, k, marks=pytest.mark.slow if f not in ("olmoe", "gpt_oss") else ())
        for f in STORAGE_FORMS
        for k in EDITS
        if k != ALL_AT_ONCE
    ],
)
def test_a_streamed_stock_export_equals_the_one_through_the_model_bit_by_bit(
    stored_as: Callable[..., Path], tmp_path: Path, family: str, kind: str
) -> None:
    source = stored_as(family)
    moe = open_model(source, dtype="stored")
    edits, fitted = edits_of(moe, kind)
    stored = read_stored(source)
    write_checkpoint(stored, tmp_path / "out", stock_rewrite(stored.tensors, edits, fitted))
    apply_stock(moe, edits, fitted)
    moe.model.save_pretrained(tmp_path / "wanted")
    assert_same(weights(tmp_path / "out"), wanted := weights(tmp_path / "wanted"))
    before = weights(source)
    assert any(n not in before or not torch.equal(before[n], t) for n, t in wanted.items())
    config_of(source, tmp_path / "out", len(EDITS[kind][0].keep))
    config = AutoConfig.from_pretrained(tmp_path / "out")
    reloaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", config=config, output_loading_info=True
    )
    assert not any(info.values())
    assert_same(reloaded.state_dict(), moe.model.state_dict())


@pytest.mark.parametrize("family", STORAGE_FORMS)
def test_many_files_in_and_out_hold_the_same_tensors_as_one(
    stored_as: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    source = stored_as(family, shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    moe = open_model(source, dtype="stored")
    rewrite = stock_rewrite(read_stored(source).tensors, *edits_of(moe, ALL_AT_ONCE))
    write_checkpoint(read_stored(source), tmp_path / "one", rewrite)
    write_checkpoint(read_stored(source), tmp_path / "many", rewrite, max_shard_bytes=20_000)
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert_same(many, one)
    assert [f.name for f in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in one.values())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    for i, file in enumerate(files, start=1):
        assert file.name == f"model-{i:05}-of-{len(files):05}.safetensors"
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
            assert opened.metadata() == {"format": "pt"}
        assert names == {n for n, f in index["weight_map"].items() if f == file.name}
        assert file.stat().st_size <= 20_000 or len(names) == 1
    assert read_stored(tmp_path / "many").tensors.keys() == one.keys()
    config_of(source, tmp_path / "many", len(KEEP))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "many", output_loading_info=True)
    assert not any(info.values())


def test_what_is_not_touched_keeps_its_bytes_and_its_order(olmoe: Path, tmp_path: Path) -> None:
    write_checkpoint(read_stored(olmoe), tmp_path / "out", Rewrite())
    assert list(read_stored(tmp_path / "out").tensors) == list(read_stored(olmoe).tensors)
    assert_same(weights(tmp_path / "out"), weights(olmoe))
    mask = os.umask(0o022)
    os.umask(mask)
    mode = (tmp_path / "out" / "model.safetensors").stat().st_mode
    assert mode & 0o777 == 0o666 & ~mask


def test_a_header_is_laid_out_as_safetensors_itself_lays_it_out(
    olmoe: Path, tmp_path: Path
) -> None:
    tensors = {
        "b": torch.arange(3, dtype=torch.float32),
        "a": torch.arange(5).to(torch.bfloat16),
        "c": torch.tensor(7),
    }
    (tmp_path / "in").mkdir()
    shutil.copy(olmoe / "config.json", tmp_path / "in")
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"by": "näme"})
    stored = read_stored(tmp_path / "in")
    write_checkpoint(stored, tmp_path / "out", Rewrite(added={"d": torch.ones(2)}))
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    n = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n])
    assert (8 + n) % 64 == 0
    assert header.pop("__metadata__") == {"format": "pt", "by": "näme"}
    assert list(header) == ["c", "b", "d", "a"]  # wide types first: every value is aligned
    assert_same(weights(tmp_path / "out"), tensors | {"d": torch.ones(2)})


def test_removed_experts_are_never_read(
    olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoints
) -> None:
    moves = {name: getattr(shards, name) for name in ("copy_ranges", "read_ranges")}
    for source in (olmoe, checkpoint("gpt_oss")):
        headers = read_stored(source).tensors
        edits, fitted = edits_of(open_model(checkpoint(read_config(source)["model_type"])), "cut")
        rewrite = stock_rewrite(headers, edits, fitted)
        read: dict[str, set[int]] = {tensor.file.name: set() for tensor in headers.values()}
        for name, move in moves.items():
            monkeypatch.setattr(shards, name, recorded(move, read))
        write_checkpoint(read_stored(source), tmp_path / source.name, rewrite)
        blocks, _ = match_blocks(headers, edits)
        unread = 0
        for name, edit in edits.items():
            for stored in gone(blocks[name], headers, edit):
                assert not read[stored.file.name] & set(range(stored.begin, stored.end))
                unread += stored.end - stored.begin
        wanted = sum(stored.end - stored.begin for stored in headers.values())
        assert unread > 0
        assert sum(map(len, read.values())) == wanted - unread


def recorded(move: Callable[..., Any], read: dict[str, set[int]]) -> Callable[..., Any]:
    def wrapper(source: Any, *rest: Any) -> Any:
        for begin, size_bytes in rest[-1]:
            read[Path(source.name).name] |= set(range(begin, begin + size_bytes))
        return move(source, *rest)

    return wrapper


def gone(block: Any, headers: Any, edit: BlockEdit) -> Iterator[StoredTensor]:
    """Where the tensors and rows of removed experts lie."""
    removed = sorted(set(ALL) - set(edit.keep))
    for expert in removed if block.by_expert else []:
        yield from (headers[name] for name in block.by_expert[expert].values())
    for name in block.axes:
        stored = headers[name]
        row_bytes = (stored.end - stored.begin) // len(ALL)
        for begin in (stored.begin + expert * row_bytes for expert in removed):
            yield StoredTensor(stored.file, stored.dtype, (), begin, begin + row_bytes)


def fails_with(number: int, after: int = 0) -> Callable[..., int]:
    """A system call that moves some bytes once and then is not to be had."""
    real, calls = os.copy_file_range, Counter[str]()

    def call(source: int, target: int, count: int, offset_src: int) -> int:
        calls["n"] += 1
        if after and calls["n"] == 1:
            return real(source, target, min(count, after), offset_src=offset_src)
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("has_sendfile", [True, False])
@pytest.mark.parametrize("copy", ["absent", "refused", "breaks off", "moves nothing"])
def test_bytes_arrive_whichever_way_the_system_can_copy(
    olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: str, has_sendfile: bool
) -> None:
    if copy == "absent":
        monkeypatch.delattr(os, "copy_file_range")
    elif copy == "moves nothing":
        monkeypatch.setattr(os, "copy_file_range", lambda *_, **__: 0)
    else:
        after = 100 if copy == "breaks off" else 0
        monkeypatch.setattr(os, "copy_file_range", fails_with(errno.EXDEV, after))
    if not has_sendfile:
        monkeypatch.delattr(os, "sendfile")
    monkeypatch.setattr(shards, "_BUFFER_BYTES", 1000)
    write_checkpoint(read_stored(olmoe), tmp_path / "out", Rewrite())
    assert_same(weights(tmp_path / "out"), weights(olmoe))


def test_a_copy_that_fails_for_good_is_not_tried_another_way(
    olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", fails_with(errno.ENOSPC))
    match = "out cannot be written: No space left on device"
    with pytest.raises(OutputError, match=match), atomic_dir(tmp_path / "out") as folder:
        write_checkpoint(read_stored(olmoe), folder, Rewrite())


def test_too_little_space_is_found_before_the_first_byte(
    olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite = Rewrite(removed={"lm_head.weight"})
    for limit in (10**9, 40_000):
        write_checkpoint(read_stored(olmoe), tmp_path / str(limit), rewrite, limit)
        needed = total_bytes(lay_out(read_stored(olmoe), rewrite, limit))
        assert needed == sum(f.stat().st_size for f in (tmp_path / str(limit)).iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(OutputError, match=f"needs {needed:,} bytes but {needed - 1:,} are free"):
        write_checkpoint(read_stored(olmoe), tmp_path / "a" / "b", rewrite, 40_000)
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    write_checkpoint(read_stored(olmoe), tmp_path / "a" / "b", rewrite, 40_000)


def test_a_source_that_shrinks_while_it_is_read_is_told(olmoe: Path, tmp_path: Path) -> None:
    stored = read_stored(olmoe)
    last = max(olmoe.glob("*.safetensors"))
    os.truncate(last, last.stat().st_size - 1)
    with pytest.raises(ModelError, match="became shorter"):
        write_checkpoint(stored, tmp_path / "out", Rewrite())
