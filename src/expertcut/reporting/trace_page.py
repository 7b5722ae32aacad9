"""The page's sections of traces, placements and cache plans: where routing goes."""

import math

import numpy as np

from expertcut.edits.cache_plan import CacheFile
from expertcut.edits.placement_results import PlacementFile
from expertcut.profiling.trace import Trace
from expertcut.profiling.trace_findings import TraceFindings
from expertcut.reporting import trace_tables as tables
from expertcut.reporting.page_sections import Facts, Folded, Part, Section, one_each
from expertcut.reporting.place_tables import (
    cache_facts,
    cache_table,
    placement_facts,
    placement_table,
)
from expertcut.reporting.plots import Curves, Heat, Series, series_of, span
from expertcut.reporting.tables import Column
from expertcut.reporting.views import NamedDocument, Run


def trace_sections(run: Run) -> list[Section]:
    """One for each trace: how local routing is, and which expert follows which."""
    return one_each("Trace", run.traces, "trace-", _parts)


def placement_sections(run: Run) -> list[Section]:
    """One for each placement, beside its peers, and one for each cache plan."""

    def placement(document: NamedDocument[PlacementFile], _key: str) -> list[Part]:
        return [Facts(placement_facts(document.content)), placement_table(document.content)]

    def cache(document: NamedDocument[CacheFile], _key: str) -> list[Part]:
        return [Facts(cache_facts(document.content)), cache_table(document.content)]

    return [
        *one_each("Placement", run.placements, "placement-", placement),
        *one_each("Cache", run.caches, "cache-", cache),
    ]


def _parts(document: NamedDocument[Trace], key: str) -> list[Part]:
    findings = TraceFindings(document.content)
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
