"""Scores of every expert by any criterion, and the order that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from expertcut.errors import ProfileError, SettingsError
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
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.statistics import LayerStatistics, layer_statistics
from expertcut.profiling.storage import Profile

if TYPE_CHECKING:
    from expertcut.models.moe_block import MoeBlock
    from expertcut.scoring.engine import Engine

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
    return _observed(layer_statistics(profile), by, positions)


def _observed(layers: Sequence[LayerStatistics], by: str, positions: Positions) -> list[Array]:
    if by in _AT_POSITIONS:
        return [_AT_POSITIONS[by](layer, positions).astype(np.float64) for layer in layers]
    criterion = {**_AT_ANSWERS, **_OVER_TOKENS}[by]
    return [criterion(layer) for layer in layers]


def _asking_the_model(profile: Profile, by: str, engine: Engine | None) -> list[Array]:
    if engine is None:
        raise SettingsError(f"{by} needs the model itself: load it, or take another criterion")
    if by == aimer.__name__:
        return [_by_weights(block) for block in engine.moe.blocks]
    from expertcut.interventions.calibration.activations import Tried, keep_inputs
    from expertcut.interventions.questions import questions_for

    kept = keep_inputs(engine, questions_for(profile, is_fitting=True).tuning)
    layers = zip(
        engine.moe.blocks, profile.info.model.blocks, layer_statistics(profile), strict=True
    )
    return [
        np.zeros(block.experts)  # a table chooses them: none can go
        if block.is_hashed
        else reconstruction(Tried(own, kept[own.layer]).change, *_groups(block), _by_use(layer))
        for own, block, layer in layers
    ]


def _by_weights(block: MoeBlock) -> Array:
    weights = list(block.expert_weights())
    if not weights:
        raise SettingsError(
            f"aimer: {block.name} has experts without weights of their own, which a cut in layout "
            "exact leaves: take another criterion"
        )
    return aimer(weights)


def _by_use(layer: LayerStatistics) -> list[int]:
    use_E = layer.alpha_mean_E if layer.tokens_E is None else layer.tokens_E
    return ranked(use_E, layer.alpha_mean_E)


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


@dataclass(frozen=True)
class Compared:
    """The criteria that a profile can answer: scores and ranks (E,) per layer, 1 is kept longest.

    `left_out` says of the others why.
    """

    profile: Profile
    layers: Sequence[LayerStatistics]
    scores: Mapping[str, list[Array]]
    left_out: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Criteria, those over all tokens that have a choice marked so."""
        return tuple(self.scores)

    @cached_property
    def ranks(self) -> dict[str, list[Array]]:
        """Places in the order of `ranked`."""
        return {
            name: [
                np.argsort(ranked(score_E, layer.alpha_mean_E)) + 1
                for score_E, layer in zip(found, self.layers, strict=True)
            ]
            for name, found in self.scores.items()
        }

    def correlations(self, a: str, b: str) -> list[float]:
        """Spearman's rank correlation of two criteria's scores in each layer.

        NaN where a criterion tells no expert from another.
        """
        return [spearman(x, y) for x, y in zip(self.scores[a], self.scores[b], strict=True)]

    def agreement(self, a: str, b: str) -> float:
        """Their mean over the layers that have one."""
        values = np.array(self.correlations(a, b))
        is_defined = ~np.isnan(values)
        return float(values[is_defined].mean()) if is_defined.any() else float("nan")


def compare(profile: Profile) -> Compared:
    """Every criterion by every kind of positions that it takes, from a profile alone."""
    layers = layer_statistics(profile)
    found: dict[str, list[Array]] = {}
    left_out = {name: "asks the model" for name in sorted(NEEDS_MODEL)}
    for by in OBSERVED:
        for positions in _positions(by):
            is_second = positions == "all" and by in _AT_POSITIONS
            name = f"{by}_all" if is_second else by
            try:
                found[name] = _observed(layers, by, positions)
            except ProfileError as error:
                left_out[name] = str(error).removeprefix(f"{by}: ")
    return Compared(profile, layers, found, left_out)


def _positions(by: str) -> tuple[Positions, ...]:
    return ("answer", "all") if by in _AT_POSITIONS else (positions_of(by, None),)


def spearman(a_E: Array, b_E: Array) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where either is constant."""
    from scipy.stats import rankdata  # every prune would wait for it

    a_E, b_E = (rankdata(values_E) for values_E in (a_E, b_E))
    a_E, b_E = a_E - a_E.mean(), b_E - b_E.mean()
    length = float(np.sqrt((a_E @ a_E) * (b_E @ b_E)))
    return float(a_E @ b_E) / length if length else float("nan")


def ranked(score_E: Array, alpha_mean_E: Array) -> list[int]:
    """Expert ids, best first: by score, then mean α, then the lower id."""
    ids = np.arange(len(score_E))
    return [int(e) for e in np.lexsort((ids, -alpha_mean_E, -score_E))]
