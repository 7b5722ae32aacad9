"""Plans, results, sweeps and audits in tables, words and figures."""

from collections.abc import Sequence
from pathlib import Path

from expertcut.edits.plan import PlanFile, ids_text
from expertcut.evaluation.results import ComparisonResult, ModelResult, Results
from expertcut.evaluation.search_results import (
    Audit,
    Correlation,
    Sweep,
    SweepCell,
    SweptModel,
    Verdict,
)
from expertcut.evaluation.stats import shows_change
from expertcut.reporting.edit_tables import merged_text
from expertcut.reporting.plots import Series, draw_forest, draw_lines
from expertcut.reporting.profile_tables import cut_text
from expertcut.reporting.tables import Cell, Column, Table


def plan_table(plan: PlanFile) -> Table:
    """One row per block: what stays, what is tilted, and what joined what."""
    rows: list[list[Cell]] = [
        [
            name,
            len(edit.keep),
            ids_text(edit.keep),
            ", ".join(f"{e}: {b:+.4f}" for e, b in edit.bias.items()) or None,
            ", ".join(f"{e}: ×{s:.4f}" for e, s in edit.scale.items()) or None,
            *([merged_text(edit)] if plan.removal == "merge" else []),
        ]
        for name, edit in plan.blocks.items()
    ]
    names = ["block", "kept", "experts", "bias", "scale"]
    columns = tuple(map(Column, [*names, *(["joined by"] if plan.removal == "merge" else [])]))
    chosen = plan.chosen_on
    fitted = f", fitted on {chosen.fitted_questions:,} of {chosen.fitted_split}"
    note = (
        f"Chosen on {chosen.questions:,} {chosen.split} questions of {chosen.quiz}"
        f"{fitted if chosen.fitted_split else ''}; model {plan.model.label}."
    )
    return Table(f"Plan: {plan.action} ({plan.layout})", columns, rows, note)


def plan_csv(plan: PlanFile) -> Table:
    """One row per expert that stays, with its bias and its factor, empty where it has none."""
    rows: list[list[Cell]] = [
        [name, expert, edit.bias.get(expert), edit.scale.get(expert)]
        for name, edit in plan.blocks.items()
        for expert in edit.keep
    ]
    return Table("plan", tuple(map(Column, ("block", "expert", "bias", "scale"))), rows)


def results_table(found: Results) -> Table:
    """One row per model, compared with the first."""
    compared = {c.other: c for c in found.comparisons}
    rows = [_result_row(m, compared.get(i)) for i, m in enumerate(found.models)]
    columns = (
        Column("model"),
        Column("accuracy", ".2%"),
        Column("95 % interval"),
        Column("Δ", "+.2%"),
        Column("95 % interval of Δ"),
        Column("gained"),
        Column("lost"),
        Column("McNemar p", ".3g"),
        Column("parameters", ",d"),
        Column("active", ",d"),
        Column("MB", ".1f"),
    )
    n_questions = found.models[0].questions
    note = f"{n_questions:,} {found.split} questions of {found.quiz} at {found.shots} shots"
    if cuts := {model.cut for model in found.models if model.cut is not None}:
        n_cut = " or ".join(f"{n:,}" for n in sorted(cuts))  # tokenizers and contexts may differ
        note += f", {n_cut} prompts cut from the left to fit the context"
    return Table("Evaluation", columns, rows, note)


def results_csv(found: Results) -> Table:
    """One row per model and subject, and one for all (subject empty)."""
    rows: list[list[Cell]] = []
    for model in found.models:
        rows.append([model.path, None, model.accuracy, model.questions])
        rows += [[model.path, s, r.accuracy, r.questions] for s, r in model.subjects.items()]
    return Table("results", tuple(map(Column, ("path", "subject", "accuracy", "questions"))), rows)


def result_sentences(found: Results) -> list[str]:
    """A sentence per model: what happened, how sure it is, and what it was chosen on."""
    base, names = found.models[0], _names(found)
    sentences = [f"{names[0]} answers {base.accuracy:.2%} right: the base of the comparisons."]
    for comparison in found.comparisons:
        model = found.models[comparison.other]
        verdict = _comparison_verdict(comparison) + _won_back(found, names, comparison)
        sentences.append(f"{names[comparison.other]} {verdict}{_leak(model, found.split)}.")
    return sentences


def _names(found: Results) -> list[str]:
    """The last part of each model's path, or the whole where that would name two."""
    last = [Path(model.path).name for model in found.models]
    return [
        name if last.count(name) == 1 else model.path
        for name, model in zip(last, found.models, strict=True)
    ]


