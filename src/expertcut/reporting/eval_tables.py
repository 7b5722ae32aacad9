"""Tables, sentences and figures of plans, results, sweeps and audits."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from expertcut.edits.plan import ChosenOn, PlanBlend, PlanFile, ids_text
from expertcut.evaluation import search_results as searches
from expertcut.evaluation.results import QuizComparison, QuizModelResult, QuizResults, Results
from expertcut.evaluation.search_results import Audit, Sweep, SweptModel
from expertcut.reporting import edit_tables as edits
from expertcut.reporting import generation_tables, task_tables, text_search_tables, text_tables
from expertcut.reporting.plots import Series, draw_forest, draw_lines, series_of
from expertcut.reporting.profile_tables import cut_text
from expertcut.reporting.tables import Cell, Column, Table, columns, signed
from expertcut.stats import MARGIN, Comparison, verdict

_rho = partial(signed, spec="+.2f")
_SCORED = (
    f"size; accuracy::.2%; {edits.CHANGE}; verdict | 95 % interval; gained; lost; McNemar p::.3g"
)


def plan_table(plan: PlanFile) -> Table:
    """One row per block: kept, biased, scaled and merged experts."""
    is_merged = plan.removal == "merge"
    rows: list[list[Cell]] = []
    for name, edit in plan.blocks.items():
        bias = ", ".join(f"{e}: {b:+.4f}" for e, b in edit.all_biases.items()) or None
        scale = ", ".join(f"{e}: ×{s:.4f}" for e, s in edit.scale.items()) or None
        groups = [
            f"{expert} ← {', '.join(str(m) for m in members if m != expert)}"
            for expert, members in (edit.merged or {}).items()
        ]
        joined: list[Cell] = ["; ".join(groups) or None] if is_merged else []
        joined += [edit.at] if plan.routing else []
        rows.append([name, len(edit.keep), ids_text(edit.keep), bias, scale, *joined])
    heads = "block; kept; experts; bias; scale" + ("; joined by" if is_merged else "")
    heads += "; threshold::.4g" if plan.routing else ""
    note = f"{made_on(plan)}; model {plan.model.label}."
    if plan.routing and (mean := plan.routing.experts_per_token) is not None:
        note += f" Rule {plan.routing.rule} uses {mean:.2f} experts a token."
    return Table(f"Plan: {plan.action} ({plan.layout})", columns(heads), rows, note)


def made_on(plan: PlanFile) -> str:
    """How a plan was chosen and on which questions, or on which a checkpoint was trained."""
    by = "" if plan.criterion in ("", "by hand") else "by "
    verb = "Trained" if plan.action.startswith("heal") else f"Chosen {by}{plan.criterion}".strip()
    if plan.routing and " --experts " in plan.action:
        verb = "Calibrated"
    return f"{verb} on {chosen_text(plan.chosen_on, plan.blend)}"


def chosen_text(chosen: ChosenOn, blend: PlanBlend | None = None) -> str:
    """The questions that a plan was chosen and fitted on."""
    text = f"{chosen.questions:,} {chosen.split} questions of {chosen.quiz}"
    if chosen.text_tokens is not None:
        text = f"{chosen.text_tokens:,} tokens in {chosen.questions:,} documents of {chosen.quiz}"
    if blend is not None and all(part.questions is None for part in blend.profiles):
        parts = (f"{p.tokens:,} tokens of {p.quiz} (weight {p.weight:.3g})" for p in blend.profiles)
        text = ", ".join(parts)
    elif blend is not None:
        n_more = len(blend.profiles) - 1
        text += f" and what {n_more} more profile{'s' if n_more > 1 else ''} read"
    if chosen.fitted_split:
        text += f", fitted on {chosen.fitted_questions:,} of {chosen.fitted_split}"
    return text


def plan_csv(plan: PlanFile) -> Table:
    """One row per kept expert, with its bias and its factor."""
    rows: list[list[Cell]] = [
        [name, expert, edit.all_biases.get(expert), edit.scale.get(expert)]
        for name, edit in plan.blocks.items()
        for expert in edit.keep
    ]
    return Table("plan", columns("block; expert; bias; scale"), rows)


def results_table(results: QuizResults, margin: float = MARGIN) -> Table:
    """One row per model, compared with the first."""
    compared = {c.other: c for c in results.comparisons}
    rows: list[list[Cell]] = [
        [name, *_scored(m, compared.get(i), margin), m.parameters, m.active_parameters]
        for i, (name, m) in enumerate(zip(model_names(results), results.models, strict=True))
    ]
    heads = columns(f"model; {_SCORED}; parameters::,d; active::,d")
    n_questions = results.models[0].questions
    note = f"{n_questions:,} {results.split} questions of {results.quiz} at {results.shots} shots"
    note += cut_text(*(model.cut for model in results.models))
    return Table("Evaluation", heads, rows, note)


def evaluation_tables(results: Results, margin: float = MARGIN) -> list[Table]:
    """A table for each part: the quiz, the texts, the tasks, what models write."""
    tables = [results_table(results, margin)] if isinstance(results, QuizResults) else []
    names = model_names(results)
    tables += text_tables.judged_tables(results, names)
    tables += task_tables.tasks_tables(results, names)
    return [*tables, *generation_tables.generation_tables(results, names, margin)]


def evaluation_facts(results: Results, margin: float = MARGIN) -> list[tuple[str, str]]:
    """Verdicts and changes in each part, with labels."""
    facts = result_facts(results, margin) if isinstance(results, QuizResults) else []
    return facts + part_facts(results, margin)


def part_facts(results: Results, margin: float = MARGIN) -> list[tuple[str, str]]:
    """Changes in each part beside the quiz, with labels."""
    names = model_names(results)
    facts = text_tables.judged_facts(results, names) + task_tables.tasks_facts(results, names)
    return facts + generation_tables.generation_facts(results, names, margin)


def size_text(size: int, base_size: int = 0) -> str:
    """How much smaller or larger than the base; without one the size."""
    if not base_size:
        return edits.unit(size, "B") if size else "–"
    change = round(100 * (size / base_size - 1))
    return f"{abs(change)} % {'smaller' if change < 0 else 'larger'}" if change else "same size"


def part_findings(results: Results) -> list[tuple[str, str]]:
    """The same in plain words, texts first, each with the figures behind it."""
    names, models = model_names(results), results.models
    findings: list[tuple[str, str]] = []
    for index, words, figures in text_tables.text_findings(results, names):
        size, base_size = models[index].bytes, models[0].bytes
        if size and base_size and index and (len(models) > 2 or not findings):
            words = f"{size_text(size, base_size)}, {words}"
        findings.append((f"{names[index]}: {words}" if len(models) > 2 else words, figures))
    findings += [(text, "") for _, text in task_tables.tasks_facts(results, names)]
    return findings + generation_tables.generation_findings(results, names, MARGIN)


def evaluation_csv(results: Results) -> Table:
    """The quiz alone by subject; with further parts one row per model and figure of a part."""
    rows = text_tables.judged_rows(results) + task_tables.tasks_rows(results)
    rows += generation_tables.generation_rows(results, MARGIN)
    if isinstance(results, QuizResults):
        if not rows:
            return results_csv(results)
        rows = [*_quiz_rows(results), *rows]
    return Table("results", columns(task_tables.FLAT), rows)


def _quiz_rows(results: QuizResults) -> list[list[Cell]]:
    """One row per model over all questions, in the columns of `task_tables.FLAT`."""
    compared, rows = {c.other: c for c in results.comparisons}, list[list[Cell]]()
    for i, m in enumerate(results.models):
        row: list[Cell] = [m.path, "quiz", results.quiz, "accuracy"]
        row += [m.accuracy, m.stderr, m.questions]
        if c := compared.get(i):
            row += [c.delta, *c.ci95, c.gained, c.lost, c.mcnemar_p, c.smallest_effect]
        rows.append([*row, *[None] * (len(columns(task_tables.FLAT)) - len(row))])
    return rows


def results_csv(results: QuizResults) -> Table:
    """One row per model and subject, and one for all subjects (empty)."""
    rows: list[list[Cell]] = []
    for model in results.models:
        rows.append([model.path, None, model.accuracy, model.questions])
        rows += [[model.path, s, r.accuracy, r.questions] for s, r in model.subjects.items()]
    return Table("results", columns("path; subject; accuracy; questions"), rows)


def result_sentences(results: QuizResults) -> list[str]:
    """A sentence per model: the change, the size, and leakage."""
    names, base = model_names(results), results.models[0]
    guess = edits.guess_clause(base.accuracy, base.questions, results.chance)
    first = f"{names[0]} answers {base.accuracy:.2%} right{guess}: the base of the others."
    return [first, *(f"{names[c.other]}: {_facts(results, c)}." for c in results.comparisons)]


def verdict_sentences(results: QuizResults, margin: float = MARGIN) -> list[str]:
    """A verdict per model compared, within a margin (a share of questions)."""
    names, base = model_names(results), results.models[0]
    known = (base.questions, margin, base.accuracy, results.chance)
    return [f"{names[c.other]}: {edits.verdict_text(c, *known)}" for c in results.comparisons]


def result_facts(results: QuizResults, margin: float = MARGIN) -> list[tuple[str, str]]:
    """Accuracy of a model alone or near guessing, verdict and change of the others, with labels."""
    said = zip(verdict_sentences(results, margin), result_sentences(results)[1:], strict=True)
    facts = []
    for name, m in zip(model_names(results), results.models, strict=True):
        scored = (m.accuracy, m.questions, results.chance)
        if not results.comparisons or edits.guess_clause(*scored):
            text = edits.accuracy_text(*scored)
            facts.append(("accuracy", f"{name}: {text}"))
    return facts + [fact for pair in said for fact in zip(("verdict", "change"), pair, strict=True)]


def model_names(results: Results) -> list[str]:
    """The last part of each model's path, or the whole path where that is ambiguous."""
    last = [Path(model.path).name for model in results.models]
    return [
        name if last.count(name) == 1 else model.path
        for name, model in zip(last, results.models, strict=True)
    ]


