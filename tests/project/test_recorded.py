"""The recorded set: it finds what differs, passes over what may, and refuses what is not whole."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests import recorded
from tests.recorded import Refused, compare, read_set
from tests.recorded_bytes import RULES, comparable, first_difference
from tests.recorded_commands import absent, is_input, steps_of
from tests.recorded_inputs import WORLDS

ROOT = Path(__file__).parents[2]
WORLD = "qwen3_moe"
PART = [f"--only={WORLD}/{out}" for out in ("profile/all", "plan/reap")]
MADE_WITH = {"python": "3", "folder": "/work"}


# In a process of its own, for forks.
WRITE = """
import sys
from tests.recorded import main
raise SystemExit(main(["write", *sys.argv[1:]]))
"""


def record(folder: Path) -> Path:
    """A small part, recorded into `folder`."""
    words = map(str, (folder, f"--work={folder.parent / 'work'}", *PART))
    line = [sys.executable, "-c", WRITE, *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (folder.parent / "work").exists()
    return folder


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recorded") / "old")


@pytest.fixture
def copies(once: Path, tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(once, tmp_path / name)) for name in ("old", "new")]


def small_set(folder: Path, files: dict[str, bytes]) -> Path:
    """A recorded set that was made by hand."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    index = {"format": 1, "made_with": MADE_WITH, "files": {}}
    (folder / "recorded.json").write_text(json.dumps(index))
    return folder


def differing(old: bytes, new: bytes, path: str, folder: Path) -> recorded.Comparison:
    sets = [small_set(folder / name, {path: its}) for name, its in (("a", old), ("b", new))]
    return compare(*map(read_set, sets))


@pytest.mark.slow
def test_two_recordings_of_one_version_are_equal(once: Path) -> None:
    twice = [once, record(once.with_name("new"))]
    found = compare(*map(read_set, twice))
    assert found.is_equal and not found.differ_in_flags
    assert found.n_files > 15 and found.size_bytes > 100_000
    profiles = [folder / WORLD / "profile" / "all" for folder in twice]
    runs = [(folder / "run.json").read_bytes() for folder in profiles]
    assert runs[0] != runs[1]  # there was something to pass over
    held = {path: entry for path, entry in read_set(twice[0]).files.items() if not is_input(path)}
    assert {path.split("/")[1] for path in held} == {"profile", "plan"}


def test_the_hashes_alone_are_enough_to_compare(copies: list[Path]) -> None:
    index, folder = copies[0] / "recorded.json", copies[1]
    assert compare(read_set(index), read_set(folder)).is_equal
    plan = folder / WORLD / "plan" / "reap" / "plan.json"
    plan.write_bytes(plan.read_bytes() + b"\n")
    found = compare(read_set(index), read_set(folder))
    assert found.differ == {f"{WORLD}/plan/reap/plan.json": "other bytes"}


def _change_value(folder: Path) -> tuple[str, str]:
    path = f"{WORLD}/plan/reap/plan.json"
    plan = json.loads((folder / path).read_text())
    block = next(iter(plan["blocks"]))
    plan["blocks"][block]["keep"][0] += 1
    (folder / path).write_text(json.dumps(plan))
    return path, f"blocks.{block}.keep[0]: "


def _change_byte(folder: Path) -> tuple[str, str]:
    path = next((folder / WORLD).glob("profile/all/chunks/*"))
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    begins = json.loads(content[8 : 8 + length])["alpha_NLE"]["data_offsets"][0]
    content[8 + length + begins] ^= 1
    path.write_bytes(content)
    return path.relative_to(folder).as_posix(), "alpha_NLE: other values"


@pytest.mark.parametrize("change", [_change_value, _change_byte])
def test_one_other_value_or_byte_is_found_and_named(
    copies: list[Path], change: Callable[[Path], tuple[str, str]]
) -> None:
    path, where = change(copies[1])
    found = compare(*map(read_set, copies))
    assert list(found.differ) == [path] and found.differ[path].startswith(where)
    assert not (found.missing or found.extra)


def test_a_file_too_few_or_too_many_is_found(copies: list[Path]) -> None:
    (copies[1] / WORLD / "plan" / "reap" / "plan.json").rename(copies[1] / WORLD / "plan.json")
    found = compare(*map(read_set, copies))
    assert found.missing == [f"{WORLD}/plan/reap/plan.json"]
    assert found.extra == [f"{WORLD}/plan.json"] and not found.is_equal


