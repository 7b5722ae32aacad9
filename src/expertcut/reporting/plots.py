"""All figures: as data for the page and CSV, and as PNG and SVG with the same bytes each time.

Matplotlib is imported only when a figure is drawn. Series have the colours of Okabe and Ito, maps
viridis; both are safe for colour-blind readers. Markers differ too, and where colours repeat,
lines are dashed and markers hollow.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from expertcut.reporting.tables import Cell, Column, Table, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Array = np.ndarray[Any, Any]
Values = tuple[float | None, ...]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLOURMAP = "viridis"
_GREY = "#767676"
_DPI = 150
_MAX_NAME = 40  # characters of a category's name
_LEGEND: dict[str, Any] = dict(
    loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize="small"
)


@dataclass(frozen=True)
class Heat:
    """A map with a row per `down`; NaN cells are hatched and explained by `undefined`."""

    key: str
    title: str
    note: str
    rows: tuple[Array, ...]
    column: Column
    across: str = "expert"
    first: int = 0
    low: float = 0.0  # colours reach from low to high; values outside have the colour of that end
    high: float = 1.0
    undefined: str = "never chosen"
    down: str = "layer"

    def table(self) -> Table:
        """One row per cell, in full precision."""
        cells: list[list[Cell]] = [
            [layer, self.first + i, None if math.isnan(value) else float(value)]
            for layer, values in enumerate(self.rows)
            for i, value in enumerate(values)
        ]
        names = (self.down, self.across, self.column.name)
        return Table(self.title, tuple(map(Column, names)), cells)

    def as_json(self) -> dict[str, Any]:
        """The data that the page's script draws."""
        return {
            "kind": "heat",
            "title": self.title,
            "rows": [rounded(values) for values in self.rows],
            "name": self.column.name,
            "spec": self.column.spec,
            **{
                key: getattr(self, key)
                for key in ("across", "down", "first", "low", "high", "undefined")
            },
        }


@dataclass(frozen=True)
class Series:
    """Values with intervals, one per category or at the numbers `x`; a reference is a bare line."""

    name: str
    values: Values
    low: Values = ()
    high: Values = ()
    is_reference: bool = False
    x: tuple[float, ...] = ()


def series_of(
    name: str,
    values: Iterable[float | None],
    ends: Sequence[tuple[float | None, float | None]],
    x: tuple[float, ...] = (),
) -> Series:
    """A series of values, each with the ends of its interval."""
    lows, highs = zip(*ends, strict=True) if ends else ((), ())
    return Series(name, tuple(values), lows, highs, x=x)


