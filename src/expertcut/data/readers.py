"""Readers of questions from CSV, JSON lines and data set rows; errors name file and line."""

import codecs
import csv
import errno
import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from expertcut.data.questions import LETTERS, Question
from expertcut.errors import ExpertcutError, QuizError
from expertcut.files import MARK_BYTES, open_file, parse_json, wide_encoding

_MAX_BYTES = 512 << 20  # of one file; the largest of MMLU has a third
_MAX_CHARACTERS = 1 << 20  # of a question or choice
_MUST = "must have question, A, B, … and answer"
_HENDRYCKS = ["question", "A", "B", "C", "D", "answer"]  # the columns without a header

logger = logging.getLogger(__name__)


def read_csv(path: Path, default_subject: str) -> list[Question]:
    """Questions of a CSV file, with a header (`question`, `A`, `B`, …, `answer`) or without.

    Without a header, the columns are those of Hendrycks: question, A, B, C, D, letter. Further
    columns are ignored, except `subject`. Blank lines and a leading byte order mark are skipped.
    Raises QuizError: the file cannot be read, or a row is invalid.
    """
    questions: list[Question] = []
    n_rows, names = Counter[str](), list[str]()
    for where, cells in _csv_rows(path):
        is_first = not names
        if is_first and (names := _named_columns(cells, where)):
            continue
        names = names or _HENDRYCKS
        row = dict(zip(names, cells, strict=False))
        subject = row.get("subject", "").strip() or default_subject
        try:
            if len(cells) != len(names):
                wanted = f"the header has {len(names)}"
                if names is _HENDRYCKS:
                    wanted = "question, 4 choices and a letter make 6"
                raise QuizError(f"{where}: {len(cells)} fields where {wanted}")
            text, choices = row["question"], [row[letter] for letter in LETTERS if letter in row]
            index = n_rows[subject]
            questions.append(_make_question(subject, text, choices, row["answer"], index, where))
        except QuizError as error:
            if is_first and len(cells[-1].strip()) > 1:
                raise QuizError(f"{error}; if this is a header, it {_MUST}") from None
            raise
        n_rows[subject] += 1
    return questions