def test_a_set_that_is_not_whole_is_refused(
    copies: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert recorded.main(["compare", *map(str, copies)]) == 2
    said = capsys.readouterr().err
    assert "not whole" in said and f"{WORLD}/stock/*/plan.json" in said
    assert f"{WORLD}/plan/*/plan.json" not in said and len(said.splitlines()) == 1
    assert recorded.main(["compare", *map(str, copies), f"--only={WORLD}/*"]) == 0
    assert recorded.main(["compare", *map(str, copies), "--only=nothing/*"]) == 2


def test_every_kind_that_must_be_there_is_what_a_command_writes() -> None:
    for world in WORLDS:
        written = {step.out.split("/")[0] for step in steps_of(world)}
        required = {pattern.split("/")[0] for pattern in absent(world, [])}
        assert required - {"model", "quiz"} <= written and len(required) > 12
        assert len({step.out for step in steps_of(world)}) == len(steps_of(world)) > 50


def test_an_empty_file_does_not_count_as_recorded(tmp_path: Path) -> None:
    paths = [f"{world}/{p.replace('*', 'x')}" for world in WORLDS for p in absent(world, [])]
    whole = small_set(tmp_path / "whole", dict.fromkeys(paths, b"something"))
    recorded.check_whole(read_set(whole).files)
    (whole / "gpt_oss" / "results" / "predictions.parquet").write_bytes(b"")
    with pytest.raises(Refused, match=r"it has no gpt_oss/results/predictions\.parquet$"):
        recorded.check_whole(read_set(whole).files)


def test_sets_of_another_machine_are_refused(copies: list[Path]) -> None:
    index = copies[1] / "recorded.json"
    index.write_text(index.read_text().replace('"torch": "', '"torch": "0.'))
    with pytest.raises(Refused, match="made with other torch: "):
        compare(*map(read_set, copies))


def test_a_recording_beside_another_and_a_place_that_is_taken_are_refused(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    with pytest.raises(Refused, match="is there: another recording"):
        recorded.write(tmp_path / "new", tmp_path / "work")
    with pytest.raises(Refused, match="is not empty"):
        recorded.write(tmp_path, tmp_path / "other")
    assert (tmp_path / "work").is_dir() and not (tmp_path / "other").exists()


def test_a_command_that_fails_ends_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "make_inputs", Path.mkdir)
    monkeypatch.setattr(recorded, "_in_fork", lambda *_: 3)
    with pytest.raises(Refused, match=r"profile model .* status 3"):
        recorded.write(tmp_path / "new", tmp_path / "work")
    assert not (tmp_path / "work").exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("run.json", '{"elapsed_s": 1.5e-3, "host": "a"}', '{"elapsed_s": 20.25, "host": "b"}'),
        ("manifest.json", '{"finished": "2026", "mtime_ns": 1}', '{"finished": "", "mtime_ns": 2}'),
        (
            "report.html",
            "<dd>2026-11-29T09:08:35+00:00, 1.3 s, expertcut 0.1.0, torch 2</dd>",
            "<dd>2027-01-01T00:00:00+00:00, 1,000.0 s, expertcut 0.2.0, torch 2</dd>",
        ),
        ("lm_eval-0-model.json", '{"date": 1.5}', '{"date": 2.5}'),
        ("adapter_config.json", '{"target_modules": ["a", "b"]}', '{"target_modules": ["b", "a"]}'),
    ],
)
def test_times_do_not_count_in_their_files_and_count_elsewhere(
    tmp_path: Path, path: str, old: str, new: str
) -> None:
    contents = old.encode(), new.encode()
    assert differing(*contents, path, tmp_path / "own").is_equal
    assert not differing(*contents, "plan.json", tmp_path / "other").is_equal


def test_what_names_a_flag_is_listed_and_is_no_difference(tmp_path: Path) -> None:
    old, new = b'{"action": "prune --keep-active"}', b'{"action": "prune --keep-used"}'
    found = differing(old, new, "plan.json", tmp_path / "flag")
    assert found.is_equal
    assert found.differ_in_flags == {
        "plan.json": 'action: "prune --keep-active", now "prune --keep-used"'
    }
    style = b"a { --ink: #111; color: var(--ink) }", b"a { --pen: #111; color: var(--pen) }"
    assert not differing(*style, "page.html", tmp_path / "style").is_equal
    assert not differing(b"prune --keep 4", b"prune --keep 5", "a.txt", tmp_path / "n").is_equal


def test_a_manifest_may_note_other_files_but_must_note_them_rightly() -> None:
    noted = b"""{
 "report.html": {
  "size": 3,
  "mtime_ns": 5,
  "ctime_ns": 5,
  "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
 }
}"""
    right = comparable("w/recipe/manifest.json", noted, {"w/recipe/report.html": b"abc"}.get)
    assert b"stamp of that file" in right
    wrong = comparable("w/recipe/manifest.json", noted, {"w/recipe/report.html": b"abd"}.get)
    assert b"ba7816bf" in wrong and b'"mtime_ns": "<time>"' in wrong


def parquet_bytes(**columns: list[object]) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("path", "old", "new", "where"),
    [
        ("a.json", b'{"a": {"b": [1, 2]}}', b'{"a": {"b": [1, 3]}}', "a.b[1]: 2, now 3"),
        ("a.json", b'{"a": 1}', b'{"a": 1, "b": 2}', "b: new"),
        ("a.json", b'{"a": 1, "b": 2}', b'{"b": 2, "a": 1}', "the keys: in another order"),
        ("a.json", b'{"a": 1}', b'{"a":1}', r'line 1: "{\"a\": 1}", now "{\"a\":1}"'),
        ("a.json", b"1", b"1.0", ": 1, now 1.0"),
        ("a.json", b"{", b"}", "cannot be read (JSONDecodeError)"),
        ("a.csv", b"a\nb\n", b"a\nb\nc\n", 'line 3: "", now "c"'),
        ("a.png", b"\x89P\0N", b"\x89P\0M", "byte 3"),
        (
            "a.parquet",
            parquet_bytes(x=[1, 2], y=["a", "b"]),
            parquet_bytes(x=[1, 2], y=["a", "c"]),
            "y, row 1: 'b', now 'c'",
        ),
        ("a.parquet", parquet_bytes(x=[1]), parquet_bytes(z=[1]), "columns ['x'], now ['z']"),
    ],
)
def test_the_first_difference_is_said_in_the_words_of_the_format(
    path: str, old: bytes, new: bytes, where: str
) -> None:
    assert first_difference(path, old, new).startswith(where)


def test_every_rule_has_a_reason_and_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert recorded.main(["rules"]) == 0
    printed = capsys.readouterr().out
    assert len(RULES) > 8 and all(rule.reason in printed for rule in RULES)