def _won_back(found: Results, names: list[str], healed: ComparisonResult) -> str:
    """How many of the points that a cut lost healing won back, if the cut was evaluated too."""
    before = found.models[healed.other].healed_from
    for cut in found.comparisons if before else []:
        is_lost = shows_change(cut.ci95, cut.mcnemar_p) and cut.delta < 0
        if is_lost and found.models[cut.other].fingerprint == before:
            won, lost = healed.delta - cut.delta, -cut.delta
            return (
                f"; healing won back {won * 100:.2f} of the {lost * 100:.2f} points that "
                f"{names[cut.other]} had lost"
            )
    return ""


def _result_row(model: ModelResult, comparison: ComparisonResult | None) -> list[Cell]:
    row: list[Cell] = [Path(model.path).name, model.accuracy, _points_interval(model.ci95, "")]
    if comparison is None:
        row += [None] * 5
    else:
        c = comparison
        row += [c.delta, _points_interval(c.ci95, "+"), c.gained, c.lost, c.mcnemar_p]
    return [*row, model.parameters, model.active_parameters, model.bytes / 1e6]


def _comparison_verdict(c: ComparisonResult) -> str:
    change = f"{c.delta * 100:+.2f} points ({c.gained} gained, {c.lost} lost)"
    if c.gained + c.lost == 0:
        text = "answers every question as the base does"
    elif not shows_change(c.ci95, c.mcnemar_p):
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


def _points_interval(ci95: tuple[float, float], sign: str) -> str:
    return f"{ci95[0]:{sign}.2%} … {ci95[1]:{sign}.2%}"


def sweep_table(found: Sweep) -> Table:
    """The unedited model and every cell that is finished."""
    rows: list[list[Cell]] = []
    if found.base is not None:
        b = found.base
        its: list[Cell] = [
            b.accuracy,
            _sweep_interval(b.ci95),
            *[None] * 5,
            b.parameters,
            b.bytes / 1e6,
        ]
        rows.append(["unedited", None, None, *its])
    rows += [_row(cell) for cell in found.cells]
    columns = (
        Column("by"),
        Column("share", "g"),
        Column("kept a layer"),
        Column("accuracy", ".2%"),
        Column("95 % interval"),
        Column("Δ", "+.2%"),
        Column("95 % interval of Δ"),
        Column("gained"),
        Column("lost"),
        Column("McNemar p", ".3g"),
        Column("parameters", ",d"),
        Column("MB", ".2f"),
    )
    asked, quiz = found.asked, found.asked.scored.quiz
    n_questions = sum(subject.questions for subject in quiz.subjects.values())
    n_cells = len(asked.by) * len(asked.fractions)
    note = (
        f"{n_questions:,} {quiz.split} questions of {quiz.id} at {quiz.shots} shots, layout "
        f"{asked.layout}. MB are those of the weights that a checkpoint would have."
    )
    if found.base is not None and found.base.cut is not None:
        note += f" {found.base.cut:,} prompts are cut from the left to fit the context."
    if not found.is_complete:
        note += f" {len(found.cells)} of {n_cells} cells: the same command does the rest."
    return Table(f"Sweep of {asked.scored.model.label}", columns, rows, note)


def _row(cell: SweepCell) -> list[Cell]:
    c = cell.change
    change: list[Cell] = [c.delta, _sweep_interval(c.ci95, "+"), c.gained, c.lost, c.mcnemar_p]
    scored: list[Cell] = [cell.accuracy, _sweep_interval(cell.ci95), *change]
    return [cell.by, cell.fraction, cell.kept, *scored, cell.parameters, cell.bytes / 1e6]


def sweep_csv(found: Sweep) -> Table:
    """One row per form of the model, in full precision; the unedited one has no criterion."""
    names = (
        *("by", "fraction", "kept", "questions", "accuracy", "ci95_low", "ci95_high"),
        *("right_logprob", "delta", "delta_low", "delta_high", "gained", "lost", "mcnemar_p"),
        *("smallest_effect", "max_abs_logprob_diff", "median_abs_logprob_diff"),
        *("parameters", "active_parameters", "bytes"),
    )
    rows: list[list[Cell]] = []
    if found.base is not None:
        b = found.base
        its: list[Cell] = [b.questions, b.accuracy, *b.ci95, b.right_logprob, *[None] * 9]
        rows.append([None, None, None, *its, b.parameters, b.active_parameters, b.bytes])
    for cell in found.cells:
        c = cell.change
        its = [cell.questions, cell.accuracy, *cell.ci95, cell.right_logprob, c.delta, *c.ci95]
        its += [c.gained, c.lost, c.mcnemar_p, c.smallest_effect]
        its += [cell.max_abs_logprob_diff, cell.median_abs_logprob_diff]
        its += [cell.parameters, cell.active_parameters, cell.bytes]
        rows.append([cell.by, cell.fraction, cell.kept, *its])
    return Table("sweep", tuple(map(Column, names)), rows)


