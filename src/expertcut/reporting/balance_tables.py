"""Tables of `reweight --balance`: the loads of experts before and under the biases."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from expertcut.reporting.tables import Cell, Table, columns

if TYPE_CHECKING:  # with torch
    from expertcut.edits.balance import BalancedLayer

_HEADS = (
    "layer; MaxVio, held out::.3f; balanced::.3f; behind shots::.3f; balanced::.3f; "
    "choices kept::.1% | tuning::.3f; balanced::.3f; largest bias::.4f"
)


def balance_table(layers: Sequence["BalancedLayer"]) -> Table:
    """One row per layer."""
    rows: list[list[Cell]] = [
        [
            *(own.layer, *own.held_out, *own.behind, own.kept, *own.tuned),
            float(np.abs(own.bias_E).max()),
        ]
        for own in layers
    ]
    note = (
        "MaxVio is the largest load of an expert over the mean load, less 1. Every other sequence "
        "of the trace chose the biases (tuning), the others are held out. Shots, and what else "
        "the prompts of a subject begin with, are in both: behind them all tokens are new."
    )
    return Table("Loads of experts, before and balanced", columns(_HEADS), rows, note)


def balance_sentences(layers: Sequence["BalancedLayer"], target: float) -> list[str]:
    """What was reached, and where not."""
    short = [str(own.layer) for own in layers if own.tuned[1] > target]
    pairs = [[own.held_out for own in layers], [own.behind for own in layers]]
    (before, after), (was, now) = (map(max, zip(*own, strict=True)) for own in pairs)
    kept = float(np.mean([own.kept for own in layers]))
    sentences = [
        f"Largest MaxVio of a layer on held-out sequences: {before:.3f} before, {after:.3f} "
        f"balanced (behind their shots {was:.3f} and {now:.3f}); {kept:.1%} of the choices stay."
    ]
    if short:
        sentences.append(
            f"Not brought to {target:g} on the tuning sequences: layer{'s' * (len(short) > 1)} "
            f"{', '.join(short)}."
        )
    return sentences
