"""A profile as tables: the paper's Tables 1 to 7 (arXiv 2502.17187), its evidence, criteria."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain, combinations
from typing import Any

import numpy as np

from expertcut.edits.criteria import Compared
from expertcut.edits.selection import super_experts
from expertcut.profiling import findings as evidence
from expertcut.profiling.findings import THRESHOLDS, Findings
from expertcut.profiling.significance import subjects_json
from expertcut.profiling.statistics import LayerStatistics, expert_json, or_none, share
from expertcut.profiling.storage import Profile, largest_values
from expertcut.reporting import edit_tables as edits
from expertcut.reporting.edit_tables import interval_text, known_ids, percent, rows_tables
from expertcut.reporting.tables import Cell, Column, Table, columns, labelled, next_lines
from expertcut.stats import LEVEL, Array

MIN_APPEARANCES = 0.01  # the paper's tables list experts that appear in at least 1 % of questions
FROM_0 = "Layers are MoE layers, counted from 0."
ENTROPY_HEADS = "entropy, mean::.4f; entropy, std::.4f; at most::.4f"


def cut_text(*n_cut: int | None) -> str:
    """How many prompts each tokenizer cut, as the end of a sentence; nothing where none may be."""
    counts = " or ".join(f"{n:,}" for n in sorted({n for n in n_cut if n is not None}))
    return f", {counts} prompts cut from the left to fit the context" if counts else ""


def headline_facts(findings: Findings) -> dict[str, str]:
    """What a profile says of a model: accuracy, experts by their part in the output, gate."""
    profile, layers, tested = findings.profile, findings.layers, findings.significance
    quiz, answers, blocks = profile.info.quiz, profile.answers, profile.info.model.blocks
    n = len(answers.answer_N)
    counts = f"{sum(x.n_activated for x in layers):,} of {len(findings.places):,} ever answer"
    if (tokens_LE := profile.token_sum("tokens")) is not None:
        counts += f", {int((tokens_LE > 0).sum()):,} are chosen by any token"
    numbers = known_ids(profile)
    names = [f"{layer}:{numbers.number(blocks[layer].name, e)}" for layer, e in findings.places]
    sums = [x.over_tokens.weighted_norm_E if x.over_tokens else x.weight_E for x in layers]
    what = "gate weight·‖f(x)‖" if layers[0].over_tokens else "gate weight at the answer"
    listed = ranked_contributions(profile, sums)
    harmful = [names[x] for x in tested.suspects if tested.p_family_X[x] < LEVEL]
    worse = f"{', '.join(harmful)} answer worse" if harmful else "none answers worse"
    flat_L = [float(x.entropy_all_N.mean()) / math.log(max(x.n_experts, 2)) for x in layers]
    return {
        "questions": f"{n:,} {quiz.split} questions of {quiz.id} at {quiz.shots} shots"
        + cut_text(answers.n_cut),
        "accuracy": edits.accuracy_text(answers.accuracy, n, answers.chance),
        "experts": f"{counts}, in {len(layers)} layers of {profile.info.model.label}",
        "most": f"{', '.join(listed[:5])} of the {what} of their layers",
        "least": f"{', '.join(listed[:-6:-1])}, of experts that are chosen at all",
        "suspects": f"{worse} beyond chance, of {tested.n_tests:,} experts that could be tested",
        "gate": gate_text(flat_L),
    }


def ranked_contributions(profile: Profile, sums: Sequence[Array | None]) -> list[str]:
    """The experts with their shares of a sum over their layer, the largest first, 0 left out."""
    numbers = known_ids(profile)
    names = [
        f"{layer}:{numbers.number(block.name, e)}"
        for layer, block in enumerate(profile.info.model.blocks)
        for e in range(block.experts)
    ]
    share_X = np.concatenate([share(own_E, own_E.sum(), 0.0) for own_E in map(np.asarray, sums)])
    order = [x for x in np.argsort(-share_X, kind="stable") if share_X[x] > 0]
    return [f"{names[x]} {100 * share_X[x]:.2g} %" for x in order]


def gate_text(flat_L: Sequence[float]) -> str:
    """The sharpest and the flattest gate, by the entropy as a share of that of a uniform gate."""
    sharpest, flattest = int(np.argmin(flat_L)), int(np.argmax(flat_L))
    return (
        f"{percent(flat_L[sharpest])} (layer {sharpest}) to {percent(flat_L[flattest])} "
        f"(layer {flattest}) of the entropy of a uniform gate"
    )


def headline(findings: Findings) -> list[str]:
    """The same in a few lines, with the profile's folder and what to do next."""
    profile, facts, path = findings.profile, headline_facts(findings), str(findings.profile.path)
    facts = {"profile": f"{path}: {facts.pop('questions')}", **facts}
    by = ("--by", "reap") if findings.layers[0].over_tokens else ()
    return [*(labelled(*fact) for fact in facts.items()), *next_commands(profile, by)]


