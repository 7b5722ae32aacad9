"""What the experts did: maps of every layer and expert, routing, suspects."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from expertcut.profiling.findings import Findings
from expertcut.profiling.statistics import LayerStatistics
from expertcut.profiling.storage import TextProfile
from expertcut.reporting import page_sections, text_profile_tables
from expertcut.reporting import profile_tables as tables
from expertcut.reporting.edit_tables import rows_tables
from expertcut.reporting.page_sections import Explorer, Facts, Folded, Section, key_of
from expertcut.reporting.plots import Curves, Heat, Series, rounded, span, spread
from expertcut.reporting.tables import Column, Table, printable
from expertcut.reporting.views import NamedDocument, Run, edits_of

_MAPS = (
    ("appearances", "Appearances", ".1%", "Share of questions that chose the expert to answer."),
    ("weighted_accuracy", "Weighted accuracy", ".1%",
     "Right among its questions, weighted by its probability."),
    ("contribution_pct", "Contribution, %", ".2f",
     "Its mean share of the chosen experts' probability."),
    ("tokens", "All-token load", ",d", "Tokens of all prompts, shots included, that chose it."),
)  # fmt: skip
_TEXT_MAPS = (
    ("tokens", "All-token load", ",d", "Tokens that chose the expert."),
    ("accuracy", "Next token right", ".1%",
     "Share of the tokens routed to the expert whose next token the model predicts."),
    ("weighted_accuracy", "Weighted accuracy", ".1%", "The same, weighted by its probability."),
    ("mean_loss", "Mean loss", ".3f", "Mean −log p of the next token, in nats."),
)  # fmt: skip
_FIGURES = (
    *("appearances", "accuracy", "accuracy_ci95_low", "accuracy_ci95_high", "weighted_accuracy"),
    *("weighted_accuracy_ci95_low", "weighted_accuracy_ci95_high", "contribution_pct", "tokens"),
    *("difference", "difference_se", "z", "p", "p_adjusted", "p_family"),
)


def expert_sections(run: Run) -> list[Section]:
    """Experts, routing and suspects of each profile."""
    sections: list[Section] = []
    for profile in run.profiles:
        key = key_of(profile.name, [s.key.removesuffix("-experts") for s in sections])
        of = f": {profile.name}" if len(run.profiles) > 1 else ""
        findings, experts = profile.content, tables.experts_csv(profile.content)
        facts = Facts([*tables.headline_facts(findings).items()])
        note = "2:21 is expert 21 of layer 2. Layers are MoE layers, counted from 0."
        explorer = Explorer(key, _maps(findings, key), _data(run, profile, experts), experts)
        sections += [
            Section(f"{key}-experts", f"Experts{of}", [facts, note, explorer]),
            Section(f"{key}-suspects", f"Suspects{of}", [tables.suspects_table(findings)]),
            Section(f"{key}-routing", f"Routing{of}", _routing(findings, key)),
        ]
    for text in run.texts:
        key = key_of(text.name, [s.key.removesuffix("-experts") for s in sections])
        sections.append(Section(f"{key}-experts", f"Experts: {text.name}", _text_parts(text, key)))
    return sections


def _text_parts(document: NamedDocument[TextProfile], key: str) -> list[page_sections.Part]:
    """A profile of texts: its facts, maps of its experts, and the paper's tables."""
    profile, maps = document.content, list[Heat]()
    for name, title, spec, note in _TEXT_MAPS:
        values = [
            x.over_tokens.tokens_E if name == "tokens" else getattr(x.next, f"{name}_E")
            for x in profile.layers
            if name == "tokens" or x.next is not None
        ]
        if values:
            rows = tuple(np.asarray(value, dtype=float) for value in values)
            low, high = span(rows)
            low, column = 0.0 if name == "tokens" else low, Column(title.lower(), spec)
            map_key = f"{key}-{name.replace('_', '-')}"
            maps.append(Heat(map_key, title, note, rows, column, low=low, high=high))
    facts = Facts(
        [*text_profile_tables.profile_facts(profile), *text_profile_tables.expert_facts(profile)]
    )
    sources, *paper_tables = text_profile_tables.text_tables(profile)
    note = "2:21 is expert 21 of layer 2. Layers are MoE layers, counted from 0."
    title = "Tables 1 to 7 of the paper (arXiv 2502.17187), over all tokens"
    return [facts, note, sources, *maps, Folded(title, paper_tables)]


def _maps(findings: Findings, key: str) -> tuple[Heat, ...]:
    maps = []
    for name, title, spec, note in _MAPS:
        values = [getattr(layer, f"{name}_E") for layer in findings.layers]
        if any(value is None for value in values):
            continue
        rows = tuple(np.asarray(value, dtype=float) for value in values)
        # Of the experts in at least 1 % of questions: else one question would set the colours.
        pairs = zip(findings.layers, rows, strict=True)
        common = [row[layer.appearances_E >= tables.MIN_APPEARANCES] for layer, row in pairs]
        is_load = name == "tokens"
        low, high = span(rows if is_load or not any(map(len, common)) else common)
        if name != "weighted_accuracy":
            low = 0.0 if is_load else min(low, 0.0)
        map_key, column = f"{key}-{name.replace('_', '-')}", Column(title.lower(), spec)
        maps.append(Heat(map_key, title, note, rows, column, low=low, high=high))
    return tuple(maps)


