"""Tables of `reweight --balance`: the loads of experts before and under the biases."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from expertcut.reporting.tables import Cell, Table, columns

if TYPE_CHECKING:  # with torch
    from expertcut.edits.balance import BalancedLayer

_HEADS = (
    "layer; MaxVio, tuning::.3f; balanced::.3f; MaxVio, held out::.3f; balanced::.3f; "
    "choices kept::.1%; largest bias::.4f"
)


def balance_table(layers: Sequence["BalancedLayer"]) -> Table:
    """One row per layer."""
    rows: list[list[Cell]] = [
        [
            own.layer,
            *own.tuned,
            *own.held_out,
            own.kept,
            float(np.abs(own.bias_E).max()),
        ]
        for own in layers
    ]
    note = (
        "MaxVio is the largest load of an expert over the mean load, less 1. Every other sequence "
        "of the trace chose the biases; held out are the others, with the share of their choices "
        "that stay."
    )
    return Table("Loads of experts, before and balanced", columns(_HEADS), rows, note)


def balance_sentences(layers: Sequence["BalancedLayer"], target: float) -> list[str]:
    """What was reached, and where not."""
    short = [str(own.layer) for own in layers if own.tuned[1] > target]
    before, after = (max(own.held_out[i] for own in layers) for i in (0, 1))
    kept = float(np.mean([own.kept for own in layers]))
    sentences = [
        f"Largest MaxVio of a layer on held-out sequences: {before:.3f} before, {after:.3f} "
        f"balanced; {kept:.1%} of the choices stay."
    ]
    if short:
        sentences.append(
            f"Not brought to {target:g} on the tuning sequences: layer{'s' * (len(short) > 1)} "
            f"{', '.join(short)}."
        )
    return sentences
