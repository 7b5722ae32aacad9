"""The page's sections of placements, beside their peers, and of cache plans."""

from expertcut.reporting.page_sections import Facts, Part, Section, key_of
from expertcut.reporting.place_tables import (
    cache_facts,
    cache_table,
    placement_facts,
    placement_table,
)
from expertcut.reporting.views import Run


def placement_sections(run: Run) -> list[Section]:
    """One for each placement and each cache plan."""
    sections: list[Section] = []
    parts: list[tuple[str, str, list[Part]]] = []
    for placed in run.placements:
        own: list[Part] = [Facts(placement_facts(placed.content)), placement_table(placed.content)]
        parts.append(("placement", placed.name, own))
    for cached in run.caches:
        own = [Facts(cache_facts(cached.content)), cache_table(cached.content)]
        parts.append(("cache", cached.name, own))
    for kind, name, own in parts:
        key = key_of(f"{kind}-{name}", [section.key for section in sections])
        sections.append(Section(key, f"{kind.capitalize()}: {name}", own))
    return sections
