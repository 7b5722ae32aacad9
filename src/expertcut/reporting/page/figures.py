"""Figures as data: the page draws them from JSON, matplotlib from the same, CSV has every number.

Colours are Okabe and Ito's for series and viridis for maps, which the colour-blind tell apart.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from expertcut.reporting.tables import Cell, Column, Table, printable

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Heat:
    """A map of layers × something, a row per layer; NaN is what `undefined` says.

    Colours reach from `low` to `high`; what lies outside has the colour of that end.
    """

    key: str
    title: str
    note: str
    rows: tuple[Array, ...]
    column: Column
    across: str = "expert"
    first: int = 0
    low: float = 0.0
    high: float = 1.0
    undefined: str = "never chosen"

    def table(self) -> Table:
        """One row per cell, in full precision."""
        cells: list[list[Cell]] = [
            [layer, self.first + i, None if math.isnan(value) else float(value)]
            for layer, values in enumerate(self.rows)
            for i, value in enumerate(values)
        ]
        columns = (Column("layer"), Column(self.across), Column(self.column.name))
        return Table(self.title, columns, cells)

    def as_json(self) -> dict[str, Any]:
        """What the page draws."""
        return {
            "kind": "heat",
            "title": self.title,
            "rows": [rounded(values) for values in self.rows],
            "name": self.column.name,
            "spec": self.column.spec,
            "across": self.across,
            "first": self.first,
            "low": self.low,
            "high": self.high,
            "undefined": self.undefined,
        }


@dataclass(frozen=True)
class Series:
    """A value per category, with an interval or a spread; None where there is none.

    A reference is what the others are to be compared with: a line, no points.
    """

    name: str
    values: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    is_reference: bool = False


@dataclass(frozen=True)
class Curves:
    """Series over categories; lying (`is_flat`), each category is a row with its name."""

    key: str
    title: str
    note: str
    across: str
    categories: tuple[str, ...]
    series: tuple[Series, ...]
    column: Column
    is_flat: bool = False
    zero: float | None = None

    def table(self) -> Table:
        """One row per category and series, in full precision."""
        rows: list[list[Cell]] = []
        for its in self.series:
            nothing = (None,) * len(self.categories)
            ends = zip(its.low or nothing, its.high or nothing, strict=True)
            found = zip(self.categories, its.values, ends, strict=True)
            rows += [[category, its.name, value, *end] for category, value, end in found]
        names = (self.across, "series", self.column.name, "low", "high")
        return Table(self.title, tuple(map(Column, names)), rows)

    def as_json(self) -> dict[str, Any]:
        """What the page draws."""
        return {
            "kind": "curves",
            "title": self.title,
            "across": self.across,
            "categories": [printable(category) for category in self.categories],
            "series": [
                {
                    "name": printable(its.name),
                    "values": rounded(its.values),
                    "low": rounded(its.low),
                    "high": rounded(its.high),
                    "reference": its.is_reference,
                }
                for its in self.series
            ],
            "name": self.column.name,
            "spec": self.column.spec,
            "flat": self.is_flat,
            "zero": self.zero,
        }


Figure = Heat | Curves


def spread(name: str, mean_X: Array, std_X: Array) -> Series:
    """A mean with one standard deviation to either side."""
    low_X, high_X = mean_X - std_X, mean_X + std_X
    return Series(name, tuple(mean_X.tolist()), tuple(low_X.tolist()), tuple(high_X.tolist()))


def span(rows: Iterable[Array]) -> tuple[float, float]:
    """Least and largest of what is defined, never equal; 0 and 1 where nothing is."""
    found = np.concatenate([np.ravel(values) for values in rows])
    found = found[~np.isnan(found)]
    if not len(found):
        return 0.0, 1.0
    low, high = float(found.min()), float(found.max())
    return (low, high) if low < high else (low, low + (abs(low) or 1.0))


def rounded(values: Iterable[float | None]) -> list[float | None]:
    """Six digits, as many as a page shows; None where there is no number."""
    return [
        None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
        for value in values
    ]
