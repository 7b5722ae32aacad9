"""Quizzes: rows that cannot be asked, files that are none, subjects that want to be paths."""

import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.hostile.case import Corpus, Spoil
from tests.hostile.cases.documents import OF, SWEPT
from tests.hostile.spoiling import (
    as_dangling_link,
    as_device,
    as_folder,
    as_pipe,
    spoiled,
    written,
)
from tests.hostile.world import World

CASES = Corpus("quizzes")
CSV = f"{World.quiz}/test/old_clocks_test.csv"
JSONL = "quiz/test.jsonl"
PARQUET = "quiz/test-00000-of-00001.parquet"
ROW = "Which one?,amber,birch,cloud,delta,A\n"
RECORD = {"question": "Which one?", "choices": ["amber", "birch"], "answer": 0}


def commands(quiz: str) -> dict[str, list[str]]:
    asked = ["--quiz", quiz, "--shots", "0"]
    return {
        "profile": ["profile", World.model, *asked, "--out", "new"],
        "eval": ["eval", World.model, World.cut, *asked, "--out", "new.json"],
        "sweep": ["prune", *OF, *SWEPT, *asked, "--out", "new"],
    }


CSV_TURNS, JSON_TURNS = cycle(commands(World.quiz).items()), cycle(commands("quiz").items())


def row(fault: str, content: bytes | str, says: str) -> None:
    """A second row of CSV."""
    command, words = next(CSV_TURNS)
    text = content.encode() if isinstance(content, str) else content
    spoil = written(CSV, ROW.encode() + text, *words)
    CASES.add(f"{fault}, met by {command}", spoil, r"old_clocks_test\.csv:\d+: ", says)


row("a choice missing", "Who?,amber,,cloud,delta,A\n", "choice B is missing")
row("a choice of blanks", "Who?,amber, ,cloud,delta,A\n", "choice B is missing")
row("no question", ",amber,birch,cloud,delta,A\n", "the question is empty")
row("an answer outside", "Who?,amber,birch,cloud,delta,E\n", "answer must be A-D, not 'E'")
row("an answer missing", "Who?,amber,birch,cloud,delta,\n", "not ''")
row("an answer in words", "Who?,amber,birch,cloud,delta,amber\n", "not 'amber'")
row("an answer by number", "Who?,amber,birch,cloud,delta,0\n", "not '0'")
row("a small letter", "Who?,amber,birch,cloud,delta,a\n", "not 'a'")
row("a letter that looks like A", "Who?,amber,birch,cloud,delta,Α\n", "not 'Α'")  # noqa: RUF001
row("a field too few", "Who?,amber,birch,cloud,A\n", "5 fields")
row("a field too many", "Who?,amber,birch,cloud,delta,A,B\n", "7 fields")
row("one choice", "Who?,amber,A\n", "3 fields")
row("27 choices", "Who?," + ",".join("x" * 27) + ",A\n", "29 fields")
row("a quote left open", '"Who?,amber,birch,cloud,delta,A\n', "not a CSV row")
row("a quote left open to the end of 10 MB", '"' + "Who?,\n" * 1_700_000, "not a CSV row: field")
row("text after a quote", '"Who"?,amber,birch,cloud,delta,A\n', "not a CSV row")
row("a cell of 10 MB", f"{'x' * 10_000_000},amber,birch,cloud,delta,A\n", "not a CSV row: field")
row("a NUL in a question", "Wh\0o?,amber,birch,cloud,delta,A\n", "NUL")
row("a NUL in a choice", "Who?,am\0ber,birch,cloud,delta,A\n", "NUL")
row("NULs alone", "\0" * 5000, "1 fields")
row("another encoding", b"Wh\xf6?,amber,birch,cloud,delta,A\n", "not UTF-8 text")
row("a surrogate in UTF-8", b"Wh\xed\xa0\x80?,amber,birch,cloud,delta,A\n", "not UTF-8 text")
row("UTF-16", "Who?,amber,birch,cloud,delta,A\n".encode("utf-16"), "not UTF-8 text")
row("JSON", json.dumps(RECORD) + "\n", "fields|not a CSV row")
row("semicolons", ROW.replace(",", ";"), "1 fields")
for fault, spoil, says in (
    ("a folder", as_folder, "Is a directory"),
    ("a pipe", as_pipe, "Not an ordinary file"),
    ("a device", as_device, "Not an ordinary file"),
    ("a link to nothing", as_dangling_link, "No such file"),
):
    command, words = next(CSV_TURNS)
    CASES.add(
        f"{fault}, met by {command}", spoiled(CSV, spoil, *words), "old_clocks_test.csv", says
    )


