"""Tables, sentences and figures of plans, results, sweeps and audits."""

from collections.abc import Sequence
from pathlib import Path

from expertcut.edits.plan import PlanFile, ids_text
from expertcut.evaluation.results import ComparisonResult, ModelResult, Results
from expertcut.evaluation.search_results import (
    Audit,
    Correlation,
    CriterionEvaluation,
    Sweep,
    SweptModel,
)
from expertcut.reporting.edit_tables import change_cells, interval_text, points, verdict_text
from expertcut.reporting.plots import Series, draw_forest, draw_lines, series_of
from expertcut.reporting.profile_tables import cut_text
from expertcut.reporting.tables import Cell, Column, Table, columns
from expertcut.stats import MARGIN, Comparison

_SCORED = "accuracy::.2%; 95 % interval; Δ::+.2%; 95 % interval of Δ; gained; lost; McNemar p::.3g"


def plan_table(plan: PlanFile) -> Table:
    """One row per block: kept, biased, scaled and merged experts."""
    is_merged = plan.removal == "merge"
    rows: list[list[Cell]] = []
    for name, edit in plan.blocks.items():
        bias = ", ".join(f"{e}: {b:+.4f}" for e, b in edit.bias.items()) or None
        scale = ", ".join(f"{e}: ×{s:.4f}" for e, s in edit.scale.items()) or None
        groups = [
            f"{expert} ← {', '.join(str(m) for m in members if m != expert)}"
            for expert, members in (edit.merged or {}).items()
        ]
        joined = ["; ".join(groups) or None] if is_merged else []
        rows.append([name, len(edit.keep), ids_text(edit.keep), bias, scale, *joined])
    heads = "block; kept; experts; bias; scale" + ("; joined by" if is_merged else "")
    note = f"Chosen on {chosen_text(plan)}; model {plan.model.label}."
    return Table(f"Plan: {plan.action} ({plan.layout})", columns(heads), rows, note)


def chosen_text(plan: PlanFile) -> str:
    """The questions that a plan was chosen and fitted on."""
    chosen = plan.chosen_on
    text = f"{chosen.questions:,} {chosen.split} questions of {chosen.quiz}"
    if chosen.fitted_split:
        text += f", fitted on {chosen.fitted_questions:,} of {chosen.fitted_split}"
    return text


def plan_csv(plan: PlanFile) -> Table:
    """One row per kept expert, with its bias and its factor."""
    rows: list[list[Cell]] = [
        [name, expert, edit.bias.get(expert), edit.scale.get(expert)]
        for name, edit in plan.blocks.items()
        for expert in edit.keep
    ]
    return Table("plan", columns("block; expert; bias; scale"), rows)


def results_table(results: Results) -> Table:
    """One row per model, compared with the first."""
    compared = {c.other: c for c in results.comparisons}
    rows: list[list[Cell]] = [
        [Path(m.path).name, *_scored(m, compared.get(i)), m.parameters, m.active_parameters,
         m.bytes / 1e6]
        for i, m in enumerate(results.models)
    ]  # fmt: skip
    heads = columns(f"model; {_SCORED}; parameters::,d; active::,d; MB::.1f")
    n_questions = results.models[0].questions
    note = f"{n_questions:,} {results.split} questions of {results.quiz} at {results.shots} shots"
    if cuts := {model.cut for model in results.models if model.cut is not None}:
        n_cut = " or ".join(f"{n:,}" for n in sorted(cuts))  # tokenizers and contexts may differ
        note += f", {n_cut} prompts cut from the left to fit the context"
    return Table("Evaluation", heads, rows, note)


def results_csv(results: Results) -> Table:
    """One row per model and subject, and one for all subjects (empty)."""
    rows: list[list[Cell]] = []
    for model in results.models:
        rows.append([model.path, None, model.accuracy, model.questions])
        rows += [[model.path, s, r.accuracy, r.questions] for s, r in model.subjects.items()]
    return Table("results", columns("path; subject; accuracy; questions"), rows)


def result_sentences(results: Results) -> list[str]:
    """A sentence per model: the change, its significance, and leakage."""
    base, names = results.models[0], model_names(results)
    sentences = [f"{names[0]} answers {base.accuracy:.2%} right: the base of the comparisons."]
    for comparison in results.comparisons:
        model = results.models[comparison.other]
        verdict = _comparison_verdict(comparison) + _won_back(results, names, comparison)
        sentences.append(f"{names[comparison.other]} {verdict}{_leak(model, results.split)}.")
    return sentences


