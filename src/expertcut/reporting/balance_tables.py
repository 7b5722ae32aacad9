"""Tables of `reweight --balance`: the loads of experts before and under the biases."""

from collections.abc import Sequence

import numpy as np

from expertcut.edits.plan import PlanBalance
from expertcut.reporting.tables import Cell, Table, columns

_HEADS = (
    "block; MaxVio, held out::.3f; balanced::.3f; behind shots::.3f; balanced::.3f; "
    "choices kept::.1% | tuning::.3f; balanced::.3f; smallest load::.3f; balanced::.3f; "
    "heaviest token::.3f"
)


def balance_table(found: PlanBalance) -> Table:
    """One row per layer."""
    rows: list[list[Cell]] = [
        [
            *(name, *own.held_out, *own.behind, own.kept),
            *(*own.tuned, *own.smallest, own.heaviest),
        ]
        for name, own in found.blocks.items()
    ]
    note = (
        "MaxVio is the largest load of an expert over the mean load, less 1. Every other sequence "
        "of the trace chose the biases (tuning), the others are held out. Shots, and what else "
        "the prompts of a subject begin with, are in both: behind them all tokens are new. "
        "Smallest loads are held out, over the mean load; the heaviest token is the largest load "
        "over the mean that tokens of equal logits have, which no bias can split."
    )
    return Table("Loads of experts, before and balanced", columns(_HEADS), rows, note)


def balance_sentences(found: PlanBalance) -> list[str]:
    """What was reached, and where not."""
    layers = [*found.blocks.values()]
    pairs = [[own.held_out for own in layers], [own.behind for own in layers]]
    (before, after), (was, now) = (map(max, zip(*own, strict=True)) for own in pairs)
    kept = float(np.mean([own.kept for own in layers]))
    sentences = [
        f"Largest MaxVio of a layer on held-out sequences: {before:.3f} before, {after:.3f} "
        f"balanced (behind their shots {was:.3f} and {now:.3f}); {kept:.1%} of the choices stay."
    ]
    short = {name: own for name, own in found.blocks.items() if own.tuned[1] > found.target}
    if short:
        reached = max(own.tuned[1] for own in short.values())
        heaviest = max(own.heaviest for own in short.values())
        sentences.append(
            f"Not brought to {found.target:g} on the tuning sequences, but to {reached:.3f}: "
            f"{', '.join(short)}. Tokens of equal logits, which no bias can split, have up to "
            f"{heaviest:.3f} of a mean load there."
        )
    return sentences


def balance_parts(found: PlanBalance | None) -> Sequence[str | Table]:
    """All of it for the page."""
    return [] if found is None else [*balance_sentences(found), balance_table(found)]
