"""Searches for a strength, and proofs of a way of reweighting, in tables and words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from expertcut.edits.plan import Point
from expertcut.reporting.tables import Cell, Column, Table

if TYPE_CHECKING:  # with torch, which `show` does without
    from expertcut.evaluation.cross_fit import Change, ProofResult
    from expertcut.evaluation.reweight_search import Decision


def curve_table(curve: Sequence[Point]) -> Table:
    """Strength against accuracy, as the search went."""
    rows: list[list[Cell]] = [
        [
            point.strength,
            ", ".join(f"{layer}:{e}" for layer, e, _ in point.biases) or None,
            point.accuracy,
            f"{point.ci95[0]:.2%} … {point.ci95[1]:.2%}",
            point.questions,
        ]
        for point in curve
    ]
    columns = (
        Column("strength", ".4g"),
        Column("experts"),
        Column("accuracy", ".2%"),
        Column("95 % interval"),
        Column("questions", ",d"),
    )
    note = "Accuracy on the questions that the strength was chosen on, so the best of it flatters."
    return Table("Strength (logits) against accuracy", columns, rows, note)


def proof_table(proof: "ProofResult") -> Table:
    """The fair number, the flattering one and chance, side by side."""
    control = proof.random
    rows = [
        ["cross-fitted", *_change_cells(proof.cross_fitted)],
        ["chosen and scored on the same questions", *_change_cells(proof.same_questions)],
        [
            f"random experts ({control.draws} draws, {control.distinct} distinct)",
            control.delta_mean,
            _points(control.range95),
            *[None] * 3,
        ],
    ]
    columns = (
        Column(f"{proof.questions:,} questions of {proof.split}"),
        Column("Δ accuracy", "+.2%"),
        Column("95 % interval"),
        Column("gained"),
        Column("lost"),
        Column("McNemar p", ".3g"),
    )
    note = f"Unedited accuracy {proof.base_accuracy:.2%}; p against random experts {control.p:.3g}."
    return Table(f"Proof: {proof.procedure}", columns, rows, note)


def proof_csv(proof: "ProofResult") -> Table:
    """One row per estimate, shares and not percentages; of random experts the range of draws."""
    control = proof.random
    rows: list[list[Cell]] = [
        [name, c.delta, *c.ci95, c.gained, c.lost, c.mcnemar_p, c.smallest_effect, None, None]
        for name, c in (
            ("cross_fitted", proof.cross_fitted),
            ("same_questions", proof.same_questions),
        )
    ]
    drawn: list[Cell] = [control.delta_mean, *control.range95, *[None] * 4, control.draws]
    rows.append(["random", *drawn, control.p])
    names = (
        *("estimate", "delta", "low", "high", "gained", "lost", "mcnemar_p", "smallest_effect"),
        *("draws", "p_random"),
    )
    return Table("proof", tuple(map(Column, names)), rows)


def _change_cells(change: "Change") -> list[Cell]:
    interval = _points(change.ci95)
    return [change.delta, interval, change.gained, change.lost, change.mcnemar_p]


def _points(ends: tuple[float, float]) -> str:
    return f"{ends[0]:+.2%} … {ends[1]:+.2%}"


def decision_tables(found: "Decision") -> list[Table]:
    """The curve of the search, and the proof."""
    tables = [curve_table(found.curve)] if found.curve else []
    return [*tables, proof_table(found.proof)] if found.proof else tables


def decision_sentences(found: "Decision") -> list[str]:
    """What was chosen, where its effect comes from, and the verdict."""
    sentences = []
    if found.chosen:
        chosen = ", ".join(f"{layer}:{e} by {bias:+.4g}" for layer, e, bias in found.chosen)
        answer, everywhere = found.accuracy_at["answer"], found.accuracy_at["all"]
        sentences.append(
            f"Chosen on {len(found.tuning):,} {found.tuning.split} questions: {chosen} (logits). "
            f"There accuracy goes from {found.base_accuracy:.2%} to {everywhere:.2%} with the bias "
            f"at every token, and to {answer:.2%} with it at the answer position alone."
        )
    else:
        sentences.append(
            f"No tilt that was tried beats the unedited model on {len(found.tuning):,} "
            f"{found.tuning.split} questions."
        )
    return [*sentences, found.proof.sentence] if found.proof else sentences