def verdict_sentences(results: Results, margin: float = MARGIN) -> list[str]:
    """A sentence per model compared: whether it holds within a margin (a share of questions)."""
    names, n = model_names(results), results.models[0].questions
    return [
        f"verdict on {names[c.other]}: {verdict_text(c, n, margin)} ({points(c.delta)} points, "
        f"95 % interval {' … '.join(map(points, c.ci95))})"
        for c in results.comparisons
    ]


def model_names(results: Results) -> list[str]:
    """The last part of each model's path, or the whole path where that is ambiguous."""
    last = [Path(model.path).name for model in results.models]
    return [
        name if last.count(name) == 1 else model.path
        for name, model in zip(last, results.models, strict=True)
    ]


def _won_back(results: Results, names: list[str], healed: ComparisonResult) -> str:
    """The points that healing regained, if the cut was evaluated too and lost accuracy."""
    before = results.models[healed.other].healed_from
    for cut in results.comparisons if before else []:
        is_lost = cut.is_significant and cut.delta < 0
        if is_lost and results.models[cut.other].fingerprint == before:
            won, lost = healed.delta - cut.delta, -cut.delta
            return (
                f"; healing won back {won * 100:.2f} of the {lost * 100:.2f} points that "
                f"{names[cut.other]} had lost"
            )
    return ""


def _scored(model: ModelResult | SweptModel, change: Comparison | None) -> list[Cell]:
    return [model.accuracy, interval_text(model.ci95), *change_cells(change)]


def _comparison_verdict(c: ComparisonResult) -> str:
    change = f"{c.delta * 100:+.2f} points ({c.gained} gained, {c.lost} lost)"
    if c.gained + c.lost == 0:
        text = "answers every question as the base does"
    elif not c.is_significant:
        text = (
            f"shows no evidence of a change in accuracy: {change}, McNemar p = {c.mcnemar_p:.2g}; "
            f"{c.smallest_effect * 100:.2f} points could have been shown"
        )
    else:
        word = "gains" if c.delta > 0 else "loses"
        text = f"{word} accuracy: {change}, McNemar p = {c.mcnemar_p:.2g}"
    if c.parameters_delta:
        text += f", with {c.parameters_delta:+,} parameters"
    return text


def _leak(model: ModelResult, split: str) -> str:
    chosen = model.chosen_on
    if chosen is None:
        return ""
    if chosen.overlap == 0:
        return f"; it was chosen on {chosen.split}, none of the questions scored here"
    return (
        f"; {chosen.overlap:,} of the {model.questions:,} {split} questions scored here were used "
        "to choose it, so this flatters it"
    )


def sweep_table(sweep: Sweep) -> Table:
    """The unedited model and every finished cell."""
    rows: list[list[Cell]] = []
    if b := sweep.base:
        rows.append(["unedited", None, None, *_scored(b, None), b.parameters, b.bytes / 1e6])
    for c in sweep.cells:
        scored = _scored(c, c.change)
        rows.append([c.by, c.fraction, c.kept, *scored, c.parameters, c.bytes / 1e6])
    heads = columns(f"by; share::g; kept a layer; {_SCORED}; parameters::,d; MB::.2f")
    request, quiz = sweep.asked, sweep.asked.scored.quiz
    n_cells = len(request.by) * len(request.fractions)
    note = (
        f"{sweep.n_questions:,} {quiz.split} questions of {quiz.id} at {quiz.shots} shots, layout "
        f"{request.layout}. MB are those of the weights that a checkpoint would have."
    )
    if sweep.base is not None and sweep.base.cut is not None:
        note += f" {sweep.base.cut:,} prompts are cut from the left to fit the context."
    if not sweep.is_complete:
        note += f" {len(sweep.cells)} of {n_cells} cells: the same command does the rest."
    return Table(f"Sweep of {request.scored.model.label}", heads, rows, note)


def sweep_csv(sweep: Sweep) -> Table:
    """One row per form of the model, in full precision; the unedited one has no criterion."""
    heads = columns(
        "by; fraction; kept; questions; accuracy; ci95_low; ci95_high; right_logprob; delta; "
        "delta_low; delta_high; gained; lost; mcnemar_p; smallest_effect; max_abs_logprob_diff; "
        "median_abs_logprob_diff; parameters; active_parameters; bytes"
    )
    rows: list[list[Cell]] = []
    if b := sweep.base:
        scored: list[Cell] = [b.questions, b.accuracy, *b.ci95, b.right_logprob, *[None] * 9]
        rows.append([None, None, None, *scored, b.parameters, b.active_parameters, b.bytes])
    for cell in sweep.cells:
        c = cell.change
        row: list[Cell] = [cell.by, cell.fraction, cell.kept, cell.questions, cell.accuracy]
        row += [*cell.ci95, cell.right_logprob, c.delta, *c.ci95, c.gained, c.lost, c.mcnemar_p]
        row += [c.smallest_effect, cell.max_abs_logprob_diff, cell.median_abs_logprob_diff]
        rows.append([*row, cell.parameters, cell.active_parameters, cell.bytes])
    return Table("sweep", heads, rows)


