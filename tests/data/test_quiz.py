"""Prompts as lm-evaluation-harness writes them, every way of storing questions, every refusal."""

import csv
import json
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pyarrow as pa
import pytest
import yaml
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from pyarrow import parquet

from expertcut.data import Question, Quiz, Selection, load_quiz, prompt, round_robin, without
from expertcut.data.questions import LETTERS
from expertcut.errors import QuizError
from tests.conftest import COUNTS, SUBJECTS

TEMPLATES = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
AWKWARD = (
    Question("green_birds", "  Which?\r\nI or II\n", ("None", "\nb", " c ", '"d", e'), 0, 0),
    Question("green_birds", "{{ choices[0] }} {% raw %}", ("1", "0", "True", "null"), 2, 1),
    Question("green_birds", "\tÄ – 鳥\u2028?", ("| A |", "Answer: B", "<b>", "x\\n"), 3, 2),
)


# Prompts


def harness_task(subject: str, dev: Sequence[Question], test: Sequence[Question]) -> Any:
    """The harness' own task of a subject, its data set replaced by these questions."""
    config = yaml.safe_load((TEMPLATES / "_default_template_yaml").read_text())
    config |= yaml.safe_load((TEMPLATES / f"mmlu_{subject}.yaml").read_text())
    del config["include"]
    rows = {
        split: Dataset.from_list(
            [{"question": q.text, "choices": list(q.choices), "answer": q.answer} for q in qs]
        )
        for split, qs in (("dev", dev), ("test", test))
    }
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: DatasetDict(rows)})


def assert_the_harness_writes_the_same(quiz: Quiz, subject: str, as_subject: str) -> None:
    questions, shots = quiz.questions[subject], quiz.shots_by_subject[subject]
    task = harness_task(as_subject, shots, questions)
    docs = list(task.test_docs())
    assert len(docs) == len(questions) > 0
    for doc, question in zip(docs, questions, strict=True):
        asked = replace(question, subject=as_subject)
        assert prompt(asked, shots) == task.fewshot_context(doc, len(shots))
        letters = task.doc_to_choice(doc)
        assert LETTERS[asked.answer] == letters[task.doc_to_target(doc)]
        assert task.config.target_delimiter == " "  # so that " A" is what is scored


@pytest.mark.parametrize("shots", [0, 1, 5])
def test_prompts_are_those_of_the_harness(quiz_folder: Path, shots: int):
    quiz = load_quiz(Selection(str(quiz_folder), shots=shots))
    assert_the_harness_writes_the_same(quiz, "green_birds", "high_school_us_history")


def test_prompts_of_awkward_rows_are_those_of_the_harness():
    subject = AWKWARD[0].subject
    quiz = Quiz("q", None, "test", 3, {subject: AWKWARD}, {subject: AWKWARD})
    assert_the_harness_writes_the_same(quiz, subject, "anatomy")


@pytest.mark.parametrize(
    ("split", "subjects", "what"),
    [
        ("test", ("college_mathematics",), "None"),  # \r\n in its shots
        ("val", ("college_mathematics", "college_physics"), "\r\n"),
        ("test", ("high_school_us_history",), "\n"),
    ],
)
def test_real_prompts_are_those_of_the_harness(
    real_mmlu: Path, split: str, subjects: tuple[str, ...], what: str
):
    quiz = load_quiz(Selection(str(real_mmlu), split, subjects=subjects, limit=80))
    for subject in subjects:
        assert_the_harness_writes_the_same(quiz, subject, subject)
    assert any(what in text for q in quiz for text in (q.text, *q.choices))


def test_every_subject_is_introduced_as_the_harness_does(real_mmlu: Path):
    quiz = load_quiz(Selection(str(real_mmlu), shots=0, limit=1))
    for question in quiz:
        config = yaml.safe_load((TEMPLATES / f"mmlu_{question.subject}.yaml").read_text())
        assert config["dataset_name"] == question.subject
        assert prompt(question).startswith(config["description"] + question.text.strip())
    assert len(quiz) == 57


