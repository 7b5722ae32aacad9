"""Readers of questions from CSV, JSON lines and data set rows; errors name file and line."""

import codecs
import csv
import errno
import io
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from expertcut.data.questions import LETTERS, Question
from expertcut.errors import QuizError
from expertcut.files import MARK_BYTES, open_file, parse_json, wide_encoding

_MAX_BYTES = 512 << 20  # of one file; the largest of MMLU has a third
_MAX_CHARACTERS = 1 << 20  # of a question or choice
_MAX_SUBJECT = 200  # of the 255 in a file name
_MAX_KEYS = 12  # listed in an error
_BOM = "\ufeff"  # as Excel and Notepad write it
_CHOICE_COLUMN = re.compile(r"(?:(?:option|choice)[ _-])?([a-z])")
_MUST = "must have question, A, B, … and answer"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Columns:
    """The columns of a CSV file; `subject` is None if the file name is the subject."""

    n_columns: int
    question: int
    choices: tuple[int, ...]
    answer: int
    subject: int | None = None


_HENDRYCKS = _Columns(6, 0, (1, 2, 3, 4), 5)


def read_csv(path: Path, default_subject: str) -> list[Question]:
    """Questions of a CSV file, with a header (`question`, `A`, `B`, …, `answer`) or without.

    Without a header, the columns are those of Hendrycks: question, A, B, C, D, letter. Further
    columns are ignored, except `subject`. Blank lines and a leading byte order mark are skipped.

    Raises:
        QuizError: the file cannot be read, or a row is invalid.
    """
    questions: list[Question] = []
    rows: dict[str, int] = {}
    columns, is_first = _HENDRYCKS, True
    for where, cells in _csv_rows(path):
        if is_first and _is_header(cells):
            columns, is_first = _named_columns(cells, where), False
            continue
        subject = default_subject
        if columns.subject is not None and columns.subject < len(cells):
            subject = cells[columns.subject].strip() or default_subject
        index = rows.get(subject, 0)
        try:
            questions.append(_csv_question(cells, columns, subject, index, where))
        except QuizError as error:
            if is_first and len(cells[-1].strip()) > 1:
                raise QuizError(f"{error}; if this is a header, it {_MUST}") from None
            raise
        rows[subject], is_first = index + 1, False
    return questions