def _csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Position (file:line) and cells of each row that is not blank."""
    # 1,285 rows of MMLU have newlines inside a cell and 4 have \r\n: newline="" keeps them.
    try:
        with opened(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                if cells and (len(cells) > 1 or cells[0].strip()):
                    where = f"{path}:{reader.line_num}"
                    if cells[0].startswith("\ufeff"):
                        logger.warning("%s: a byte order mark inside the file is asked too", where)
                    yield where, cells
    except UnicodeDecodeError:
        # The decoder counts from the start of its buffer, so its position is not the file's.
        with opened(path) as lines:
            is_utf8 = (line == line.decode(errors="ignore").encode() for line in lines)
            number = next((n for n, is_sound in enumerate(is_utf8, start=1) if not is_sound), 0)
        raise QuizError(f"{path}:{number}: not UTF-8 text: save it as UTF-8") from None
    except csv.Error as error:
        raise QuizError(f"{path}:{reader.line_num}: not a CSV row: {error}") from None


def _named_columns(cells: list[str], where: str) -> list[str]:
    """The columns that a header names, choices as `A`, `B`, …; none if the row is not a header."""
    names = [cell.strip().casefold() for cell in cells]
    pattern = r"(?:(?:option|choice)[ _-])?([a-z])"  # `a`, `option_a`, `choice a`
    matches = [re.fullmatch(pattern, name) for name in names]
    names = [m[1].upper() if m else name for m, name in zip(matches, names, strict=True)]
    letters = sorted(match[1].upper() for match in matches if match)
    if "question" not in names or not ("answer" in names or {"A", "B"} <= {*letters}):
        return []
    for name in ("question", "answer", "subject"):
        n_found = names.count(name)
        if n_found > 1 or (n_found == 0 and name != "subject"):
            raise QuizError(f"{where}: a header with {n_found} columns {name}: it {_MUST}")
    if letters != list(LETTERS[: len(letters)]) or len(letters) < 2:
        found = ", ".join(letters) or "none"
        raise QuizError(f"{where}: a header whose choices are {found}: it {_MUST}")
    return names


def read_records(
    records: Iterable[tuple[str, dict[str, Any]]], name: str, subject: str, *, is_only: bool = False
) -> list[Question]:
    """Questions from positions and mappings; `subject` is the default, or with `is_only` of all."""
    n_rows = Counter[str]()
    questions, numbers = [], []
    for where, record in records:
        own = subject if is_only else record.get("subject") or subject
        if not isinstance(own, str):
            raise QuizError(f"{where}: subject is {own!r:.60}, must be text")
        if missing := [key for key in ("question", "choices", "answer") if record.get(key) is None]:
            there = ", ".join(str(key)[:40] for key in list(record)[:12])
            raise QuizError(
                f"{where}: has no {' and no '.join(missing)}: it has {there or 'nothing at all'}"
            )
        text, choices, answer = record["question"], record["choices"], record["answer"]
        if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
            raise QuizError(f"{where}: choices must be a list of texts")
        if not isinstance(text, str):
            raise QuizError(f"{where}: question is {text!r:.60}, must be text")
        questions.append(_make_question(own, text, choices, answer, n_rows[own], where))
        n_rows[own] += 1
        numbers += [answer] if isinstance(answer, int) else []
    if len(numbers) > 1 and 0 not in numbers:
        logger.warning(
            "%s: none of its %d answers by number is 0, which is the first choice: if they count "
            "from 1, every answer here is wrong",
            *(name, len(numbers)),
        )
    return questions


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Position (file:line) and JSON object (`question`, `choices`, …) of each line not blank."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text.strip():
                continue
            where = f"{path}:{number}"
            yield where, read_object(text, where)


def read_object(text: bytes, where: str, kind: type[ExpertcutError] = QuizError) -> dict[str, Any]:
    """The JSON object of a line; an error of the kind names the position."""
    try:
        record = parse_json(text)
    except UnicodeDecodeError:
        raise kind(f"{where}: not UTF-8 text: save it as UTF-8") from None
    except ValueError as error:
        raise kind(f"{where}: not JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(record, dict):
        raise kind(f"{where}: a {type(record).__name__}, must be a JSON object")
    return record


@contextmanager
def opened(
    path: Path, most_bytes: int = _MAX_BYTES, kind: type[ExpertcutError] = QuizError
) -> Iterator[BinaryIO]:
    """A file of UTF-8 text; an error of the kind says why it cannot be read."""
    try:
        with open_file(path) as file:
            if (encoding := wide_encoding(file.read(MARK_BYTES))) is not None:
                raise kind(f"{path}: {encoding} text, must be UTF-8: save it as UTF-8")
            if file.seek(0, io.SEEK_END) > most_bytes:
                raise OSError(errno.EFBIG, f"More than {most_bytes >> 20} MiB", str(path))
            file.seek(0)
            yield file
    except OSError as error:
        raise kind(f"{path}: cannot be read: {error.strerror}") from None


def _make_question(
    subject: str, text: str, choices: list[str], answer: object, index: int, where: str
) -> Question:
    if not text.strip():
        raise QuizError(f"{where}: the question is empty")
    if not 2 <= len(choices) <= len(LETTERS):
        raise QuizError(f"{where}: {len(choices)} choices, must be 2 to {len(LETTERS)}")
    if empty := [LETTERS[i] for i, choice in enumerate(choices) if not choice.strip()]:
        raise QuizError(f"{where}: choice {', '.join(empty)} is missing")
    for part in (subject, text, *choices):
        if "\0" in part:
            raise QuizError(f"{where}: a NUL byte, which is not text")
        if not part.isascii() and any("\ud800" <= char <= "\udfff" for char in part):
            raise QuizError(f"{where}: a lone surrogate, which is not a character")
        if len(part) > _MAX_CHARACTERS:
            most = f"must be at most {_MAX_CHARACTERS:,}"
            raise QuizError(f"{where}: a text of {len(part):,} characters, {most}")
    if len(quote(subject)) > 200:  # of the 255 in a file name
        raise QuizError(
            f"{where}: a subject of {len(subject)} characters, whose files could not be named: "
            "shorten it"
        )
    last, letter = len(choices) - 1, answer.strip() if isinstance(answer, str) else ""
    if len(letter) == 1 and letter in LETTERS[: last + 1]:
        answer = LETTERS.index(letter)
    elif not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer <= last:
        numbers = "" if isinstance(answer, str) else f" or 0-{last}"
        raise QuizError(f"{where}: answer must be A-{LETTERS[last]}{numbers}, not {answer!r:.60}")
    return Question(subject, text, tuple(choices), answer, index)
