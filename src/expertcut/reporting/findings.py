"""How far a profile can be trusted, as tables: suspects, gate margins, subjects."""

from typing import Any

from expertcut.profiling.findings import (
    THRESHOLDS,
    Findings,
    layers_json,
    margin_json,
    suspects_json,
)
from expertcut.profiling.significance import subjects_json
from expertcut.reporting.tables import Cell, Column, Table

MIN_APPEARANCES = 0.01  # of a subject's questions, for the tables that people read
N_SUSPECTS = 10
_LAYER = Column("layer")
_P = ".2g"
_MOMENTS = ("mean", "std")
_FROM_0 = "Layers are MoE layers, counted from 0."


def suspects_table(found: Findings) -> Table:
    """The experts whose questions went worst against others of their subjects."""
    tested = found.significance
    rows = [
        [
            row["layer"],
            row["expert"],
            row["appearances"],
            row["accuracy"],
            _percent_range(row["accuracy_ci95"]),
            100 * row["difference"],
            100 * row["difference_se"],
            *[row[name] for name in ("z", "p", "p_adjusted", "p_family")],
        ]
        for row in suspects_json(found)[:N_SUSPECTS]
    ]
    columns = (
        *(_LAYER, Column("expert"), Column("appearances", ".1%"), Column("accuracy", ".1%")),
        *(Column("95 % interval"), Column("difference, points", "+.1f"), Column("± SE", ".1f")),
        *(Column("z", "+.2f"), Column("p", _P), Column("p, adjusted", _P)),
        Column("p, family-wise", _P),
    )
    note = (
        f"By z, the most harmful first; {tested.n_tests:,} of {len(found.places):,} experts could "
        "be tested. The difference is to questions of the same subjects that did not activate the "
        "expert. Adjusted: Benjamini–Hochberg. Family-wise: the largest |z| of "
        f"{tested.permutations:,} permutations of correctness within subjects. {_FROM_0}"
    )
    return Table("Suspects: experts whose questions are answered worse", columns, rows, note)


def margins_table(found: Findings) -> Table:
    """How far the last chosen expert is ahead of the next, layer by layer."""
    rows: list[list[Cell]] = []
    reasons: dict[str, list[int]] = {}
    for layer, margin in enumerate(found.margins):
        shown = margin_json(margin)
        p, logit = shown["margin_probability"] or {}, shown["margin_logit"] or {}
        below = [item["share"] for item in shown["margin_below"] or []]
        rows.append(
            [
                layer,
                *[p.get(name) for name in ("mean", "q05", "median", "q95")],
                *[logit.get(name) for name in ("mean", "q05", "median", "q95")],
                *(below or [None] * len(THRESHOLDS)),
            ]
        )
        if margin.undefined:
            reasons.setdefault(margin.undefined, []).append(layer)
    parts = ("mean", "5 %", "median", "95 %")
    columns = (
        _LAYER,
        *[Column(f"p: {part}", ".2e") for part in parts],
        *[Column(f"logit: {part}", ".3f") for part in parts],
        *[Column(f"p < {threshold:g}", ".1%") for threshold in THRESHOLDS],
    )
    notes = [f"Rank K minus rank K+1, in probability and in logit. {_FROM_0}"]
    notes += [f"None in layers {', '.join(map(str, at))}: {why}." for why, at in reasons.items()]
    title = "Gate margins at the answer position"
    return Table(title, columns, rows, " ".join(notes))