def _data(run: Run, document: NamedDocument[Findings], experts: Table) -> dict[str, Any]:
    counts, names = document.content.counts, [column.name for column in experts.columns]
    values: dict[str, Any] = dict(zip(names, zip(*experts.rows, strict=True), strict=True))
    return {
        "layers": [
            {"layer": x.layer, "block": x.block, "experts": x.n_experts, "top_k": x.top_k}
            for x in document.content.layers
        ],
        "figures": {name: rounded(values[name]) for name in _FIGURES},
        "subjects": {
            "names": [printable(name) for name in counts.names],
            "questions": counts.questions_S.tolist(),
            "right": counts.right_S.tolist(),
            "activated": counts.activated_SX.tolist(),
            "activated_right": counts.activated_right_SX.tolist(),
        },
        "marks": _marks(run, document),
        "suspect": next(iter(document.content.significance.suspects), None),
    }


def _marks(run: Run, document: NamedDocument[Findings]) -> list[dict[str, Any]]:
    """What each plan that was made from this profile removes and tilts, by places in X."""
    marks = []
    for plan in run.plans:
        profile = run.profile_of(plan.content)
        edits = edits_of(plan.content, document.content) if profile is document else None
        if edits is None:
            continue
        removed, tilted, start = [], [], 0
        for layer in document.content.layers:
            edit = edits[layer.block]
            removed += [start + expert for expert in edit.removed(layer.n_experts)]
            tilted += [start + expert for expert in edit.tilted]
            start += layer.n_experts
        verb, name = "merged" if plan.content.removal == "merge" else "removed", plan.name
        marks.append(dict(name=printable(name), removed=removed, tilted=tilted, verb=verb))
    return marks


def _routing(findings: Findings, key: str) -> list[page_sections.Part]:
    layers = findings.layers
    paper_tables = tables.profile_tables(findings.profile, layers)
    return [
        _entropy(f"{key}-entropy-top", "Entropy of the chosen experts", layers, "top", "top_k"),
        _entropy(f"{key}-entropy-all", "Entropy over all experts", layers, "all", "n_experts"),
        _ranks(layers, key),
        *([_rank_map(layers, key)] if len(layers) > 2 else []),
        *tables.perturbation_tables(findings),
        *rows_tables(findings.profile),
        Folded("Gate margins", [tables.margins_table(findings)]),
        Folded("Tables 1 to 7 of the paper (arXiv 2502.17187)", paper_tables),
    ]


def _entropy(
    key: str, title: str, layers: Sequence[LayerStatistics], which: str, count: str
) -> Curves:
    entropies = [getattr(layer, f"entropy_{which}_N") for layer in layers]
    most = tuple(math.log(getattr(layer, count)) for layer in layers)
    mean_L = np.array([entropy_N.mean() for entropy_N in entropies])
    std_L = np.array([entropy_N.std() for entropy_N in entropies])
    mean = spread("mean ± standard deviation", mean_L, std_L)
    series = (mean, Series("maximum", most, is_reference=True))
    note = "Over questions, at the answer position. The maximum is that of a uniform gate."
    names, column = tuple(str(layer.layer) for layer in layers), Column("entropy (nats)", ".2f")
    return Curves(key, title, note, "layer", names, series, column, zero=0.0)


def _ranks(layers: Sequence[LayerStatistics], key: str) -> Curves:
    most = max(layer.top_k for layer in layers)
    series = []
    for layer in [layers[i] for i in dict.fromkeys((0, len(layers) - 1))]:
        p_NK, rest = layer.rank_probability_NK, (None,) * (most - layer.top_k)
        ranks = spread(f"layer {layer.layer}", p_NK.mean(axis=0), p_NK.std(axis=0))
        series.append(Series(ranks.name, ranks.values + rest, ranks.low + rest, ranks.high + rest))
    title = "Probability of each rank, first and last layer"
    note = "Normalised over the chosen experts; mean and standard deviation over questions."
    names, column = tuple(str(rank + 1) for rank in range(most)), Column("probability", ".2f")
    return Curves(f"{key}-ranks", title, note, "rank", names, tuple(series), column, zero=0.0)


def _rank_map(layers: Sequence[LayerStatistics], key: str) -> Heat:
    rows = tuple(layer.rank_probability_NK.mean(axis=0) for layer in layers)
    title = "Mean probability of each rank, every layer"
    note, column = "Normalised over the chosen experts.", Column("mean probability", ".3f")
    return Heat(f"{key}-rank-map", title, note, rows, column, "rank", 1, *span(rows))
