"""Criteria that rank experts: one pure function each, in a registry of all of them by name.

To add one, decorate a function with `@criterion`; all that lists criteria reads the registry.
Higher scores are kept; `ranked` breaks ties by mean α, then by the lower id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import numpy as np

from expertcut.edits.layouts import Positions
from expertcut.errors import ProfileError, SettingsError
from expertcut.profiling.statistics import (
    LayerStatistics,
    LayerSums,
    OverTokens,
    TextLayer,
    share,
)
from expertcut.stats import Array, spearman

if TYPE_CHECKING:
    from torch import Tensor

    from expertcut.models.moe_block import MoeBlock
    from expertcut.profiling.storage import Profile
    from expertcut.scoring.engine import Engine

Needs = Literal["profile", "weights", "calibration", "nothing"]


@dataclass(frozen=True)
class Criterion:
    """A function that scores the E experts of one block, and what it looks at.

    `needs` decides the function's arguments: "profile" a block's `LayerStatistics` (and the
    positions, where it has a choice), "weights" a block's expert matrices, "calibration" the
    arguments of `reconstruction`, "nothing" the number of experts, the layer and the seed.
    """

    name: str
    function: Callable[..., Array]
    needs: Needs
    positions: tuple[Positions, ...]
    paper: str | None
    aliases: tuple[str, ...]

    @property
    def default_positions(self) -> Positions:
        """The first of its positions; "all" where it looks at none."""
        return self.positions[0] if self.positions else "all"

    @property
    def needs_model(self) -> bool:
        """Whether a profile alone cannot give the scores."""
        return self.needs in ("weights", "calibration")

    def of_layer(self, layer: LayerSums, positions: Positions) -> Array:
        """Scores (E,) from a profile's statistics of one block."""
        choice = (positions,) if len(self.positions) > 1 else ()  # else it takes no choice
        return self.function(layer, *choice).astype(np.float64)


_OF_TEXTS = ("weighted_accuracy", "all")  # a quiz has no next tokens
_NEEDED = {"weight_E": "gate weights"}  # by sum, where that is not of outputs
_REGISTRY: dict[str, Criterion] = {}
CRITERIA: Mapping[str, Criterion] = MappingProxyType(_REGISTRY)