@dataclass(frozen=True)
class Curves:
    """Series over categories; if `is_flat`, a row per category instead of a column."""

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
        for series in self.series:
            nothing = (None,) * len(self.categories)
            ends = zip(series.low or nothing, series.high or nothing, strict=True)
            points = zip(self.categories, series.values, ends, strict=True)
            rows += [[category, series.name, value, *end] for category, value, end in points]
        names = (self.across, "series", self.column.name, "low", "high")
        return Table(self.title, tuple(map(Column, names)), rows)

    def as_json(self) -> dict[str, Any]:
        """The data that the page's script draws."""
        return {
            "kind": "curves",
            "title": self.title,
            "across": self.across,
            "categories": [printable(category) for category in self.categories],
            "series": [
                {
                    "name": printable(series.name),
                    **{key: rounded(getattr(series, key)) for key in ("values", "low", "high")},
                    "reference": series.is_reference,
                }
                for series in self.series
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
    """Smallest and largest defined value, never equal; 0 and 1 if none is defined."""
    values = np.concatenate([np.ravel(row) for row in rows])
    values = values[~np.isnan(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else (low, low + (abs(low) or 1.0))


def rounded(values: Iterable[float | None]) -> list[float | None]:
    """Six significant digits, the precision of the page; None for non-finite values."""
    return [
        None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
        for value in values
    ]


def colour_stops() -> list[str]:
    """The map's colours from low to high, as `#rrggbb`."""
    import matplotlib
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in matplotlib.colormaps[COLOURMAP](np.linspace(0, 1, 64))]


def draw(figure: Figure) -> dict[str, bytes]:
    """A figure of the page: PNG and SVG, by file name."""
    import matplotlib

    settings: Any = {
        "svg.fonttype": "none",  # text stays text
        "text.parse_math": False,  # a subject may be called $x$
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 9,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Glyphs that the font lacks are boxes in the PNG, and text in the SVG.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        if isinstance(figure, Heat):
            width = min(14.0, 3.0 + 0.11 * max(map(len, figure.rows)))
            canvas, (axes,) = _canvas((width, min(12.0, 1.8 + 0.11 * len(figure.rows))))
            _draw_heat(canvas, axes, figure)
        else:
            height = 1.6 + 0.3 * len(figure.categories) if figure.is_flat else 3.8
            canvas, (axes,) = _canvas((7.5, height))
            _draw_curves(axes, figure)
        axes.set_title(printable(figure.title), fontsize="medium", loc="left")
        return _saved(figure.key, canvas)


def draw_lines(
    name: str, series: Sequence[Series], base: Series | None, labels: tuple[str, str]
) -> dict[str, bytes]:
    """PNG and SVG, by file name: a line per series over `x`, and the base's level and interval."""
    canvas, (axes,) = _canvas((8.5, 4.8), has_grid=True)
    xs = [x for each in (*series, *([base] if base else [])) for x in each.x]
    width = (max(xs) - min(xs)) or 1.0 if xs else 1.0
    if base is not None:
        axes.axhspan(base.low[0], base.high[0], color="0.9", zorder=0)
        axes.axhline(base.values[0], color="0.4", linewidth=1, zorder=1)
        axes.plot(base.x, base.values, "*", color="0.2", markersize=11, label=base.name, zorder=4)
    for number, (each, look) in enumerate(zip(series, _looks(len(series)), strict=True)):
        # A little of the width apart, so that intervals at the same x can be told apart.
        shift = (number - (len(series) - 1) / 2) * 0.012 * width
        places = np.array(each.x) + shift
        _draw_bars(axes, places, each, capsize=2.5, markersize=5, zorder=3, **look)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.legend(**_LEGEND)
    return _saved(name, canvas)


def draw_forest(
    name: str,
    rows: Sequence[str],
    left: Series,
    right: Sequence[Series],
    *,
    labels: tuple[str, str],
    marks: Sequence[float],
) -> dict[str, bytes]:
    """PNG and SVG, by file name: two panels, a value per row; `marks` are levels on the right."""
    canvas, (first, second) = _canvas((9.0, 1.6 + 0.36 * len(rows)), 2, has_grid=True)
    for row, value in enumerate(left.values):
        if value is not None:
            errors = _errors(left)[:, [row]]
            first.errorbar([value], [row], xerr=errors, fmt="o", color=COLOURS[0], capsize=2.5)
    first.axvline(0, color="0.4", linewidth=1)
    first.set_xlim(-1.08, 1.08)
    first.set_xticks([-1, -0.5, 0, 0.5, 1])
    second.locator_params(axis="x", nbins=5)
    first.set_yticks(range(len(rows)), rows)
    looks = _looks(len(right))
    for number, (each, look, mark) in enumerate(zip(right, looks, marks, strict=True)):
        offset = (number - (len(right) - 1) / 2) * 0.22
        dots = {**look, "linestyle": "none", "markersize": 5, "label": each.name}
        second.plot(each.values, [row + offset for row in range(len(each.values))], **dots)
        second.axvline(mark, color=look["color"], linestyle=":", linewidth=1)
    second.set_yticks(range(len(rows)), [""] * len(rows))
    for axes, label in zip((first, second), labels, strict=True):
        axes.set_xlabel(label)
        axes.set_ylim(len(rows) - 0.5, -0.5)
    second.legend(**_LEGEND)
    return _saved(name, canvas)


def _looks(n: int) -> list[dict[str, Any]]:
    """`n` styles: colours and markers, then the same with dashes and hollow markers."""
    pairs = product(("-", "--", ":"), zip(COLOURS, MARKERS, strict=True))
    looks = [
        dict(linestyle=dash, color=colour, marker=marker)
        | ({} if dash == "-" else {"markerfacecolor": "white"})
        for dash, (colour, marker) in pairs
    ]
    return [looks[i % len(looks)] for i in range(n)]


def _canvas(
    size: tuple[float, float], n_panels: int = 1, *, has_grid: bool = False
) -> "tuple[Canvas, tuple[Any, ...]]":
    from matplotlib.figure import Figure as Canvas

    # The resolution at which text is measured decides the last bits of the layout.
    canvas = Canvas(figsize=size, layout="constrained", dpi=None if has_grid else _DPI)
    panels = tuple(canvas.add_subplot(1, n_panels, i + 1) for i in range(n_panels))
    for axes in panels:
        if has_grid:
            axes.grid(color="0.92", linewidth=0.8)
            axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return canvas, panels


def _saved(name: str, canvas: "Canvas") -> dict[str, bytes]:
    """PNG and SVG without date and version, so that their bytes are the same each time."""
    import matplotlib

    contents = {}
    with matplotlib.rc_context({"svg.hashsalt": name}):
        for ending, metadata in {"png": {"Software": None}, "svg": {"Date": None}}.items():
            stream = BytesIO()
            canvas.savefig(stream, format=ending, dpi=_DPI, metadata=metadata)
            contents[f"{name}.{ending}"] = stream.getvalue()
    return contents


def _draw_heat(canvas: "Canvas", axes: "Axes", figure: Heat) -> None:
    import matplotlib
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    most = max(map(len, figure.rows))
    padded_LE = np.full((len(figure.rows), most), np.nan)
    for layer, values in enumerate(figure.rows):
        padded_LE[layer, : len(values)] = values
        # Behind the cells, seen where there is no value.
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
    is_hatched = any(np.isnan(values).any() for values in figure.rows)
    hatched = f" (hatched: {figure.undefined})" if is_hatched else ""
    axes.set_xlabel(printable(figure.across) + hatched)
    axes.set_ylabel(printable(figure.down))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    below, above = bool((padded_LE < figure.low).any()), bool((padded_LE > figure.high).any())
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]
    bar = canvas.colorbar(image, ax=axes, extend=extend, shrink=0.9)
    bar.ax.yaxis.set_major_formatter(lambda value, _: format(value, _spec(figure)))


def _spec(figure: Figure) -> str:
    """Ends of an axis may be fractions even where values are whole."""
    return ",.0f" if figure.column.spec == ",d" else figure.column.spec


def _draw_curves(axes: "Axes", figure: Curves) -> None:
    places = np.arange(len(figure.categories), dtype=float)
    drawn = [series for series in figure.series if not series.is_reference]
    for number, (series, look) in enumerate(zip(drawn, _looks(len(drawn)), strict=True)):
        shift = (number - (len(drawn) - 1) / 2) * (0.5 / len(drawn)) if figure.is_flat else 0
        look |= {"linestyle": "none"} if figure.is_flat else {}
        look |= {"is_flat": figure.is_flat, "capsize": 2, "markersize": 4}
        _draw_bars(axes, places + shift, series, **look)
    for series in figure.series:
        if series.is_reference:
            pair = (series.values, places) if figure.is_flat else (places, series.values)
            axes.plot(*pair, color=_GREY, linestyle="--", label=printable(series.name))
    names = [printable(name) for name in figure.categories]
    names = [n if len(n) <= _MAX_NAME else n[: _MAX_NAME - 1] + "…" for n in names]
    step = 1 if figure.is_flat else -(-len(names) // 24)  # at most so many ticks
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
    if len(figure.series) > 1:
        axes.legend(**_LEGEND)


def _draw_bars(
    axes: "Axes", places: Array, series: Series, *, is_flat: bool = False, **look: Any
) -> None:
    values = np.array(series.values, dtype=float)
    if series.low or not series.values:
        look["xerr" if is_flat else "yerr"] = _errors(series)
    pair = (values, places) if is_flat else (places, values)
    axes.errorbar(*pair, linewidth=1.2, elinewidth=0.9, label=printable(series.name), **look)


def _errors(series: Series) -> Array:
    """Distances to both ends; rounding may leave an end on the wrong side of its value."""
    values, low, high = np.array([series.values, series.low, series.high], dtype=float)
    return np.asarray(np.maximum([values - low, high - values], 0))
