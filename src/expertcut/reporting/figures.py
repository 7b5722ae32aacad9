"""Figures as PNG and SVG, the same bytes each time; matplotlib is imported when one is drawn.

Colours are those of Okabe and Ito, which the colour-blind tell apart; markers differ too, and where
colours repeat lines are dashed and markers hollow, so that a figure can be read in grey.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":")
_DPI = 150
_SPREAD = 0.012  # of the width, between criteria that stand at one size


@dataclass(frozen=True)
class Point:
    """A value with its interval."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """Points under one name."""

    name: str
    points: Sequence[Point]


def curves(
    name: str, series: Sequence[Series], base: Point | None, labels: tuple[str, str]
) -> dict[str, bytes]:
    """One line per series, intervals as bars, the base as a level with its own.

    Series are moved sideways a little, so that intervals at one x can be told apart.
    """
    figure, (axes,) = _figure(8.5, 4.8, 1)
    xs = [p.x for s in series for p in s.points] + ([base.x] if base else [])
    width = (max(xs) - min(xs)) or 1.0 if xs else 1.0
    if base is not None:
        axes.axhspan(base.low, base.high, color="0.9", zorder=0)
        axes.axhline(base.y, color="0.4", linewidth=1, zorder=1)
        axes.plot([base.x], [base.y], "*", color="0.2", markersize=11, label="unedited", zorder=4)
    for number, (its, style) in enumerate(zip(series, styles(len(series)), strict=True)):
        shift = (number - (len(series) - 1) / 2) * _SPREAD * width
        _bars(axes, its.points, shift, {**style, "label": its.name})
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize="small")
    return _files(name, figure)


def _bars(axes: Any, points: Sequence[Point], shift: float, style: dict[str, Any]) -> None:
    errors = [_bar(p.y, p) for p in points]
    axes.errorbar(
        [p.x + shift for p in points],
        [p.y for p in points],
        yerr=list(zip(*errors, strict=True)),
        capsize=2.5,
        linewidth=1.2,
        elinewidth=0.9,
        markersize=5,
        zorder=3,
        **style,
    )


def _bar(value: float, point: Point) -> tuple[float, float]:
    """How far the interval reaches below and above; its end at 0 or 1 may be rounded past it."""
    return max(value - point.low, 0.0), max(point.high - value, 0.0)


def forests(
    name: str,
    left: tuple[str, Sequence[Series]],
    right: tuple[str, Sequence[Series]],
    marks: Sequence[float],
) -> dict[str, bytes]:
    """Two panels with a row per name: on the left a value with its interval, on the right several.

    On the left a series is a row; on the right a series has a point per row, in the rows' order,
    `marks` being a reference for each of these series.
    """
    names = [series.name for series in left[1]]
    figure, (first, second) = _figure(9.0, 1.6 + 0.36 * len(names), 2)
    for row, series in enumerate(left[1]):
        for point in series.points:
            bar = [[end] for end in _bar(point.x, point)]
            first.errorbar([point.x], [row], xerr=bar, fmt="o", color=_COLOURS[0], capsize=2.5)
    first.axvline(0, color="0.4", linewidth=1)
    first.set_xlim(-1.08, 1.08)
    first.set_xticks([-1, -0.5, 0, 0.5, 1])
    second.locator_params(axis="x", nbins=5)
    first.set_yticks(range(len(names)), names)
    offsets = [(i - (len(right[1]) - 1) / 2) * 0.22 for i in range(len(right[1]))]
    for series, style, offset, mark in zip(
        right[1], styles(len(right[1])), offsets, marks, strict=True
    ):
        rows = [row + offset for row in range(len(series.points))]
        dots = {**style, "linestyle": "none", "markersize": 5, "label": series.name}
        second.plot([point.x for point in series.points], rows, **dots)
        second.axvline(mark, color=style["color"], linestyle=":", linewidth=1)
    second.set_yticks(range(len(names)), [""] * len(names))
    for axes, (label, _) in ((first, left), (second, right)):
        axes.set_xlabel(label)
        axes.set_ylim(len(names) - 0.5, -0.5)
    second.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    return _files(name, figure)


def styles(n: int) -> list[dict[str, Any]]:
    """So many looks, each with its own colour and marker, or dashes where these repeat."""
    pairs = [
        (dash, colour, marker)
        for dash, (colour, marker) in product(_DASHES, zip(_COLOURS, _MARKERS, strict=True))
    ]
    return [
        {"linestyle": dash, "color": colour, "marker": marker}
        | ({} if dash == _DASHES[0] else {"markerfacecolor": "white"})
        for dash, colour, marker in (pairs[i % len(pairs)] for i in range(n))
    ]


def _figure(width: float, height: float, panels: int) -> "tuple[Figure, tuple[Any, ...]]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panes = tuple(figure.add_subplot(1, panels, i + 1) for i in range(panels))
    for axes in panes:
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, panes


def _files(name: str, figure: "Figure") -> dict[str, bytes]:
    import matplotlib

    found = {}
    # A fixed salt and no date: else the same figure would have other bytes each time.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            stream = BytesIO()
            figure.savefig(stream, format=ending, dpi=_DPI, metadata=metadata)
            found[f"{name}.{ending}"] = stream.getvalue()
    return found
