"""The page's section of a trace: how local routing is, and which expert follows which."""

import math

import numpy as np

from expertcut.profiling.trace_findings import TraceFindings
from expertcut.reporting import trace_tables as tables
from expertcut.reporting.page_sections import Facts, Folded, Part, Section, key_of
from expertcut.reporting.plots import Curves, Heat, Series, series_of, span
from expertcut.reporting.tables import Column
from expertcut.reporting.views import Run


def trace_sections(run: Run) -> list[Section]:
    """One for each trace."""
    sections: list[Section] = []
    for document in run.traces:
        key = key_of(f"trace-{document.name}", [section.key for section in sections])
        parts = _parts(TraceFindings(document.content), key)
        sections.append(Section(key, f"Trace: {document.name}", parts))
    return sections


def _parts(findings: TraceFindings, key: str) -> list[Part]:
    segments, *others = tables.finding_tables(findings)
    parts: list[Part] = [Facts(tables.trace_facts(findings.trace))]
    parts += tables.finding_sentences(findings)
    parts += [segments, *_curves(findings, key)]
    if findings.transitions:
        parts.append(_transitions(findings, key))
    return [*parts, Folded("All figures of the trace", others)]


def _curves(findings: TraceFindings, key: str) -> list[Curves]:
    """SRP and SCH over segment lengths, hit rates over cache sizes."""
    found, sizes = findings.locality, tables.cache_sizes(findings)
    rates = [found.hits["lru", cache] for cache in found.caches]
    lru = series_of("LRU", [r.whole for r in rates], [r.ci95 or (None, None) for r in rates])
    others = [
        Series(name, tuple(found.hits[policy, cache].whole for cache in found.caches))
        for policy, name in tables.POLICY_NAMES.items()
        if policy != "lru"
    ]
    note = "Share of the choices that a cache of so many experts a layer holds when they come."
    hits = Curves(
        f"{key}-hits", "Cache hits", note, "experts held", tuple(sizes), (lru, *others),
        Column("hits", ".0%"), zero=0.0,
    )  # fmt: skip
    if not found.srp:
        return [hits]
    srps = found.srp.values()
    served = series_of("SRP", [r.whole for r in srps], [r.ci95 or (None, None) for r in srps])
    best = [
        Series(f"SCH {size}", tuple(found.hits[m, cache].whole for m in found.srp))
        for cache, size in zip(found.caches, sizes, strict=True)
    ]
    lengths = tuple(map(str, found.srp))
    note = "SRP with its 95 % interval over sequences; SCH of caches of so many experts."
    local = Curves(
        f"{key}-locality", "Local routing consistency", note, "tokens of a segment", lengths,
        (served, *best), Column("SRP, hits", ".2f"), zero=0.0,
    )  # fmt: skip
    return [local, hits]


def _transitions(findings: TraceFindings, key: str) -> Heat:
    """The pair of layers that tell most of each other: P(f of the next layer | e)."""
    layer = int(np.argmax(findings.information_nats))
    count_EF = findings.transitions[layer]
    uses_E1 = np.maximum(findings.uses_LE[layer, : len(count_EF), None], 1)
    rows = np.where(count_EF.sum(1, keepdims=True) > 0, count_EF / uses_E1, math.nan)
    title = f"Experts of layer {layer + 1} that follow those of layer {layer}"
    nats = findings.information_nats[layer]
    note = "Share of an expert's tokens that choose the other in the next layer. These two layers "
    note += f"tell most of each other: {nats:.3f} nats of mutual information."
    _, high = span([rows])
    return Heat(
        f"{key}-transitions", title, note, tuple(rows), Column("share", ".1%"),
        f"expert of layer {layer + 1}", down=f"expert of layer {layer}", high=high,
    )  # fmt: skip
