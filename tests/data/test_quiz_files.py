"""What quiz files may look like: marks, blank lines, headers, folders; and what is said of them."""

import json
import logging
from pathlib import Path

import pytest

from expertcut.data import Quiz, Selection, load_quiz, warn_of_repeats
from expertcut.data.texts import read_texts
from expertcut.errors import ModelError, QuizError, RecipeError
from expertcut.models.checkpoint_dir import read_config
from expertcut.recipes.recipe_schema import read_recipe

MARK = b"\xef\xbb\xbf"
ROWS = b"Which is a bird?,heron,cloud,inlet,lemon,A\nWhich is a tree?,heron,birch,inlet,lemon,B\n"
CMMLU = b",Question,A,B,C,D,Answer\n0,Which is a bird?,heron,cloud,inlet,lemon,A\n"
RECORD = {"question": "Which is a bird?", "choices": ["heron", "cloud"], "answer": 0}
LINES = json.dumps(RECORD).encode() + b"\n"


def put(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def read(path: Path, split: str = "test", shots: int = 0) -> Quiz:
    return load_quiz(Selection(str(path), split, shots))


def texts(quiz: Quiz) -> list[tuple[str, str, tuple[str, ...], int, int]]:
    return [(q.subject, q.text, q.choices, q.answer, q.row) for q in quiz]


def refusal(path: Path, split: str = "test") -> str:
    with pytest.raises(QuizError) as refused:
        read(path, split)
    return str(refused.value)


# Encodings


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("q/test/b_test.csv", ROWS),
        ("q/test/b_test.csv", b'"Which, of these?",heron,cloud,inlet,lemon,A\n'),
        ("q/test/b.csv", CMMLU),
        ("q/test.csv", b"question,A,B,answer\nWhich?,x,y,A\n"),
        ("q/test.jsonl", LINES),
    ],
)
def test_a_byte_order_mark_is_no_part_of_a_question(
    tmp_path: Path, name: str, content: bytes
) -> None:
    file = put(tmp_path / name, content)
    plain = texts(read(tmp_path / "q"))
    file.write_bytes(MARK + content)
    assert texts(read(tmp_path / "q")) == plain != []


def test_a_mark_in_the_middle_of_a_file_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "test/b_test.csv", MARK + ROWS + MARK + ROWS)
    assert [q.text[0] for q in read(tmp_path)] == ["W", "W", "\ufeff", "W"]
    assert "b_test.csv:3: a byte order mark inside the file" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(("name", "content"), [("q.csv", ROWS), ("q.jsonl", LINES)])
def test_other_encodings_are_named(
    tmp_path: Path, encoding: str, name: str, content: bytes
) -> None:
    file = put(tmp_path / name, content.decode().encode(encoding))
    said = refusal(file)
    assert said == f"{file}: {encoding[:6].upper()} text, must be UTF-8: save it as UTF-8"


def test_texts_and_recipes_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    found = read_texts(str(put(tmp_path / "t.jsonl", MARK + b'{"text": "once"}\n')), None)
    assert [text.read for text in found] == ["once"]
    recipe = read_recipe(put(tmp_path / "r.yaml", MARK + b"model: owner/name\nquiz: mmlu\n"))
    assert recipe.quiz == "mmlu"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_encodings_of_recipes_and_configs_are_named_too(tmp_path: Path, encoding: str) -> None:
    said = f"{encoding.upper()} text, must be UTF-8: save it as UTF-8"
    with pytest.raises(RecipeError, match=said):
        read_recipe(put(tmp_path / "r.yaml", "model: x\n".encode(encoding)))
    put(tmp_path / "config.json", "{}".encode(encoding))
    with pytest.raises(ModelError, match=rf"config\.json cannot be read as JSON: {said}"):
        read_config(tmp_path)


# Blank lines


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    one, two = ROWS.splitlines(keepends=True)
    put(tmp_path / "plain/test/b_test.csv", ROWS)
    file = put(tmp_path / "gaps/test/b_test.csv", b"\n" + one + b"\r\n  \n" + two + b"\n\n")
    assert texts(read(tmp_path / "gaps")) == texts(read(tmp_path / "plain"))
    file.write_bytes(one + b"\n \n" + two + b",,,,,\n")
    assert refusal(tmp_path / "gaps") == f"{file}:5: the question is empty"


# Headers