def criterion(
    *,
    needs: Needs,
    positions: tuple[Positions, ...] = (),
    paper: str | None = None,
    aliases: tuple[str, ...] = (),
) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Registers a function under its own name, which must be free; `paper` is an arXiv id."""

    def register(function: Callable[..., Array]) -> Callable[..., Array]:
        name = function.__name__
        if taken := {name, *aliases} & {*CRITERIA, *_aliases()}:
            raise ValueError(f"two criteria are called {min(taken)}")
        _REGISTRY[name] = Criterion(name, function, needs, positions, paper, aliases)
        return function

    return register


def _aliases() -> dict[str, str]:
    return {alias: name for name, own in CRITERIA.items() for alias in own.aliases}


def criterion_name(text: str) -> str:
    """The registered name for a name or an alias; SettingsError for any other."""
    names = {name: name for name in CRITERIA} | _aliases()
    if text in names:
        return names[text]
    near = get_close_matches(text, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"take one of {', '.join(CRITERIA)}"
    raise SettingsError(f"{text[:60]!a} is not a criterion: {hint}")


def read_criteria(text: str) -> tuple[str, ...]:
    """Criteria from `reap,activations` or `all`; unknown and repeated ones are refused."""
    if text == "all":
        return tuple(CRITERIA)
    names = tuple(criterion_name(name.strip()) for name in text.split(","))
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingsError(f"--by names {twice[0]} twice")
    return names


@criterion(needs="profile", positions=("answer", "all"), paper="2502.17187", aliases=("frequency",))
def activations(layer: LayerSums, positions: Positions) -> Array:
    """Number of questions (answer positions) or tokens (all) routed to the expert."""
    if positions == "answer":
        return answered(layer, "activations").activations_E
    return all_tokens(layer).tokens_E


@criterion(needs="profile", positions=("answer", "all"), paper="2404.05089")
def gate_mass(layer: LayerSums, positions: Positions) -> Array:
    """Σ gate weight over the questions or tokens routed to the expert: a soft count."""
    if positions == "all":
        return _held(layer, "weight_E", "gate_mass")
    weight_E = answered(layer, "gate_mass").weight_E
    assert weight_E is not None, "layer_statistics gives it"
    return weight_E


@criterion(needs="profile", positions=("answer", "all"), paper="2502.17187")
def weighted_accuracy(layer: LayerSums, positions: Positions) -> Array:
    """Σ α·1(correct) / Σ α over the questions routed to the expert, −∞ where none is.

    Over all tokens of texts, a token is correct if the model predicts the next one.
    """
    if positions == "answer":
        share_E = answered(layer, "weighted_accuracy").weighted_accuracy_E
    elif isinstance(layer, TextLayer) and layer.next is not None:
        share_E = layer.next.weighted_accuracy_E
    else:
        raise ProfileError(
            "weighted_accuracy over all tokens needs a profile of texts with losses: profile with "
            "--text and without --no-loss, or take --tokens answer"
        )
    return np.where(np.isnan(share_E), -np.inf, share_E)


@criterion(needs="profile", positions=("all",), paper="2510.13999", aliases=("ean_sum",))
def output_norm(layer: LayerSums) -> Array:
    """Σ ‖f(x)‖₂ over the tokens routed to the expert: the expert activation norm."""
    return _held(layer, "norm_E", "output_norm")


@criterion(needs="profile", positions=("all",), paper="2510.13999", aliases=("ean_mean",))
def output_norm_mean(layer: LayerSums) -> Array:
    """Mean ‖f(x)‖₂ over the tokens routed to the expert, 0 where none is."""
    return share(_held(layer, "norm_E", "output_norm_mean"), all_tokens(layer).tokens_E, 0.0)


@criterion(needs="profile", positions=("all",), paper="2510.13999")
def reap(layer: LayerSums) -> Array:
    """Mean gate weight·‖f(x)‖₂ over the tokens routed to the expert, 0 where none is."""
    return share(_held(layer, "weighted_norm_E", "reap"), all_tokens(layer).tokens_E, 0.0)


@criterion(needs="profile", positions=("all",), paper="2504.06792")
def easy_ep(layer: LayerSums) -> Array:
    """Σ gate weight·‖f(x)‖₂·max(1 − cos(x, x + y), 0) over the tokens routed to the expert.

    x is the residual stream, y what all routed experts add to it; layers with several streams
    (hyper-connections) have none.
    """
    sums = all_tokens(layer)
    if sums.residual_shift_E is None and sums.votes_E is not None:
        other = "another" if sums.input_shift_E is None else "easy_ep_postnorm or another"
        raise ProfileError(
            f"easy_ep: {layer.block} does not add its output to one residual stream that could be "
            f"found: take {other} criterion"
        )
    return _held(layer, "residual_shift_E", "easy_ep")


@criterion(needs="profile", positions=("all",))
def easy_ep_postnorm(layer: LayerSums) -> Array:
    """`easy_ep` with the block's input, after the norm, as x."""
    sums = all_tokens(layer)
    if sums.input_shift_E is None and sums.votes_E is not None:
        raise ProfileError(
            f"easy_ep_postnorm: the experts of {layer.block} work in another width than the block "
            "reads, so what they add is not known: take another criterion"
        )
    return _held(layer, "input_shift_E", "easy_ep_postnorm")


@criterion(needs="profile", positions=("all",))
def ranked_choice(layer: LayerSums) -> Array:
    """Σ points over the tokens routed to the expert: K for a token's largest contribution, to 1.

    A contribution is gate weight·‖f(x)‖₂, the sum Borda's count (our definition, docs/criteria.md).
    """
    return _held(layer, "votes_E", "ranked_choice")


@criterion(needs="weights", paper="2603.18492")
def aimer(weights: Iterable[Tensor]) -> Array:
    """−(mean |w| / root mean square of w) over the expert's matrices, biases excluded.

    Matrices are (E, ·, ·). A few large weights among many small ones score high, an expert without
    any weight but 0 scores lowest. The paper's score has no sign and prunes the highest.
    """
    score_E = []
    for matrices in zip(*weights, strict=True):
        n_weights = sum(m.numel() for m in matrices)
        absolute = sum(float(m.double().abs().sum()) for m in matrices)
        squared = sum(float(m.double().square().sum()) for m in matrices)
        rms = float(np.sqrt(squared / max(n_weights, 1)))
        # Below every other score: mean |w| is at most the root mean square.
        score_E.append(-(absolute / n_weights) / rms if squared else -1.0)
    return np.array(score_E)


