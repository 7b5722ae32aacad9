"""Plans and results: what was done, and how well it answers, in tables and words."""

from pathlib import Path

from expertcut.edits.plan import Plan, ids_text
from expertcut.evaluation.results import ComparisonResult, ModelResult, Results
from expertcut.evaluation.stats import shows_change
from expertcut.reporting.merging import merged_text
from expertcut.reporting.tables import Cell, Column, Table


def plan_table(plan: Plan) -> Table:
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


def plan_csv(plan: Plan) -> Table:
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
        verdict = _verdict(comparison) + _won_back(found, names, comparison)
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
    row: list[Cell] = [Path(model.path).name, model.accuracy, _interval(model.ci95, "")]
    if comparison is None:
        row += [None] * 5
    else:
        c = comparison
        row += [c.delta, _interval(c.ci95, "+"), c.gained, c.lost, c.mcnemar_p]
    return [*row, model.parameters, model.active_parameters, model.bytes / 1e6]


def _verdict(c: ComparisonResult) -> str:
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


def _interval(ci95: tuple[float, float], sign: str) -> str:
    return f"{ci95[0]:{sign}.2%} … {ci95[1]:{sign}.2%}"
