"""Text of quizzes, models and people in Markdown, where none of it is markup."""

import re

from expertcut.reporting.tables import Table

# What CommonMark lets a backslash stand before, but for a point in a number or behind a word, a
# hyphen in a name and a colon before a space, which mean nothing.
_PUNCTUATION = re.compile(
    r"(?!(?<=\d)\.(?=\d)|(?<=[a-z%)])\.(?=\s|$)|(?<=\w)-(?=\w)|:(?=\s))([!-/:-@\[-`{-~])"
)
_HARMLESS = set(",;%'\"/+=()")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


class Markdown(str):
    """Markup that was made here, and is not escaped again."""

    __slots__ = ()


def printable(text: str) -> str:
    """One line, without what a terminal, YAML or a reader's eye could be fooled by."""
    shown = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(shown.split())


def escaped(value: object) -> Markdown:
    """A value as text: no markup, HTML, link or formula comes of it."""
    if isinstance(value, Markdown):
        return value
    return Markdown(_PUNCTUATION.sub(_escape, printable(str(value))))


def _escape(found: re.Match[str]) -> str:
    char = found[1]
    return char if char in _HARMLESS else _ENTITIES.get(char, f"\\{char}")


def code(text: str) -> Markdown:
    """A code span; backticks, which would end it, are left out."""
    return Markdown(f"`{printable(text).replace('`', '')}`")


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
