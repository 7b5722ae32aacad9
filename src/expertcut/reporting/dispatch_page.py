"""The page's section of a dispatch: what choosing gains, and which model answers what."""

from expertcut.reporting.dispatch_tables import dispatch_facts, dispatch_tables
from expertcut.reporting.page_sections import Part, Section, key_of
from expertcut.reporting.views import Run


def dispatch_sections(run: Run) -> list[Section]:
    """One for each dispatch."""
    sections: list[Section] = []
    for document in run.dispatches:
        key = key_of(f"dispatch-{document.name}", [section.key for section in sections])
        parts: list[Part] = [text for _, text in dispatch_facts(document.content)]
        parts += dispatch_tables(document.content)
        sections.append(Section(key, f"Dispatch: {document.name}", parts))
    return sections
