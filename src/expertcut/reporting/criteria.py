"""Every criterion that a profile can answer, side by side: ranks, and how far they agree."""

from typing import Any

import numpy as np

from expertcut.edits.criteria import Compared
from expertcut.edits.ranking import super_experts
from expertcut.profiling.statistics import or_none
from expertcut.reporting.cuts import rows_tables
from expertcut.reporting.tables import Cell, Column, Table

_COUNTED = "Layers are MoE layers, counted from 0."


def criteria_tables(found: Compared) -> list[Table]:
    """How far criteria agree, and the ranks that they give in the first and the last layer."""
    last = len(found.layers) - 1
    return [
        _agreement(found),
        *[_ranks(found, layer) for layer in dict.fromkeys((0, last))],
        *rows_tables(found.profile),
    ]


def criteria_csv(found: Compared) -> Table:
    """One row for each expert of each layer: score and rank by each criterion."""
    heads = [Column(f"{name}_{what}") for name in found.names for what in ("score", "rank")]
    rows: list[list[Cell]] = []
    for layer, expert, scores, ranks in _experts(found):
        cells = [cell for name in found.names for cell in (scores[name], ranks[name])]
        rows.append([layer, expert, *cells])
    return Table("Criteria", (Column("layer"), Column("expert"), *heads), rows)


def criteria_json(found: Compared) -> dict[str, Any]:
    """Scores, ranks and rank correlations of all layers, and what could not be answered."""
    layers: list[dict[str, Any]] = [
        {"layer": x.layer, "block": x.block, "super_experts": list(own), "expert": []}
        for x, own in zip(found.layers, _supers(found), strict=True)
    ]
    for layer, expert, scores, ranks in _experts(found):
        row = {"expert": expert, "scores": scores, "ranks": ranks}
        layers[layer]["expert"].append(row)
    pairs = [(a, b) for i, a in enumerate(found.names) for b in found.names[i + 1 :]]
    return {
        "criteria": list(found.names),
        "left_out": dict(found.left_out),
        "spearman": [
            {
                "criteria": [a, b],
                "mean": or_none(found.agreement(a, b)),
                "layers": [or_none(value) for value in found.correlations(a, b)],
            }
            for a, b in pairs
        ],
        "layers": layers,
    }


def _experts(found: Compared) -> list[tuple[int, int, dict[str, float | None], dict[str, int]]]:
    """Layer, expert, scores and ranks by criterion; a score that is undefined is None."""
    return [
        (
            layer.layer,
            expert,
            {name: or_none(found.scores[name][layer.layer][expert]) for name in found.names},
            {name: int(found.ranks[name][layer.layer][expert]) for name in found.names},
        )
        for layer in found.layers
        for expert in range(layer.n_experts)
    ]


def _agreement(found: Compared) -> Table:
    rows: list[list[Cell]] = [
        [name, *[or_none(found.agreement(name, other)) for other in found.names]]
        for name in found.names
    ]
    left_out = "; ".join(f"{name}: {reason}" for name, reason in found.left_out.items())
    n_layers = len(found.layers)
    note = f"Spearman's correlation of scores within a layer, its mean over {n_layers} layers."
    note += f" Left out: {left_out}." if left_out else ""
    columns = (Column("criterion"), *[Column(name, ".2f") for name in found.names])
    return Table("How far criteria agree", columns, rows, note)


def _ranks(found: Compared, index: int) -> Table:
    layer, supers = found.layers[index], _supers(found)[index]
    best_first = np.argsort(found.ranks[found.names[0]][index])
    rows: list[list[Cell]] = [
        [
            int(expert),
            *[int(found.ranks[name][index][expert]) for name in found.names],
            "super" if expert in supers else "",
        ]
        for expert in best_first
    ]
    columns = (Column("expert"), *[Column(name) for name in found.names], Column("protected"))
    title = f"Ranks of the experts of layer {layer.layer} by each criterion, 1 is kept longest"
    return Table(title, columns, rows, _COUNTED)


def _supers(found: Compared) -> list[tuple[int, ...]]:
    is_known = found.layers[0].over_tokens is not None
    return super_experts(found.profile) if is_known else [()] * len(found.layers)
