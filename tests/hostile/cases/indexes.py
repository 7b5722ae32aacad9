"""Indexes that lie about which tensor lies in which file."""

from collections import Counter
from typing import Any

from tests.hostile.case import Corpus
from tests.hostile.edits import (
    INDEX,
    Q_PROJ,
    Change,
    in_shards,
    json_of,
    text_of,
    weight_map,
)

CASES = Corpus("index")
HERE = r"sharded/model\.safetensors\.index\.json"


def lies_in(file: object) -> Change:
    return weight_map(lambda found: found.update({Q_PROJ: file}))


def forget_one(found: dict[str, Any]) -> None:
    counts = Counter(found.values())
    del found[next(name for name, file in found.items() if counts[file] > 1)]


def forget_a_file(found: dict[str, Any]) -> None:
    first = min(found.values())
    for name in [name for name, file in found.items() if file == first]:
        del found[name]


def swap(found: dict[str, Any]) -> None:
    one, other = found["lm_head.weight"], found["model.norm.weight"]
    found.update({"lm_head.weight": other, "model.norm.weight": one})


INDEXES: dict[str, tuple[Change, str]] = {
    "../ to a model beside it": (lies_in("../olmoe/model.safetensors"), "lies in '../olmoe"),
    "an absolute path": (lies_in("/etc/x.safetensors"), "lies in '/etc/x.safetensors', must be"),
    "./ before the name": (lies_in("./model-00001-of-00006.safetensors"), "must be a .safetensors"),
    "a folder within": (lies_in("more/x.safetensors"), "must be a .safetensors file here"),
    "a path of Windows": (lies_in(r"..\olmoe\model.safetensors"), "must be a .safetensors"),
    "a drive of Windows": (lies_in("C:x.safetensors"), "must be a .safetensors file here"),
    "a NUL byte": (lies_in("x\0.safetensors"), "must be a .safetensors file here"),
    "a URL": (lies_in("https://example.org/x.safetensors"), "must be a .safetensors file here"),
    "a pickle": (lies_in("pytorch_model.bin"), "lies in 'pytorch_model.bin', must be"),
    "a number": (lies_in(1), "lies in 1, must be"),
    "a list": (lies_in(["model-00001-of-00006.safetensors"]), "must be a .safetensors file here"),
    "null": (lies_in(None), "lies in None, must be"),
    "a name of 5,000 letters": (lies_in("a" * 5000 + ".safetensors"), "lies in .aaaa.*…"),
    "a file that is not there": (lies_in("gone.safetensors"), "gone.safetensors is missing"),
    "metadata that is null": (
        json_of(INDEX, lambda i: i.update(metadata=None)),
        """its metadata is null, must be an object.*: write "metadata": {} there""",
    ),
    "metadata that is a list": (
        json_of(INDEX, lambda i: i.update(metadata=["x"])),
        "its metadata is .*, must be an object",
    ),
    "metadata that is text": (
        json_of(INDEX, lambda i: i.update(metadata="pt")),
        'its metadata is "pt", must be an object',
    ),
    "no metadata": (json_of(INDEX, lambda i: i.pop("metadata")), "has no metadata, without which"),
    "no weight_map": (json_of(INDEX, lambda i: i.pop("weight_map")), "has no weight_map"),
    "an empty weight_map": (weight_map(lambda found: found.clear()), "has no weight_map"),
    "a weight_map that is a list": (
        json_of(INDEX, lambda i: i.update(weight_map=[1])),
        "has no weight_map",
    ),
    "no JSON": (text_of(INDEX, "{"), "no JSON object"),
    "no text": (text_of(INDEX, b"\xff\xfe"), "no JSON object"),
    "a list alone": (text_of(INDEX, "[]"), "found a list"),
    "nothing": (text_of(INDEX, ""), "no JSON object"),
    "10,000 levels": (text_of(INDEX, '{"weight_map":' + "[" * 10_000), "no JSON object"),
    "a tensor named twice": (
        text_of(INDEX, '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        "'a' stands twice",
    ),
}
for fault, (change, says) in INDEXES.items():
    CASES.add(fault, in_shards(change), "sharded/", says)

CASES.add(
    "../ to a model beside it, met by eval",
    in_shards(
        lies_in("../olmoe/model.safetensors"),
        lambda world: ["eval", world.sharded, *world.asked, "--out", "new.json"],
    ),
    HERE,
    r"'\.\./olmoe/model\.safetensors'",
)
