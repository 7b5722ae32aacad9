"""A table as data, and its forms: rich for people, Markdown, CSV; text that is never markup."""

import csv
import io
import re
import shlex
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any

from expertcut.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Group

Cell = str | int | float | None
# What CommonMark lets a backslash stand before, but for a point in a number or behind a word, a
# hyphen in a name and a colon before a space, which mean nothing.
_PUNCTUATION = re.compile(
    r"(?!(?<=\d)\.(?=\d)|(?<=[a-z%)])\.(?=\s|$)|(?<=\w)-(?=\w)|:(?=\s))([!-/:-@\[-`{-~])"
)
_ESCAPES = {char: f"\\{char}" for char in string.punctuation}
_ESCAPES |= {char: char for char in ",;%'\"/+=()"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_AT_WORDS: Any = {"break_long_words": False, "break_on_hyphens": False}
_LABEL = 10  # columns before a labelled paragraph
_UNIT = r"(?<=\d) (?=(?:[kMG]B?|B)\b)"
_UNBROKEN = rf" (?=[%…])|(?<=…) |{_UNIT}|(?<= )'[^']*'"  # an interval, a size, a quoted path
_WORDS = re.compile(rf"(?!{_UNIT})(?<!…) (?!…)").split  # an interval is one, and a size


@dataclass(frozen=True)
class Column:
    """A column's heading and how its numbers are written, as a format specification."""

    name: str
    spec: str = ""
    is_wide: bool = False  # a terminal shows it only with --wide; files and pages show it always


def columns(text: str) -> tuple[Column, ...]:
    """Columns from `name; name::spec; …`; those behind ` | ` are wide."""
    parts = zip(text.split(" | "), (False, True), strict=False)
    named = [(*name.partition("::")[::2], wide) for p, wide in parts for name in p.split("; ")]
    return tuple(Column(*column) for column in named)


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

    def narrow(self, *, unless: bool) -> "Table":
        """Without its wide columns, unless these are asked for."""
        kept = [i for i, column in enumerate(self.columns) if unless or not column.is_wide]
        heads = tuple(self.columns[i] for i in kept)
        return replace(self, columns=heads, rows=[[row[i] for i in kept] for row in self.rows])

    def are_numbers(self) -> list[bool]:
        """Of each column, whether it holds numbers."""
        return [
            any(isinstance(row[i], int | float) for row in self.rows)
            for i in range(len(self.columns))
        ]


def as_rich(table: Table, width: int = 200, spell: Callable[[str], str] = str) -> "Group":
    """For a terminal: title, table, note; text of files is never taken as markup.

    A table that would have to break words is a list of names and values, row by row.
    """
    from rich.box import HEAVY_HEAD
    from rich.console import Group  # not to print an error
    from rich.table import Table as RichTable
    from rich.text import Text

    heads = [spell(printable(column.name)) for column in table.columns]
    rows, are_numbers = [list(map(spell, row)) for row in table.texts()], table.are_numbers()
    widths, rich = _widths([heads, *rows], width - 3 * len(heads) - 1), RichTable(box=HEAVY_HEAD)
    if sum(widths) + 3 * len(heads) + 1 > width:
        rows = [[*pair] for row in rows for pair in (*zip(heads, row, strict=True), ("", ""))]
        heads, are_numbers, widths = ["", ""], [False] * 2, _widths([["", ""], *rows], width - 2)
        widths[1] = max(1, min(widths[1], width - 2 - widths[0]))
        rich = RichTable(box=None, show_header=False, pad_edge=False)
    for head, is_number, own in zip(heads, are_numbers, widths, strict=True):
        justify: Any = "right" if is_number else "left"
        rich.add_column(Text(head), justify=justify, overflow="fold", width=own)
    for row in rows:
        rich.add_row(*map(Text, row))
    note = [Text(spell(printable(table.note)))] if table.note else []
    return Group(Text(spell(printable(table.title)), style="bold"), rich, *note, Text())


def _widths(rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """Columns as wide as their texts, or narrower to fit into `room`, but never than a word."""
    columns = [*zip(*rows, strict=True)]
    most = [max(map(len, column)) for column in columns]
    widths = [max(len(word) for cell in column for word in _WORDS(cell)) for column in columns]
    for _ in range(min(room, sum(most)) - sum(widths)):
        missing = [m - w for m, w in zip(most, widths, strict=True)]
        widths[missing.index(max(missing))] += 1
    return widths


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
    for row in table.rows:  # None is written as nothing
        writer.writerow([printable(cell) if isinstance(cell, str) else cell for cell in row])
    return stream.getvalue()


def save_table(file: Path, table: Table, figure: Mapping[str, bytes]) -> None:
    """Writes a table as CSV, with the files of its figure beside it."""
    for name, content in {file.name: as_csv(table).encode(), **figure}.items():
        write_atomically(file.with_name(name), content)


def _text(cell: Cell, column: Column) -> str:
    if cell is None:
        return "–"
    return printable(cell) if isinstance(cell, str) else signed(cell, column.spec)


def signed(number: float, spec: str) -> str:
    """A formatted number; the sign of a negative one is a minus."""
    return re.sub("^-", "−", format(number, spec))


def labelled(label: str, text: str) -> str:
    """A paragraph of at most 80 columns behind a label; without one a plain paragraph."""
    return wrapped(f"{label:<{_LABEL}}{printable(text)}" if label else printable(text), 80)


def wrapped(text: str, width: int) -> str:
    """The lines of a text, and paragraphs behind a label, broken at words; a command as in sh."""
    lines = []
    for line in text.replace("\n" + " " * _LABEL, " ").split("\n"):
        label = re.match(rf"[a-z ]{{{_LABEL}}}(?<= )(?=\S)", line)
        after = " " * _LABEL if label and "  " in label[0] else ""
        end = " \\" if line[len(after) :].startswith("expertcut ") else ""
        whole = re.sub(_UNBROKEN, lambda found: found[0].replace(" ", "\0"), line)
        parts = TextWrapper(width - len(end), "", after, **_AT_WORDS).wrap(whole)
        lines.append(f"{end}\n".join(parts).replace("\0", " "))
    return "\n".join(lines)


def next_lines(*commands: Sequence[str]) -> list[str]:
    """Commands to go on with, each on a line of its own that a shell takes."""
    texts = [printable(shlex.join(["expertcut", *words])) for words in commands]
    labels = ("next", *[""] * len(texts))
    return [f"{label:<{_LABEL}}{text}" for label, text in zip(labels, texts, strict=False)]


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
    return Markdown(_PUNCTUATION.sub(lambda found: _ESCAPES[found[1]], one_line(str(value))))


def code(text: str) -> Markdown:
    """A code span; backticks, which would end it, are left out."""
    return Markdown(f"`{one_line(text).replace('`', '')}`")


def markdown_table(table: Table) -> Markdown:
    """A table's columns and rows, without its title and note; empty without rows."""
    if not table.rows:
        return Markdown("")
    rules: list[str] = [Markdown("---:" if number else "---") for number in table.are_numbers()]
    rows = [[column.name for column in table.columns], rules, *table.texts()]
    return Markdown("\n".join("| " + " | ".join(map(escaped, row)) + " |" for row in rows))