def _facts(results: QuizResults, change: QuizComparison) -> str:
    """The change, what healing won back, the size, and whether questions chose the model."""
    base, model = results.models[change.base], results.models[change.other]
    text = edits.change_text(change)
    if change.gained + change.lost:
        text += f", {change.gained:,} gained, {change.lost:,} lost{_won_back(results, change)}"
    if change.parameters_delta and base.parameters:
        share = abs(change.parameters_delta) / base.parameters
        few = f"{100 * share:.0f}" if share >= 0.01 else "under 1"
        text += f"; {few} % {'more' if change.parameters_delta > 0 else 'fewer'} parameters"
    if model.chosen_on and model.chosen_on.overlap:
        used = f"{model.chosen_on.overlap:,} of these {model.questions:,} questions"
        text += f"; chosen on {used}, which flatters it"
    elif model.chosen_on:
        text += f"; chosen on {model.chosen_on.split}, none of these questions"
    return text


def _won_back(results: QuizResults, healed: QuizComparison) -> str:
    """The points that healing regained, if the cut was evaluated too and lost accuracy."""
    before = results.models[healed.other].healed_from
    for cut in results.comparisons if before else []:
        is_lost = cut.is_significant and cut.delta < 0
        if is_lost and results.models[cut.other].fingerprint == before:
            won, lost = (f"{100 * d:.1f}" for d in (healed.delta - cut.delta, -cut.delta))
            name = model_names(results)[cut.other]
            return f"; healing won back {won} of the {lost} points that {name} had lost"
    return ""