def test_a_prompt_goes_on_to_the_26th_choice():
    question = Question("birds", "Which?", tuple(f"<{i}>" for i in range(26)), 25, 0)
    lines = prompt(question, [question]).splitlines()
    assert [f"{letter}. <{i}>" for i, letter in enumerate(string.ascii_uppercase)] == lines[3:29]
    assert lines[29] == "Answer: Z"
    assert lines[-1] == "Answer:"


# Three ways to store the same


def content(quiz: Quiz) -> object:
    """All that may differ between two quizzes but id and revision."""
    return quiz.split, quiz.shots, dict(quiz.questions), dict(quiz.shots_by_subject)


def all_questions(folder: Path) -> dict[str, list[Question]]:
    """Every split, with the awkward questions in the test split."""
    splits = {
        split: list(load_quiz(Selection(str(folder), split, 0))) for split in ("dev", "val", "test")
    }
    rows = [replace(q, row=q.row + COUNTS["test"]) for q in AWKWARD]
    birds = [q for q in splits["test"] if q.subject == AWKWARD[0].subject]
    others = [q for q in splits["test"] if q.subject != AWKWARD[0].subject]
    return {**splits, "test": [*birds, *rows, *others]}


def write_csv(folder: Path, splits: dict[str, list[Question]]) -> Path:
    for split, questions in splits.items():
        (folder / split).mkdir(parents=True)
        for subject in {q.subject for q in questions}:
            file = folder / split / f"{subject}_{split}.csv"
            with file.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream)
                for q in questions:
                    if q.subject == subject:
                        writer.writerow([q.text, *q.choices, "ABCD"[q.answer]])
    return folder


