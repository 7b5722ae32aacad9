"""Headers of checkpoints that may be read, and those that only running may read.

What does not hold together is refused by its name: tests/hostile/cases has the faults.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from expertcut.errors import ModelError
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import find_source
from expertcut.models.safetensors_index import read_even_quantized, read_headers
from tests.hostile.edits import header

Checkpoints = Callable[..., Path]
FILE = "model.safetensors"
NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def olmoe(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A copy that may be damaged, in several files."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("olmoe"))
    model.save_pretrained(tmp_path / "olmoe", max_shard_size="60KB")
    return tmp_path / "olmoe"


@pytest.fixture
def single(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A copy that may be damaged, in one file."""
    return Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "single"))


def test_weights_of_another_series_beside_the_indexed_ones_do_not_matter(olmoe: Path) -> None:
    before = read_headers(olmoe)
    (olmoe / "consolidated.safetensors").write_bytes(b"")
    assert read_headers(olmoe) == before


@pytest.mark.parametrize("place", ["top", "text_config"])
def test_quantized_weights_are_refused_by_their_method(olmoe: Path, place: str) -> None:
    config = read_config(olmoe)
    said = {"quantization_config": {"quant_method": "mxfp4"}}
    (olmoe / "config.json").write_text(
        json.dumps(config | (said if place == "top" else {"text_config": said}))
    )
    with pytest.raises(ModelError, match=r"olmoe is quantized \(mxfp4\)"):
        read_headers(olmoe)


def as_fp8(content: dict[str, Any]) -> None:
    content[NAME].update(dtype="F8_E4M3", shape=[128, 32])


def as_fp4(content: dict[str, Any]) -> None:
    content[NAME].update(dtype="F4", shape=[256, 32])


def as_mxfp4(content: dict[str, Any]) -> None:
    content["experts_blocks"] = content.pop(NAME)


@pytest.mark.parametrize("change", [as_fp8, as_fp4, as_mxfp4])
def test_quantized_tensors_may_be_run_and_not_cut(
    single: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    header(change)(single)
    assert len(read_even_quantized(single).tensors) == len(read_even_quantized(single).tensors)
    with pytest.raises(ModelError, match=rf"single/{FILE} is quantized \(.* is F"):
        read_headers(single)


def test_files_of_the_hubs_cache_are_links_and_are_read(single: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--me--olmoe"
    (repository / "blobs").mkdir(parents=True)
    (snapshot := repository / "snapshots" / "abc").mkdir(parents=True)
    for file in single.iterdir():
        shutil.copy(file, repository / "blobs" / f"sha-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha-of-{file.name}")
    assert find_source(str(snapshot)).fingerprint == find_source(str(single)).fingerprint
    (snapshot / "LICENSE").symlink_to("../../../../single/config.json")
    with pytest.raises(ModelError, match=r"abc/LICENSE is a link that leads outside"):
        find_source(str(snapshot))


def test_a_blobs_folder_that_is_a_link_opens_no_way_out(single: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--me--olmoe"
    (repository / "snapshots").mkdir(parents=True)
    snapshot = single.rename(repository / "snapshots" / "abc")
    (repository / "blobs").symlink_to("/etc")
    (snapshot / "notes.txt").symlink_to("../../blobs/hostname")
    with pytest.raises(ModelError, match=r"notes\.txt is a link that leads outside"):
        find_source(str(snapshot))


def test_links_within_a_checkpoint_and_a_link_to_the_whole_of_it_are_followed(
    single: Path, tmp_path: Path
) -> None:
    before = find_source(str(single)).fingerprint
    (single / "stored").mkdir()
    (single / FILE).rename(single / "stored" / "x")
    (single / FILE).symlink_to("stored/x")
    (tmp_path / "link").symlink_to(single)
    assert find_source(str(single)).fingerprint == before
    assert find_source(str(tmp_path / "link")).fingerprint == before