def _scored(
    m: QuizModelResult | SweptModel, change: Comparison | None, margin: float
) -> list[Cell]:
    delta, *counts = edits.change_cells(change)
    word = verdict(change.gained, change.lost, m.questions, margin) if change else None
    return [edits.unit(m.bytes, "B"), m.accuracy, delta, word, edits.interval_text(m.ci95), *counts]


def sweep_table(sweep: Sweep, margin: float = MARGIN) -> Table:
    """The unedited model and every finished cell."""
    if sweep.asked.text is not None:
        return text_search_tables.sweep_table(sweep)
    rows: list[list[Cell]] = []
    if isinstance(b := sweep.base, SweptModel):
        rows.append(["unedited", *_scored(b, None, margin), None, b.parameters])
    for c in sweep.of_quiz:
        name = f"{c.by} {c.fraction:g}"
        rows.append([name, *_scored(c, c.change, margin), c.kept, c.parameters])
    heads = columns(f"criterion, share; {_SCORED}; kept a layer; parameters::,d")
    request, quiz = sweep.asked, sweep.asked.scored.quiz
    n_cells = len(request.by) * len(request.fractions)
    note = (
        f"{sweep.n_questions:,} {quiz.split} questions of {quiz.id} at {quiz.shots} shots, layout "
        f"{request.layout}. The size is that of a checkpoint's weights."
    )
    if isinstance(b, SweptModel) and b.cut is not None:
        note += f" {b.cut:,} prompts are cut from the left to fit the context."
    if not sweep.is_complete:
        note += f" {len(sweep.cells)} of {n_cells} cells: the same command does the rest."
    return Table(f"Sweep of {request.scored.model.label}", heads, rows, note)


