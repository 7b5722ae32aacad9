"""Texts that anyone may give: read right, or refused in one line that says where and why."""

import codecs
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from expertcut.data.corpus import Corpus, TextSelection, load_corpus
from expertcut.errors import ExpertcutError
from tests.conftest import make_tokenizer
from tests.support.fake_hub import LocalHub

Read = Callable[..., Corpus]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
MIB = 1 << 20


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    found = make_tokenizer()
    found.chat_template = CHAT
    return found


@pytest.fixture
def read(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Read:
    """Loads texts, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return lambda *specs, **options: load_corpus(TextSelection(specs, **options), tokenizer)


def lines(*records: object) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write(name: str, content: bytes) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return name


def said(corpus: Corpus) -> list[str]:
    """What its documents say, in order."""
    return [document.said for document in corpus]


def refusal(read: Read, *specs: str, **options: Any) -> str:
    """The one line with which texts are refused."""
    with pytest.raises(ExpertcutError) as refused:
        read(*specs, **options)
    message = str(refused.value)
    assert "\n" not in message
    return message


A, B = {"text": "abc"}, {"text": "d"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("blank.jsonl", b"\n\n" + lines(A) + b"  \n" + lines(B), ["abc", "d"]),
        ("mark.jsonl", codecs.BOM_UTF8 + lines(A, B), ["abc", "d"]),
        ("mark.txt", codecs.BOM_UTF8 + b"abc", ["abc"]),
        ("nul.jsonl", lines(A, {"text": "a\0b"}), ["abc", "a\0b"]),
        ("open.jsonl", lines(A, B).rstrip(), ["abc", "d"]),
        ("crlf.jsonl", lines(A, B).replace(b"\n", b"\r\n"), ["abc", "d"]),
        ("crlf.txt", b"a\r\nb", ["a\r\nb"]),
        ("source.py", b"x = 1\n", ["x = 1\n"]),
        ("k=1/a=2.jsonl", lines(A), ["abc"]),
        ("w=1", b"abc", ["abc"]),
        ("empty.jsonl", lines(A, {"text": ""}, {"text": None}, {"text": " \n"}, B), ["abc", "d"]),
        (
            "parts.jsonl",
            lines({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}),
            ["hi"],
        ),
        (
            "turns.jsonl",
            lines({"prompt": [{"role": "user", "content": "q"}],
                   "completion": [{"role": "assistant", "content": "a"}]}),
            ["q\na"],
        ),
        ("half.jsonl", lines({"prompt": "q", "completion": "a"}), ["qa"]),
    ],
)  # fmt: skip
def test_what_is_unusual_and_right_is_read(
    read: Read, name: str, content: bytes, expected: list[str]
) -> None:
    assert said(read(write(name, content))) == expected


def message(**fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", **fields}]}


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl", b"", "a.jsonl holds no text that is not empty"),
        ("a.txt", b" \n", "a.txt holds no text that is not empty"),
        ("a.txt", b"ab\nc\0d", "a.txt:2: a NUL byte"),
        ("a.txt", b"abc\n" * 50_000 + b"\xff", "a.txt:50001: a byte that is not UTF-8"),
        ("a.txt", "hello".encode("utf-16"), "a.txt: UTF-16 text, must be UTF-8"),
        ("a.jsonl", "hello".encode("utf-16-le"), "a.jsonl: UTF-16 text, must be UTF-8"),
        ("a.jsonl", lines(A) + b'{"text": "\xff"}\n', "a.jsonl:2: not UTF-8 text"),
        ("a.jsonl", lines(A) + b'{"text": "a\0"}\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", lines(A, A) + b"{\n", "a.jsonl:3: not JSON"),
        ("a.jsonl", b"[1, 2]\n", "a.jsonl:1: a list, must be a JSON object"),
        ("a.jsonl", b'{"text": ' + b"[" * 5000, "a.jsonl:1: not JSON: more than 100 levels"),
        ("a.json", b'[{"text": "a"}]', "a.json: must be JSON lines"),
        ("a.jsonl", lines({"text": "a\ud800"}), "a.jsonl:1: a lone surrogate"),
        ("a.jsonl", lines(message(content="\ud800")), "a.jsonl:1: a lone surrogate"),
        ("a.jsonl", lines({"text": 5}), "a.jsonl:1: its text must be a text, not int"),
        ("a.jsonl", lines(A, {"messages": []}), "a.jsonl:2: messages must be turns"),
        ("a.jsonl", lines({"messages": "hi"}), "a.jsonl:1: messages must be turns"),
        ("a.jsonl", lines(message(content=None)), "a.jsonl:1: messages must be turns"),
        ("a.jsonl", lines({"body": "a", "id": 1}), "it holds 'body', 'id'"),
        ("a.jsonl", lines({"prompt": "a", "completion": 5}), "both be texts or both messages"),
        ("a.jsonl", lines(message(content="a") | {"tools": "{"}), "a.jsonl:1: tools is not JSON"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet: not a parquet file"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_file_and_line(
    read: Read, name: str, content: bytes, why: str
) -> None:
    assert why in refusal(read, write(name, content))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", lines(A) + b'{"text": "' + b"a" * (100 * MIB) + b'"}\n', ":2"),
        ("a.jsonl", lines(A) + b"a" * (70 * MIB), ":2"),
        ("a.txt", b"a" * (70 * MIB), ""),
        ("a.txt", b"a " * (9 * MIB), ""),
    ],
    ids=["a line of 100 MiB", "70 MiB without a newline", "70 MiB of text", "18 Mi characters"],
)
def test_documents_beyond_what_a_tokenizer_can_hold_are_refused(
    read: Read, name: str, content: bytes, line: str
) -> None:
    assert f"{name}{line}: a document of " in (why := refusal(read, write(name, content)))
    assert why.endswith("split it into several")


def test_parquet_is_read_by_column_and_what_it_lacks_is_named(read: Read, tmp_path: Path) -> None:
    def table(name: str, **columns: list[object]) -> str:
        parquet.write_table(pa.table(columns), name, row_group_size=2)
        return name

    read(write("a.txt", b"moves into the folder"))
    rows = ["abc", None, "d", "e"]
    assert said(read(table("a.parquet", text=rows))) == ["abc", "d", "e"]
    assert said(read(table("b.parquet", body=["abc"]) + ":body")) == ["abc"]
    assert "b.parquet:1: must hold text" in refusal(read, "b.parquet")
    assert "b.parquet:1: has no text no: it holds 'body'" in refusal(read, "b.parquet:no")
    many = table("c.parquet", text=["a", "b", "c", 5][:3], other=[1, 2, 3])
    chosen = [said(read(many, tokens=3, seed=seed)) for seed in range(8)]
    assert {*map(tuple, map(sorted, chosen))} == {("a", "b", "c")}
    assert len({*map(tuple, chosen)}) > 1  # in an order of the seed
    assert "c.parquet:1: its text must be a text" in refusal(read, table("c.parquet", text=[b"a"]))
    content = bytearray(Path("a.parquet").read_bytes())
    content[6:40] = b"\xff" * 34
    assert "a.parquet: cannot be read" in refusal(read, write("a.parquet", bytes(content)))


def test_of_a_folder_texts_are_read_and_the_rest_is_passed_over(
    read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    write("d/a.py", b"x = 1\n")
    write("d/picture.png", bytes(range(256)))
    write("d/weights.safetensors", b"\1\0" * (40 * MIB))
    write("d/latin.txt", "café".encode("latin-1"))
    write("d/.hidden.txt", b"hidden")
    write("d/.git/config", b"hidden")
    write("d/sub/c.jsonl", lines(B))
    write("d/empty.txt", b"")
    os.mkfifo("d/pipe.txt")
    with caplog.at_level(logging.WARNING):
        assert said(read("d")) == ["x = 1\n", "d"]
    assert "3 files that are not UTF-8 text are left out" in caplog.text
    Path("none").mkdir()
    write("binary/a.bin", b"\0")
    for folder in ("none", "binary"):
        assert refusal(read, folder).startswith(f"{folder} holds no text")
    write("d/sub/c.jsonl", lines(B) + b"{")  # what says that it is a text must be one
    assert "c.jsonl:2: not JSON" in refusal(read, "d")


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_a_pipe_is_refused_and_not_waited_for(read: Read, ending: str) -> None:
    os.mkfifo(f"pipe.{ending}")
    assert "Not an ordinary file" in refusal(read, f"pipe.{ending}")


@pytest.mark.parametrize(
    ("specs", "why"),
    [
        (["no.jsonl"], "no such text: no.jsonl does not exist"),
        (["src/no.py"], "no such text: src/no.py does not exist"),
        (["/no/where"], "no such text: /no/where does not exist"),
        ([""], "--text names nothing"),
        (["=0.5"], "--text names nothing"),
        (["a" * 5000], "cannot be read: File name too long"),
        *[([f"a.jsonl={weight}"], "a weight must be above 0") for weight in ("0", "nan", "-1")],
        (["a.jsonl", "./a.jsonl=2"], "a.jsonl is given twice"),
        (["a.jsonl:no"], "a.jsonl:1: has no text no: it holds 'text'"),
        (["org/unknown:train"], "org/unknown"),
        (["org/dated:20231101.en:train:text"], "org/dated:20231101.en:train:text"),
    ],
)
def test_sources_that_are_not_there_or_said_wrongly_are_refused(
    read: Read, specs: list[str], why: str
) -> None:
    write("a.jsonl", lines(A))
    found = refusal(read, *specs)
    assert why in found
    if specs[0].startswith("org"):
        assert "the Hub cannot be reached" in found


def test_sources_have_names_of_their_own(read: Read) -> None:
    long = "文" * 60
    files = [write(f"{place}.jsonl", lines(A)) for place in ("a", "x/a", long)]
    names = [source.name for source in read(*files).sources]
    assert names[:2] == ["a", "a-2"]
    assert names[2] and long.startswith(names[2])


def test_more_tokens_than_there_are_is_told_and_all_are_used(
    read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    files = [write("a.jsonl", lines(A)), write("b.jsonl", lines(A, B))]
    corpus = read(f"{files[0]}=3", f"{files[1]}=1", tokens=1000)
    assert corpus.n_tokens == 7
    assert "hold 7 tokens, fewer than the 1,000" in caplog.text


@pytest.mark.parametrize(
    ("template", "options", "why"),
    [
        (None, {}, "a.jsonl:1: a chat, but the tokenizer has no chat template"),
        ("{{ messages }}", {"assistant_only": True}, "does not mark what the assistant writes"),
        ("{{ raise_exception('no system role') }}", {}, "template fails: no system role"),
        ("{% for", {}, "template fails: unexpected"),
        ("{{ messages[0].content.no.no }}", {}, "template fails: 'str object' has no attribute"),
        ("{{ 1 / 0 }}", {}, "template fails: division by zero"),
        ("{{ '' }}", {}, "holds no text that is not empty"),
    ],
)
def test_a_chat_template_that_fails_is_said_in_one_line(
    read: Read,
    tokenizer: PreTrainedTokenizerFast,
    template: str | None,
    options: dict[str, bool],
    why: str,
) -> None:
    tokenizer.chat_template = template
    file = write("a.jsonl", lines({"messages": [{"role": "system", "content": "s"}]}))
    assert why in refusal(read, file, **options)


def test_with_assistant_only_plain_text_and_slow_tokenizers_are_refused(
    read: Read, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write("a.jsonl", lines(A))
    assert "a.jsonl:1: --assistant-only needs messages" in refusal(read, file, assistant_only=True)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert "--assistant-only needs a tokenizer" in refusal(read, file, assistant_only=True)
    assert said(read(file)) == ["abc"]


READ = """
import json, sys
from expertcut.data.corpus import TextSelection, load_corpus
from expertcut.errors import TextError

class Bytes:  # of transformers, a tokenizer takes seconds to import
    chat_template = None
    def __call__(self, texts, **_):
        return {"input_ids": [[*text.encode()] for text in texts]}

for spec, revision in json.loads(sys.argv[1]):
    try:
        selection = TextSelection((spec,), revisions={spec: revision})
        corpus = load_corpus(selection, Bytes())
        found = [corpus.sources[0].revision, corpus.sources[0].name, [d.said for d in corpus]]
    except TextError as error:
        found = ["refused", str(error), []]
    print(json.dumps(found))
"""


def test_data_sets_of_the_hub_are_read_by_configuration_split_and_field_at_a_pinned_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}.jsonl"},
                                             {"split": "dev", "path": "dev.jsonl"}]}
        for name in ("en.2023", "code")
    ]  # fmt: skip
    card = f"---\nconfigs: {json.dumps(configs)}\n---\n".encode()
    write("set/README.md", card)
    write("set/en.2023.jsonl", lines({"text": "abc", "body": "in the body"}))
    write("set/code.jsonl", lines({"text": "x = 1", "body": ""}))
    write("set/dev.jsonl", lines({"text": "of dev", "body": ""}))
    asked = [
        ("org/set-1.5:en.2023", None),
        ("org/set-1.5:code:train", None),
        ("org/set-1.5:en.2023:train:body", None),
        ("org/set-1.5:code:dev:text", None),
        ("org/set-1.5:none:train:text", None),
        ("org/none", None),
    ]
    with LocalHub() as hub:
        repository = hub.add("datasets", "org/set-1.5", Path("set"))
        commit = repository.at("main").commit

        def found(asked: list[tuple[str, str | None]]) -> list[list[Any]]:
            done = subprocess.run(
                [sys.executable, "-c", READ, json.dumps(asked)],
                env={**hub.environment(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return [json.loads(line) for line in done.stdout.splitlines()]

        *right, wrong, none = found(asked)
    assert not [why for _, why, said in right if not said]
    assert [said for *_, said in right] == [["abc"], ["x = 1"], ["in the body"], ["of dev"]]
    assert {(revision, name) for revision, name, _ in right} == {(commit, "set-1")}
    for (kind, message, _), spec in ((wrong, asked[4][0]), (none, "org/none")):
        assert kind == "refused" and spec in message and "\n" not in message
