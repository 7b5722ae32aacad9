"""Scores of every expert by any criterion, and the order that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from expertcut.errors import SettingsError
from expertcut.interventions.allowed import least_per_group
from expertcut.interventions.criteria.blind import aimer, random
from expertcut.interventions.criteria.observed import (
    activations,
    easy_ep,
    easy_ep_postnorm,
    gate_mass,
    output_norm,
    output_norm_mean,
    ranked_choice,
    reap,
    weighted_accuracy,
)
from expertcut.interventions.criteria.reconstruction import reconstruction
from expertcut.interventions.plan import Positions
from expertcut.profiling.statistics import layer_statistics
from expertcut.profiling.store import BlockInfo, Profile

if TYPE_CHECKING:
    from expertcut.moe.engine import Engine

Array = np.ndarray[Any, Any]

_AT_POSITIONS = {f.__name__: f for f in (activations, gate_mass)}
_AT_ANSWERS = {f.__name__: f for f in (weighted_accuracy,)}
_OVER_TOKENS = {
    f.__name__: f
    for f in (output_norm, output_norm_mean, reap, easy_ep, easy_ep_postnorm, ranked_choice)
}
CRITERIA: Mapping[str, Callable[..., Array]] = {
    **_AT_POSITIONS,
    **_AT_ANSWERS,
    **_OVER_TOKENS,
    **{f.__name__: f for f in (aimer, reconstruction, random)},
}
NEEDS_MODEL = frozenset({aimer.__name__, reconstruction.__name__})
CALIBRATED = frozenset({reconstruction.__name__})  # by a pass over the tuning questions
OBSERVED = (*_AT_POSITIONS, *_AT_ANSWERS, *_OVER_TOKENS)  # that a profile alone can answer


def scores(
    profile: Profile,
    by: str,
    positions: Positions,
    engine: Engine | None = None,
    seed: int = 0,
) -> list[Array]:
    """One score (E,) per MoE block in layer order, higher is kept.

    `positions` matter to `activations` and `gate_mass`, `seed` to `random`. `reconstruction` runs
    the tuning questions through the engine's model.

    Raises:
        ProfileError: the profile does not hold what the criterion needs.
        SettingsError: a criterion that needs a model, and none is given.
    """
    blocks = profile.info.model.blocks
    if by == random.__name__:
        return [random(block.experts, layer, seed) for layer, block in enumerate(blocks)]
    if by in NEEDS_MODEL:
        return _asking_the_model(profile, by, engine)
    layers = layer_statistics(profile)
    if by in _AT_POSITIONS:
        return [_AT_POSITIONS[by](layer, positions) for layer in layers]
    criterion = {**_AT_ANSWERS, **_OVER_TOKENS}[by]
    return [np.asarray(criterion(layer)) for layer in layers]


def _asking_the_model(profile: Profile, by: str, engine: Engine | None) -> list[Array]:
    if engine is None:
        raise SettingsError(f"{by} needs the model itself: load it, or take another criterion")
    if by == aimer.__name__:
        return [aimer(block.expert_weights()) for block in engine.moe.blocks]
    from expertcut.interventions.calibration.activations import Tried, keep_inputs
    from expertcut.interventions.questions import questions_for

    kept = keep_inputs(engine, questions_for(profile, is_fitting=True).tuning)
    return [
        reconstruction(Tried(own, kept[own.layer]).change, *_groups(block))
        for own, block in zip(engine.moe.blocks, profile.info.model.blocks, strict=True)
    ]


def _groups(block: BlockInfo) -> tuple[list[range], int]:
    """The experts of each routing group, and how many of each the router needs."""
    size = block.experts // block.groups
    groups = [range(g * size, (g + 1) * size) for g in range(block.groups)]
    return groups, block.top_k if block.groups == 1 else least_per_group(block)


def positions_of(by: str, asked: Positions | None) -> Positions:
    """The positions that a criterion looks at: its own, or as asked where it has a choice.

    Raises:
        SettingsError: asked for others than it is defined on.
    """
    own: Positions = "answer" if by in (*_AT_POSITIONS, *_AT_ANSWERS) else "all"
    if asked is None or asked == own or by in _AT_POSITIONS:
        return asked or own
    where = "answer positions" if own == "answer" else "all tokens"
    if by not in OBSERVED:
        where = "no positions"
    raise SettingsError(f"--positions {asked}: {by} looks at {where} alone: leave --positions out")


def ranked(score_E: Array, alpha_mean_E: Array) -> list[int]:
    """Expert ids, best first: by score, then mean α, then the lower id."""
    ids = np.arange(len(score_E))
    return [int(e) for e in np.lexsort((ids, -alpha_mean_E, -score_E))]