def sweep_csv(sweep: Sweep) -> Table:
    """One row per form of the model, in full precision; the unedited one has no criterion."""
    if sweep.asked.text is not None:
        return text_search_tables.sweep_csv(sweep)
    heads = columns(
        "by; fraction; kept; questions; accuracy; ci95_low; ci95_high; right_logprob; delta; "
        "delta_low; delta_high; gained; lost; mcnemar_p; smallest_effect; max_abs_logprob_diff; "
        "median_abs_logprob_diff; parameters; active_parameters; bytes"
    )
    rows: list[list[Cell]] = []
    if isinstance(b := sweep.base, SweptModel):
        scored: list[Cell] = [b.questions, b.accuracy, *b.ci95, b.right_logprob, *[None] * 9]
        rows.append([None, None, None, *scored, b.parameters, b.active_parameters, b.bytes])
    for cell in sweep.of_quiz:
        c = cell.change
        row: list[Cell] = [cell.by, cell.fraction, cell.kept, cell.questions, cell.accuracy]
        row += [*cell.ci95, cell.right_logprob, c.delta, *c.ci95, c.gained, c.lost, c.mcnemar_p]
        row += [c.smallest_effect, cell.max_abs_logprob_diff, cell.median_abs_logprob_diff]
        rows.append([*row, cell.parameters, cell.active_parameters, cell.bytes])
    return Table("sweep", heads, rows)


def sweep_sentences(sweep: Sweep, margin: float = MARGIN) -> list[str]:
    """Leakage, and for each share the best cell and those within the margin.

    Of texts, those that are not told apart from the best.
    """
    if sweep.asked.text is not None:
        return text_search_tables.sweep_sentences(sweep)
    quiz, chosen = sweep.asked.scored.quiz, sweep.chosen_on
    leak = (
        f"The experts were chosen on {chosen.split}, none of the questions scored here."
        if chosen.overlap == 0
        else f"{chosen.overlap:,} of the {sweep.n_questions:,} {quiz.split} questions scored here "
        "were used to choose the experts, so this flatters the cuts."
    )
    return [leak, *(_best_cell(share, sweep, margin) for share in sweep.asked.fractions)]


def within_margin(cells: Sequence[searches.SweepCell], margin: float) -> list[searches.SweepCell]:
    """The cells whose verdict is better or holds."""
    words = [verdict(c.change.gained, c.change.lost, c.questions, margin) for c in cells]
    return [c for c, word in zip(cells, words, strict=True) if word in ("better", "holds")]


def cell_to_prune(sweep: Sweep, margin: float) -> searches.SweepCell | searches.TextCell:
    """The smallest cut within the margin, else the best."""
    if sweep.asked.text is not None:
        return text_search_tables.to_prune(sweep)
    held = within_margin(sweep.of_quiz, margin)
    if held:
        return min(held, key=lambda cell: cell.bytes)
    return max(sweep.of_quiz, key=lambda cell: cell.accuracy)