def write_jsonl(folder: Path, splits: dict[str, list[Question]]) -> Path:
    folder.mkdir()
    for split, questions in splits.items():
        lines = []
        for i, q in enumerate(questions):
            answer: object = q.answer if i % 2 else "ABCD"[q.answer]
            row = {"subject": q.subject, "question": q.text, "choices": q.choices, "answer": answer}
            lines.append(json.dumps(row, ensure_ascii=bool(i % 3)))
        (folder / f"{split}.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_parquet(folder: Path, splits: dict[str, list[Question]], *, is_whole: bool) -> Path:
    """As `cais/mmlu` on the hub: one configuration with all subjects, or one per subject."""
    subjects = sorted({q.subject for q in splits["test"]})
    configs = {"all": subjects} if is_whole else {subject: [subject] for subject in subjects}
    header = []
    for config, its_subjects in configs.items():
        files = []
        for split, questions in splits.items():
            name = "validation" if split == "val" else split
            rows = [
                {
                    "question": q.text,
                    "subject": q.subject,
                    "choices": list(q.choices),
                    "answer": q.answer,
                }
                for q in questions
                if q.subject in its_subjects
            ]
            (folder / config).mkdir(parents=True, exist_ok=True)
            parquet.write_table(pa.Table.from_pylist(rows), folder / config / f"{name}-0.parquet")
            files.append({"split": name, "path": f"{config}/{name}-*"})
        header.append({"config_name": config, "data_files": files})
    readme = f"---\n{yaml.safe_dump({'configs': header})}---\n"
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


WAYS: dict[str, Callable[[Path, dict[str, list[Question]]], Path]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "parquet, one configuration": lambda f, s: write_parquet(f, s, is_whole=True),
    "parquet, one per subject": lambda f, s: write_parquet(f, s, is_whole=False),
}


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("way", WAYS)
def test_the_same_questions_are_read_however_they_are_stored(
    quiz_folder: Path, tmp_path: Path, way: str
):
    written = all_questions(quiz_folder)
    folder = WAYS[way](tmp_path / "stored", written)
    for split, questions in written.items():
        quiz = load_quiz(Selection(str(folder), split))
        assert list(quiz) == questions
        assert list(quiz.questions) == sorted(SUBJECTS)
        for subject, shots in quiz.shots_by_subject.items():
            assert list(shots) == [q for q in written["dev"] if q.subject == subject]
    assert content(load_quiz(Selection(str(folder), "validation"))) == content(
        load_quiz(Selection(str(folder), "val"))
    )
    none = [q for q in load_quiz(Selection(str(folder))) if "None" in q.choices]
    assert len(none) == 1  # pandas would have made it NaN


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("name", ["default", None], ids=["named default", "not named"])
def test_a_data_set_of_one_configuration_takes_subjects_from_its_rows(
    quiz_folder: Path, tmp_path: Path, name: str | None
):
    written = all_questions(quiz_folder)
    folder = write_parquet(tmp_path / "stored", written, is_whole=True)
    readme = folder / "README.md"
    assert "config_name: all" in readme.read_text()
    if name is None:
        readme.unlink()
        (folder / "all" / "dev-0.parquet").unlink()  # by its name it would be of `validation`
    else:
        readme.write_text(readme.read_text().replace("config_name: all", f"config_name: {name}"))
    for split in ("val", "test"):
        quiz = load_quiz(Selection(str(folder), split, shots=0 if name is None else 5))
        assert list(quiz) == written[split]
        assert len(quiz.questions) == 3


def test_subjects_and_limit_select(quiz_folder: Path):
    whole = load_quiz(Selection(str(quiz_folder)))
    few = load_quiz(Selection(str(quiz_folder), subjects=(SUBJECTS[2], SUBJECTS[0]), limit=3))
    assert list(few.questions) == [SUBJECTS[0], SUBJECTS[2]]
    for subject, questions in few.questions.items():
        assert questions == whole.questions[subject][:3]
        assert few.shots_by_subject[subject] == whole.shots_by_subject[subject]
    assert len(few) == 6 < len(whole) == 3 * COUNTS["test"]
    assert [q.row for q in whole.questions[SUBJECTS[1]]] == list(range(COUNTS["test"]))


def test_shots_are_the_first_of_dev(quiz_folder: Path):
    five = load_quiz(Selection(str(quiz_folder), shots=5)).shots_by_subject
    for n_shots in range(5):
        quiz = load_quiz(Selection(str(quiz_folder), shots=n_shots))
        assert quiz.shots_by_subject == {s: shots[:n_shots] for s, shots in five.items()}


def write_lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(text: str = "Which?", n_choices: int = 4, answer: object = 0, **more: object) -> Any:
    choices = [f"choice {i}" for i in range(n_choices)]
    return {"question": text, "choices": choices, "answer": answer, **more}


def test_one_file_is_whichever_split_is_asked_and_dev_lies_beside_it(tmp_path: Path):
    file = write_lines(tmp_path / "pub_quiz.jsonl", row("one?"), row("two?", subject="beer"))
    write_lines(tmp_path / "dev.jsonl", row("shot?"), row("small beer?", subject="beer"))
    for split in ("test", "val", "mine"):
        quiz = load_quiz(Selection(str(file), split, shots=1))
        assert quiz.split == split
        assert [(q.subject, q.text) for q in quiz] == [("beer", "two?"), ("pub_quiz", "one?")]
        assert quiz.shots_by_subject["pub_quiz"][0].text == "shot?"
        assert quiz.shots_by_subject["beer"][0].text == "small beer?"


def test_a_question_may_have_2_to_26_choices_answered_by_index_or_letter(tmp_path: Path):
    rows = [
        row(f"{n} {i}?", n, answer)
        for n in range(2, 27)
        for i, answer in enumerate((n - 1, string.ascii_uppercase[n - 1], " A "))
    ]
    quiz = load_quiz(Selection(str(write_lines(tmp_path / "q.jsonl", *rows)), shots=0))
    assert len(quiz) == 75
    for question in quiz:
        n, i = question.text.rstrip("?").split()
        assert len(question.choices) == int(n)
        assert question.answer == (0 if i == "2" else int(n) - 1)


# Refusals

FAULTY_LINES = {
    "{": "not JSON: Expecting property name enclosed in double quotes",
    "[1, 2]": "must be a JSON object",
    '"text"': "must be a JSON object",
    "9" * 5000: "not JSON",
    "[" * 100_000: "not JSON",
    json.dumps({"question": "Which?"}): "no choices and no answer",
    json.dumps(row(answer=None)): "no answer",
    json.dumps(row(text="  \n")): "question is empty",
    json.dumps({**row(), "question": 3}): "question is 3",
    json.dumps({**row(), "choices": "ABCD"}): "list of texts",
    json.dumps({**row(), "choices": ["a", None]}): "list of texts",
    json.dumps({**row(), "choices": ["a", float("nan")]}): "NaN is not a number in JSON",
    json.dumps({**row(), "choices": ["a", " ", "c", ""]}): "choice B, D is missing",
    json.dumps(row(n_choices=1)): "1 choices, must be 2 to 26",
    json.dumps(row(n_choices=27)): "27 choices, must be 2 to 26",
    json.dumps(row(answer=4)): "answer must be A-D or 0-3, not 4",
    json.dumps(row(answer=-1)): "not -1",
    json.dumps(row(answer="E")): "not 'E'",
    json.dumps(row(answer="a")): "not 'a'",
    json.dumps(row(answer="AB")): "not 'AB'",
    json.dumps(row(answer="")): "not ''",
    json.dumps(row(answer=True)): "not True",
    json.dumps(row(answer=1.0)): "not 1.0",
    json.dumps(row(subject=["birds"])): "subject is",
    json.dumps(row(subject=7)): "subject is 7",
    json.dumps(row(text="\ud83d")): "lone surrogate",
}


@pytest.mark.parametrize("line", FAULTY_LINES, ids=lambda line: line[:60])
def test_a_faulty_json_row_names_its_file_and_line(tmp_path: Path, line: str):
    file = tmp_path / "birds.jsonl"
    good = json.dumps(row())
    file.write_text(f"{good}\n\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(QuizError) as refused:
        load_quiz(Selection(str(file), shots=0))
    assert str(refused.value).startswith(f"{file}:3: ")
    assert FAULTY_LINES[line] in str(refused.value)
    file.write_text(f"{good}\n\n{good}\n{good}\n", encoding="utf-8")
    assert len(load_quiz(Selection(str(file), shots=0))) == 3  # else anything would be refused


FAULTY_CSV = {
    b"Which?,a,b,c,d\n": (3, "5 fields"),
    b"Which?,a,b,c,d,A,B\n": (3, "7 fields"),
    b"\n \r\n\nWhich?,a,b,c,d,E\n": (6, "not 'E'"),  # blank lines are counted
    b"Which?,a,b,c,d,E\n": (3, "answer must be A-D, not 'E'"),
    b"Which?,a,b,c,d,\n": (3, "not ''"),
    b"Which?,a,,c,d,A\n": (3, "choice B is missing"),
    b" ,a,b,c,d,A\n": (3, "question is empty"),
    b'"Which?"!,a,b,c,d,A\n': (3, "not a CSV row"),
    b'"Which?,a,b,c,d,A\n': (4, "not a CSV row"),
    b'"Which?\n",a,b,c,d,E\n': (4, "not 'E'"),  # the row ends there
    b"Wh\xefch?,a,b,c,d,A\n": (3, "not UTF-8"),
    b"Which?," + b"a" * 200_000 + b",b,c,d,A\n": (3, "field larger than"),
}


@pytest.mark.parametrize("faulty", FAULTY_CSV, ids=lambda line: repr(line[:30]))
def test_a_faulty_csv_row_names_its_file_and_line(tmp_path: Path, faulty: bytes):
    file = tmp_path / "test" / "birds_test.csv"
    file.parent.mkdir()
    good = b'"Which\r\none?",a,b,c,d,A\n'  # two lines
    file.write_bytes(good + faulty + good.replace(b'"', b"").replace(b"\r\n", b" "))
    number, reason = FAULTY_CSV[faulty]
    with pytest.raises(QuizError) as refused:
        load_quiz(Selection(str(tmp_path), shots=0))
    assert str(refused.value).startswith(f"{file}:{number}: ")
    assert reason in str(refused.value)


def test_a_line_that_is_no_utf8_is_named_however_far_down_it_is(tmp_path: Path):
    lines = [json.dumps(row(f"{i}? " + "x" * 500)).encode() for i in range(100)]
    lines[87] = b'{"question": "\xff"}'
    file = tmp_path / "birds.jsonl"
    file.write_bytes(b"\r\n".join(lines))
    with pytest.raises(QuizError, match=r"birds\.jsonl:88: not UTF-8"):
        load_quiz(Selection(str(file), shots=0))
    rows = [b'"%d?\n",a,b,c,d,A\n' % i + b"x" * 500 + b"?,a,b,c,d,A\n" for i in range(100)]
    rows[87] = b"\xff,a,b,c,d,A\n"
    csv_file = tmp_path / "csv" / "test" / "birds_test.csv"
    csv_file.parent.mkdir(parents=True)
    csv_file.write_bytes(b"".join(rows))
    with pytest.raises(QuizError, match=rf"birds_test\.csv:{3 * 87 + 1}: not UTF-8"):
        load_quiz(Selection(str(tmp_path / "csv"), shots=0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"subjects": ("green_birds", "red_cats")}, "no subject red_cats in split test: it has"),
        ({"split": "train"}, "no questions in split train"),
        ({"shots": 6}, "6 shots asked but split dev of green_birds has 5"),
        ({"shots": -1}, "--shots must be at least 0"),
        ({"limit": 0}, "--limit at least 1"),
    ],
)
def test_what_a_quiz_does_not_have_is_refused(
    quiz_folder: Path, changes: dict[str, Any], reason: str
):
    with pytest.raises(QuizError, match=reason):
        load_quiz(replace(Selection(str(quiz_folder)), **changes))


