"""The control of a proof: other experts, drawn at random among those that appear as often."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from expertcut.edits.reweight_select import (
    Chooser,
    QuestionOutcomes,
    SelectedExpert,
    appearances,
    places,
)

Array = np.ndarray[Any, Any]
DRAWS = 99
_FACTOR = 2.0  # a match appears at most so many times as often, or as seldom
_FEWEST = 25  # nearest ones, where fewer match


def draw(
    chooser: Chooser,
    records: QuestionOutcomes,
    picks: Sequence[SelectedExpert],
    rng: np.random.Generator,
) -> dict[SelectedExpert, SelectedExpert]:
    """For each pick another expert, tilted the same way and matched to it in appearances.

    Fewer where the model has no more candidates. Layers are those that the choice was made from.
    """
    by_id = places(records.blocks)
    appears_X = appearances(records)
    is_free_X = chooser.candidates(records)
    is_free_X[[by_id.index((pick.layer, pick.expert)) for pick in picks]] = False
    drawn = {}
    for pick in picks:
        matched = matches(appears_X, is_free_X, by_id.index((pick.layer, pick.expert)))
        if len(matched):
            x = int(rng.choice(matched))
            is_free_X[x] = False
            drawn[pick] = SelectedExpert(*by_id[x], pick.sign)
    return drawn


def matches(appears_X: Array, is_free_X: Array, x: int) -> Array:
    """Indices of the free experts that appear about as often, at least the 25 nearest."""
    free = np.flatnonzero(is_free_X & (appears_X > 0))
    distance = np.abs(np.log(appears_X[free] / max(appears_X[x], appears_X[free].min(initial=1))))
    nearest = np.argsort(distance, kind="stable")
    n_within = int((distance <= np.log(_FACTOR)).sum())
    return free[nearest[: max(n_within, _FEWEST)]]
