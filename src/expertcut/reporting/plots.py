"""Every figure, as data and as PNG and SVG; matplotlib is imported when one is drawn.

Figures as PNG and SVG, the same bytes each time; matplotlib is imported when one is drawn. Colours
are those of Okabe and Ito, which the colour-blind tell apart; markers differ too, and where colours
repeat lines are dashed and markers hollow, so that a figure can be read in grey.

Figures as data: the page draws them from JSON, matplotlib from the same, CSV has every number.
Colours are Okabe and Ito's for series and viridis for maps, which the colour-blind tell apart.
"""

import io
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from expertcut.reporting.tables import Cell, Column, Table, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":")
_DPI = 150
_SPREAD = 0.012  # of the width, between criteria that stand at one size
Array = np.ndarray[Any, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLOURMAP = "viridis"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "#767676"
_MOST_TICKS = 24
_LONGEST = 40  # characters of a category's name


@dataclass(frozen=True)
class Point:
    """A value with its interval."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class PointSeries:
    """Points under one name."""

    name: str
    points: Sequence[Point]


def curves(
    name: str, series: Sequence[PointSeries], base: Point | None, labels: tuple[str, str]
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
    left: tuple[str, Sequence[PointSeries]],
    right: tuple[str, Sequence[PointSeries]],
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


def _figure(width: float, height: float, panels: int) -> "tuple[Canvas, tuple[Any, ...]]":
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


def _files(name: str, figure: "Canvas") -> dict[str, bytes]:
    import matplotlib

    found = {}
    # A fixed salt and no date: else the same figure would have other bytes each time.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            stream = BytesIO()
            figure.savefig(stream, format=ending, dpi=_DPI, metadata=metadata)
            found[f"{name}.{ending}"] = stream.getvalue()
    return found


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


def draw(figure: Figure) -> dict[str, bytes]:
    """PNG and SVG by their endings."""
    from matplotlib.figure import Figure as Canvas

    found = {}
    with _style(figure.key):
        canvas = Canvas(figsize=_size(figure), layout="constrained", dpi=_DPI)
        axes = canvas.add_subplot()
        if isinstance(figure, Heat):
            _heat(canvas, axes, figure)
        else:
            _curves(axes, figure)
        axes.set_title(printable(figure.title), fontsize="medium", loc="left")
        # No date and no version: the same figure has the same bytes each time.
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            stream = io.BytesIO()
            canvas.savefig(stream, format=ending, metadata=metadata)
            found[ending] = stream.getvalue()
    return found


def colour_stops() -> list[str]:
    """The map's colours from low to high, as `#rrggbb`."""
    import matplotlib
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in matplotlib.colormaps[COLOURMAP](np.linspace(0, 1, 64))]


