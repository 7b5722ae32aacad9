"""What a page is made of: sections of text, facts, tables and figures."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from expertcut.reporting.plots import Curves, Heat
from expertcut.reporting.tables import Table


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    words: str


@dataclass(frozen=True)
class Facts:
    """Names and what they are, one under another."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Lines:
    """A file's lines, as they stand there."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """Parts behind a title, shown when it is opened, and always on paper."""

    title: str
    parts: "Sequence[Part]"


@dataclass(frozen=True)
class Explorer:
    """Linked maps of all experts, the chosen one's figures and subjects, and a table of all.

    `data` is what the page's script reads, `table` every expert with every figure.
    """

    key: str
    maps: tuple[Heat, ...]
    data: dict[str, Any]
    table: Table


Part = Text | Facts | Lines | Table | Heat | Curves | Folded | Explorer


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it; `key` is its place in the page."""

    key: str
    title: str
    parts: Sequence[Part]


def figures_of(parts: Sequence[Part]) -> "list[Heat | Curves]":
    """Every figure, those of explorers and behind titles too."""
    found: list[Heat | Curves] = []
    for part in parts:
        if isinstance(part, Heat | Curves):
            found.append(part)
        elif isinstance(part, Explorer):
            found += part.maps
        elif isinstance(part, Folded):
            found += figures_of(part.parts)
    return found


def key_of(name: str, used: Collection[str]) -> str:
    """A name for files and places in the page, of plain letters, that is not used yet."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "run"
    keys = [plain, *(f"{plain}-{n}" for n in range(2, len(used) + 3))]
    return next(key for key in keys if key not in used)