def sweep_sentences(sweep: Sweep) -> list[str]:
    """Leakage, and which cells change accuracy significantly."""
    quiz, chosen = sweep.asked.scored.quiz, sweep.chosen_on
    leak = (
        f"The experts were chosen on {chosen.split}, none of the questions scored here."
        if chosen.overlap == 0
        else f"{chosen.overlap:,} of the {sweep.n_questions:,} {quiz.split} questions scored here "
        "were used to choose the experts, so this flatters the cuts."
    )
    return [leak, *(_sweep_verdict(fraction, sweep) for fraction in sweep.asked.fractions)]


def _sweep_verdict(fraction: float, sweep: Sweep) -> str:
    cells = [cell for cell in sweep.cells if cell.fraction == fraction]
    if not cells:
        return f"At {fraction:g} no cell is finished."
    best = max(cells, key=lambda cell: cell.accuracy)
    clear = ", ".join(c.by for c in cells if c.change.is_significant)
    change = best.change
    text = (
        f"At {fraction:g} of the experts {best.by} keeps most: {best.accuracy:.2%}, "
        f"{change.delta * 100:+.2f} points (95 % interval {change.ci95[0] * 100:+.2f} to "
        f"{change.ci95[1] * 100:+.2f}, McNemar p = {change.mcnemar_p:.2g})"
    )
    if clear:
        return f"{text}; accuracy changes beyond chance with {clear}."
    return f"{text}; no evidence of a change with any criterion."


def sweep_figure(sweep: Sweep) -> dict[str, bytes]:
    """`sweep.png` and `sweep.svg`: accuracy against the size of the weights, with intervals."""
    cells = sorted(sweep.cells, key=lambda cell: cell.bytes)
    series = [_sweep_series(by, [c for c in cells if c.by == by]) for by in sweep.asked.by]
    base = None if sweep.base is None else _sweep_series("unedited", [sweep.base])
    labels = ("size of the weights (MB)", f"accuracy on {sweep.asked.scored.quiz.split} (%)")
    return draw_lines("sweep", series, base, labels)


def _sweep_series(name: str, models: Sequence[SweptModel]) -> Series:
    values = [100 * model.accuracy for model in models]
    ends = [(100 * model.ci95[0], 100 * model.ci95[1]) for model in models]
    return series_of(name, values, ends, tuple(model.bytes / 1e6 for model in models))


def _criteria_table(audit: Audit) -> Table:
    """One row per criterion, the best correlation first."""
    rows: list[list[Cell]] = []
    for v in ranked(audit):
        rhos = [*_correlation(v.within), *_correlation(v.overall), *_correlation(v.within_accuracy)]
        rows.append([v.by, *rhos, *(r.regret for r in v.regrets)])
    heads = (
        "criterion; ρ within layers::+.2f; 95 % interval; ρ over all::+.2f; 95 % interval; "
        "ρ with accuracy::+.2f; 95 % interval"
    )
    heads += "".join(f"; regret at {f:g}::.4f" for f in audit.asked.fractions)
    expected = ", ".join(
        f"{r.random - r.least:.4f} at {r.fraction:g}" for r in audit.verdicts[0].regrets
    )
    note = (
        "ρ is Spearman's between score and harm: +1 where the criterion removes the least harmful "
        "experts first. Regret is in nats of mean log p, as a sum of single harms; removing at "
        f"random costs {expected} on average."
    )
    title = f"Audit of {audit.asked.model.label}: the criteria"
    return Table(title, columns(heads), rows, note)