@pytest.mark.parametrize("quiz", ["nowhere", "./no/where", "/no", "a/b/c", "birds.jsonl"])
def test_a_quiz_that_is_nowhere_is_refused_by_name(quiz: str):
    with pytest.raises(QuizError, match=f"no such quiz: {quiz}"):
        load_quiz(Selection(quiz))


def test_a_folder_without_a_quiz_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("no questions")
    with pytest.raises(QuizError, match="holds no quiz"):
        load_quiz(Selection(str(tmp_path)))


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        ({"subject": 0}, {"subject": 7}, "subject is 7"),
        ({"subject": []}, {"subject": ["birds"]}, "subject is"),
        ({"answer": 3}, {"answer": 4}, "answer must be"),
        ({"choices": ["a", "b"]}, {"choices": ["a", None]}, "list of texts"),
        ({"question": "Which?"}, {"question": None}, "no question"),
    ],
)
def test_a_faulty_row_of_a_data_set_is_named(
    tmp_path: Path, good: dict[str, object], bad: dict[str, object], reason: str
):
    header = {"config_name": "all", "data_files": [{"split": "test", "path": "*.parquet"}]}
    readme = f"---\n{yaml.safe_dump({'configs': [header]})}---\n"
    for name, rows in (("good", [good, good]), ("bad", [good, bad])):
        folder = tmp_path / name
        folder.mkdir()
        table = pa.Table.from_pylist([row("Which?", 4) | more for more in rows])
        parquet.write_table(table, folder / "rows.parquet")
        (folder / "README.md").write_text(readme, encoding="utf-8")
    assert len(load_quiz(Selection(str(tmp_path / "good"), shots=0))) == 2
    with pytest.raises(QuizError, match=rf"all/test row 1: .*{reason}"):
        load_quiz(Selection(str(tmp_path / "bad"), shots=0))


