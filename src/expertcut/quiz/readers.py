"""Three ways to store questions, each read row by row; every fault names its file and line."""

import csv
import errno
import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from expertcut.documents.reading import open_file, parse_json
from expertcut.errors import QuizError
from expertcut.quiz.prompts import LETTERS
from expertcut.quiz.questions import Question

_HENDRYCKS_COLUMNS = 6  # question, A, B, C, D, letter
_MAX_BYTES = 512 << 20  # of one file: the largest of MMLU, which only trains, has a third
_MAX_CHARACTERS = 1 << 20  # of a question or choice; csv itself takes an eighth of it
_MAX_SUBJECT = 200  # of the 255 that a file system leaves to a chunk's name


def read_csv(path: Path, subject: str) -> list[Question]:
    """Questions of one Hendrycks file: no header, the right letter in the last column."""
    # 1,285 rows of MMLU have newlines inside a cell and 4 have \r\n: newline="" keeps them.
    # utf-8, not utf-8-sig: a byte order mark would be part of what every other tool asks.
    try:
        with _opened(path) as binary, io.TextIOWrapper(binary, "utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            return [
                _csv_question(row, subject, index, f"{path}:{reader.line_num}")
                for index, row in enumerate(reader)
            ]
    except UnicodeDecodeError:
        raise QuizError(f"{path}:{_line_of(path)}: not UTF-8 text") from None
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
    for where, record in json_lines(path):
        subject = subject_of(record, default_subject, where)
        index = rows.get(subject, 0)
        questions.append(record_question(record, subject, index, where))
        rows[subject] = index + 1
    return questions


def subject_of(record: dict[str, Any], default_subject: str, where: str) -> str:
    """The row's own subject, where it names one."""
    subject = record.get("subject") or default_subject
    if not isinstance(subject, str):
        raise QuizError(f"{where}: subject is {_short(subject)}, must be text")
    return subject


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """File and line, and the JSON object there; empty lines are passed over.

    Raises:
        QuizError: the file cannot be read, or a line is no JSON object.
    """
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _json_record(line, where)
    except OSError as error:
        raise QuizError(f"{path}: cannot be read: {error.strerror}") from None


def _json_record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except UnicodeDecodeError:
        raise QuizError(f"{where}: not UTF-8 text") from None
    except ValueError as error:
        raise QuizError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise QuizError(f"{where}: a {type(record).__name__}, must be a JSON object")
    return record


def _opened(path: Path) -> BinaryIO:
    """A file of questions.

    Raises:
        OSError: it cannot be read, or is larger than any.
    """
    file = open_file(path)
    if file.seek(0, io.SEEK_END) > _MAX_BYTES:
        file.close()
        raise OSError(errno.EFBIG, f"More than {_MAX_BYTES >> 20} MiB", str(path))
    file.seek(0)
    return file


def record_question(record: dict[str, Any], subject: str, index: int, where: str) -> Question:
    """A question from a mapping with `question`, `choices` and `answer` (index or letter)."""
    missing = [key for key in ("question", "choices", "answer") if record.get(key) is None]
    if missing:
        raise QuizError(f"{where}: has no {' and no '.join(missing)}")
    choices = record["choices"]
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise QuizError(f"{where}: choices must be a list of texts")
    if not isinstance(record["question"], str):
        raise QuizError(f"{where}: question is {_short(record['question'])}, must be text")
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
        if (fault := _fault(part)) is not None:
            raise QuizError(f"{where}: {fault}")
    if _is_long(subject):
        raise QuizError(
            f"{where}: a subject of {len(subject)} characters, whose files could not be named: "
            "shorten it"
        )
    return Question(subject, text, tuple(choices), _answer_id(answer, choices, where), index)


def _short(value: object) -> str:
    return repr(value)[:60]


def _answer_id(answer: object, choices: list[str], where: str) -> int:
    letters = LETTERS[: len(choices)]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in letters:
        return letters.index(answer.strip())
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise QuizError(
        f"{where}: answer {_short(answer)} must be one of {letters[0]}-{letters[-1]} or "
        f"0-{len(letters) - 1}"
    )


def _fault(text: str) -> str | None:
    """Why no model can be asked this."""
    if "\0" in text:
        return "a NUL byte, which is no text"
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        return "a lone surrogate, which is no character"
    if len(text) > _MAX_CHARACTERS:
        return f"a text of {len(text):,} characters, must be at most {_MAX_CHARACTERS:,}"
    return None


@lru_cache
def _is_long(subject: str) -> bool:
    return len(quote(subject)) > _MAX_SUBJECT


def _line_of(path: Path) -> int:
    # The decoder counts from the start of its own buffer, so the first bad byte is sought anew.
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0