def next_commands(profile: Profile, by: Sequence[str]) -> list[str]:
    """What to do with a profile: to cut by it, if that can be, and to see its tables."""
    path = str(profile.path)
    blocks = profile.info.model.blocks
    layout = ("--layout", "exact") if any(b.is_hashed for b in blocks) else ()
    prune = ("prune", "--profile", path, "--sparsity", "0.5", *by, *layout)
    can_prune = not any(b.declared and b.declared.why_not_cut for b in blocks)
    return next_lines(*((prune,) if can_prune else ()), ("show", path, "--tables"))


def profile_tables(profile: Profile, layers: Sequence[LayerStatistics] = ()) -> list[Table]:
    """Tables 1–2, 3, 4, 5 and 6–7, in the paper's order, of `layers` where they are known."""
    layers = layers or profile.layers
    last = layers[-1]
    mean_K, std_K = last.rank_probability_NK.mean(axis=0), last.rank_probability_NK.std(axis=0)
    ranks = [[k + 1, float(mean_K[k]), float(std_K[k])] for k in range(last.top_k)]
    title = f"Table 3: normalised probability of each rank in the last layer ({last.layer})"
    entropies = [
        [layer.layer, *_entropy(layer.entropy_all_N), math.log(layer.n_experts)] for layer in layers
    ]
    heads = columns(f"layer; {ENTROPY_HEADS}")
    return [
        _activated(profile, layers),
        Table(title, columns("rank; mean::.4f; std::.4f"), ranks),
        *[_expert_table(layers[i]) for i in dict.fromkeys((0, len(layers) - 1))],
        Table("Tables 6–7: entropy over all experts", heads, entropies, FROM_0),
    ]


def _activated(profile: Profile, layers: Sequence[LayerStatistics]) -> Table:
    quiz = profile.info.quiz
    ties = profile.near_ties()
    own = sum(not tie["in_shots"] for tie in ties)
    n_questions = len(profile.array("answer_N"))
    note = (
        f"{n_questions:,} {quiz.split} questions of {quiz.id} at {quiz.shots} shots"
        f"{cut_text(profile.answers.n_cut)}. {FROM_0} "
        f"Near-ties: {own:,} questions have a token of their own whose choice of experts hangs "
        f"on a gap below 1e-5, {len(ties) - own:,} more have one in their shots."
    )
    note += hashed_note(profile)
    rows: list[list[Cell]] = [
        [layer.layer, layer.n_activated, layer.n_experts, *_entropy(layer.entropy_top_N),
         math.log(layer.top_k)]
        for layer in layers
    ]  # fmt: skip
    heads = columns(f"layer; activated experts; of; {ENTROPY_HEADS}")
    top_k = layers[0].top_k
    return Table(f"Tables 1–2: activated experts, entropy of the top {top_k}", heads, rows, note)


def hashed_note(profile: Profile) -> str:
    """Which layers a table of token ids routes, if any."""
    hashed = [str(i) for i, block in enumerate(profile.info.model.blocks) if block.is_hashed]
    if not hashed:
        return ""
    return (
        f" Hash-routed: layers {', '.join(hashed)} choose their experts by a table of token "
        "ids; they are measured, and none of their experts can be removed or boosted."
    )


def _entropy(entropy_N: np.ndarray[Any, Any]) -> tuple[float, float]:
    return float(entropy_N.mean()), float(entropy_N.std())