def sweep_sentences(found: Sweep) -> list[str]:
    """What the grid was chosen on, and which cells show a loss or a gain."""
    quiz, chosen = found.asked.scored.quiz, found.chosen_on
    n_questions = sum(subject.questions for subject in quiz.subjects.values())
    leak = (
        f"The experts were chosen on {chosen.split}, none of the questions scored here."
        if chosen.overlap == 0
        else f"{chosen.overlap:,} of the {n_questions:,} {quiz.split} questions scored here were "
        "used to choose the experts, so this flatters the cuts."
    )
    return [leak, *(_sweep_verdict(fraction, found) for fraction in found.asked.fractions)]


def _sweep_verdict(fraction: float, found: Sweep) -> str:
    cells = [cell for cell in found.cells if cell.fraction == fraction]
    if not cells:
        return f"At {fraction:g} no cell is finished."
    best = max(cells, key=lambda cell: cell.accuracy)
    clear = [c.by for c in cells if shows_change(c.change.ci95, c.change.mcnemar_p)]
    change = best.change
    text = (
        f"At {fraction:g} of the experts {best.by} keeps most: {best.accuracy:.2%}, "
        f"{change.delta * 100:+.2f} points (95 % interval {change.ci95[0] * 100:+.2f} to "
        f"{change.ci95[1] * 100:+.2f}, McNemar p = {change.mcnemar_p:.2g})"
    )
    if clear:
        return f"{text}; accuracy changes beyond chance with {', '.join(clear)}."
    return f"{text}; no evidence of a change with any criterion."


def sweep_figure(found: Sweep) -> dict[str, bytes]:
    """`sweep.png` and `sweep.svg`: accuracy against the size of the weights, with intervals."""
    series = []
    for by in found.asked.by:
        cells = sorted((c for c in found.cells if c.by == by), key=lambda c: c.bytes)
        series.append(_sweep_series(by, cells))
    base = None if found.base is None else _sweep_series("unedited", [found.base])
    quiz = found.asked.scored.quiz
    labels = ("size of the weights (MB)", f"accuracy on {quiz.split} (%)")
    return draw_lines("sweep", series, base, labels)


def _sweep_series(name: str, models: Sequence[SweptModel]) -> Series:
    """Accuracy in percent over the size in MB."""
    return Series(
        name,
        tuple(100 * model.accuracy for model in models),
        tuple(100 * model.ci95[0] for model in models),
        tuple(100 * model.ci95[1] for model in models),
        x=tuple(model.bytes / 1e6 for model in models),
    )


def _sweep_interval(ci95: tuple[float, float], sign: str = "") -> str:
    return f"{ci95[0]:{sign}.2%} … {ci95[1]:{sign}.2%}"


def audit_tables(found: Audit) -> list[Table]:
    """The criteria, and the experts whose removal did most."""
    return [*([verdict_table(found)] if found.verdicts else []), harm_table(found)]


def verdict_table(found: Audit) -> Table:
    """One row per criterion, the best correlation first."""
    rows: list[list[Cell]] = []
    for its in ranked(found):
        regrets: list[Cell] = [r.regret for r in its.regrets]
        rows.append(
            [
                its.by,
                *_correlation(its.within),
                *_correlation(its.overall),
                *_correlation(its.within_accuracy),
                *regrets,
            ]
        )
    columns = (
        Column("criterion"),
        *(Column("ρ within layers", "+.2f"), Column("95 % interval")),
        *(Column("ρ over all", "+.2f"), Column("95 % interval")),
        *(Column("ρ with accuracy", "+.2f"), Column("95 % interval")),
        *(Column(f"regret at {f:g}", ".4f") for f in found.asked.fractions),
    )
    expected = ", ".join(
        f"{r.random - r.least:.4f} at {r.fraction:g}" for r in found.verdicts[0].regrets
    )
    note = (
        "ρ is Spearman's between score and harm: +1 where the criterion removes the least harmful "
        "experts first. Regret is in nats of mean log p, as a sum of single harms; removing at "
        f"random costs {expected} on average."
    )
    return Table(f"Audit of {found.asked.model.label}: the criteria", columns, rows, note)