# Which question is which


def test_a_content_hash_is_of_text_and_choices_alone():
    question = Question("birds", "Which?", ("a", "b"), 0, 0)
    same = [
        replace(question, subject="clocks"),
        replace(question, answer=1),
        replace(question, row=5),
        replace(question, text=" Which?\n"),
    ]
    assert {q.content_hash for q in same} == {question.content_hash}
    other = [
        replace(question, text="which?"),
        replace(question, choices=("b", "a")),
        replace(question, choices=("a", "b", "c")),
        replace(question, choices=("ab",)),
        replace(question, choices=("a", " b")),
        Question("birds", "Which?a", ("b",), 0, 0),
    ]
    assert len({q.content_hash for q in [question, *other]}) == 7
    assert all(set(q.content_hash) <= set("0123456789abcdef") for q in other)
    assert all(len(q.content_hash) == 16 for q in other)


def test_a_subjects_hash_changes_with_anything_that_is_asked(quiz_folder: Path):
    quiz = load_quiz(Selection(str(quiz_folder), shots=2))
    subject = SUBJECTS[0]
    first, *rest = quiz.questions[subject]
    shot = quiz.shots_by_subject[subject]
    variants = [
        [first, *rest],
        [*rest, first],
        [replace(first, answer=(first.answer + 1) % 4), *rest],
        [replace(first, text=first.text + " "), *rest],
        rest,
    ]
    hashes = {replace(quiz, questions={subject: tuple(v)}).content_hash(subject) for v in variants}
    hashes |= {
        replace(quiz, shots_by_subject={subject: s}).content_hash(subject)
        for s in (shot[:1], shot[::-1], ())
    }
    assert len(hashes) == 8
    elsewhere = replace(quiz, id="another", split="val", revision="1234")
    assert elsewhere.content_hash(subject) == quiz.content_hash(subject)


