"""Plans, built checkpoints and results: what was done, and what came of it, in tables and words."""

from pathlib import Path
from typing import TYPE_CHECKING

from expertcut.evaluation.results import ComparisonResult, ModelResult, Results
from expertcut.interventions.plan import Plan
from expertcut.interventions.reweighting.targets import Tilt
from expertcut.reporting.tables import Cell, Column, Table

if TYPE_CHECKING:  # with torch, which `show` does without
    from expertcut.checkpoints.build import Built
    from expertcut.checkpoints.proof import Proof


def plan_table(plan: Plan) -> Table:
    """One row per block: what stays and what is tilted."""
    rows: list[list[Cell]] = [
        [
            name,
            len(edit.keep),
            ids_text(edit.keep),
            ", ".join(f"{e}: {b:+.4f}" for e, b in edit.bias.items()) or None,
            ", ".join(f"{e}: ×{s:.4f}" for e, s in edit.scale.items()) or None,
        ]
        for name, edit in plan.blocks.items()
    ]
    columns = (Column("block"), Column("kept"), Column("experts"), Column("bias"), Column("scale"))
    chosen = plan.chosen_on
    fitted = f", fitted on {chosen.fitted_questions:,} of {chosen.fitted_split}"
    note = (
        f"Chosen on {chosen.questions:,} {chosen.split} questions of {chosen.quiz}"
        f"{fitted if chosen.fitted_split else ''}; model {plan.model.id}."
    )
    return Table(f"Plan: {plan.action} ({plan.layout})", columns, rows, note)


def proof_tables(built: "Built") -> list[Table]:
    """How well biases are carried, and what the edit did to questions that were not used."""
    tables = [_fit_table(built)] if built.fits else []
    return [*tables, _held_out_table(built.proof)] if built.proof else tables


def proof_sentences(built: "Built") -> list[str]:
    """What layout exact promises, and whether it held; or that nothing was asked."""
    if built.proof is None:
        return ["The new checkpoint was not asked any question."]
    alone = built.proof.alone
    if alone is None:
        return []
    if alone.untouched == 0:
        return [
            f"Each of the {alone.questions} questions has tokens that chose a removed expert, so "
            "none must stay as it was."
        ]
    kept = "all of them" if alone.bit_equal == alone.untouched else f"{alone.bit_equal} of them"
    return [
        f"{alone.untouched} of the {alone.questions} questions have no token that chose a removed "
        f"expert; scored alone, {kept} come out bit-equal."
    ]


def _held_out_table(proof: "Proof") -> Table:
    rows: list[list[Cell]] = [
        [d.against, d.max_abs_logprob_diff, d.median_abs_logprob_diff, d.flipped, d.questions]
        for d in proof.differences
    ]
    columns = (
        Column("against"),
        Column("largest |Δ log p|", ".4f"),
        Column("median |Δ log p|", ".4f"),
        Column("flipped answers"),
        Column("questions"),
    )
    return Table(f"Held-out questions ({proof.split})", columns, rows)


def _fit_table(built: "Built") -> Table:
    """How well the gate row carries the bias (design: layout stock)."""
    rows: list[list[Cell]] = [
        [
            f.layer,
            f.quality_all,
            f"{f.mean_all:.3f} ± {f.std_all:.3f}",
            f.quality_answer,
            f"{f.mean_answer:.3f} ± {f.std_answer:.3f}",
        ]
        for f in built.fits
    ]
    columns = (
        Column("layer"),
        Column("fit, all tokens", ".4f"),
        Column("v·h, all tokens"),
        Column("fit, answer positions", ".4f"),
        Column("v·h, answer positions"),
    )
    note = "fit = 1 − mean((1 − v·h)²) on held-out questions; 1 is a bias carried exactly."
    return Table("The bias as a gate row", columns, rows, note)


def tilt_sentences(found: list[Tilt], built: "Built | None") -> list[str]:
    """What each tilt did, in words."""
    sentences = []
    for tilt in found:
        verb = "boosted" if tilt.bias > 0 else "suppressed"
        origin = "given" if tilt.is_given else "its admission gap"
        text = (
            f"Expert {tilt.expert} of layer {tilt.layer} is {verb} by {tilt.bias:+.4f} "
            f"on its logit ({origin})"
        )
        if built is not None and built.proof is not None:
            base, exact, edited = built.proof.shares[tilt.layer, tilt.expert]
            text += (
                f"; it serves {edited:.1%} of held-out questions, before {base:.1%}, "
                f"with the exact bias {exact:.1%}"
            )
        sentences.append(f"{text}.")
    return sentences


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
    base = found.models[0]
    sentences = [f"{base.path} answers {base.accuracy:.2%} right: the base of the comparisons."]
    for comparison in found.comparisons:
        model = found.models[comparison.other]
        sentences.append(f"{model.path} {_verdict(comparison)}{_leak(model, found.split)}.")
    return sentences


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
    elif c.ci95[0] <= 0 <= c.ci95[1]:
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


def ids_text(ids: tuple[int, ...]) -> str:
    """Ids as `0–3, 7, 9–12`."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)