@criterion(needs="calibration", positions=("all",), paper="2402.14800")
def reconstruction(
    change: Callable[[tuple[int, ...]], float],
    groups: Sequence[range],
    least: int,
    by_use: Sequence[int],
) -> Array:
    """Step at which an expert is removed: each step removes the one that changes the output least.

    `change` is that of the block's output without these experts. The paper tries every set of
    experts to keep, which 8 experts allow and 64 do not; greedy backward elimination is the
    tractable form. It ends where every group of experts has `least` left, which the router needs.
    Those experts rank above all others, by the change that their removal would make next. Of equal
    changes (experts that no stored token is routed to), the last one in `by_use` is removed.
    """
    later = {expert: -rank for rank, expert in enumerate(by_use)}
    score_E = np.full(sum(map(len, groups)), np.nan)
    removed: tuple[int, ...] = ()
    while True:
        left = [[e for e in group if e not in removed] for group in groups]
        candidates = [e for group in left if len(group) > least for e in group]
        if not candidates:
            break
        next_removed = min(candidates, key=lambda e: (change((*removed, e)), later[e]))
        score_E[next_removed] = len(removed)
        removed = (*removed, next_removed)

    def next_change(expert: int) -> float:
        # Replaces the last removal of its group: a group with one expert fewer cannot be routed.
        (own,) = (group for group in groups if expert in group)
        last = next(e for e in reversed(removed) if e in own)
        return change((*(e for e in removed if e != last), expert))

    order = [e for group in left for e in group]
    if removed:
        order.sort(key=lambda e: (next_change(e), later[e]))
    for rank, expert in enumerate(order):
        score_E[expert] = len(removed) + rank
    return score_E


@criterion(needs="nothing")
def random(n_experts: int, layer: int, seed: int) -> Array:
    """A permutation of 0 to E − 1 for each layer and seed: the baseline of every criterion."""
    return np.random.default_rng((seed, layer)).permutation(n_experts).astype(np.float64)


def answered(layer: LayerSums, name: str) -> LayerStatistics:
    """A layer's statistics over questions; ProfileError for texts."""
    if isinstance(layer, LayerStatistics):
        return layer
    raise ProfileError(f"{name} at answers needs a profile of a quiz, and this is one of texts")


def all_tokens(layer: LayerSums) -> OverTokens:
    """The sums over every token, shots included; ProfileError with --stats answer."""
    if layer.over_tokens is None:
        raise ProfileError(
            "the profile holds no all-token statistics (--stats answer): profile with --stats all"
        )
    return layer.over_tokens


def _held(layer: LayerSums, name: str, by: str) -> Array:
    sums = all_tokens(layer)
    sum_E: Array | None = getattr(sums, name)
    if sum_E is None and sums.weight_E is None:
        raise ProfileError(
            f"{by}: needs {_NEEDED.get(name, 'outputs of experts')}, and the profile holds routes, "
            "which are choices alone: profile with --text or --quiz, or take --by activations"
        )
    if sum_E is None:
        raise ProfileError(
            f"{by}: the profile was made before what it needs was kept: profile again, "
            "into another folder, with --stats all"
        )
    return sum_E


def scores(
    profile: Profile, by: str, positions: Positions, engine: Engine | None = None, seed: int = 0
) -> list[Array]:
    """One score (E,) per MoE block in layer order, higher is kept; some need the engine."""
    chosen, blocks = CRITERIA[by], profile.info.model.blocks
    if chosen.needs == "nothing":
        return [chosen.function(block.experts, layer, seed) for layer, block in enumerate(blocks)]
    if chosen.needs == "profile":
        return [chosen.of_layer(layer, positions) for layer in profile.layers]
    if engine is None:
        raise SettingsError(f"{by} needs the model itself: load it, or take another criterion")
    if chosen.needs == "calibration":
        return _after_calibration(profile, chosen, engine)
    by_layer = []
    for block in engine.moe.blocks:
        if not (weights := list(block.expert_weights())):
            raise ProfileError(
                f"{by}: {block.name} has experts without weights of their own, which a cut in "
                "layout exact leaves, or of different shapes: take another criterion"
            )
        by_layer.append(chosen.function(weights))
    return by_layer


