"""A routing trace as tables and sentences: what it is of, how local and predictable routing is."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from expertcut.profiling.locality import POLICIES, Rate
from expertcut.profiling.predictability import MIN_SEEN
from expertcut.profiling.trace import QuizTraceInfo, TextTraceInfo, Trace
from expertcut.profiling.trace_findings import TraceFindings
from expertcut.reporting.edit_tables import interval_text, percent, unit
from expertcut.reporting.tables import Cell, Column, Table, columns
from expertcut.reporting.text_profile_tables import texts_line

POLICY_NAMES = {"lru": "LRU", "lfu": "LFU", "belady": "Belady", "static": "static"}


def trace_facts(trace: Trace) -> list[tuple[str, str]]:
    """Model, what was read, and how much is kept of it."""
    info = trace.info
    if isinstance(info, QuizTraceInfo):
        n, quiz = trace.n_sequences, info.quiz
        read = ("quiz", f"{n:,} {quiz.split} questions of {quiz.id} at {quiz.shots} shots")
    elif isinstance(info, TextTraceInfo):
        read = ("text", texts_line(info.text))
    else:
        read = ("routes", info.routes.id)
    kept = [("gate weights", info.settings.weights), ("router logits", info.settings.logits)]
    named = " and ".join(["experts", *(name for name, is_kept in kept if is_kept)])
    size = unit(trace.size_bytes, "B")
    blocks = info.model.blocks
    counts = "/".join(map(str, dict.fromkeys(block.experts for block in blocks)))
    top_k = "/".join(map(str, dict.fromkeys(block.top_k for block in blocks)))
    return [
        ("model", f"{info.model.label}: {len(blocks)} layers of {counts} experts, {top_k} a token"),
        read,
        ("tokens", f"{info.n_tokens:,} in {trace.n_sequences:,} sequences, {named}: {size}"),
    ]


def trace_json(findings: TraceFindings) -> dict[str, Any]:
    """What the trace is of, and all numbers."""
    trace = findings.trace
    info = trace.info.model_dump(mode="json")
    size = {"n_sequences": trace.n_sequences, "size_bytes": trace.size_bytes}
    return {**info, **size, **findings.as_json()}


def finding_tables(findings: TraceFindings) -> list[Table]:
    """Locality by segment, cache and layer; predictability; drops; batches."""
    tables = [segment_table(findings), cache_table(findings), locality_table(findings)]
    tables += [predictability_table(findings), _drops_table(findings)]
    if findings.predictability.batches:
        tables.append(_batches_table(findings))
    return tables


def experts_text(size_L: Iterable[int]) -> str:
    """Experts of a layer, `16`, or `16/24` where layers differ."""
    return "/".join(str(size) for size in dict.fromkeys(size_L))


def segment_table(findings: TraceFindings) -> Table:
    """One row per segment length."""
    found = findings.locality
    rows: list[list[Cell]] = []
    for m, srp in found.srp.items():
        hits = [found.hits[m, cache].whole for cache in found.caches]
        rows.append([m, srp.whole, _interval(srp, 3), srp.size, *hits])
    heads = columns("segment; SRP::.3f; 95 % interval; experts::.1f")
    heads += tuple(Column(f"SCH {size}", ".1%") for size in cache_sizes(findings))
    note = "SRP: F1 of the experts served to a whole segment, against those that its tokens choose;"
    note += " experts: how many are served, in each layer. SCH: hits of a cache that knows the "
    note += "segment ahead (arXiv 2505.16056). Intervals over sequences."
    if longer := [m for m in findings.segments if m not in found.srp]:
        note += f" No sequence has {min(longer)} tokens."
    return Table("Local routing consistency", heads, rows, note)


def cache_table(findings: TraceFindings) -> Table:
    """One row per cache size."""
    found = findings.locality
    rows: list[list[Cell]] = []
    for cache, size in zip(found.caches, cache_sizes(findings), strict=True):
        rates = [found.hits[policy, cache] for policy in (*POLICIES, "static")]
        lru, *others = rates
        rows.append([size, lru.whole, _interval(lru), *(rate.whole for rate in others)])
    heads = columns("experts held; LRU::.1%; 95 % interval; LFU::.1%; Belady::.1%; static::.1%")
    note = "Hits of a cache of so many experts a layer, empty at the start of each sequence. "
    note += "Belady knows all that comes; static holds those most used in the other half."
    return Table("Cache hits", heads, rows, note)


def locality_table(findings: TraceFindings) -> Table:
    """One row per layer, with the hits of the middle cache size; the other sizes are wide."""
    found, middle = findings.locality, middle_cache(findings)
    sizes = dict(zip(found.caches, cache_sizes(findings), strict=True))
    named: list[tuple[str, str, Rate, bool]] = [
        (f"SRP {m}", ".3f", srp, False) for m, srp in found.srp.items()
    ]
    for cache in sorted(found.caches, key=lambda cache: cache != middle):
        for policy, name in POLICY_NAMES.items():
            rate, is_wide = found.hits[policy, cache], cache != middle
            named.append((f"{name} {sizes[cache]}" if is_wide else name, ".1%", rate, is_wide))
    heads = (Column("layer"), *(Column(name, spec, wide) for name, spec, _, wide in named))
    rows: list[list[Cell]] = [
        [layer, *(_known(rate.by_layer_L[layer]) for _, _, rate, _ in named)]
        for layer in range(len(findings.n_experts_L))
    ]
    title = f"Locality by layer; hits of a cache of {sizes[middle]} experts"
    return Table(title, heads, rows)


def middle_cache(findings: TraceFindings) -> float:
    """The cache size that sentences and the table by layer name."""
    return findings.caches[(len(findings.caches) - 1) // 2]


def predictability_table(findings: TraceFindings) -> Table:
    """One row per layer."""
    told, load = findings.predictability, findings.load
    share, recall = told.token_share, told.recall
    before = recall.get("layer_before")
    rows: list[list[Cell]] = []
    for layer in range(len(findings.n_experts_L)):
        numbers = [
            recall["token_id"].by_layer_L[layer],
            recall["popularity"].by_layer_L[layer],
            before.by_layer_L[layer - 1] if before and layer else np.nan,
            share.share_L[layer],
            share.shuffled_L[layer],
            load.max_vio_L[layer],
            load.variation_L[layer],
            load.balance_loss_L[layer] if load.balance_loss_L is not None else np.nan,
            findings.information_nats[layer - 1] if layer else np.nan,
        ]
        rows.append([layer, *map(_known, numbers)])
    heads = columns(
        "layer; token id::.1%; popularity::.1%; layer before::.1%; I/H::.2f; shuffled::.2f; "
        "MaxVio::.2f | variation::.2f; balance loss::.3f; I before, nats::.3f"
    )
    note = "Right among the experts of a token, by what the other half says of its id, of all "
    note += "tokens, of its experts one layer before. I/H: share of the entropy that the id "
    note += f"explains, over {share.n_tokens:,} tokens of {share.n_ids:,} ids seen {MIN_SEEN} "
    note += "times or more, and with ids shuffled. MaxVio: largest load / mean − 1."
    return Table("Predictability and load by layer", heads, rows, note)


def _drops_table(findings: TraceFindings) -> Table:
    drops = findings.drops
    rows: list[list[Cell]] = []
    for capacity, dropped_LX in zip(drops.capacities, drops.dropped_CLX, strict=True):
        shares = _dropped(dropped_LX.sum(0), drops.choices_LX.sum(0))
        whole = float(dropped_LX.sum() / drops.choices_LX.sum())
        rows.append([f"{capacity:g}", *shares, whole])
    tenths = "; ".join(f"{tenth}::.0%" for tenth in range(1, 11))
    note = "An expert takes ⌈capacity · tokens · K / E⌉ tokens of a sequence, the first that come."
    return Table("Dropped choices by tenth of the sequence",
                 columns(f"capacity; {tenths}; all::.1%"), rows, note)  # fmt: skip


def _dropped(dropped_X: Any, choices_X: Any) -> list[float | None]:
    pairs = zip(dropped_X, choices_X, strict=True)
    return [float(dropped / n) if n else None for dropped, n in pairs]


def _batches_table(findings: TraceFindings) -> Table:
    n_experts = float(np.mean(findings.n_experts_L))
    rows: list[list[Cell]] = []
    for n_tokens, batch in findings.predictability.batches.items():
        come, dealt = float(batch.as_they_come_L.mean()), float(batch.grouped_L.mean())
        rows.append([n_tokens, come, dealt, dealt / come - 1, n_experts])
    heads = "tokens; as they come::.1f; grouped::.1f; change::+.1%; of experts::.4g"
    note = "Grouped: dealt within eight batches by the experts that the other half foretells "
    note += "from a token's id."
    return Table("Distinct experts of a batch, mean of the layers", columns(heads), rows, note)


def layers_csv(findings: TraceFindings) -> Table:
    """One row per layer, in full precision."""
    local, told = locality_table(findings), predictability_table(findings)
    names = findings.trace.block_names
    heads = (Column("layer"), Column("block"), *local.columns[1:], *told.columns[1:])
    size = experts_text(findings.locality.size_CL[findings.caches.index(middle_cache(findings))])
    named = tuple(
        Column(f"{head.name} {size}") if head.name in POLICY_NAMES.values() else Column(head.name)
        for head in heads
    )
    rows = [
        [layer, names[layer], *local.rows[layer][1:], *told.rows[layer][1:]]
        for layer in range(len(names))
    ]
    return Table("layers", named, rows)


def finding_sentences(findings: TraceFindings) -> list[str]:
    """What the numbers say, in words."""
    return [_told_by_id(findings), _held(findings), *_served(findings), _dropped_in_turn(findings)]


def _told_by_id(findings: TraceFindings) -> str:
    recall = findings.predictability.recall
    by_id, popular = recall["token_id"], recall["popularity"]
    ends = " ({} … {})".format(*map(percent, by_id.ci95)) if by_id.ci95 else ""
    figures = f"{percent(by_id.whole)}{ends}, popularity {percent(popular.whole)}"
    if by_id.whole <= (popular.ci95 or (0, popular.whole))[1]:
        return f"A token's id says no more of its experts than their popularity: {figures}."
    share = fraction_text(by_id.whole)
    return f"{share} choices follow from the token's id alone: {figures}."


def fraction_text(share: float) -> str:
    """A share as `Three of four`, to the nearest of a few."""
    words = {
        0.0: "Hardly any", 0.1: "One of ten", 0.2: "One of five", 0.25: "One of four",
        1 / 3: "One of three", 0.4: "Two of five", 0.5: "Half of the", 0.6: "Three of five",
        2 / 3: "Two of three", 0.75: "Three of four", 0.8: "Four of five", 0.9: "Nine of ten",
        1.0: "Nearly all",
    }  # fmt: skip
    nearest = min(words, key=lambda known: abs(known - share))
    return "All" if share == 1 else words[nearest]


def _held(findings: TraceFindings) -> str:
    found, cache = findings.locality, middle_cache(findings)
    size = dict(zip(found.caches, cache_sizes(findings), strict=True))[cache]
    lru, static = found.hits["lru", cache], found.hits["static", cache]
    points_L = 100 * (lru.by_layer_L - static.by_layer_L)
    gains = [round(gain) for gain in points_L[~np.isnan(points_L)]] or [0]
    total = experts_text(findings.n_experts_L)
    text = f"With {size} of {total} experts in fast memory LRU, empty at first, hits"
    return f"{text} {points_span(min(gains), max(gains))} the {size} most used ones do."


def points_span(low: int, high: int) -> str:
    """`0 to 5 points more than`, of the smallest and largest difference of the layers."""
    if low < 0 < high:
        return f"from {-low} point{'s' * (low < -1)} less to {high} more, by layer, than"
    ends, sign = sorted((abs(low), abs(high))), "less" if low < 0 else "more"
    span = " to ".join(map(str, dict.fromkeys(ends)))
    return f"{span} point{'s' * (ends[1] > 1)} {sign} than" if ends[1] else "as often as"


def _served(findings: TraceFindings) -> list[str]:
    srps = findings.locality.srp
    if not srps:
        return []
    m = min(srps, key=lambda m: abs(np.log2(m / 16)))
    total = float(np.mean(findings.n_experts_L))
    served = f"{srps[m].size:.1f} of {total:.4g} experts a layer"
    return [f"A segment of {m} tokens is served best by {served}: SRP {srps[m].whole:.3f}."]


def _dropped_in_turn(findings: TraceFindings) -> str:
    drops = findings.drops
    at = drops.capacities.index(1.25)
    shares = _dropped(drops.dropped_CLX[at].sum(0), drops.choices_LX.sum(0))
    listed = " ".join("–" if share is None else f"{100 * share:.0f}" for share in shares)
    return f"Dropped at capacity 1.25, by tenth of the sequence: {listed} %."


def _known(number: float) -> float | None:
    return None if np.isnan(number) else float(number)


def _interval(rate: Rate, places: int = 0) -> str | None:
    """Of shares with `places` decimals, else in per cent."""
    if rate.ci95 is None:
        return None
    low, high = rate.ci95
    return f"{low:.{places}f} … {high:.{places}f}" if places else interval_text(rate.ci95, 1)


def cache_sizes(findings: TraceFindings) -> list[str]:
    """Experts of a layer in each cache."""
    return [experts_text(size_L.tolist()) for size_L in findings.locality.size_CL]