def _expert_table(layer: LayerStatistics) -> Table:
    rows = [
        list(expert_json(layer, expert).values())
        for expert in range(layer.n_experts)
        if layer.appearances_E[expert] >= MIN_APPEARANCES
    ]
    which = "4: experts of the first" if layer.layer == 0 else "5: experts of the last"
    title = f"Table {which} layer ({layer.layer}) in at least 1 % of questions"
    heads = columns(
        "expert; appearances::.1%; accuracy::.1%; weighted accuracy::.1%; contribution, %::.2f; "
        "tokens::,d"
    )
    return Table(title, heads, rows, "Tokens count every prompt token, shots included.")


def constants_tables(profile: Profile) -> list[Table]:
    """How often zero-computation experts are chosen at answers, by layer and by subject."""
    kinds_L = [
        block.declared.constants if block.declared else {} for block in profile.info.model.blocks
    ]
    named = [
        kind
        for kind in ("zero", "copy", "constant")
        if any(kind in own.values() for own in kinds_L)
    ]
    if not named:
        return []
    chosen_NLK, subjects = profile.array("chosen_NLK"), np.array(profile.subjects())
    kind_NLK = np.full(chosen_NLK.shape, -1)
    for layer, own in enumerate(kinds_L):
        for expert, kind in own.items():
            kind_NLK[:, layer][chosen_NLK[:, layer] == expert] = named.index(kind)

    def row(name: Cell, part: Array, chosen: Array) -> list[Cell]:
        return [name, *(float((part == i).sum() / (chosen >= 0).sum()) for i in range(len(named)))]

    heads = "; ".join(f"{kind}::.1%" for kind in named)
    layers = [row(i, kind_NLK[:, i], chosen_NLK[:, i]) for i in range(len(kinds_L))]
    by_subject = [
        row(name, kind_NLK[subjects == name], chosen_NLK[subjects == name])
        for name in dict.fromkeys(subjects.tolist())
    ]
    title = "Choices of experts without computation, at answers"
    return [
        Table(title, columns(f"layer; {heads}"), layers, FROM_0),
        Table(f"{title}, by subject", columns(f"subject; {heads}"), by_subject),
    ]


def suspects_table(findings: Findings) -> Table:
    """The experts whose questions went worst against others of their subjects."""
    tested = findings.significance
    rows = [
        [
            *(row[name] for name in ("layer", "expert", "appearances", "accuracy")),
            interval_text(row["accuracy_ci95"], places=1),
            *(100 * row["difference"], 100 * row["difference_se"]),
            *(row[name] for name in ("z", "p", "p_adjusted", "p_family")),
        ]
        for row in evidence.suspects_json(findings)[:10]
    ]
    heads = columns(
        "layer; expert; appearances::.1%; accuracy::.1%; 95 % interval; difference, points::+.1f | "
        "± SE::.1f; z::+.2f; p::.2g; p, adjusted::.2g; p, family-wise::.2g"
    )
    note = (
        f"By z, the most harmful first; {tested.n_tests:,} of {len(findings.places):,} experts "
        "could be tested. The difference is to questions of the same subjects that did not "
        "activate the expert. Adjusted: Benjamini–Hochberg. Family-wise: the largest |z| of "
        f"{tested.permutations:,} permutations of correctness within subjects. {FROM_0}"
    )
    return Table("Suspects: experts whose questions are answered worse", heads, rows, note)


def margins_table(findings: Findings) -> Table:
    """How far the last chosen expert is ahead of the next, layer by layer."""
    rows: list[list[Cell]] = []
    reasons: dict[str, list[int]] = {}
    parts = {"mean": "mean", "q05": "5 %", "median": "median", "q95": "95 %"}
    for layer, margin in enumerate(findings.margins):
        shown = evidence.margin_json(margin)
        p, logit = shown["margin_probability"] or {}, shown["margin_logit"] or {}
        below = [item["share"] for item in shown["margin_below"] or []] or [None] * len(THRESHOLDS)
        rows.append([layer, *map(p.get, parts), *map(logit.get, parts), *below])
        if margin.undefined:
            reasons.setdefault(margin.undefined, []).append(layer)
    heads = (
        Column("layer"),
        *[Column(f"p: {part}", ".2e") for part in parts.values()],
        *[Column(f"logit: {part}", ".3f", is_wide=True) for part in parts.values()],
        *[Column(f"p < {threshold:g}", ".1%", is_wide=True) for threshold in THRESHOLDS],
    )
    notes = [f"Rank K minus rank K+1, in probability and in logit. {FROM_0}"]
    notes += [f"None in layers {', '.join(map(str, at))}: {why}." for why, at in reasons.items()]
    return Table("Gate margins at the answer position", heads, rows, " ".join(notes))