def _best_cell(fraction: float, sweep: Sweep, margin: float) -> str:
    cells = [cell for cell in sweep.of_quiz if cell.fraction == fraction]
    if not cells:
        return f"At {fraction:g} no cell is finished."
    best, n = max(cells, key=lambda cell: cell.accuracy), sweep.n_questions
    ties = [cell.by for cell in cells if cell.accuracy == best.accuracy]
    keep, by = ("keep", f"; by {best.by}") if len(ties) > 1 else ("keeps", "")
    text = (
        f"At {fraction:g} of the experts {edits.listed(ties)} {keep} most, "
        f"{edits.percent(best.accuracy)}{by}: {edits.change_text(best.change)}, "
        + edits.verdict_text(best.change, n, margin)
    )
    if isinstance(base := sweep.base, SweptModel):
        shares = {"the unedited model": base.accuracy, best.by: best.accuracy}
        text += edits.guessing_text(shares, n, sweep.chance)
        is_near = best.ci95[0] <= base.ci95[1] and base.ci95[0] <= best.ci95[1]
        if len(cells) > 1 and is_near:
            text += f"; chance flatters the best of {len(cells)} criteria on {n:,} questions"
    held = ", ".join(cell.by for cell in within_margin(cells, margin)) or "none"
    return text + (f"; within the margin: {held}." if len(cells) > 1 else ".")


def sweep_figure(sweep: Sweep) -> dict[str, bytes]:
    """`sweep.png` and `sweep.svg`: accuracy against the size of the weights, with intervals."""
    if sweep.asked.text is not None:
        return text_search_tables.sweep_figure(sweep)
    cells = sorted(sweep.of_quiz, key=lambda cell: cell.bytes)
    series = [_sweep_series(by, [c for c in cells if c.by == by]) for by in sweep.asked.by]
    base = None
    if isinstance(sweep.base, SweptModel):
        base = _sweep_series("unedited", [sweep.base])
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
        others = [*_correlation(v.overall), *_correlation(v.within_accuracy)]
        (_, interval), within = _correlation(v.within), v.within.rho
        text = None if within is None else _rho(within) + (f" ({interval})" if interval else "")
        # Where none or all of the sample go, no criterion chooses.
        chosen = (r.regret if 0 < r.removed < len(audit.harms) else None for r in v.regrets)
        rows.append([v.by, text, *chosen, *others])
    heads = "criterion; ρ within layers (95 %)"
    heads += "".join(f"; at {f:g}::.4f" for f in audit.asked.fractions)
    heads += " | ρ over all::+.2f; 95 % interval; ρ with accuracy::+.2f; 95 % interval"
    expected = ", ".join(
        f"{r.random - r.least:.4f} at {r.fraction:g}" for r in audit.verdicts[0].regrets
    )
    note = (
        "ρ is Spearman's between score and harm: +1 where the criterion removes the least harmful "
        "experts first. Regret is in nats of mean log p, as a sum of single harms; removing at "
        f"random costs {expected} on average."
    )
    title = f"Audit of {audit.asked.model.label}: the criteria, with their regret at each share"
    return Table(title, columns(heads), rows, note)


def audit_tables(audit: Audit, margin: float = MARGIN) -> list[Table]:
    """The criteria, and the ten experts whose ablation has the largest effects."""
    on_texts = audit.asked.text is not None
    effects = text_search_tables.effects_table(audit) if on_texts else _effects(audit, margin)
    return [_criteria_table(audit), effects] if audit.verdicts else [effects]


