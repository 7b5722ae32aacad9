"""Built checkpoints: how well a layout carries a plan, and what that did to questions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from expertcut.edits.plan import ExpertIds
from expertcut.edits.reweight import Scaling, Tilt
from expertcut.reporting.tables import Cell, Column, Table

if TYPE_CHECKING:  # with torch, which `show` does without
    from expertcut.checkpoints.build import Built
    from expertcut.checkpoints.held_out_check import Proof


def proof_tables(built: "Built") -> list[Table]:
    """How well biases are carried, and what the edit did to the questions that judge it."""
    tables = [_fit_table(built)] if built.fits else []
    if built.proof is None:
        return tables
    tables.append(_held_out_table(built.proof))
    return [*tables, _outcome_table(built.proof)] if built.proof.outcomes else tables


def proof_sentences(built: "Built") -> list[str]:
    """What layout exact promises, and whether it held; or that nothing was asked."""
    if built.proof is None:
        why = f": {built.why_unjudged}" if built.why_unjudged else ""
        return [f"The new checkpoint was not asked any question{why}."]
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


def adapter_sentences(built: "Built") -> list[str]:
    """That an adapter was cut along, and what was done without it."""
    plan = built.plan
    if plan.adapter is None:
        return []
    is_boosted = plan.layout == "stock" and any(edit.bias for edit in plan.blocks.values())
    is_fitted = is_boosted or plan.fold in ("answer", "all") or plan.removed == "mean"
    done = ["chosen", *(["what was fitted is fitted"] if is_fitted else [])]
    if built.proof is not None:
        done.append(f"{built.proof.judged.noun.removeprefix('the ')} asked")
    return [
        f"The adapter {plan.adapter.path} is cut to fit, in {built.folder / 'adapter'}; experts "
        f"were {_listed(done)} without it."
    ]


def _listed(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


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
    return Table(proof.judged.title, columns, rows)


def _outcome_table(proof: "Proof") -> Table:
    """How much of a bias's effect comes from where the answer is written."""
    rows: list[list[Cell]] = [
        [o.form, o.accuracy, o.right_logprob, o.flipped, o.questions] for o in proof.outcomes
    ]
    columns = (
        Column("form"),
        Column("accuracy", ".2%"),
        Column("mean log p of the right choice", ".4f"),
        Column("flipped answers"),
        Column("questions"),
    )
    note = "Carried out at run time, in the unedited model, but for the last row."
    return Table(f"Where the bias acts ({proof.split})", columns, rows, note)


def _fit_table(built: "Built") -> Table:
    """How well the gate row carries the bias (design: layout stock)."""
    rows: list[list[Cell]] = [
        [
            f.layer,
            f.quality,
            f.quality_answer,
            f"{f.mean_answer:.3f} ± {f.std_answer:.3f}",
            f"{f.mean_elsewhere:.3f} ± {f.std_elsewhere:.3f}",
        ]
        for f in built.fits
    ]
    columns = (
        Column("layer"),
        Column("fit", ".4f"),
        Column("fit, answer positions", ".4f"),
        Column("v·h, answer positions"),
        Column("v·h, elsewhere"),
    )
    target = "1 at answer positions and 0 elsewhere, both weighing the same"
    noun = "held-out questions" if built.proof is None else built.proof.judged.noun
    note = (
        f"fit = 1 − mean((t − v·h)²) on {noun}, where t is "
        f"{target if built.plan.apply_at == 'answer' else '1'}; 1 is a bias carried exactly."
    )
    return Table("The bias as a gate row", columns, rows, note)


def tilt_sentences(
    found: Sequence[Tilt], built: "Built | None", numbers: ExpertIds | None = None
) -> list[str]:
    """What each bias did, in words, and whether the experts are then those of the exact bias."""
    sentences = []
    for tilt in found:
        verb = "boosted" if tilt.bias > 0 else "suppressed"
        text = (
            f"{_expert(tilt, numbers)} is {verb} by {tilt.bias:+.4f} on its logit ({tilt.origin})"
        )
        fits = [] if built is None else built.fits
        if fit := next((fit for fit in fits if fit.layer == tilt.layer), None):
            mean, spread = tilt.bias * fit.mean_answer, abs(tilt.bias) * fit.std_answer
            text += (
                f"; the checkpoint's gate row moves it by {mean:+.4f} ± {spread:.4f} at answer "
                "positions"
            )
        if built is not None and built.proof is not None:
            base, exact, edited = built.proof.shares[tilt.layer, tilt.expert]
            text += (
                f"; it serves {edited:.1%} of {built.proof.judged.noun}, before {base:.1%}, "
                f"with the exact bias {exact:.1%}"
            )
        sentences.append(f"{text}.")
    proof = None if built is None else built.proof
    return [*sentences, *(_agreement_sentences(proof) if proof else [])]


def scale_sentences(
    scaled: Sequence[Scaling], built: "Built | None", numbers: ExpertIds | None = None
) -> list[str]:
    """What each factor did, in words."""
    sentences = []
    for scaling in scaled:
        expert = _expert(scaling, numbers)
        text = f"The gate weight of {expert[0].lower()}{expert[1:]} is multiplied by "
        text += f"{scaling.factor:g}; in its own layer who is chosen stays"
        if built is not None and built.proof is not None:
            share = built.proof.shares[scaling.layer, scaling.expert][2]
            text += f", and it serves {share:.1%} of {built.proof.judged.noun}"
        sentences.append(f"{text}.")
    return sentences


def _agreement_sentences(proof: "Proof") -> list[str]:
    return [
        f"In layer {a.layer} the checkpoint chooses the very experts of the exact bias at "
        f"{a.same_answer:.1%} of answer positions ({a.overlap_answer:.1%} of the experts) and at "
        f"{a.same_all:.1%} of all tokens ({a.overlap_all:.1%})."
        for a in proof.agreement
    ]


def _expert(tilt: Tilt | Scaling, numbers: ExpertIds | None) -> str:
    number = tilt.expert if numbers is None else numbers.number(tilt.block, tilt.expert)
    return f"Expert {number} of layer {tilt.layer}"