@pytest.mark.parametrize(
    "content",
    [
        CMMLU,
        b"question,A,B,C,D,answer\nWhich is a bird?,heron,cloud,inlet,lemon,A\n",
        b"id,question,A,B,C,D,answer,explanation\n0,Which is a bird?,heron,cloud,inlet,lemon,A,-\n",
        b"Answer,D,C,B,A,Question\nA,lemon,inlet,cloud,heron,Which is a bird?\n",
        b"\n question , option_a,Option B,choice-c,D,answer\n"
        b"Which is a bird?,heron,cloud,inlet,lemon,A\n",
        b"Which is a bird?,heron,cloud,inlet,lemon,A\n",
    ],
)
def test_a_header_says_where_everything_is(tmp_path: Path, content: bytes) -> None:
    put(tmp_path / "test/birds.csv", content)
    put(tmp_path / "dev/birds.csv", content)
    choices = ("heron", "cloud", "inlet", "lemon")
    quiz = read(tmp_path, shots=1)
    assert texts(quiz) == [("birds", "Which is a bird?", choices, 0, 0)]
    assert quiz.shots_by_subject["birds"] == quiz.questions["birds"]


def test_a_header_may_have_2_or_5_choices_and_a_subject(tmp_path: Path) -> None:
    put(
        tmp_path / "test.csv",
        b"subject,question,A,B,C,D,E,answer\nx,One?,1,2,3,4,5,E\n,Two?,1,2,3,4,5,A\n"
        b"x,Three?,1,2,3,4,5,B\n",
    )
    found = [(q.subject, q.text, q.answer, q.row) for q in read(tmp_path)]
    own = tmp_path.stem
    assert found == [(own, "Two?", 0, 0), ("x", "One?", 4, 0), ("x", "Three?", 1, 1)]
    put(tmp_path / "test.csv", b"question,A,B,answer\nOne?,1,2,B\n")
    assert [q.choices for q in read(tmp_path)] == [("1", "2")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"question,A,B,C,D\nWho?,a,b,c,d\n", ":1: a header with 0 columns answer"),
        (b"Question,Subject,A,B,C,D\nWho?,x,a,b,c,d\n", ":1: a header with 0 columns answer"),
        (b"question,question,A,B,answer\n", ":1: a header with 2 columns question"),
        (b"question,A,B,D,answer\n", ":1: a header whose choices are A, B, D"),
        (b"question,A,A,answer\n", ":1: a header whose choices are A, A"),
        (
            b"question,choices,answer\n\"Who?\",\"['a', 'b']\",A\n",
            ":1: a header whose choices are none",
        ),
        (b"question,A,B,answer\nWho?,a,b\n", ":2: 3 fields where the header has 4"),
        (b"question,A,B,answer\nWho?,a,b,C\n", ":2: answer must be A-B, not 'C'"),
        (b"question,A,B,answer\n\nWho?,a,b,1\n", ":3: answer must be A-B, not '1'"),
        (b"prompt,A,B,C,D,key\n", ":1: answer must be A-D, not 'key'; if this is a header, it"),
        (b"id,prompt,A,B,C,D,key\n", "make 6; if this is a header, it must have question, A, B"),
    ],
)
def test_what_a_header_lacks_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    file = put(tmp_path / "test/birds.csv", content)
    assert refusal(tmp_path).startswith(str(file))
    assert said in refusal(tmp_path)


# Folders


@pytest.mark.parametrize(
    ("name", "content", "subject"),
    [
        ("q/test/birds_test.csv", ROWS, "birds"),
        ("q/test/birds.csv", ROWS, "birds"),
        ("q/test/birds.csv", CMMLU, "birds"),
        ("q/test.csv", ROWS, "q"),
        ("q/data/test.csv", CMMLU, "q"),
        ("q/data/test/birds_test.csv", ROWS, "birds"),
        ("q/data/test.jsonl", LINES, "q"),
        ("q/test.jsonl", LINES, "q"),
    ],
)
def test_a_split_is_found_in_every_layout(
    tmp_path: Path, name: str, content: bytes, subject: str
) -> None:
    put(tmp_path / name, content)
    put(tmp_path / name.replace("test", "dev"), content)
    quiz = read(tmp_path / "q", shots=1)
    assert list(quiz.questions) == [subject]
    assert quiz.id == str(tmp_path / "q")
    assert next(q.text for q in quiz) == "Which is a bird?"
    assert len(quiz.shots_by_subject[subject]) == 1


@pytest.mark.parametrize(
    "name", ["validation/b_validation.csv", "validation/b.csv", "validation.csv", "val/b.csv"]
)
def test_val_and_validation_are_one_split_in_files_too(tmp_path: Path, name: str) -> None:
    put(tmp_path / name, ROWS)
    for split in ("val", "validation"):
        assert len(read(tmp_path, split)) == 2


