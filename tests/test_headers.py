"""Headers and indexes of checkpoints: what does not hold together is refused by its name."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from expertcut.errors import ModelError
from expertcut.moe.loading import read_config
from expertcut.moe.stored.headers import read_headers

Checkpoints = Callable[..., Path]
Entry = dict[str, Any]


@pytest.fixture
def olmoe(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A copy that may be damaged, in several files."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("olmoe"))
    model.save_pretrained(tmp_path / "olmoe", max_shard_size="60KB")
    return tmp_path / "olmoe"


def rewritten(file: Path, change: Callable[[Entry], object]) -> None:
    """Changes the header of a file, and not its data."""
    content = file.read_bytes()
    n = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + n :])


def some(header: Entry) -> Entry:
    """The entry whose data comes first."""
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    return next(entry for entry in entries if entry["data_offsets"][0] == 0)


def shifted(header: Entry, by: int) -> None:
    for name, entry in header.items():
        if name != "__metadata__" and entry is not some(header):
            entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


HEADER_FAULTS: dict[str, tuple[Callable[[Entry], object], str]] = {
    "an unknown dtype": (lambda h: some(h).update(dtype="F31"), "unknown dtype F31"),
    "fp8": (lambda h: some(h).update(dtype="F8_E4M3"), r"is quantized \(.* is F8_E4M3\)"),
    "MXFP4": (lambda h: h.update({"a_blocks": h.popitem()[1]}), r"is quantized \(a_blocks"),
    "a wrong shape": (lambda h: some(h)["shape"].append(3), "bytes, its shape needs"),
    "a negative length": (lambda h: some(h).update(shape=[-1]), "no dtype, shape and data_offsets"),
    "a shape of text": (lambda h: some(h).update(shape="12"), "no dtype, shape and data_offsets"),
    "a dtype of numbers": (lambda h: some(h).update(dtype=[1]), "no dtype, shape and data_offsets"),
    "one offset": (lambda h: some(h)["data_offsets"].pop(), "no dtype, shape and data_offsets"),
    "truth for a number": (
        lambda h: some(h).update(data_offsets=[False, True]),
        "no dtype, shape and data_offsets",
    ),
    "no dtype": (lambda h: some(h).pop("dtype"), "no dtype, shape and data_offsets"),
    "a list for an entry": (lambda h: h.update(x=[1]), "x has no dtype, shape and data_offsets"),
    "a gap": (lambda h: shifted(h, 4), "follows a gap"),
    "an overlap": (lambda h: shifted(h, -4), "overlaps the tensor before it"),
    "metadata of numbers": (lambda h: h.update(__metadata__={"a": 1}), "__metadata__ is not text"),
    "a tensor too few": (lambda h: h.popitem(), "its tensors end at byte|follows a gap"),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_a_header_with_a_fault_is_refused_by_its_name(
    checkpoint: Checkpoints, tmp_path: Path, fault: str
) -> None:
    shutil.copytree(checkpoint("olmoe"), tmp_path / "m")
    change, message = HEADER_FAULTS[fault]
    rewritten(tmp_path / "m" / "model.safetensors", lambda header: None)
    read_headers(tmp_path / "m")
    rewritten(tmp_path / "m" / "model.safetensors", change)
    with pytest.raises(ModelError, match=rf"m/model\.safetensors.*({message})") as caught:
        read_headers(tmp_path / "m")
    assert "\n" not in str(caught.value)


FILE_FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda b: b"", "a header of 0 bytes cannot lie in 0 bytes"),
    "half a length": (lambda b: b[:5], "cannot lie in 5 bytes"),
    "half a header": (lambda b: b[:100], "cannot lie in 100 bytes"),
    "half the data": (lambda b: b[:-1], "its tensors end at byte"),
    "too much data": (lambda b: b + b"\0", "its tensors end at byte"),
    "a huge header": (lambda b: b"\xff" * 8 + b[8:], "cannot lie in"),
    "a pointer to Git LFS": (lambda b: b"version https://git-lfs.github.com/spec", "cannot lie in"),
    "no JSON": (lambda b: b[:8] + b"?" + b[9:], "no JSON object"),
    "no text": (lambda b: b[:8] + b"\xff" + b[9:], "no JSON object"),
    "a list": (lambda b: (2).to_bytes(8, "little") + b"[]", "found a list"),
    "no tensors": (lambda b: (2).to_bytes(8, "little") + b"{}", "holds no tensors"),
    "deep nesting": (lambda b: (50000).to_bytes(8, "little") + b"[" * 50000, "no JSON object"),
    "a name twice": (
        lambda b: (15).to_bytes(8, "little") + b'{"a": 1, "a":2}',
        "a stands in it twice",
    ),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_file_that_is_not_whole_is_refused_by_its_name(
    checkpoint: Checkpoints, tmp_path: Path, fault: str
) -> None:
    shutil.copytree(checkpoint("olmoe"), tmp_path / "m")
    change, message = FILE_FAULTS[fault]
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ModelError, match=f"/m.*{message}") as caught:
        read_headers(tmp_path / "m")
    assert "\n" not in str(caught.value)


def lead_out(folder: Path, index: Entry) -> None:
    (folder.parent / "x.safetensors").write_bytes(b"")
    index["weight_map"]["lm_head.weight"] = "../x.safetensors"


def forget(_: Path, index: Entry) -> None:
    counts = Counter(index["weight_map"].values())
    name = next(n for n, file in index["weight_map"].items() if counts[file] > 1)
    del index["weight_map"][name]


def forget_file(folder: Path, index: Entry) -> None:
    first = min(folder.glob("*.safetensors")).name
    index["weight_map"] = {n: file for n, file in index["weight_map"].items() if file != first}


INDEX_FAULTS: dict[str, tuple[Callable[[Path, Entry], object], str]] = {
    "a way out": (lead_out, r"index\.json is damaged: lm_head.weight lies in '\.\./x"),
    "an absolute path": (
        lambda _, i: i["weight_map"].update(a="/etc/x.safetensors"),
        "a lies in '/etc/x.safetensors', must be a .safetensors file here",
    ),
    "a number": (lambda _, i: i["weight_map"].update(a=1), "a lies in 1, must be"),
    "a pickle": (lambda _, i: i["weight_map"].update(a="a.bin"), "a lies in 'a.bin', must be"),
    "no map": (lambda _, i: i.pop("weight_map"), "has no weight_map"),
    "an empty map": (lambda _, i: i["weight_map"].clear(), "has no weight_map"),
    "a missing file": (
        lambda f, _: min(f.glob("*.safetensors")).unlink(),
        r"model-00001.*\.safetensors is missing, but the index names it",
    ),
    "a folder for a file": (
        lambda f, _: (min(f.glob("*.safetensors")).unlink(), (f / "model.safetensors").mkdir()),
        "holds model.safetensors and an index of other files",
    ),
    "a tensor too many": (
        lambda _, i: i["weight_map"].update(a=max(i["weight_map"].values())),
        "lacks a, which the index says it holds",
    ),
    "a tensor too few": (forget, "holds .*, which the index does not say"),
    "a file too few": (forget_file, "model-00001.* is damaged: the index does not name it"),
    "one file and many": (
        lambda f, _: (f / "model.safetensors").touch(),
        "holds model.safetensors and an index of other files",
    ),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_an_index_with_a_fault_is_refused_by_its_name(olmoe: Path, fault: str) -> None:
    change, message = INDEX_FAULTS[fault]
    file = olmoe / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(olmoe, index)
    file.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=f"olmoe.*{message}") as caught:
        read_headers(olmoe)
    assert "\n" not in str(caught.value)


def test_a_folder_without_readable_weights_is_refused(olmoe: Path, tmp_path: Path) -> None:
    file = olmoe / "model.safetensors.index.json"
    file.write_text("{")
    with pytest.raises(ModelError, match=r"index\.json is damaged: it is no JSON object"):
        read_headers(olmoe)
    file.unlink()
    with pytest.raises(ModelError, match=r"olmoe holds neither model\.safetensors nor"):
        read_headers(olmoe)
    (olmoe / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read: Is a directory"):
        read_headers(olmoe)


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
