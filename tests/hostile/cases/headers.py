"""Headers of safetensors files that do not hold together."""

from pathlib import Path
from typing import Any

from tests.hostile.case import Corpus
from tests.hostile.edits import (
    Q_PROJ,
    WEIGHTS,
    Change,
    audit,
    cut_to,
    entry,
    evaluate,
    header,
    in_cut,
    in_model,
    merge,
    prune,
    publish,
    raw_header,
    reweight,
    run,
)

CASES = Corpus("header")
FILE = r"olmoe/model\.safetensors"


def prefix(size: int) -> Change:
    """The file says that its header has so many bytes."""

    def edit(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(size.to_bytes(8, "little") + content[8:])

    return edit


def file_of(content: bytes, size_bytes: int) -> Change:
    """A file that begins so; the rest are zeros that take no room on disk."""

    def edit(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(content)
        cut_to(size_bytes)(folder)

    return edit


def moved(by: int, after: int = 0) -> Change:
    """Every tensor behind so many bytes says that it lies elsewhere."""

    def edit(content: dict[str, Any]) -> None:
        for name, found in content.items():
            if name != "__metadata__" and found["data_offsets"][0] > after:
                found["data_offsets"] = [offset + by for offset in found["data_offsets"]]

    return header(edit)


def offsets(change: Any) -> Change:
    return header(lambda h: h[Q_PROJ].update(data_offsets=change(*h[Q_PROJ]["data_offsets"])))


def swapped(content: dict[str, Any]) -> None:
    """Two tensors claim the same bytes."""
    content[Q_PROJ]["data_offsets"] = content[Q_PROJ.replace("q_proj", "o_proj")]["data_offsets"]


def twice() -> str:
    return '{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "a": {}}'


def twice_at_the_end() -> str:
    """A hundred thousand names, of which the last stands there already."""
    names = [*map(str, range(100_000)), "99999"]
    return "{" + ",".join(f'"{name}":1' for name in names) + "}"


ENTRY = '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": '
HEADERS: dict[str, tuple[Change, str]] = {
    "a file of no bytes": (cut_to(0), "cannot lie in 0 bytes"),
    "half of its own length": (cut_to(5), "cannot lie in 5 bytes"),
    "a length of zero": (prefix(0), "no JSON object"),
    "cut within the header": (cut_to(100), "cannot lie in 100 bytes"),
    "cut within the data": (cut_to(100_000), "its tensors end at byte"),
    "one byte short": (lambda f: cut_to((f / WEIGHTS).stat().st_size - 1)(f), "tensors end at"),
    "one byte more": (lambda f: cut_to((f / WEIGHTS).stat().st_size + 1)(f), "tensors end at"),
    "a length of 2^63": (prefix(2**63), "cannot lie in"),
    "a length of 2^64 - 1": (prefix(2**64 - 1), "cannot lie in"),
    "a length that ends within the header": (prefix(50), "no JSON object"),
    "a length that reaches into the data": (prefix(100_000), "no JSON object"),
    "100 MB of header in a sparse file": (
        file_of((10**8).to_bytes(8, "little"), 10**8 + 8),
        "100,000,000 bytes is more than any",
    ),
    "24 MB of empty lists": (
        raw_header('{"a":[' + "[]," * 8_000_000 + "[]]}"),
        "more lists and objects",
    ),
    "a pointer to Git LFS": (
        file_of(b"version https://git-lfs.github.com/spec/v1\n", 130),
        "cannot lie in",
    ),
    "a page of a proxy": (file_of(b"<!DOCTYPE html><title>403</title>", 5000), "cannot lie in"),
    "a zip file": (file_of(b"PK\x03\x04", 200_000), "cannot lie in 200000 bytes"),
    "no JSON": (raw_header("{" * 20), "no JSON object"),
    "no UTF-8": (raw_header(b'{"\xff": 1}'), "no JSON object .*utf-8"),
    "UTF-16": (raw_header('{"a": 1}'.encode("utf-16")), "no JSON object"),
    "a BOM": (raw_header(b"\xef\xbb\xbf{}"), "no JSON object"),
    "a list": (raw_header("[]"), "found a list"),
    "a text": (raw_header('"weights"'), "found a str"),
    "no tensors": (raw_header("{}"), "tensors end at|holds no tensors"),
    "metadata alone": (raw_header('{"__metadata__": {"format": "pt"}}'), "tensors end at"),
    "10,000 levels of lists": (raw_header(ENTRY + "[" * 10_000), "no JSON object"),
    "a million levels of objects": (raw_header('{"a":' * 1_000_000), "no JSON object"),
    "a name twice": (raw_header(twice()), "'a' stands twice"),
    "a name twice behind 100,000 others": (raw_header(twice_at_the_end()), "99999' stands twice"),
    "a number of 5,000 digits": (raw_header(ENTRY + "9" * 5000 + "}}"), "no JSON object"),
    "metadata of numbers": (header(lambda h: h.update(__metadata__={"a": 1})), "is not text"),
    "metadata of lists": (header(lambda h: h.update(__metadata__=["pt"])), "is not text"),
    "metadata that is null": (header(lambda h: h.update(__metadata__=None)), "is not text"),
    "an entry that is a list": (header(lambda h: h.update(x=[1])), "x has no dtype, shape and"),
    "an entry without a dtype": (header(lambda h: h[Q_PROJ].pop("dtype")), "has no dtype, shape"),
    "an entry without offsets": (header(lambda h: h[Q_PROJ].pop("data_offsets")), "has no dtype"),
    "an unknown dtype": (entry(Q_PROJ, dtype="F31"), "the unknown dtype F31"),
    "a dtype of 1 MB": (entry(Q_PROJ, dtype="F" * 10**6), "the unknown dtype FFFF"),
    "a dtype that is a list": (entry(Q_PROJ, dtype=["F32"]), "has no dtype, shape"),
    "a dtype half as wide": (entry(Q_PROJ, dtype="F16"), "4096 bytes, its shape needs 2048"),
    "a shape twice as long": (entry(Q_PROJ, shape=[64, 32]), "4096 bytes, its shape needs 8192"),
    "a negative length": (entry(Q_PROJ, shape=[-32, -32]), "has no dtype, shape"),
    "a length of a text": (entry(Q_PROJ, shape=["32", 32]), "has no dtype, shape"),
    "a length of a float": (entry(Q_PROJ, shape=[32.0, 32]), "has no dtype, shape"),
    "a length of 2^80": (entry(Q_PROJ, shape=[2**80]), "more than 64 bits"),
    "lengths whose product passes 2^64": (entry(Q_PROJ, shape=[2**40, 2**40]), "its shape needs"),
    "a million axes": (entry(Q_PROJ, shape=[2**62] * 10**6), "has no dtype, shape"),
    "negative offsets": (offsets(lambda a, b: [a - b, 0]), "has no dtype, shape"),
    "reversed offsets": (offsets(lambda a, b: [b, a]), "has -4096 bytes, its shape needs 4096"),
    "offsets beyond the end": (offsets(lambda a, b: [a + 10**12, b + 10**12]), "gap"),
    "offsets that are not whole": (offsets(lambda a, b: [a + 0.5, b + 0.5]), "has no dtype"),
    "truth for offsets": (offsets(lambda a, b: [False, True]), "has no dtype, shape"),
    "one offset": (offsets(lambda a, b: [a]), "has no dtype, shape"),
    "a hole": (moved(4), "follows a gap"),
    "an overlap of four bytes": (moved(-4, after=40_000), "overlaps the tensor before it"),
    "two tensors in one place": (header(swapped), "overlaps|follows a gap"),
    "a tensor too few": (header(lambda h: h.pop(Q_PROJ)), "follows a gap|end at byte"),
}
for fault, (change, says) in HEADERS.items():
    CASES.add(fault, in_model(change), FILE, says)

LONG = "w" * 1_000_000
CASES.add(
    "a name of a million letters",
    in_model(header(lambda h: h.update({LONG: h.pop(Q_PROJ) | {"dtype": "X"}}))),
    FILE,
    "wwww.*…",
)
CASES.add(
    "a name that would clear the terminal",
    in_model(header(lambda h: h.update({"\x1b[2J\u202e": h.pop(Q_PROJ) | {"dtype": "X"}}))),
    FILE,
    "unknown dtype X",
)
for command in (evaluate, prune, reweight, merge, audit):
    CASES.add(
        f"an overlap, met by {command.__name__}",
        in_model(moved(-4, after=40_000), command),
        FILE,
        "overlaps the tensor before it",
    )
CASES.add(
    "an overlap, met by run",
    in_model(moved(-4, after=40_000), run),
    FILE,
    "profile: .*overlaps the tensor before it",
    keeps="out",
)
CASES.add(
    "an overlap in what is published",
    in_cut(moved(-4, after=10_000), publish),
    r"cut/model\.safetensors",
    "overlaps the tensor before it",
)
CASES.add(
    "fp8 weights, which no export can cut",
    in_cut(entry(Q_PROJ, dtype="F8_E4M3", shape=[128, 32]), publish),
    r"cut/model\.safetensors is quantized",
    "F8_E4M3",
)