def test_one_csv_file_is_whichever_split_is_asked(tmp_path: Path) -> None:
    file = put(tmp_path / "pub.csv", CMMLU)
    put(tmp_path / "dev.csv", CMMLU.replace(b"bird", b"fish"))
    quiz = read(file, "mine", shots=1)
    assert [q.subject for q in quiz] == ["pub"]
    assert quiz.shots_by_subject["pub"][0].text == "Which is a fish?"


def test_files_that_are_not_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "test/birds_test.csv", ROWS)
    put(tmp_path / "test/clocks.csv", ROWS)
    put(tmp_path / "test/._birds_test.csv", b"\0\1\2")
    with caplog.at_level(logging.WARNING):
        assert list(read(tmp_path).questions) == ["birds"]
    assert "1 files are not read, first clocks.csv: name them <subject>_test.csv" in caplog.text


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (("Test/birds.csv",), "split test must lie in test/<subject>_test.csv, "),
        (("csv/birds_test.csv",), "found csv/birds_test.csv"),
        (("birds_test.csv",), "split test must lie in "),
        (
            ("data/final/test/birds.csv", "dev/birds.csv"),
            "no questions in split test: it has dev, no",
        ),
        (("dev/birds_dev.csv", "val/birds_val.csv"), "it has dev, val, no test/<subject>_test.csv"),
        (("my_test.jsonl",), "split test must lie in test.jsonl: found my_test.jsonl"),
        (("dev.jsonl",), "has no questions in split test: it has dev.jsonl, no test.jsonl"),
    ],
)
def test_a_split_that_is_elsewhere_is_pointed_at(
    tmp_path: Path, files: tuple[str, ...], says: str
) -> None:
    for name in files:
        put(tmp_path / "q" / name, ROWS)
    said = refusal(tmp_path / "q")
    assert says in said and said.startswith(str(tmp_path / "q"))
    is_there = any("test" in name.lower() for name in files) and "final" not in files[0]
    assert ("has no questions" in said) != is_there


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    file = put(tmp_path / "q/test/birds_test.csv", b"\n \n")
    assert refusal(tmp_path / "q") == (
        f"{tmp_path / 'q'} has no questions in split test: no row in {file}"
    )


# Rows


def test_what_a_row_has_instead_of_choices_is_said(tmp_path: Path) -> None:
    record = {"question": "Who?", "options": ["a", "b"], "answer_idx": 0}
    file = put(tmp_path / "q.jsonl", json.dumps(record).encode())
    said = refusal(file)
    assert said == f"{file}:1: has no choices and no answer: it has question, options, answer_idx"


@pytest.mark.parametrize(
    ("answers", "is_warned"),
    [([1, 2, 1], True), ([1, 0, 1], False), (["B", "C"], False), ([1], False), ([2, "A", 1], True)],
)
def test_answers_by_number_that_seem_to_count_from_1_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, answers: list[object], is_warned: bool
) -> None:
    rows = [
        {"question": f"{i}?", "choices": list("abc"), "answer": a} for i, a in enumerate(answers)
    ]
    file = put(tmp_path / "q.jsonl", "\n".join(map(json.dumps, rows)).encode())
    assert len(read(file)) == len(answers)
    assert ("if they count from 1, every answer here is wrong" in caplog.text) == is_warned


@pytest.mark.parametrize(
    ("n_questions", "n_repeats", "n_same", "is_warned"),
    [(2, 1, 0, True), (2, 0, 1, True), (10, 0, 2, False), (10, 1, 2, True), (2, 0, 0, False)],
)
def test_questions_and_choices_that_stand_twice_are_counted_above_a_fifth(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    n_questions: int,
    n_repeats: int,
    n_same: int,
    is_warned: bool,
) -> None:
    rows = [
        {"question": f"{max(i - n_repeats, 0)}?", "choices": ["a", "b", "c"], "answer": "A"}
        for i in range(n_questions)
    ]
    for row in rows[n_questions - n_same :]:
        row["choices"] = ["a", "a", "b"]
    file = put(tmp_path / "q.jsonl", "\n".join(map(json.dumps, rows)).encode())
    warn_of_repeats(read(file))
    said = f"of {n_questions} questions of {file}, {n_repeats} repeat another and {n_same} have a"
    assert (said in caplog.text) == is_warned == bool(caplog.records)
