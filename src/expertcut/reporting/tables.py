"""A table as data, and its forms: rich for people, Markdown, CSV; text that is never markup."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

Cell = str | int | float | None
# What CommonMark lets a backslash stand before, but for a point in a number or behind a word, a
# hyphen in a name and a colon before a space, which mean nothing.
_PUNCTUATION = re.compile(
    r"(?!(?<=\d)\.(?=\d)|(?<=[a-z%)])\.(?=\s|$)|(?<=\w)-(?=\w)|:(?=\s))([!-/:-@\[-`{-~])"
)
_HARMLESS = set(",;%'\"/+=()")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


@dataclass(frozen=True)
class Column:
    """A column's heading and how its numbers are written, as a format specification."""

    name: str
    spec: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under columns; `note` is a sentence below."""

    title: str
    columns: tuple[Column, ...]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def texts(self) -> list[list[str]]:
        """Every cell as a person reads it; nothing is a dash."""
        return [
            [_text(cell, column) for cell, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]


def as_rich(table: Table) -> Group:
    """For a terminal: title, table, note; text of files is never taken as markup."""
    rich = RichTable()
    for i, column in enumerate(table.columns):
        is_number = any(isinstance(row[i], int | float) for row in table.rows)
        rich.add_column(
            Text(printable(column.name)), justify="right" if is_number else "left", overflow="fold"
        )
    for row in table.texts():
        rich.add_row(*map(Text, row))
    note = [Text(printable(table.note))] if table.note else []
    return Group(Text(printable(table.title), style="bold"), rich, *note, Text())


def as_markdown(table: Table) -> str:
    """A GitHub table under a heading."""
    rows = [[c.name for c in table.columns], ["---"] * len(table.columns), *table.texts()]
    lines = ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows]
    parts = [f"### {_escaped(table.title)}", "\n".join(lines), _escaped(table.note)]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_csv(table: Table) -> str:
    """Full precision, one header line; nothing is an empty cell."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([printable(column.name) for column in table.columns])
    writer.writerows(map(_raw, row) for row in table.rows)
    return stream.getvalue()


def _raw(cell: Cell) -> str | int | float:
    if cell is None:
        return ""
    return printable(cell) if isinstance(cell, str) else cell


def _text(cell: Any, column: Column) -> str:
    if cell is None:
        return "–"
    text = format(cell, column.spec) if isinstance(cell, int | float) else str(cell)
    return printable(text)


def printable(text: str) -> str:
    """The text with everything that a terminal or page would obey replaced by �."""
    # A control character in a subject's name must not reach a terminal.
    return "".join(char if char.isprintable() else "�" for char in text)


def _escaped(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


class Markdown(str):
    """Markup that was made here, and is not escaped again."""

    __slots__ = ()


def one_line(text: str) -> str:
    """One line, without what a terminal, YAML or a reader's eye could be fooled by."""
    shown = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(shown.split())


def escaped(value: object) -> Markdown:
    """A value as text: no markup, HTML, link or formula comes of it."""
    if isinstance(value, Markdown):
        return value
    return Markdown(_PUNCTUATION.sub(_escape, one_line(str(value))))


def _escape(found: re.Match[str]) -> str:
    char = found[1]
    return char if char in _HARMLESS else _ENTITIES.get(char, f"\\{char}")


def code(text: str) -> Markdown:
    """A code span; backticks, which would end it, are left out."""
    return Markdown(f"`{one_line(text).replace('`', '')}`")


def markdown_table(table: Table) -> Markdown:
    """A table's columns and rows, without its title and note; empty without rows."""
    if not table.rows:
        return Markdown("")
    numbers = [
        any(isinstance(row[i], int | float) for row in table.rows)
        for i in range(len(table.columns))
    ]
    rows: list[list[str]] = [
        [column.name for column in table.columns],
        [Markdown("---:" if is_number else "---") for is_number in numbers],
        *table.texts(),
    ]
    return Markdown("\n".join("| " + " | ".join(map(escaped, row)) + " |" for row in rows))