def perturbation_tables(findings: Findings) -> list[Table]:
    """What moved when the questions were asked otherwise; nothing where they were not."""
    if not findings.perturbations:
        return []
    keys = (
        *("kind", "accuracy", "flipped", "mean_abs_logprob_diff", "max_abs_logprob_diff"),
        *("changed", "margin_flipped_correlation", "margin_logprob_correlation"),
    )
    heads = columns(
        "asked again with; accuracy::.2%; flipped answers::.2%; mean |Δ log p|::.4f; largest::.4f; "
        "another set chosen::.2% | margin and flips::+.2f; margin and |Δ log p|::+.2f"
    )
    note = "Correlations are Spearman's, with the smallest margin of any layer."
    by_layer = [
        [p["kind"], layer["layer"], layer["changed"], layer["margin_changed_correlation"]]
        for p in findings.perturbations
        for layer in p["layers"]
    ]
    layer_heads = columns(
        "asked again with; layer; another set chosen::.2%; margin and change::+.2f"
    )
    rows = [[p[key] for key in keys] for p in findings.perturbations]
    return [
        Table("Perturbations", heads, rows, note),
        Table("Perturbations, layer by layer", layer_heads, by_layer, FROM_0),
    ]


def subject_tables(findings: Findings) -> list[Table]:
    """Every subject's accuracy and gate, and the experts in at least 1 % of its questions."""
    moments = ("entropy_top_mean", "entropy_top_std", "entropy_all_mean", "entropy_all_std")
    routing: list[list[Cell]] = []
    experts: list[list[Cell]] = []
    for subject in subjects_json(findings.counts, findings.layers):
        for layer in subject["layers"]:
            ranks = " ".join(f"{p:.3f}" for p in layer["rank_probability_mean"])
            own = (subject[name] for name in ("subject", "questions", "accuracy"))
            routing.append([*own, *(layer[name] for name in ("layer", *moments)), ranks])
            experts += [
                [subject["subject"], layer["layer"], expert, *pair]
                for expert, pair in enumerate(_pairs(layer))
                if pair[0] >= MIN_APPEARANCES
            ]
    heads = columns(
        "subject; questions::,d; accuracy::.1%; layer; entropy, top K::.4f; std::.4f; "
        "entropy, all::.4f; std::.4f; mean probability of each rank"
    )
    expert_heads = columns("subject; layer; expert; appearances::.1%; accuracy::.1%")
    title = "Subjects: experts in at least 1 % of a subject's questions"
    return [
        Table("Subjects: entropy and rank probabilities", heads, routing, FROM_0),
        Table(title, expert_heads, experts, FROM_0),
    ]


def experts_csv(findings: Findings) -> Table:
    """Every expert of every layer, one row each, for a data frame; intervals as two columns."""
    rows: list[dict[str, Any]] = []
    for layer in evidence.layers_json(findings):
        for expert in layer["expert"]:
            row = {"layer": layer["layer"], "block": layer["block"]}
            for name, value in expert.items():
                if name.endswith("_ci95"):
                    row[f"{name}_low"], row[f"{name}_high"] = value or (None, None)
                else:
                    row[name] = value
            rows.append(row)
    return Table("experts", tuple(map(Column, rows[0])), [list(row.values()) for row in rows])


def subjects_csv(findings: Findings) -> Table:
    """Every expert of every layer for every subject, one row each."""
    rows = [
        [subject["subject"], subject["questions"], layer["layer"], expert, *pair]
        for subject in subjects_json(findings.counts, findings.layers)
        for layer in subject["layers"]
        for expert, pair in enumerate(_pairs(layer))
    ]
    heads = columns("subject; questions; layer; expert; appearances; accuracy")
    return Table("subjects", heads, rows)


def _pairs(layer: dict[str, Any]) -> list[tuple[float, float | None]]:
    return list(zip(layer["appearances"], layer["expert_accuracy"], strict=True))


