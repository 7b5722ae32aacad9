"""What was changed: who was removed or tilted, what went with them, how strength was chosen."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from expertcut.documents import first_fault
from expertcut.edits.plan import Edit, Plan, Point
from expertcut.edits.prune import RemovedTraffic, removed_traffic
from expertcut.edits.splits import read_judged
from expertcut.errors import PlanError
from expertcut.profiling.findings import Findings
from expertcut.profiling.schema import BlockInfo
from expertcut.reporting.cuts import touched_table
from expertcut.reporting.outcomes import plan_table
from expertcut.reporting.page.figures import Curves, Series
from expertcut.reporting.page.gathering import Found, Run
from expertcut.reporting.page.parts import Folded, Part, Section, Text, key_of
from expertcut.reporting.proving import curve_table, proof_table
from expertcut.reporting.tables import Cell, Column, Table


class HeldOut(BaseModel):
    """A row of `held_out` in a plan's proof: the checkpoint against another form of the model."""

    against: str
    questions: int
    max_abs_logprob_diff: float
    median_abs_logprob_diff: float
    flipped: int


def change_sections(run: Run) -> list[Section]:
    """One for each plan, and for each proof without one; first of all what went with cuts."""
    sections: list[Section] = []
    for plan in run.plans:
        key = key_of(f"plan-{plan.name}", [section.key for section in sections])
        sections.append(Section(key, f"What was changed: {plan.name}", _plan_parts(run, plan, key)))
    alone = [p for p in run.proofs if p.file.parent not in {plan.file.parent for plan in run.plans}]
    for proof in alone:
        key = key_of(f"proof-{proof.name}", [section.key for section in sections])
        parts: list[Part] = [Text(proof.its.sentence), proof_table(proof.its)]
        sections.append(Section(key, f"Proof: {proof.name}", parts))
    return sections


def rows_of(edit: Edit, block: BlockInfo) -> Edit | None:
    """The edit by rows of a profiled router, None where these are not the ones that it is for."""
    rows = edit.rows or tuple(range(block.experts))
    named = {*edit.keep, *edit.tilted}
    if len(rows) != block.experts or not named <= set(rows):
        return None
    at = {number: row for row, number in enumerate(rows)}
    return Edit(
        keep=tuple(at[number] for number in edit.keep),
        bias={at[number]: value for number, value in edit.bias.items()},
        scale={at[number]: value for number, value in edit.scale.items()},
    )


def edits_of(plan: Plan, found: Findings) -> dict[str, Edit] | None:
    """A plan by rows of a profile; None where the profile is of another cut of the model."""
    edits = {}
    for block in found.profile.info.model.blocks:
        edit = plan.blocks.get(block.name)
        edits[block.name] = None if edit is None else rows_of(edit, block)
    complete = {name: edit for name, edit in edits.items() if edit is not None}
    return complete if len(complete) == len(edits) else None


def _plan_parts(run: Run, found: Found[Plan], key: str) -> list[Part]:
    plan, profile = found.its, run.profile_of(found.its)
    parts: list[Part] = [Text(_in_words(plan))]
    edits = None if profile is None else edits_of(plan, profile.its)
    if profile is not None and edits is not None:
        gone = removed_traffic(profile.its.profile, edits)
        if any(block.n_removed for block in gone):
            parts += [touched_table(gone), *_traffic(gone, key)]
    if plan.tuning:
        parts += [_curve(plan.tuning, key), Folded("Every try", [curve_table(plan.tuning)])]
    parts += _held_out(found)
    for proof in run.proofs:
        if proof.file.parent == found.file.parent:
            parts += [Text(proof.its.sentence), proof_table(proof.its)]
    return [*parts, Folded("Every block of the plan", [plan_table(plan)])]


def _in_words(plan: Plan) -> str:
    removal = {
        "reroute": "the router takes the next best expert instead of a removed one",
        "constant": f"a removed expert may be chosen and gives a constant ({plan.removed})",
        "merge": "a removed expert lives on in one that stays, which it has joined",
    }
    parts = [f"{plan.action}: layout {plan.layout}, criterion {plan.criterion}"]
    if not any(edit.tilted for edit in plan.blocks.values()):
        parts.append(removal[plan.removal])
    elif plan.apply_at:
        parts.append(f"biases act at {plan.apply_at} positions")
    chosen = plan.chosen_on
    on = f"Chosen on {chosen.questions:,} {chosen.split} questions of {chosen.quiz}."
    return f"{'; '.join(parts)}. {on}"


def _traffic(gone: Sequence[RemovedTraffic], key: str) -> list[Part]:
    if any(block.mass is None for block in gone):
        return []
    figure = Curves(
        key=f"{key}-traffic",
        title="Gate weight that went through the removed experts",
        note="Share of all gate weight of the profiled prompts, every token counted.",
        across="layer",
        categories=tuple(map(str, range(len(gone)))),
        series=(Series("share", tuple(block.mass for block in gone)),),
        column=Column("share of gate weight", ".1%"),
        zero=0.0,
    )
    return [figure]


def _curve(tuning: Sequence[Point], key: str) -> Curves:
    """Strength against accuracy, a series for each number of experts."""
    base, tried = tuning[0], tuning[1:]
    strengths = sorted({point.strength for point in tried})
    series = []
    for n_experts in sorted({point.experts for point in tried}):
        at = {point.strength: point for point in tried if point.experts == n_experts}
        points = [at.get(strength) for strength in strengths]
        name = f"{n_experts} expert{'s' if n_experts > 1 else ''}"
        series.append(
            Series(
                name,
                tuple(None if p is None else p.accuracy for p in points),
                tuple(None if p is None else p.ci95[0] for p in points),
                tuple(None if p is None else p.ci95[1] for p in points),
            )
        )
    level = Series("unedited", (base.accuracy,) * len(strengths), is_reference=True)
    return Curves(
        key=f"{key}-tuning",
        title="The search for a strength",
        note=curve_table(tuning).note,
        across="strength (logits)",
        categories=tuple(f"{strength:.4g}" for strength in strengths),
        series=(*series, level),
        column=Column("accuracy", ".1%"),
    )


def _held_out(found: Found[Plan]) -> list[Part]:
    proof: dict[str, Any] = found.its.proof
    try:
        rows = TypeAdapter(list[HeldOut]).validate_python(proof.get("held_out", []))
    except ValidationError as error:
        fault = first_fault(error)
        raise PlanError(f"{found.file} is no plan: proof.held_out.{fault}") from None
    if not rows:
        return []
    columns = (
        *(Column("against"), Column("largest |Δ log p|", ".4f"), Column("median", ".4f")),
        *(Column("flipped answers", ",d"), Column("questions", ",d")),
    )
    cells: list[list[Cell]] = [
        [r.against, r.max_abs_logprob_diff, r.median_abs_logprob_diff, r.flipped, r.questions]
        for r in rows
    ]
    return [Table(read_judged(found.its, found.file.parent).title, columns, cells)]
