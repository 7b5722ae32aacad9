"""What the page says: each function makes sections of what a run holds, none where it has none."""

from collections.abc import Callable

from expertcut.reporting.page.gathering import Run
from expertcut.reporting.page.parts import Section
from expertcut.reporting.page.sections.changes import change_sections
from expertcut.reporting.page.sections.experts import expert_sections
from expertcut.reporting.page.sections.outcomes import outcome_sections
from expertcut.reporting.page.sections.provenance import provenance_sections
from expertcut.reporting.page.sections.searches import search_sections

SECTIONS: tuple[Callable[[Run], list[Section]], ...] = (
    outcome_sections,
    change_sections,
    search_sections,
    expert_sections,
    provenance_sections,
)


def sections_of(run: Run) -> list[Section]:
    """All of them, in the order of the page."""
    return [section for make in SECTIONS for section in make(run)]