def test_without_drops_every_copy_and_what_is_left_empty(quiz_folder: Path):
    quiz = load_quiz(Selection(str(quiz_folder), shots=1))
    birds, clocks, trees = (quiz.questions[s] for s in SUBJECTS)
    copy = replace(birds[1], subject=SUBJECTS[1], row=99)
    quiz = replace(quiz, questions={**quiz.questions, SUBJECTS[1]: (*clocks, copy)})
    left = without(quiz, {birds[1].content_hash, *(q.content_hash for q in trees)})
    assert left.questions == {SUBJECTS[0]: (birds[0], *birds[2:]), SUBJECTS[1]: clocks}
    assert list(left.shots_by_subject) == list(left.questions)
    assert (left.id, left.split, left.shots) == (quiz.id, quiz.split, quiz.shots)
    assert content(without(quiz, set())) == content(quiz)


def test_round_robin_takes_the_first_of_every_subject_then_the_second():
    def questions(subject: str, n: int) -> tuple[Question, ...]:
        return tuple(Question(subject, f"{i}?", ("a", "b"), 0, i) for i in range(n))

    sizes = {"a": 1, "b": 4, "c": 2}
    quiz = Quiz("q", None, "val", 0, {s: questions(s, n) for s, n in sizes.items()}, {})
    quiz = replace(quiz, shots_by_subject=dict.fromkeys(sizes, ()))
    turns = ["a0", "b0", "c0", "b1", "c1", "b2", "b3"]
    for n in range(10):
        taken = round_robin(quiz, n)
        assert sorted(f"{q.subject}{q.row}" for q in taken) == sorted(turns[:n])
        for its in taken.questions.values():
            assert [q.row for q in its] == sorted(q.row for q in its)


# The real MMLU


@pytest.fixture(scope="module")
def whole_mmlu(real_mmlu: Path) -> dict[str, Quiz]:
    return {split: load_quiz(Selection(str(real_mmlu), split)) for split in ("test", "val")}


def test_the_whole_mmlu_is_read(real_mmlu: Path, whole_mmlu: dict[str, Quiz]):
    test, val = whole_mmlu["test"], whole_mmlu["val"]
    dev = load_quiz(Selection(str(real_mmlu), "dev", shots=0))
    assert (len(test), len(val), len(dev)) == (14_042, 1_531, 285)
    assert list(test.questions) == list(val.questions) == list(dev.questions)
    assert len(test.questions) == 57
    assert sum(choice == "None" for q in test for choice in q.choices) > 0
    cells = [(q, text) for quiz in (test, val, dev) for q in quiz for text in (q.text, *q.choices)]
    assert len({id(q) for q, text in cells if "\n" in text}) == 1_285
    assert len({id(q) for q, text in cells if "\r\n" in text}) == 4
    assert sum(text == "None" for _, text in cells) == 12


def test_repeats_in_mmlu_are_found_by_their_hash(whole_mmlu: dict[str, Quiz]):
    test, val = whole_mmlu["test"], whole_mmlu["val"]
    copies: dict[str, list[Question]] = {}
    for question in test:
        copies.setdefault(question.content_hash, []).append(question)
    repeated = {key: qs for key, qs in copies.items() if len(qs) > 1}
    assert len(test) - len(copies) == 105
    pairs = Counter(frozenset(q.subject for q in qs) for qs in repeated.values())
    assert pairs[frozenset({"clinical_knowledge", "college_medicine"})] == 78
    for qs in repeated.values():  # no two different questions share a hash
        assert len({(q.text.strip(), q.choices) for q in qs}) == 1
    assert sum(q.content_hash in copies for q in val) == 27
