"""What healing was done with, and what it won back."""

from typing import TYPE_CHECKING

from expertcut.reporting.tables import Cell, Column, Table, printable

if TYPE_CHECKING:
    from expertcut.healing.heal import Healed
    from expertcut.healing.leakage import Dropped

_NAMED = 10


def healing_tables(healed: "Healed") -> list[Table]:
    """Answers of the base, before and after, to questions of which is said how they were used."""
    verdict = healed.verdict
    if verdict is None:
        return []
    to_base = {row.against: row for row in verdict.differences}
    rows: list[list[Cell]] = [
        [o.form, o.accuracy, o.right_logprob, o.flipped, o.questions] for o in verdict.outcomes
    ]
    columns = (
        Column("form"),
        Column("accuracy", ".2%"),
        Column("mean log p of the right choice", ".4f"),
        Column(f"answers unlike {verdict.outcomes[0].form}"),
        Column("questions"),
    )
    found = next(iter(to_base.values()))
    note = (
        f"Healed against {found.against}: largest |Δ log p| {found.max_abs_logprob_diff:.4f}, "
        f"median {found.median_abs_logprob_diff:.4f}."
    )
    return [Table(f"Questions that {verdict.used} ({verdict.split})", columns, rows, note)]


def healing_sentences(healed: "Healed") -> list[str]:
    """What was trained, on what, how the loss fell, and what was left out."""
    read, curve = healed.read, healed.curve
    texts = f" and {read.n_texts:,} texts" if read.n_texts else ""
    by_step = dict(curve.held_out)
    first = f"{curve.losses[0]:.4f}" if curve.losses else "?"
    sentences = [
        f"Trained {healed.trained:,} weights of adapters beside {healed.parameters:,} by "
        f"{healed.objective} on {read.n_questions:,} questions{texts}: {curve.steps} steps, the "
        f"loss from {first} to {curve.losses[-1]:.4f}; kept is step {curve.best_step}, where it "
        f"was {by_step[curve.best_step]:.4f} on {len(read.held_out)} rows that were held out.",
        *map(dropped_sentence, read.dropped),
    ]
    if healed.verdict is None:
        sentences.append("The new checkpoint was not asked any question.")
    return sentences


def dropped_sentence(dropped: "Dropped") -> str:
    """How many stand in what is scored later, or are too long, and which."""
    named = ", ".join(dropped.names[:_NAMED])
    more = f" and {len(dropped.names) - _NAMED} more" if len(dropped.names) > _NAMED else ""
    why = f"stand in split {dropped.split}"
    if dropped.longest is not None:
        why = f"have more than {dropped.longest:,} tokens"
    return printable(
        f"{len(dropped.names)} of {dropped.total:,} of {dropped.source} {why} and were left out: "
        f"{named}{more}."
    )
