"""What a cut would touch: how much of what the profiled questions did went through what goes."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from expertcut.interventions.plan import Edit
from expertcut.profiling.storage import Profile


@dataclass(frozen=True)
class Touched:
    """One block: `n_questions` chose a removed expert at the answer position.

    Over every token, shots included: `n_used` of the removed experts were chosen somewhere, and
    `mass` is their share of all gate weight. Both are None in a profile without all-token sums.
    """

    block: str
    n_removed: int
    n_questions: int
    n_used: int | None
    mass: float | None


def touched(profile: Profile, edits: Mapping[str, Edit]) -> list[Touched]:
    """What the removal of experts would touch, block by block."""
    chosen_NLK = profile.array("chosen_NLK")
    tokens_LE, weight_LE = profile.token_sum("tokens"), profile.token_sum("weight")
    found = []
    for layer, block in enumerate(profile.info.model.blocks):
        removed = list(edits[block.name].removed(block.experts))
        hit_N = np.isin(chosen_NLK[:, layer], removed).any(axis=1)
        n_used, mass = None, None
        if tokens_LE is not None and weight_LE is not None:
            n_used = int((tokens_LE[layer, removed] > 0).sum())
            mass = float(weight_LE[layer, removed].sum() / weight_LE[layer].sum())
        found.append(Touched(block.name, len(removed), int(hit_N.sum()), n_used, mass))
    return found