def _effects(audit: Audit, margin: float) -> Table:
    n = audit.asked.questions
    rows: list[list[Cell]] = [
        [h.layer, h.expert, h.logprob, h.stderr, 100 * h.accuracy,
         verdict(h.gained, h.lost, n, margin), h.gained, h.lost,
         h.mcnemar_p if h.gained + h.lost else None]
        for h in sorted(audit.of_quiz, key=lambda harm: -harm.logprob)[:10]
    ]  # fmt: skip
    heads = columns(
        "layer; expert; loss of log p::+.4f; ± standard error::.4f; points lost::+.1f; verdict | "
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
    return Table(title, heads, rows, note)


def audit_csv(audit: Audit) -> Table:
    """One row per ablated expert, with its score by every criterion."""
    if audit.asked.text is not None:
        return text_search_tables.audit_csv(audit)
    heads = columns(
        "layer; expert; loss_logprob; stderr; loss_accuracy; gained; lost; mcnemar_p; "
        "largest_abs_logprob_diff"
    )
    rows = [
        [*effect.model_dump().values(), *(ranks.score[i] for ranks in audit.standings.values())]
        for i, effect in enumerate(audit.of_quiz)
    ]
    return Table("audit", (*heads, *map(Column, audit.standings)), rows)


def audit_facts(audit: Audit, margin: float = MARGIN) -> list[tuple[str, str]]:
    """What the ablations did, leakage, and the best criteria, as far as the audit has come."""
    if not audit.harms:
        return []
    on_texts = audit.asked.text is not None
    first = text_search_tables.ablated_sentence(audit) if on_texts else _ablated(audit, margin)
    said = [first, *(audit_sentences(audit) if audit.verdicts else [])]
    labels = ("ablated", "text" if on_texts else "quiz", "best", "regret")
    return [*zip(labels, said, strict=False)]


def _ablated(audit: Audit, margin: float) -> str:
    n, worst = audit.asked.questions, max(audit.of_quiz, key=lambda harm: harm.logprob)
    words = Counter(verdict(h.gained, h.lost, n, margin) for h in audit.of_quiz).most_common()
    return (
        f"{len(audit.harms)} experts, one at a time (layout {audit.asked.layout}); at a margin of "
        f"{edits.margin_text(margin)} {', '.join(f'{k} {word}' for word, k in words)}; most harm "
        f"without {worst.layer}:{worst.expert}, {worst.logprob:.4f} nats of log p"
    )


def audit_sentences(audit: Audit) -> list[str]:
    """Leakage, and which criterion predicts the effects."""
    request = audit.asked
    noun, which = "documents", ""
    if request.text is None:
        noun, which = "questions", f" ({request.split})"
    leak = (
        f"None of the {request.questions:,} held-out {noun}{which} had a part in scoring the "
        "experts."
    )
    if audit.overlap:
        leak = (
            f"{audit.overlap:,} of the {request.questions:,} {noun} that were asked had been "
            "profiled, calibrated or cut on, so they are not held out: criteria that look at them "
            "are flattered."
        )
    most = ranked(audit)[0].within.rho
    if most is None:
        return [leak, "No rank correlation is defined: sample more experts."]
    clear = [v.by for v in ranked(audit) if v.within.is_clear]
    ties = [v.by for v in ranked(audit) if (-2 if v.within.rho is None else v.within.rho) >= most]
    of = f" of {len(audit.verdicts)}" if len(audit.verdicts) > 1 else ""
    best = f"the best{of} {'are' if len(ties) > 1 else 'is'} {edits.listed(ties)}"
    best += f" (ρ = {_rho(most)} within layers)"
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
        names = "all alike" if len(best) == len(audit.verdicts) > 1 else edits.listed(best)
        parts.append(
            f"at {fraction:g} {names} ({least:.4f}, at random {regret.random - regret.least:.4f})"
        )
    return ", ".join(parts)


def audit_figure(audit: Audit) -> dict[str, bytes]:
    """`audit.png` and `audit.svg`: correlations with their intervals, and regrets."""
    order = ranked(audit)
    labels = ("Spearman's ρ of score and harm, within layers", "regret (nats); dotted: at random")
    names, rhos = [verdict.by for verdict in order], [verdict.within.rho for verdict in order]
    ends = [verdict.within.ci95 or (verdict.within.rho, verdict.within.rho) for verdict in order]
    left, marks = series_of("ρ", rhos, ends), [r.random - r.least for r in order[0].regrets]
    return draw_forest("audit", names, left, regret_series(audit), labels=labels, marks=marks)


def regret_series(audit: Audit) -> list[Series]:
    """The regrets of the ranked criteria, a series for each share that is kept."""
    return [
        Series(f"{share:g} kept", tuple(found.regrets[i].regret for found in ranked(audit)))
        for i, share in enumerate(audit.asked.fractions)
    ]


def ranked(audit: Audit) -> list[searches.CriterionEvaluation]:
    """By correlation within layers, best first, undefined last."""
    return sorted(audit.verdicts, key=lambda v: 2.0 if v.within.rho is None else -v.within.rho)


def _correlation(rank: searches.Correlation) -> list[Cell]:
    return [rank.rho, None if rank.ci95 is None else " … ".join(map(_rho, rank.ci95))]
