"""Three ways to store questions, each read row by row; every fault names its file and line."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expertcut.errors import QuizError
from expertcut.quiz.prompts import LETTERS
from expertcut.quiz.questions import Question

_HENDRYCKS_COLUMNS = 6  # question, A, B, C, D, letter


def read_csv(path: Path, subject: str) -> list[Question]:
    """Questions of one Hendrycks file: no header, the right letter in the last column."""
    # 1,285 rows of MMLU have newlines inside a cell and 4 have \r\n: newline="" keeps them.
    # utf-8, not utf-8-sig: a byte order mark would be part of what every other tool asks.
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file, strict=True)
            return [
                _csv_question(row, subject, index, f"{path}:{reader.line_num}")
                for index, row in enumerate(reader)
            ]
    except UnicodeDecodeError as error:
        raise QuizError(f"{path}:{_line_of(path, error.start)}: not UTF-8 text") from None
    except csv.Error as error:
        raise QuizError(f"{path}:{reader.line_num}: not a CSV row: {error}") from None
    except OSError as error:
        raise QuizError(f"{path}: cannot be read: {error.strerror}") from None


def _csv_question(row: list[str], subject: str, index: int, where: str) -> Question:
    if len(row) != _HENDRYCKS_COLUMNS:
        raise QuizError(f"{where}: {len(row)} fields where question, 4 choices and a letter make 6")
    return make_question(subject, row[0], row[1:5], row[5], index, where)


def read_jsonl(path: Path, default_subject: str) -> list[Question]:
    """Questions of one JSON-lines file: `question`, `choices`, `answer`, optional `subject`."""
    rows: dict[str, int] = {}
    questions = []
    for where, record in _json_lines(path):
        subject = subject_of(record, default_subject, where)
        index = rows.get(subject, 0)
        questions.append(record_question(record, subject, index, where))
        rows[subject] = index + 1
    return questions


def subject_of(record: dict[str, Any], default_subject: str, where: str) -> str:
    """The row's own subject, where it names one."""
    subject = record.get("subject") or default_subject
    if not isinstance(subject, str):
        raise QuizError(f"{where}: subject is {subject!r}, must be text")
    return subject


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise QuizError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise QuizError(f"{where}: not UTF-8 text") from None
        except (ValueError, RecursionError) as error:
            raise QuizError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise QuizError(f"{where}: a {type(record).__name__}, must be a JSON object")
        yield where, record


def record_question(record: dict[str, Any], subject: str, index: int, where: str) -> Question:
    """A question from a mapping with `question`, `choices` and `answer` (index or letter)."""
    missing = [key for key in ("question", "choices", "answer") if record.get(key) is None]
    if missing:
        raise QuizError(f"{where}: has no {' and no '.join(missing)}")
    choices = record["choices"]
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise QuizError(f"{where}: choices must be a list of texts")
    if not isinstance(record["question"], str):
        raise QuizError(f"{where}: question is {record['question']!r}, must be text")
    return make_question(subject, record["question"], choices, record["answer"], index, where)


def make_question(
    subject: str, text: str, choices: list[str], answer: object, index: int, where: str
) -> Question:
    """A checked question.

    Raises:
        QuizError: what is wrong with the row, after `where`.
    """
    if not text.strip():
        raise QuizError(f"{where}: the question is empty")
    if not 2 <= len(choices) <= len(LETTERS):
        raise QuizError(f"{where}: {len(choices)} choices, must be 2 to {len(LETTERS)}")
    empty = [LETTERS[i] for i, choice in enumerate(choices) if not choice.strip()]
    if empty:
        raise QuizError(f"{where}: choice {', '.join(empty)} is missing")
    for part in (subject, text, *choices):
        if any("\ud800" <= char <= "\udfff" for char in part):
            raise QuizError(f"{where}: a lone surrogate, which is no character")
    return Question(subject, text, tuple(choices), _answer_id(answer, choices, where), index)


def _answer_id(answer: object, choices: list[str], where: str) -> int:
    letters = LETTERS[: len(choices)]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in letters:
        return letters.index(answer.strip())
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise QuizError(
        f"{where}: answer {answer!r} must be one of {letters[0]}-{letters[-1]} or "
        f"0-{len(letters) - 1}"
    )


def _line_of(path: Path, offset: int) -> int:
    # The decoder counts from the start of its own buffer, so the first bad byte is sought anew.
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start
    return content.count(b"\n", 0, offset) + 1