CASES.add(
    "a solved question that is none, met by profile",
    written(
        f"{World.quiz}/dev/old_clocks_dev.csv",
        "Who?,amber,birch,cloud,delta,E\n",
        *["profile", World.model, "--quiz", World.quiz, "--shots", "1", "--out", "new"],
    ),
    r"dev/old_clocks_dev\.csv:1: ",
    "answer must be A-D, not 'E'",
)


def line(fault: str, content: bytes | str, says: str) -> None:
    """A second line of JSON lines."""
    command, words = next(JSON_TURNS)
    text = content.encode() if isinstance(content, str) else content
    spoil = written(JSONL, json.dumps(RECORD).encode() + b"\n" + text + b"\n", *words)
    CASES.add(f"a line with {fault}, met by {command}", spoil, r"quiz/test\.jsonl:2: ", says)


def record(fault: str, says: str, **fields: object) -> None:
    line(fault, json.dumps({**RECORD, **fields}), says)


line("a brace left open", '{"question": ', "not JSON")
line("two objects", '{"a": 1} {"b": 2}', "not JSON")
line("a list", "[]", "a list, must be a JSON object")
line("a number", "7", "a int, must be a JSON object")
line("another encoding", b'{"question": "Wh\xf6?"}', "not UTF-8 text")
line("a NUL", b"\0", "not JSON")
line("100,000 levels", "[" * 100_000, "not JSON: more than 100 levels")
line("150 levels", '{"a": ' * 150 + "1" + "}" * 150, "not JSON: more than 100 levels")
line("10 MB of levels", '{"a": ' * 1_700_000, "not JSON: more than 100 levels")
line("a number that is none", '{"question": NaN}', "NaN is not a number")
line("a name twice", '{"question": "a", "question": "b"}', "'question' stands twice")
line("a number of 10,000 digits", f'{{"answer": {"9" * 10_000}}}', "more than 64 bits")
line("a byte order mark", b"\xef\xbb\xbf{}", "not JSON")  # in the middle of the file
record("no answer", "has no answer", answer=None)
record("an answer outside", "answer must be A-B or 0-1, not 2", answer=2)
record("an answer below 0", "not -1", answer=-1)
record("an answer that is true", "not True", answer=True)
record("an answer of 1.0", "not 1.0", answer=1.0)
record("an answer in a list", r"not \[0\]", answer=[0])
record("an answer of 10 MB", "not 'x", answer="x" * 10_000_000)
record("choices in one text", "choices must be a list of texts", choices="ab")
record("choices that are numbers", "choices must be a list of texts", choices=[1, 2])
record("choices by letter", "choices must be a list of texts", choices={"A": "x", "B": "y"})
record("no choices", "0 choices, must be 2 to 26", choices=[])
record("one choice", "1 choices, must be 2 to 26", choices=["amber"])
record("27 choices", "27 choices, must be 2 to 26", choices=[f"{i}" for i in range(27)])
record("a million choices", "1000000 choices, must be 2 to 26", choices=["x"] * 1_000_000)
record("an empty choice", "choice B is missing", choices=["amber", ""])
record("no question", "the question is empty", question=" ")
record("a question that is a list", "must be text", question=["Who?"])
record("half a character", "lone surrogate", question="\ud800")
record("half a character in a choice", "lone surrogate", choices=["a", "\udfff"])
record("a NUL in a question", "NUL", question="a\0b")
record("a question of 10 MB", "10,000,000 characters", question="x" * 10_000_000)
record("a choice of 10 MB", "10,000,000 characters", choices=["x", "y" * 10_000_000])
record("a subject that is no text", "subject is 3", subject=3)
record("a subject of 300 characters", "a subject of 300 characters", subject="x" * 300)
record("a subject of 60 signs of four bytes", "a subject of 60 characters", subject="🦜" * 60)
record("a subject with a NUL", "NUL", subject="a\0b")
record("a subject with half a character", "lone surrogate", subject="\udc00")
for fault, spoil, says in (
    ("is a pipe", as_pipe, "Not an ordinary file"),
    ("is a folder", as_folder, "Is a directory"),
):

    def _in_its_place(world: World, spoil: Callable[[Path], None] = spoil) -> list[str]:
        words = written(JSONL, json.dumps(RECORD), *commands("quiz")["profile"])(world)
        spoil(world / JSONL)
        return words

    CASES.add(f"a file of JSON lines that {fault}", _in_its_place, "quiz", says)