@contextmanager
def _style(key: str) -> Iterator[None]:
    import matplotlib

    settings: Any = {
        "svg.hashsalt": key,
        "svg.fonttype": "none",  # text stays text
        "text.parse_math": False,  # a subject may be called $x$
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A name in a script that the font lacks shows as boxes in the PNG, and whole in the SVG.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _size(figure: Figure) -> tuple[float, float]:
    """Inches."""
    if isinstance(figure, Heat):
        most = max(len(values) for values in figure.rows)
        return min(14.0, 3.0 + 0.11 * most), min(12.0, 1.8 + 0.11 * len(figure.rows))
    if figure.is_flat:
        return 7.5, 1.6 + 0.3 * len(figure.categories)
    return 7.5, 3.8


def _heat(canvas: "Canvas", axes: "Axes", figure: Heat) -> None:
    import matplotlib
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    most = max(len(values) for values in figure.rows)
    padded_LE = np.full((len(figure.rows), most), np.nan)
    for layer, values in enumerate(figure.rows):
        padded_LE[layer, : len(values)] = values
        # Behind the cells, seen where there is no number.
        place = (figure.first - 0.5, layer - 0.5)
        axes.add_patch(Rectangle(place, len(values), 1, fc="white", ec="#9a9a9a", hatch="////",
                                 linewidth=0, zorder=0))  # fmt: skip
    image = axes.imshow(
        np.ma.masked_invalid(padded_LE),
        cmap=matplotlib.colormaps[COLOURMAP],
        vmin=figure.low,
        vmax=figure.high,
        interpolation="none",
        aspect="auto",
        extent=(figure.first - 0.5, figure.first + most - 0.5, len(figure.rows) - 0.5, -0.5),
        zorder=1,
    )
    axes.set_xlabel(printable(figure.across))
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    bar = canvas.colorbar(image, ax=axes, extend=_extend(figure), shrink=0.9)
    bar.ax.yaxis.set_major_formatter(lambda value, _: format(value, _spec(figure)))
    axes.annotate(f"hatched: {figure.undefined}", (1, 1.01), xycoords="axes fraction", ha="right",
                  va="bottom", fontsize="small", color=_GREY)  # fmt: skip


def _spec(figure: Figure) -> str:
    """Ends of an axis may be fractions even where values are whole."""
    return ",.0f" if figure.column.spec == ",d" else figure.column.spec


def _extend(figure: Heat) -> str:
    found = np.concatenate(figure.rows)
    with np.errstate(invalid="ignore"):
        below, above = bool((found < figure.low).any()), bool((found > figure.high).any())
    return {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]


def _curves(axes: "Axes", figure: Curves) -> None:
    places = np.arange(len(figure.categories), dtype=float)
    drawn = [its for its in figure.series if not its.is_reference]
    for number, its in enumerate(drawn):
        shift = (number - (len(drawn) - 1) / 2) * (0.5 / max(len(drawn), 1))
        _series(axes, places + (shift if figure.is_flat else 0), its, number, figure.is_flat)
    for its in figure.series:
        if its.is_reference:
            pair = (its.values, places) if figure.is_flat else (places, its.values)
            axes.plot(*pair, color=_GREY, linestyle="--", label=printable(its.name))
    _label(axes, figure)
    if len(figure.series) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize="small")


def _series(axes: "Axes", places: Any, its: Series, number: int, is_flat: bool) -> None:
    values = _numbers(its.values)
    bars: dict[str, Any] = {}
    if its.low:
        ends = np.stack([values - _numbers(its.low), _numbers(its.high) - values])
        # Rounding may leave an end on the wrong side.
        bars["xerr" if is_flat else "yerr"] = np.maximum(ends, 0)
    axes.errorbar(
        *((values, places) if is_flat else (places, values)),
        **bars,
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        linestyle="none" if is_flat else "-",
        markersize=4,
        linewidth=1.2,
        elinewidth=0.9,
        capsize=2,
        label=printable(its.name),
    )


def _label(axes: "Axes", figure: Curves) -> None:
    names = [shortened(category) for category in figure.categories]
    step = 1 if figure.is_flat else -(-len(names) // _MOST_TICKS)
    ticks = range(0, len(names), step)
    value, category = (axes.xaxis, axes.yaxis) if figure.is_flat else (axes.yaxis, axes.xaxis)
    category.set_ticks(list(ticks), [names[i] for i in ticks])
    value.set_major_formatter(lambda number, _: format(number, _spec(figure)))
    value.set_label_text(printable(figure.column.name))
    value.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    if figure.is_flat:
        axes.set_ylim(len(names) - 0.4, -0.6)
    else:
        category.set_label_text(printable(figure.across))
    if figure.zero is not None:
        line = axes.axvline if figure.is_flat else axes.axhline
        line(figure.zero, color=_GREY, linewidth=1, zorder=0)


def shortened(text: str) -> str:
    """A name that fits beside a figure, harmless."""
    plain = printable(text)
    return plain if len(plain) <= _LONGEST else plain[: _LONGEST - 1] + "…"


def _numbers(values: tuple[float | None, ...]) -> Any:
    return np.array([np.nan if value is None else value for value in values], dtype=float)