def audit_tables(audit: Audit) -> list[Table]:
    """The criteria, and the ten experts whose ablation has the largest effects."""
    rows = [
        [h.layer, h.expert, h.logprob, h.stderr, h.accuracy, h.gained, h.lost, h.mcnemar_p]
        for h in sorted(audit.harms, key=lambda harm: -harm.logprob)[:10]
    ]
    heads = columns(
        "layer; expert; loss of log p::+.4f; ± standard error::.4f; loss of accuracy::+.2%; "
        "gained; lost; McNemar p::.3g"
    )
    request = audit.asked
    note = (
        f"{len(audit.harms)} of {len(audit.sampled)} sampled experts removed one at a time (layout "
        f"{request.layout}); {request.questions:,} {request.split} questions of {request.quiz} at "
        f"{request.shots} shots{cut_text(audit.cut)}, unedited accuracy {audit.accuracy:.2%}."
    )
    if not audit.is_complete:
        note += " The same command does the rest."
    title = f"Audit of {request.model.label}: what removing one expert does"
    effects = Table(title, heads, rows, note)
    return [_criteria_table(audit), effects] if audit.verdicts else [effects]


def audit_csv(audit: Audit) -> Table:
    """One row per ablated expert, with its score by every criterion."""
    heads = columns(
        "layer; expert; loss_logprob; stderr; loss_accuracy; gained; lost; mcnemar_p; "
        "largest_abs_logprob_diff"
    )
    rows = [
        [*effect.model_dump().values(), *(ranks.score[i] for ranks in audit.standings.values())]
        for i, effect in enumerate(audit.harms)
    ]
    return Table("audit", (*heads, *map(Column, audit.standings)), rows)


def audit_sentences(audit: Audit) -> list[str]:
    """Leakage, and which criterion predicts the effects."""
    request = audit.asked
    leak = (
        f"None of the {request.questions:,} held-out questions ({request.split}) had a part in "
        "scoring the experts."
    )
    if audit.overlap:
        leak = (
            f"{audit.overlap:,} of the {request.questions:,} questions that were asked had been "
            "profiled, calibrated or cut on, so they are not held out: criteria that look at them "
            "are flattered."
        )
    first = ranked(audit)[0]
    if first.within.rho is None:
        return [leak, "No rank correlation is defined: sample more experts."]
    clear = [v.by for v in ranked(audit) if v.within.is_clear]
    best = f"the best is {first.by} (ρ = {first.within.rho:+.2f} within layers)"
    summary = "No criterion clearly orders these experts by their harm"
    if clear:
        summary = f"These order experts by their harm beyond chance: {', '.join(clear)}"
    return [leak, f"{summary}; {best}.", f"Least regret: {_least_regrets(audit)}."]


def _least_regrets(audit: Audit) -> str:
    """At each budget the criterion with the least regret, and that of random removal."""
    parts, n_sampled = [], len(audit.harms)
    for i, fraction in enumerate(audit.asked.fractions):
        least = min(v.regrets[i].regret for v in audit.verdicts)
        best = [v.by for v in audit.verdicts if v.regrets[i].regret <= least + 1e-12]
        regret = audit.verdicts[0].regrets[i]
        if regret.removed in (0, n_sampled):
            parts.append(f"at {fraction:g} {'all' if regret.removed else 'none'} of the sample go")
            continue
        names = "all alike" if len(best) == len(audit.verdicts) > 1 else " and ".join(best)
        parts.append(
            f"at {fraction:g} {names} ({least:.4f}, at random {regret.random - regret.least:.4f})"
        )
    return ", ".join(parts)


def audit_figure(audit: Audit) -> dict[str, bytes]:
    """`audit.png` and `audit.svg`: correlations with their intervals, and regrets."""
    order = ranked(audit)
    regrets, marks = [], []
    for i, fraction in enumerate(audit.asked.fractions):
        each = [verdict.regrets[i] for verdict in order]
        regrets.append(Series(f"{fraction:g} kept", tuple(r.regret for r in each)))
        marks.append(each[0].random - each[0].least)
    labels = ("Spearman's ρ of score and harm, within layers", "regret (nats); dotted: at random")
    names, rhos = [verdict.by for verdict in order], [verdict.within.rho for verdict in order]
    left = series_of("ρ", rhos, [_ends(verdict.within) for verdict in order])
    return draw_forest("audit", names, left, regrets, labels=labels, marks=marks)


def _ends(rank: Correlation) -> tuple[float, float] | tuple[None, None]:
    """The interval, widened to contain the correlation itself."""
    if rank.rho is None:
        return None, None
    values = (rank.rho, *(rank.ci95 or ()))
    return min(values), max(values)


def ranked(audit: Audit) -> list[CriterionEvaluation]:
    """By correlation within layers, best first, undefined last."""
    return sorted(audit.verdicts, key=lambda v: 2.0 if v.within.rho is None else -v.within.rho)


def _correlation(rank: Correlation) -> list[Cell]:
    interval = None if rank.ci95 is None else f"{rank.ci95[0]:+.2f} … {rank.ci95[1]:+.2f}"
    return [rank.rho, interval]