def perturbation_tables(found: Findings) -> list[Table]:
    """What moved when the questions were asked otherwise; nothing where they were not."""
    if not found.perturbations:
        return []
    keys = ("accuracy", "flipped", "mean_abs_logprob_diff", "max_abs_logprob_diff", "changed")
    foretold = ("margin_flipped_correlation", "margin_logprob_correlation")
    rows = [[p["kind"], *[p[key] for key in (*keys, *foretold)]] for p in found.perturbations]
    columns = (
        *(Column("asked again with"), Column("accuracy", ".2%"), Column("flipped answers", ".2%")),
        *(Column("mean |Δ log p|", ".4f"), Column("largest", ".4f")),
        *(Column("another set chosen", ".2%"), Column("margin and flips", "+.2f")),
        Column("margin and |Δ log p|", "+.2f"),
    )
    note = "Correlations are Spearman's, with the smallest margin of any layer."
    by_layer = [
        [p["kind"], layer["layer"], layer["changed"], layer["margin_changed_correlation"]]
        for p in found.perturbations
        for layer in p["layers"]
    ]
    layer_columns = (
        *(Column("asked again with"), _LAYER, Column("another set chosen", ".2%")),
        Column("margin and change", "+.2f"),
    )
    return [
        Table("Perturbations", columns, rows, note),
        Table("Perturbations, layer by layer", layer_columns, by_layer, _FROM_0),
    ]


def subject_tables(found: Findings) -> list[Table]:
    """Every subject's accuracy and gate, and the experts in at least 1 % of its questions."""
    subjects = subjects_json(found.counts, found.layers)
    return [_routing(subjects), _experts(subjects)]


def experts_csv(found: Findings) -> Table:
    """Every expert of every layer, one row each, for a data frame; intervals as two columns."""
    flat = [
        {"layer": layer["layer"], "block": layer["block"], **_flat(expert)}
        for layer in layers_json(found)
        for expert in layer["expert"]
    ]
    return Table("experts", tuple(map(Column, flat[0])), [list(row.values()) for row in flat])


def subjects_csv(found: Findings) -> Table:
    """Every expert of every layer for every subject, one row each."""
    names = ("subject", "questions", "layer", "expert", "appearances", "accuracy")
    rows = [
        [subject["subject"], subject["questions"], layer["layer"], expert, *pair]
        for subject in subjects_json(found.counts, found.layers)
        for layer in subject["layers"]
        for expert, pair in enumerate(_pairs(layer))
    ]
    return Table("subjects", tuple(map(Column, names)), rows)


def _routing(subjects: list[dict[str, Any]]) -> Table:
    rows = [
        [
            subject["subject"],
            subject["questions"],
            subject["accuracy"],
            layer["layer"],
            *[
                layer[f"entropy_{which}"]
                for which in ("top_mean", "top_std", "all_mean", "all_std")
            ],
            " ".join(f"{p:.3f}" for p in layer["rank_probability_mean"]),
        ]
        for subject in subjects
        for layer in subject["layers"]
    ]
    columns = (
        *(Column("subject"), Column("questions", ",d"), Column("accuracy", ".1%"), _LAYER),
        *(Column("entropy, top K", ".4f"), Column("std", ".4f")),
        *(Column("entropy, all", ".4f"), Column("std", ".4f")),
        Column("mean probability of each rank"),
    )
    return Table("Subjects: entropy and rank probabilities", columns, rows, _FROM_0)


def _experts(subjects: list[dict[str, Any]]) -> Table:
    rows = [
        [subject["subject"], layer["layer"], expert, *pair]
        for subject in subjects
        for layer in subject["layers"]
        for expert, pair in enumerate(_pairs(layer))
        if pair[0] >= MIN_APPEARANCES
    ]
    columns = (
        *(Column("subject"), _LAYER, Column("expert")),
        *(Column("appearances", ".1%"), Column("accuracy", ".1%")),
    )
    title = "Subjects: experts in at least 1 % of a subject's questions"
    return Table(title, columns, rows, _FROM_0)


def _pairs(layer: dict[str, Any]) -> list[tuple[float, float | None]]:
    return list(zip(layer["appearances"], layer["expert_accuracy"], strict=True))


def _flat(expert: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in expert.items():
        if name.endswith("_ci95"):
            flat[f"{name}_low"], flat[f"{name}_high"] = value or (None, None)
        else:
            flat[name] = value
    return flat


def _percent_range(ends: list[float]) -> str:
    low, high = ends
    return f"{low:.1%} … {high:.1%}"