def _after_calibration(profile: Profile, chosen: Criterion, engine: Engine) -> list[Array]:
    inputs = calibration_inputs(profile, engine)
    return [
        after_removals(profile, chosen, block, inputs[block.layer]) for block in engine.moe.blocks
    ]


def calibration_inputs(profile: Profile, engine: Engine) -> dict[int, Tensor]:
    """Inputs (T, D) of every block, by layer, at a sample of tokens of the tuning questions."""
    from expertcut.edits.calibrate import sample_inputs
    from expertcut.edits.splits import questions_for

    return sample_inputs(engine, questions_for(profile, is_fitting=True).tuning)


def after_removals(profile: Profile, chosen: Criterion, block: MoeBlock, x_TD: Tensor) -> Array:
    """Scores (E,) by what removals of a block's experts change at these inputs."""
    from expertcut.edits.calibrate import RemovalTrial
    from expertcut.edits.plan import least_per_group

    info, layer = profile.info.model.blocks[block.layer], profile.layers[block.layer]
    if info.is_hashed:  # no expert can go
        return np.zeros(info.experts)
    size = info.experts // info.groups
    groups = [range(g * size, (g + 1) * size) for g in range(info.groups)]
    least = info.top_k if info.groups == 1 else least_per_group(info)
    use_E = layer.alpha_mean_E if layer.tokens_E is None else layer.tokens_E
    before = ranked(use_E, layer.alpha_mean_E)
    return chosen.function(RemovalTrial(block, x_TD).change, groups, least, before)


def positions_of(by: str, wanted: Positions | None) -> Positions:
    """The positions that a criterion looks at: `wanted`, if it has a choice, or its default."""
    chosen = CRITERIA[by]
    default = chosen.default_positions
    if wanted is None or wanted == default or wanted in chosen.positions:
        return wanted or default
    where = "all tokens" if default == "all" else "answer positions"
    raise SettingsError(
        f"--tokens {wanted}: {by} looks at {where if chosen.positions else 'no positions'} "
        "alone: leave --tokens out"
    )


@dataclass(frozen=True)
class Compared:
    """The criteria that a profile alone can compute: scores and ranks (E,) per layer."""

    profile: Profile
    scores: Mapping[str, list[Array]]  # "_all" marks second positions
    left_out: Mapping[str, str]  # the other criteria, and why

    @cached_property
    def ranks(self) -> dict[str, list[Array]]:
        """Places in the order of `ranked`; 1 is kept longest."""
        return {
            name: [
                np.argsort(ranked(score_E, layer.alpha_mean_E)) + 1
                for score_E, layer in zip(by_layer, self.profile.layers, strict=True)
            ]
            for name, by_layer in self.scores.items()
        }

    def correlations(self, a: str, b: str) -> list[float]:
        """Spearman's rank correlation of two criteria's scores by layer, NaN if one is constant."""
        return [spearman(x, y) for x, y in zip(self.scores[a], self.scores[b], strict=True)]

    def agreement(self, a: str, b: str) -> float:
        """Their mean over the layers that have one."""
        defined = [rho for rho in self.correlations(a, b) if not np.isnan(rho)]
        return float(np.mean(defined)) if defined else float("nan")


def compare(profile: Profile) -> Compared:
    """Every criterion that a profile alone can compute, at each of its positions."""
    layers = profile.layers
    by_name: dict[str, list[Array]] = {}
    left_out = {by: "asks the model" for by in sorted(CRITERIA) if CRITERIA[by].needs_model}
    for by, chosen in CRITERIA.items():
        if chosen.needs != "profile":
            continue
        for positions in chosen.positions:
            if (by, positions) == _OF_TEXTS and not isinstance(layers[0], TextLayer):
                continue
            name = by if positions == chosen.default_positions else f"{by}_{positions}"
            try:
                by_name[name] = [chosen.of_layer(layer, positions) for layer in layers]
            except ProfileError as error:
                left_out[name] = str(error).removeprefix(f"{by}: ")
    return Compared(profile, by_name, left_out)


def ranked(score_E: Array, alpha_mean_E: Array) -> list[int]:
    """Expert ids, best first: by score, then mean α, then the lower id."""
    return [int(e) for e in np.lexsort((-alpha_mean_E, -score_E))]  # which is stable