def criteria_tables(compared: Compared) -> list[Table]:
    """What each criterion keeps, how far they agree, and ranks in the first and the last layer."""
    n_layers, names = len(compared.profile.layers), [*compared.scores]
    ends = [*dict.fromkeys((0, n_layers - 1))]
    first: list[list[Cell]] = []
    agreement: list[list[Cell]] = []
    for name in names:
        rhos = {other: or_none(compared.agreement(name, other)) for other in names}
        others = [(rho, n) for n, rho in rhos.items() if n != name and rho is not None]
        kept = [", ".join(map(str, np.argsort(compared.ranks[name][i])[:3])) for i in ends]
        closest = "{1} {0:+.2f}".format(*max(others)) if others else None
        first.append([name, closest, *kept])
        agreement.append([name, *rhos.values()])
    note = f"Spearman's correlation of scores within a layer, its mean over {n_layers} layers."
    if left_out := "; ".join(f"{name}: {reason}" for name, reason in compared.left_out.items()):
        note += f" Left out: {left_out}."
    first_heads = *columns("criterion; closest to"), *(Column(f"first in layer {i}") for i in ends)
    heads = tuple(Column(n, ".2f", is_wide=True) for n in ("criterion", *names))
    return [
        Table("Criteria, and the experts that each keeps longest", first_heads, first, note),
        Table("How far criteria agree", heads, agreement),
        *[_criteria_ranks(compared, layer) for layer in ends],
        *rows_tables(compared.profile),
    ]


def criteria_csv(compared: Compared) -> Table:
    """One row for each expert of each layer: score and rank by each criterion."""
    heads = [Column(f"{name}_{what}") for name in compared.scores for what in ("score", "rank")]
    rows = [
        [layer, expert, *chain(*zip(scores.values(), ranks.values(), strict=True))]
        for layer, expert, scores, ranks in _expert_scores(compared)
    ]
    return Table("Criteria", (Column("layer"), Column("expert"), *heads), rows)


def criteria_json(compared: Compared) -> dict[str, Any]:
    """Scores, ranks and rank correlations of all layers, and what could not be answered."""
    layers: list[dict[str, Any]] = [
        {"layer": x.layer, "block": x.block, "super_experts": list(own), "expert": []}
        for x, own in zip(compared.profile.layers, _supers(compared), strict=True)
    ]
    for layer, expert, scores, ranks in _expert_scores(compared):
        layers[layer]["expert"].append({"expert": expert, "scores": scores, "ranks": ranks})
    return {
        "criteria": list(compared.scores),
        "left_out": dict(compared.left_out),
        "spearman": [
            {
                "criteria": [a, b],
                "mean": or_none(compared.agreement(a, b)),
                "layers": [or_none(value) for value in compared.correlations(a, b)],
            }
            for a, b in combinations(compared.scores, 2)
        ],
        "layers": layers,
    }


def _expert_scores(
    compared: Compared,
) -> Iterator[tuple[int, int, dict[str, float | None], dict[str, int]]]:
    """Layer, expert, scores and ranks by criterion; a score that is undefined is None."""
    for layer in compared.profile.layers:
        scores = {name: compared.scores[name][layer.layer] for name in compared.scores}
        ranks = {name: compared.ranks[name][layer.layer] for name in compared.scores}
        for e in range(layer.n_experts):
            own = {name: or_none(score_E[e]) for name, score_E in scores.items()}
            yield layer.layer, e, own, {name: int(rank_E[e]) for name, rank_E in ranks.items()}


def _criteria_ranks(compared: Compared, index: int) -> Table:
    layer, supers = compared.profile.layers[index], _supers(compared)[index]
    rows: list[list[Cell]] = []
    for expert in np.argsort(next(iter(compared.ranks.values()))[index]):  # the best first
        ranks = [int(compared.ranks[name][index][expert]) for name in compared.scores]
        rows.append([int(expert), *ranks, "super" if expert in supers else ""])
    heads = tuple(Column(n, is_wide=True) for n in ("expert", *compared.scores, "protected"))
    title = f"Ranks of the experts of layer {layer.layer} by each criterion, 1 is kept longest"
    return Table(title, heads, rows, FROM_0)


def _supers(compared: Compared) -> list[tuple[int, ...]]:
    is_known = largest_values(compared.profile) is not None
    return super_experts(compared.profile) if is_known else [()] * len(compared.profile.layers)
