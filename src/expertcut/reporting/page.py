"""`report.html`: the page on disk, one file that needs nothing else, its figures beside it."""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from expertcut import __version__
from expertcut.errors import OutputError
from expertcut.files import without_secrets, write_atomically
from expertcut.reporting import page_sections
from expertcut.reporting.expert_maps import expert_sections
from expertcut.reporting.generation_page import generation_sections
from expertcut.reporting.page_sections import Explorer, Section, figures_of
from expertcut.reporting.plots import colour_stops, draw
from expertcut.reporting.tables import as_csv, printable
from expertcut.reporting.trace_page import placement_sections, trace_sections
from expertcut.reporting.views import Run, gather

SECTIONS = (
    page_sections.outcome_sections,
    page_sections.dispatch_sections,
    generation_sections,
    page_sections.change_sections,
    page_sections.search_sections,
    expert_sections,
    trace_sections,
    placement_sections,
    page_sections.provenance_sections,
)
PAGE = "report.html"
SCRIPTS = ("core", "tables", "heat", "curves", "explorer")  # each uses those before it


def sections_of(run: Run) -> list[Section]:
    """All of them, in the order of the page."""
    return [section for make in SECTIONS for section in make(run)]


def write(run: Path, out: Path | None = None) -> Path:
    """Writes the page of a run and returns where; `out` is `report.html` in the run's folder.

    Figures lie beside it, in a folder of the page's name without its ending, as PNG, SVG and CSV.
    The same run gives the same bytes.
    """
    page = out or (run if run.is_dir() else run.parent) / PAGE
    if page.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{page} is not the name of a page: end it in .html")
    documents, folder = gather(run), page.with_suffix("")
    sections = sections_of(documents)
    parts = [part for section in sections for part in section.parts]
    for figure in figures_of(parts):
        write_atomically(folder / f"{figure.key}.csv", as_csv(figure.table()).encode())
        for name, content in draw(figure).items():
            write_atomically(folder / name, content)
    for part in parts:
        if isinstance(part, Explorer):
            write_atomically(folder / f"{part.key}-experts.csv", as_csv(part.table).encode())
    write_atomically(page, render(documents, sections, folder.name).encode())
    return page


def render(run: Run, sections: Sequence[Section], folder: str) -> str:
    """The page; `folder` is what its links to figures begin with."""
    environment = Environment(
        loader=PackageLoader("expertcut.reporting", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["zip"] = zip
    environment.filters["kind"] = lambda part: type(part).__name__.lower()
    template = files("expertcut.reporting") / "template"
    scripts = (template / "scripts" / f"{name}.js" for name in SCRIPTS)
    script = "\n".join(file.read_text(encoding="utf-8") for file in scripts)
    style = (template / "style.css").read_text(encoding="utf-8")
    parts = [part for section in sections for part in section.parts]
    data = {
        "colours": colour_stops(),
        "figures": {f.key: f.as_json() for f in figures_of(parts)},
        "explorers": {p.key: p.data for p in parts if isinstance(p, Explorer)},
    }
    page = environment.get_template("page.html").render(
        title=printable(run.path.resolve().name),
        headlines=page_sections.headlines(run),
        sections=sections,
        folder=folder,
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=htmlsafe_json_dumps(data, dumps=json.dumps, allow_nan=False, separators=(",", ":")),
    )
    return without_secrets(page)


def _plain(value: object) -> object:
    # Before escaping: what a terminal would obey, a page must not hold either.
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _hash(text: str) -> str:
    """As a content security policy names what may run."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