def _csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Position (file:line) and cells of each row that is not blank."""
    # 1,285 rows of MMLU have newlines inside a cell and 4 have \r\n: newline="" keeps them.
    try:
        with _open(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                if cells and (len(cells) > 1 or cells[0].strip()):
                    where = f"{path}:{reader.line_num}"
                    if cells[0].startswith(_BOM):
                        logger.warning("%s: a byte order mark inside the file is asked too", where)
                    yield where, cells
    except UnicodeDecodeError:
        raise QuizError(f"{path}:{_line_of(path)}: not UTF-8 text: save it as UTF-8") from None
    except csv.Error as error:
        raise QuizError(f"{path}:{reader.line_num}: not a CSV row: {error}") from None
    except OSError as error:
        raise QuizError(f"{path}: cannot be read: {error.strerror}") from None


def _column_names(cells: list[str]) -> list[str]:
    return [cell.strip().casefold() for cell in cells]


def _is_header(cells: list[str]) -> bool:
    names = _column_names(cells)
    return "question" in names and ("answer" in names or {"a", "b"} <= set(_choice_columns(names)))


def _choice_columns(names: list[str]) -> list[str]:
    """The letters of the choice columns: `A`, `option_a`, `Choice A`."""
    return [found[1] for name in names if (found := _CHOICE_COLUMN.fullmatch(name))]


def _named_columns(cells: list[str], where: str) -> _Columns:
    names = _column_names(cells)
    places = {name: [i for i, n in enumerate(names) if n == name] for name in set(names)}
    for name in ("question", "answer", "subject"):
        n_found = len(places.get(name, ()))
        if n_found > 1 or (n_found == 0 and name != "subject"):
            raise QuizError(f"{where}: a header with {n_found} columns {name}: it {_MUST}")
    letters = _choice_columns(names)
    wanted = list("abcdefghijklmnopqrstuvwxyz"[: len(letters)])
    if sorted(letters) != wanted or len(letters) < 2:
        found = ", ".join(letters).upper() or "none"
        raise QuizError(f"{where}: a header whose choices are {found}: it {_MUST}")
    by_letter = {f[1]: i for i, n in enumerate(names) if (f := _CHOICE_COLUMN.fullmatch(n))}
    return _Columns(
        n_columns=len(cells),
        question=places["question"][0],
        choices=tuple(by_letter[letter] for letter in wanted),
        answer=places["answer"][0],
        subject=places["subject"][0] if "subject" in places else None,
    )


def _csv_question(
    cells: list[str], columns: _Columns, subject: str, index: int, where: str
) -> Question:
    if len(cells) != columns.n_columns:
        wanted = f"the header has {columns.n_columns}"
        if columns is _HENDRYCKS:
            wanted = "question, 4 choices and a letter make 6"
        raise QuizError(f"{where}: {len(cells)} fields where {wanted}")
    choices = [cells[i] for i in columns.choices]
    answer = cells[columns.answer]
    return make_question(subject, cells[columns.question], choices, answer, index, where)


def read_jsonl(path: Path, default_subject: str) -> list[Question]:
    """Questions of a JSON-lines file: `question`, `choices`, `answer`, optional `subject`."""
    rows: dict[str, int] = {}
    questions, answers = [], []
    for where, record in json_lines(path):
        subject = subject_of(record, default_subject, where)
        index = rows.get(subject, 0)
        questions.append(record_question(record, subject, index, where))
        answers.append(record["answer"])
        rows[subject] = index + 1
    warn_if_counted_from_one(str(path), answers)
    return questions


def subject_of(record: dict[str, Any], default_subject: str, where: str) -> str:
    """The subject of a row, or the default."""
    subject = record.get("subject") or default_subject
    if not isinstance(subject, str):
        raise QuizError(f"{where}: subject is {_short(subject)}, must be text")
    return subject


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Position (file:line) and JSON object of each line that is not blank.

    Raises:
        QuizError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    where = f"{path}:{number}"
                    yield where, _json_record(text, where)
    except OSError as error:
        raise QuizError(f"{path}: cannot be read: {error.strerror}") from None


def _json_record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except UnicodeDecodeError:
        raise QuizError(f"{where}: not UTF-8 text: save it as UTF-8") from None
    except ValueError as error:
        raise QuizError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise QuizError(f"{where}: a {type(record).__name__}, must be a JSON object")
    return record


def _open(path: Path) -> BinaryIO:
    """Opens a file of questions.

    Raises:
        OSError: unreadable or too large.
        QuizError: UTF-16 or UTF-32 text.
    """
    file = open_file(path)
    encoding = wide_encoding(file.read(MARK_BYTES))
    if file.seek(0, io.SEEK_END) > _MAX_BYTES or encoding is not None:
        file.close()
        if encoding is not None:
            raise QuizError(f"{path}: {encoding} text, must be UTF-8: save it as UTF-8")
        raise OSError(errno.EFBIG, f"More than {_MAX_BYTES >> 20} MiB", str(path))
    file.seek(0)
    return file


def record_question(record: dict[str, Any], subject: str, index: int, where: str) -> Question:
    """A question from a mapping with `question`, `choices` and `answer` (index or letter)."""
    missing = [key for key in ("question", "choices", "answer") if record.get(key) is None]
    if missing:
        there = ", ".join(str(key)[:40] for key in list(record)[:_MAX_KEYS])
        raise QuizError(
            f"{where}: has no {' and no '.join(missing)}: it has {there or 'nothing at all'}"
        )
    choices = record["choices"]
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise QuizError(f"{where}: choices must be a list of texts")
    if not isinstance(record["question"], str):
        raise QuizError(f"{where}: question is {_short(record['question'])}, must be text")
    return make_question(subject, record["question"], choices, record["answer"], index, where)


def make_question(
    subject: str, text: str, choices: list[str], answer: object, index: int, where: str
) -> Question:
    """A validated question.

    Raises:
        QuizError: an invalid row; the message begins with `where`.
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
    numbers = "" if isinstance(answer, str) else f" or 0-{len(letters) - 1}"
    raise QuizError(
        f"{where}: answer {_short(answer)} must be one of {letters[0]}-{letters[-1]}{numbers}"
    )


def warn_if_counted_from_one(where: str, answers: Iterable[object]) -> None:
    """Warns if answers are numbers and none of them is 0, the first choice."""
    numbers = [a for a in answers if isinstance(a, int)]
    if len(numbers) > 1 and 0 not in numbers:
        logger.warning(
            "%s: none of its %d answers by number is 0, which is the first choice: if they count "
            "from 1, every answer here is wrong",
            *(where, len(numbers)),
        )


def _fault(text: str) -> str | None:
    """Why a text cannot be part of a prompt; None if it can."""
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
    # The decoder counts from the start of its buffer, so its position is not that in the file.
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0
