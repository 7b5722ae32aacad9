"""The page's figures as PNG and SVG, the same bytes each time; matplotlib comes with the first."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from expertcut.reporting.page.figures import Curves, Figure, Heat, Series
from expertcut.reporting.tables import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLOURMAP = "viridis"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "#767676"
_DPI = 150
_MOST_TICKS = 24
_LONGEST = 40  # characters of a category's name


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
