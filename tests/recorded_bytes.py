"""Recorded files as they are compared: which bytes do not count and why, and where two differ."""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import PurePosixPath
from typing import Any

_CONTEXT = 60  # characters shown around a difference
Find = Callable[[str], bytes | None]


@dataclass(frozen=True)
class Rule:
    """Bytes that do not count in files of such a name: what is put in their place, and why.

    Rules `of_flags` apply only where files are compared without what names a flag.
    """

    files: str
    pattern: bytes
    replacement: bytes | Callable[[re.Match[bytes]], bytes]
    reason: str
    of_flags: bool = False


def _sorted(match: re.Match[bytes]) -> bytes:
    """A list of JSON in the order of its values, on one line."""
    return match[1] + json.dumps(sorted(json.loads(match[2]))).encode()


_NUMBER = rb"-?[0-9][0-9.e+-]*"
_DATE = rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\+00:00| UTC)"
RULES = (
    Rule(
        "run.json",
        rb'"(started|finished|elapsed_s|questions_per_s)": ' + _NUMBER,
        rb'"\1": "<time>"',
        "when a profile was made and how long that took",
    ),
    Rule(
        "run.json",
        rb'"(host|python|expertcut)": "[^"]*"',
        rb'"\1": "<machine>"',
        "where and by which version a profile was made",
    ),
    Rule("run.json", rb'"cpu_count": \d+', rb'"cpu_count": "<machine>"', "where it was made"),
    Rule(
        "manifest.json",
        rb'"(elapsed_s|mtime_ns|ctime_ns)": ' + _NUMBER,
        rb'"\1": "<time>"',
        "how long a stage took, and when its files were written",
    ),
    Rule("manifest.json", rb'"finished": "[^"]*"', rb'"finished": "<time>"', "when a stage ended"),
    Rule(
        "manifest.json",
        rb'"expertcut": "[^"]*"',
        rb'"expertcut": "<version>"',
        "a new version is no other outcome; those of other packages must be equal",
    ),
    Rule(
        "manifest.json",
        rb'("(?:report|publish [^"]+)": \{(?:(?!"output").)*"output": )"[0-9a-f]{64}"',
        rb'\1"<of a page with times>"',
        "a hash over pages, which say when stages ended; each page is compared itself",
    ),
    Rule(
        "manifest.json",
        rb'"stage report": "[0-9a-f]{64}"',
        rb'"stage report": "<of a page with times>"',
        "the same hash, where a later stage reads the page",
    ),
    Rule(
        "lm_eval*.json",
        rb'"date": ' + _NUMBER,
        rb'"date": "<time>"',
        "when the answers were scored",
    ),
    Rule(
        "adapter_config.json",
        rb'("target_(?:modules|parameters)": )(\[[^\]]*\])',
        _sorted,
        "peft has a set there, and writes it in another order in each process",
    ),
    Rule(
        "manifest.json",
        rb'"(output|stage [^"]+)": "[0-9a-f]{64}"',
        rb'"\1": "<of files>"',
        "a hash over plan.json, which names flags; each file is compared itself",
        of_flags=True,
    ),
    Rule("*.html", rb"expertcut \d+\.\d+[\w.+]*", rb"expertcut <version>", "by which version"),
    Rule("*.html", _DATE + rb"(, [0-9,.]+ s\b)?", b"<time>", "when, and how long a stage took"),
    Rule(
        "*.html",
        rb"<dt>(took|version of \w+)</dt><dd>[^<]*</dd>",
        rb"<dt>\1</dt><dd>from run.json</dd>",
        "what run.json says of times and versions",
    ),
    # Not the variables of a style sheet.
    Rule(
        "*",
        rb"(?<![\w(-])--[a-z][a-z-]*\b(?!-|: #)",
        b"--<flag>",
        "flags get other names",
        of_flags=True,
    ),
)
# A manifest's notes on one file, as JSON with an indent has them.
_STAMP = re.compile(
    rb'"([^"\n]+)": \{\s*"size": (\d+),\s*"mtime_ns": \d+,\s*"ctime_ns": \d+,\s*'
    rb'"sha256": "([0-9a-f]{64})"\s*\}'
)