for name, content in {"quiz.jsonl": b"", JSONL: b"\n \n"}.items():
    CASES.add(
        f"{name} without a line",
        written(name, content, *commands(name.split("/")[0])["profile"]),
        name.split("/")[0],
        "has no questions in split test",
    )
for fault, quiz, says in (
    ("that is not there", "./nowhere", "no such quiz"),
    ("with a NUL in its name", "a\0b", "no such quiz"),
    ("that is the root of the disk", "/dev/null", "no such quiz"),
    ("that leads out of the cache", "../../etc", "no such quiz"),
    ("of a hub that nobody has", "owner/na:me", "no such quiz"),
):
    CASES.add(
        f"a quiz {fault}", lambda _world, quiz=quiz: commands(quiz)["profile"], "expertcut", says
    )
for split in ("../test", "/etc", "..", "te/st", "t\0", "x" * 300, "*"):
    CASES.add(
        f"a split called {split[:20]!r}",
        lambda _world, split=split: [*commands(World.quiz)["profile"], "--split", split],
        "not the name of a split",
        "take test, val",
    )


def table(columns: dict[str, Any]) -> Spoil:
    """A data set of one Parquet file."""

    def spoil(world: World) -> list[str]:
        (world / "quiz").mkdir()
        pq.write_table(pa.table(columns), world / PARQUET)
        return commands("quiz")["profile"]

    return spoil


def parquet(fault: str, says: str, **columns: Any) -> None:
    whole = {key: [value] for key, value in RECORD.items()}
    CASES.add(f"Parquet with {fault}", table({**whole, **columns}), "quiz ", says)


parquet("questions that are numbers", "question is 7, must be text", question=[7])
parquet("choices that are numbers", "choices must be a list of texts", choices=[[1, 2]])
parquet("an answer outside", "answer must be A-B or 0-1, not 5", answer=[5])
parquet("no answer", "has no answer", answer=pa.array([None], pa.int64()))
parquet("bytes for a question", "must be text", question=[b"Who?"])
parquet("a subject of 300 characters", "a subject of 300 characters", subject=["x" * 300])
CASES.add("Parquet with other columns", table({"prompt": ["Who?"]}), "quiz ", "has no question")


def broken(fault: str, change: Callable[[Path], object], says: str) -> None:
    def spoil(world: World) -> list[str]:
        words = table({key: [value] for key, value in RECORD.items()})(world)
        change(world / PARQUET)
        return words

    CASES.add(f"Parquet {fault}", spoil, "quiz", says)


broken("cut short", lambda f: f.write_bytes(f.read_bytes()[:-40]), "cannot be read: Parquet")
broken("of no bytes", lambda f: f.write_bytes(b""), "cannot be read: ")
broken("that is a pipe", as_pipe, "Not an ordinary file")
broken("that links to nothing", as_dangling_link, "No such file")
broken(
    "whose footer is of another file",
    lambda f: f.write_bytes(f.read_bytes()[:-8] + b"\xff\xff\xff\x7fPAR1"),
    "cannot be read: ",
)
