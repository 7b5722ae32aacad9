"""What strangers' names and files may do here: be named, and nothing else; and secrets stay."""

import importlib
import json
import logging
import os
import pkgutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import expertcut as package
from expertcut import documents
from expertcut.checkpoints.output_dir import atomic_dir
from expertcut.cli import HarmlessFormatter
from expertcut.data.readers import read_csv
from expertcut.documents import Record
from expertcut.errors import OutputError
from expertcut.files import without_secrets, write_atomically
from expertcut.profiling.storage import load_profile
from tests.conftest import Commands
from tests.support.fake_hub import TOKEN

SUBJECTS = ("../../up", "/etc/passwd", "..", ".", "a/b", "C:\\x", "nul\u2028l", "a%2Fb", " ", "~")


def modes(folder: Path) -> dict[str, int]:
    return {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}


def test_a_subject_that_wants_to_be_a_path_is_a_file_in_the_folder(
    checkpoint: Callable[..., Path], tmp_path: Path, expertcut: Commands
) -> None:
    rows = [
        {"subject": subject, "question": f"{i}?", "choices": ["a", "b"], "answer": 0}
        for i, subject in enumerate(SUBJECTS)
    ]
    inner = tmp_path / "deep" / "inside"
    inner.mkdir(parents=True)
    (inner / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ("--quiz", inner / "quiz.jsonl", "--shots", 0, "--threads", 1)
    expertcut("profile", checkpoint("olmoe"), *asked, "--out", inner / "p")
    found = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert len(list((inner / "p" / "chunks").iterdir())) == len(SUBJECTS)
    assert all(p.is_relative_to(inner) for p in found)
    assert sorted(load_profile(inner / "p").info.quiz.subjects) == sorted(SUBJECTS)


def test_mixed_line_ends_and_a_byte_order_mark_lose_no_question(tmp_path: Path) -> None:
    file = tmp_path / "birds_test.csv"
    rows = [
        b"One?,a,b,c,d,A\r\n",
        b'"Two\r\nlines?",a,b,c,d,B\n',
        b"Three?,a,b,c,d,C\r",
        b"4?,a,b,c,d,D",
    ]
    file.write_bytes(b"\xef\xbb\xbf" + b"".join(rows))
    found = read_csv(file, "birds")
    assert [q.text for q in found] == ["One?", "Two\r\nlines?", "Three?", "4?"]
    assert [q.answer for q in found] == [0, 1, 2, 3]


def test_what_is_half_written_is_nobody_elses_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    write_atomically(tmp_path / "plan.json", b"{}")
    assert seen == [0o600]
    with atomic_dir(tmp_path / "checkpoint") as temporary:
        assert temporary.parent == tmp_path and temporary.name.startswith(".checkpoint.")
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
    plain = tmp_path / "plain"
    plain.touch()
    (tmp_path / "folder").mkdir()
    found = modes(tmp_path)
    assert found["plan.json"] == found["plain"]
    assert found["checkpoint"] == found["folder"]


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").write_text("mine")
    (tmp_path / ".plan.json.0.tmp").symlink_to("theirs")
    monkeypatch.setattr("secrets.token_hex", lambda _: "0")
    with pytest.raises(OutputError, match="exists"):
        write_atomically(tmp_path / "plan.json", b"{}")
    assert (tmp_path / "theirs").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["profile", f"./{TOKEN}"], "no such model: ./"),
        (["profile", f"https://me:{TOKEN}@hub/owner/name"], "no such model: https://"),
        (["profile", "https://me:swordfish@hub/owner/name"], "@hub/owner/name"),
        (["show", f"{TOKEN}/profile"], "nothing to show in "),
        (["run", f"{TOKEN}.yaml"], ".yaml cannot be read"),
        (["prune", "--profile", TOKEN, "--keep", "4"], "no profile in "),
    ],
)
def test_no_secret_stands_in_an_error(words: list[str], kept: str, expertcut: Commands) -> None:
    line = expertcut(*words, status=2)
    assert kept in line and "***" in line
    assert TOKEN not in line and "swordfish" not in line


def test_the_token_in_use_stands_in_no_error_whatever_its_form(
    expertcut: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "correct-horse-battery")
    assert "correct-horse" not in expertcut("profile", "./correct-horse-battery", status=2)


def test_no_secret_stands_in_a_log() -> None:
    record = logging.LogRecord("x", logging.WARNING, "x", 1, "asked %s", (f"Bearer {TOKEN}",), None)
    assert HarmlessFormatter("%(message)s").format(record) == "asked Bearer ***"


def test_words_that_look_like_a_token_stay() -> None:
    for text in ("hf_hub_download", "hf_xet", "see https://hub/owner/name", "me@hub:22", "a: b@c"):
        assert without_secrets(text) == text


def test_an_extension_type_of_parquet_is_not_unpickled(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    expertcut: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # What pyarrow once unpickled when it met it: a call of os.mkdir("broken_in").
    pickled = b"cposix\nmkdir\n(S'broken_in'\ntR."
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickled,
    }
    fields = [
        pa.field("question", pa.string(), metadata=extension),
        pa.field("choices", pa.list_(pa.string())),
        pa.field("answer", pa.int64()),
    ]
    columns = [["Who?"], [["a", "b"]], [7]]
    table = pa.table([pa.array(c) for c in columns], schema=pa.schema(fields))
    (tmp_path / "quiz").mkdir()
    pq.write_table(table, tmp_path / "quiz" / "test-0.parquet")
    metadata = pq.read_schema(tmp_path / "quiz" / "test-0.parquet").field("question").metadata
    assert pickled in (metadata or {}).values()
    line = expertcut("profile", checkpoint("olmoe"), "--quiz", "quiz", "--shots", 0, status=2)
    assert "answer must be A-B or 0-1, not 7" in line
    assert not (tmp_path / "broken_in").exists()


def test_a_key_that_is_left_out_of_a_document_reads_back_as_nothing() -> None:
    """`documents` leaves keys of later versions out where they are None, by their bare names."""
    for module in pkgutil.walk_packages(package.__path__, "expertcut."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

    def kinds(of: type[Record]) -> Iterator[type[Record]]:
        for kind in of.__subclasses__():
            yield from (kind, *kinds(kind))

    found = {
        (kind, name): field
        for kind in kinds(Record)
        for name, field in kind.model_fields.items()
        if name in documents._OMITTED and "None" in str(field.annotation)
    }
    assert len(found) > 20
    for place, field in found.items():
        assert not field.is_required() and field.get_default() is None, place
