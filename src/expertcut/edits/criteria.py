"""Criteria that rank experts: one small pure function each, and all of them by name.

The criterion that tries: which expert's going changes its block's output least, again and again.
"Not All Experts Are Equal" (arXiv:2402.14800) tries every set of experts to keep, which 8 experts
allow and 64 do not; greedy backward elimination is the tractable form.

Higher is kept. Ties are broken by mean α, then by the lower id, in `ranked`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from expertcut.edits.plan import Positions, least_per_group
from expertcut.errors import ProfileError, SettingsError
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.statistics import LayerStatistics, OverTokens, share
from expertcut.profiling.storage import Profile
from expertcut.stats import spearman

if TYPE_CHECKING:
    from torch import Tensor

    from expertcut.models.moe_block import MoeBlock
    from expertcut.scoring.engine import Engine

Array = np.ndarray[Any, Any]
_NO_WEIGHTS = -1.0  # least of all, for mean |w| is never above the root mean square
Change = Callable[[tuple[int, ...]], float]  # of the block's output, these experts removed


def aimer(weights: Iterable[Tensor]) -> Array:
    """−(mean |w| / root mean square of w) over all of an expert's matrices (E, ·, ·), biases apart.

    Weights that are few large ones among many small ones score high; an expert without any weight
    but 0 scores least. arXiv:2603.18492, whose score is without the sign: it prunes the highest.
    """
    matrices = list(weights)
    return np.array([_aimer([m[e] for m in matrices]) for e in range(len(matrices[0]))])


def _aimer(matrices: list[Tensor]) -> float:
    n_weights = sum(m.numel() for m in matrices)
    absolute = sum(float(m.double().abs().sum()) for m in matrices)
    squared = sum(float(m.double().square().sum()) for m in matrices)
    if not squared:
        return _NO_WEIGHTS
    return -(absolute / n_weights) / float(np.sqrt(squared / n_weights))


def random(n_experts: int, layer: int, seed: int) -> Array:
    """A permutation of 0 to E − 1, drawn for each layer and seed: what a criterion must beat."""
    return np.random.default_rng((seed, layer)).permutation(n_experts).astype(np.float64)


def activations(layer: LayerStatistics, positions: Positions) -> Array:
    """How many questions (answer positions) or tokens (all) chose each expert. arXiv:2502.17187."""
    if positions == "answer":
        return np.asarray(layer.is_activated_NE.sum(axis=0))
    return all_tokens(layer).tokens_E


def gate_mass(layer: LayerStatistics, positions: Positions) -> Array:
    """Σ gate weight over the questions or tokens that chose it: a soft count. arXiv:2404.05089."""
    if positions == "all":
        return all_tokens(layer).weight_E
    assert layer.weight_E is not None, "the layers of a profile have it"
    return layer.weight_E


def weighted_accuracy(layer: LayerStatistics) -> Array:
    """Σ α·1(correct) / Σ α over the questions that chose it, −∞ where none. arXiv:2502.17187."""
    return np.where(np.isnan(layer.weighted_accuracy_E), -np.inf, layer.weighted_accuracy_E)


def output_norm(layer: LayerStatistics) -> Array:
    """Σ ‖f(x)‖₂ over the tokens that chose it: the expert activation norm. arXiv:2510.13999."""
    return all_tokens(layer).norm_E


def output_norm_mean(layer: LayerStatistics) -> Array:
    """Mean ‖f(x)‖₂ over the tokens that chose it, 0 where none did. arXiv:2510.13999."""
    sums = all_tokens(layer)
    return share(sums.norm_E, sums.tokens_E, 0.0)


def reap(layer: LayerStatistics) -> Array:
    """Mean gate weight·‖f(x)‖₂ over the tokens that chose it, 0 where none. arXiv:2510.13999."""
    sums = all_tokens(layer)
    return share(sums.weighted_norm_E, sums.tokens_E, 0.0)


def easy_ep(layer: LayerStatistics) -> Array:
    """Σ gate weight·‖f(x)‖₂·max(1 − cos(x, x + y), 0) over the tokens that chose it.

    x is the residual stream and y what all routed experts add to it. arXiv:2504.06792.

    Raises:
        ProfileError: the profile does not hold it, or the family has no such stream.
    """
    sums = all_tokens(layer)
    if sums.residual_shift_E is None and sums.votes_E is not None:
        other = "another" if sums.input_shift_E is None else "easy_ep_postnorm or another"
        raise ProfileError(
            f"easy_ep: {layer.block} does not add its output to a residual stream that could be "
            f"found: take {other} criterion"
        )
    return _held(sums.residual_shift_E, "easy_ep")


def easy_ep_postnorm(layer: LayerStatistics) -> Array:
    """The same with x the block's input, behind the norm that reads the residual stream.

    Raises:
        ProfileError: the profile does not hold it.
    """
    sums = all_tokens(layer)
    if sums.input_shift_E is None and sums.votes_E is not None:
        raise ProfileError(
            f"easy_ep_postnorm: the experts of {layer.block} work in another width than the block "
            "reads, so what they add is not known: take another criterion"
        )
    return _held(sums.input_shift_E, "easy_ep_postnorm")


def ranked_choice(layer: LayerStatistics) -> Array:
    """Σ points over the tokens that chose it: K for a token's largest gate weight·‖f(x)‖₂, to 1.

    Borda's count of the tokens' votes; the definition is ours (docs/criteria.md).

    Raises:
        ProfileError: the profile does not hold it.
    """
    return _held(all_tokens(layer).votes_E, "ranked_choice")


def all_tokens(layer: LayerStatistics) -> OverTokens:
    """The sums over every token, shots included.

    Raises:
        ProfileError: the profile was made with --stats answer.
    """
    if layer.over_tokens is None:
        raise ProfileError(
            "the profile holds no all-token statistics (--stats answer): profile with --stats all"
        )
    return layer.over_tokens


def _held(sum_E: Array | None, criterion: str) -> Array:
    if sum_E is None:
        raise ProfileError(
            f"{criterion}: the profile was made before what it needs was kept: profile again, "
            "into another folder, with --stats all"
        )
    return sum_E


def reconstruction(
    change: Change, groups: Sequence[range], least: int, before: Sequence[int]
) -> Array:
    """The order in which experts go, 0 first, each the one whose going then changes least.

    Ends where every group of experts has `least` left, which the router needs. Those that are left
    rank above all others, by the change that their going would make next. Of equal changes, as of
    experts that no stored token chose, the later one in the order `before` goes first.
    """
    later = {expert: -rank for rank, expert in enumerate(before)}
    score_E = np.full(sum(map(len, groups)), np.nan)
    removed: tuple[int, ...] = ()
    while candidates := _candidates(groups, removed, least):
        changes = [change((*removed, e)) for e in candidates]
        pairs = zip(changes, candidates, strict=True)
        goes = min(pairs, key=lambda pair: (pair[0], later[pair[1]]))[1]
        score_E[goes] = len(removed)
        removed = (*removed, goes)
    left = [e for group in groups for e in group if e not in removed]

    def next_change(expert: int) -> float:
        # In the place of the last one of its group: a group that lacks one more cannot be routed.
        (own,) = (group for group in groups if expert in group)
        last = next(e for e in reversed(removed) if e in own)
        return change((*(e for e in removed if e != last), expert))

    order = sorted(left, key=lambda e: (next_change(e), later[e])) if removed else left
    for rank, expert in enumerate(order):
        score_E[expert] = len(removed) + rank
    return score_E


def _candidates(groups: Sequence[range], removed: tuple[int, ...], least: int) -> list[int]:
    """The experts of groups that can spare one."""
    left = [[e for e in group if e not in removed] for group in groups]
    return [e for group in left if len(group) > least for e in group]


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
    return _observed(profile.layers, by, positions)


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
    from expertcut.edits.calibrate import Tried, keep_inputs
    from expertcut.edits.splits import questions_for

    kept = keep_inputs(engine, questions_for(profile, is_fitting=True).tuning)
    layers = zip(engine.moe.blocks, profile.info.model.blocks, profile.layers, strict=True)
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
    layers = profile.layers
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


def ranked(score_E: Array, alpha_mean_E: Array) -> list[int]:
    """Expert ids, best first: by score, then mean α, then the lower id."""
    ids = np.arange(len(score_E))
    return [int(e) for e in np.lexsort((ids, -alpha_mean_E, -score_E))]