def harm_table(found: Audit, most: int = 10) -> Table:
    """The experts whose removal did most."""
    harms = sorted(found.harms, key=lambda harm: -harm.logprob)[:most]
    rows: list[list[Cell]] = [
        [h.layer, h.expert, h.logprob, h.stderr, h.accuracy, h.gained, h.lost, h.mcnemar_p]
        for h in harms
    ]
    columns = (
        Column("layer"),
        Column("expert"),
        Column("loss of log p", "+.4f"),
        Column("± standard error", ".4f"),
        Column("loss of accuracy", "+.2%"),
        Column("gained"),
        Column("lost"),
        Column("McNemar p", ".3g"),
    )
    asked = found.asked
    note = (
        f"{len(found.harms)} of {len(found.sampled)} sampled experts removed one at a time (layout "
        f"{asked.layout}); {asked.questions:,} {asked.split} questions of {asked.quiz} at "
        f"{asked.shots} shots{cut_text(found.cut)}, unedited accuracy {found.accuracy:.2%}."
    )
    if not found.is_complete:
        note += " The same command does the rest."
    return Table(
        f"Audit of {asked.model.label}: what removing one expert does", columns, rows, note
    )


def audit_csv(found: Audit) -> Table:
    """One row per removed expert, with what every criterion said of it."""
    names = [
        *("layer", "expert", "loss_logprob", "stderr", "loss_accuracy", "gained", "lost"),
        *("mcnemar_p", "largest_abs_logprob_diff", *found.standings),
    ]
    rows: list[list[Cell]] = [
        [
            *(h.layer, h.expert, h.logprob, h.stderr, h.accuracy, h.gained, h.lost),
            *(h.mcnemar_p, h.largest, *(its.score[i] for its in found.standings.values())),
        ]
        for i, h in enumerate(found.harms)
    ]
    return Table("audit", tuple(map(Column, names)), rows)


def audit_sentences(found: Audit) -> list[str]:
    """What the questions are worth, and which criterion to trust."""
    asked = found.asked
    if found.overlap:
        leak = (
            f"{found.overlap:,} of the {asked.questions:,} questions that were asked had been "
            "profiled, calibrated or cut on, so they are not held out: criteria that look at them "
            "are flattered."
        )
    else:
        which = f"{asked.questions:,} held-out questions ({asked.split})"
        leak = f"None of the {which} had a part in scoring the experts."
    first = ranked(found)[0]
    if first.within.rho is None:
        return [leak, "No rank correlation is defined: sample more experts."]
    clear = [v.by for v in ranked(found) if v.within.is_clear]
    best = f"the best is {first.by} (ρ = {first.within.rho:+.2f} within layers)"
    told = "No criterion clearly orders these experts by their harm"
    if clear:
        told = f"These order experts by their harm beyond chance: {', '.join(clear)}"
    return [leak, f"{told}; {best}.", f"Least regret: {_least_regrets(found)}."]


def _least_regrets(found: Audit) -> str:
    """At each budget the criterion whose removals do least harm, and what chance would do."""
    parts, n_sampled = [], len(found.harms)
    for i, fraction in enumerate(found.asked.fractions):
        least = min(v.regrets[i].regret for v in found.verdicts)
        best = [v.by for v in found.verdicts if v.regrets[i].regret <= least + 1e-12]
        its = found.verdicts[0].regrets[i]
        if its.removed in (0, n_sampled):
            parts.append(f"at {fraction:g} {'all' if its.removed else 'none'} of the sample go")
            continue
        names = "all alike" if len(best) == len(found.verdicts) > 1 else " and ".join(best)
        parts.append(
            f"at {fraction:g} {names} ({least:.4f}, at random {its.random - its.least:.4f})"
        )
    return ", ".join(parts)


def audit_figure(found: Audit) -> dict[str, bytes]:
    """`audit.png` and `audit.svg`: correlations with their intervals, and regrets."""
    order = ranked(found)
    regrets, marks = [], []
    for i, fraction in enumerate(found.asked.fractions):
        each = [verdict.regrets[i] for verdict in order]
        regrets.append(Series(f"{fraction:g} kept", tuple(r.regret for r in each)))
        marks.append(each[0].random - each[0].least)
    labels = ("Spearman's ρ of score and harm, within layers", "regret (nats); dotted: at random")
    names, rhos = [verdict.by for verdict in order], _rhos(order)
    return draw_forest("audit", names, rhos, regrets, labels=labels, marks=marks)


def _rhos(order: Sequence[Verdict]) -> Series:
    """Correlations with their intervals, which contain them."""
    rhos = tuple(verdict.within.rho for verdict in order)
    ends = [verdict.within.ci95 or (verdict.within.rho,) * 2 for verdict in order]
    return Series("ρ", rhos, tuple(low for low, _ in ends), tuple(high for _, high in ends))


def ranked(found: Audit) -> list[Verdict]:
    """The best correlation within layers first, undefined ones last."""
    rho = {v.by: -2.0 if v.within.rho is None else v.within.rho for v in found.verdicts}
    return sorted(found.verdicts, key=lambda v: -rho[v.by])


def _correlation(found: Correlation) -> list[Cell]:
    interval = None if found.ci95 is None else f"{found.ci95[0]:+.2f} … {found.ci95[1]:+.2f}"
    return [found.rho, interval]