def comparable(path: str, content: bytes, find: Find, *, has_flags: bool = True) -> bytes:
    """A file's bytes without those that do not count; without `has_flags` also those of flags.

    `find` gives the bytes of a file that a manifest names.
    """
    name = PurePosixPath(path).name
    if not _is_text(content):
        return content
    if name == "manifest.json":
        content = _without_right_stamps(path, content, find)
    for rule in RULES:
        if fnmatch(name, rule.files) and not (rule.of_flags and has_flags):
            content = re.sub(rule.pattern, rule.replacement, content, flags=re.DOTALL)
    return content


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def _without_right_stamps(path: str, content: bytes, find: Find) -> bytes:
    """Files hold times and flags, so their hashes differ where they do not: each must be right."""

    def right(match: re.Match[bytes]) -> bytes:
        name, size, sha256 = match[1].decode(), int(match[2]), match[3].decode()
        run = PurePosixPath(path).parent
        for place in (run / name, run.parent / name):  # made by the run; read by it
            held = find(str(place))
            if held is not None and (len(held), _sha256(held)) == (size, sha256):
                return b'"%s": "<the stamp of that file>"' % match[1]
        return match[0]

    return _STAMP.sub(right, content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def first_difference(path: str, old: bytes, new: bytes) -> str:
    """Where two contents of one file differ, in words: a key, a tensor, a column or a line."""
    named = _NAMED.get(PurePosixPath(path).suffix, lambda old, new: None)
    try:
        where = named(old, new)
    except (ValueError, KeyError, TypeError, OSError) as error:
        where = f"cannot be read ({type(error).__name__})"
    return where or _line(old, new)


def _json(old: bytes, new: bytes) -> str | None:
    return next(_values("", json.loads(old), json.loads(new)), None)


def _values(key: str, old: Any, new: Any) -> Iterator[str]:
    """Keys whose values differ, in order."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            inner = f"{key}.{name}".lstrip(".")
            if name in old and name in new:
                yield from _values(inner, old[name], new[name])
            else:
                yield f"{inner}: {'gone' if name in old else 'new'}"
        if list(old) != list(new):
            yield f"{key or 'the keys'}: in another order"
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _values(f"{key}[{i}]", before, after)
    elif old != new or type(old) is not type(new):
        yield f"{key}: {_short(old)}, now {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 2 * _CONTEXT else f"{text[: 2 * _CONTEXT]}…"


def _safetensors(old: bytes, new: bytes) -> str | None:
    (before, old_data), (after, new_data) = _tensors(old), _tensors(new)
    # A chunk's metadata carries a checksum of all arrays, so it says least.
    for name in sorted({*before, *after} - {"__metadata__"}):
        if name not in before or name not in after:
            return f"{name}: {'gone' if name in before else 'new'}"
        form = [{k: its[name][k] for k in ("dtype", "shape")} for its in (before, after)]
        if form[0] != form[1]:
            return f"{name}: {_short(form[0])}, now {_short(form[1])}"
        (start, end), (new_start, new_end) = (its[name]["data_offsets"] for its in (before, after))
        if old_data[start:end] != new_data[new_start:new_end]:
            return f"{name}: other values"
    found = next(_values("", before.get("__metadata__"), after.get("__metadata__")), None)
    return f"__metadata__{'.' if found[0] != ':' else ''}{found}" if found else None


def _tensors(content: bytes) -> tuple[Mapping[str, Any], bytes]:
    """A file's header, and the bytes behind it."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def _parquet(old: bytes, new: bytes) -> str | None:
    from pyarrow import parquet

    before, after = (parquet.read_table(io.BytesIO(its)) for its in (old, new))
    if before.schema != after.schema:
        return f"columns {before.column_names}, now {after.column_names}, or their types"
    for name in before.column_names:
        pairs = zip_longest(before[name].to_pylist(), after[name].to_pylist())
        for row, (left, right) in enumerate(pairs):
            if left != right:
                return f"{name}, row {row}: {left!r}, now {right!r}"
    return None


_NAMED: dict[str, Callable[[bytes, bytes], str | None]] = {
    ".json": _json,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
}


def _line(old: bytes, new: bytes) -> str:
    """The first line that differs in a text, the first byte in anything else."""
    if not (_is_text(old) and _is_text(new)):
        pairs = enumerate(zip_longest(old, new))
        return f"byte {next((i for i, (a, b) in pairs if a != b), len(old)):,}"
    lines = [its.decode("utf-8").split("\n") for its in (old, new)]
    for number, (before, after) in enumerate(zip_longest(*lines), start=1):
        if before is None or after is None:
            return f"line {number}: {'gone' if after is None else 'new'}"
        if before != after:
            start = next((i for i, (a, b) in enumerate(zip_longest(before, after)) if a != b), 0)
            part = slice(max(0, start - _CONTEXT // 2), start + _CONTEXT)
            return f"line {number}: {_short(before[part])}, now {_short(after[part])}"
    return "equal"
