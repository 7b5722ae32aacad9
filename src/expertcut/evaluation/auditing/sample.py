"""Which experts an audit removes, and what each criterion says of them."""

import logging
from collections.abc import Sequence

import numpy as np

from expertcut.edits.budget import as_numbers, normalised
from expertcut.edits.criteria import NEEDS_MODEL
from expertcut.edits.plan import expert_ids
from expertcut.edits.ranking import Way, rank
from expertcut.errors import ProfileError
from expertcut.evaluation.auditing.outcome import Sampled, Standing
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine

logger = logging.getLogger(__name__)


def sample_experts(n_experts: Sequence[int], sample: int, seed: int) -> list[tuple[int, int]]:
    """`sample` (layer, expert) pairs, at most all there are, sorted.

    Equally many of each layer, what is left over of layers drawn at random, and in each drawn at
    random among all of its experts, used or not: nothing is kept away.
    """
    rng = np.random.default_rng(seed)
    quota = [0] * len(n_experts)
    left = min(sample, sum(n_experts))
    while left:
        open_layers = [layer for layer, n in enumerate(n_experts) if quota[layer] < n]
        turn = rng.permutation(open_layers)[:left]
        for layer in turn.tolist():
            quota[layer] += 1
        left -= len(turn)
    drawn = [rng.choice(n, k, replace=False) for n, k in zip(n_experts, quota, strict=True)]
    return [(layer, int(e)) for layer, own in enumerate(drawn) for e in sorted(own.tolist())]


def sampled_experts(profile: Profile, sample: int, seed: int) -> tuple[Sampled, ...]:
    """The same of a profiled model, with the numbers that its experts are called by."""
    blocks, numbers = profile.info.model.blocks, expert_ids(profile)
    # Experts that a table chooses cannot be removed.
    n_experts = [0 if block.is_hashed else block.experts for block in blocks]
    pairs = sample_experts(n_experts, sample, seed)
    return tuple(
        Sampled(layer=layer, row=row, expert=numbers.number(blocks[layer].name, row))
        for layer, row in pairs
    )


def standings(
    profile: Profile,
    by: Sequence[str],
    way: Way,
    engine: Engine,
    sampled: Sequence[Sampled],
    *,
    is_all: bool,
) -> dict[str, Standing]:
    """What each criterion says of the sampled experts.

    Where all criteria are asked for, one that the profile is too small for is left out, and said.

    Raises:
        ProfileError: the profile is too small for a criterion that was named.
    """
    found = {}
    for name in by:
        try:
            found[name] = _standing(profile, name, way, engine, sampled)
        except ProfileError as error:
            if not is_all:
                raise
            logger.warning("%s is left out: %s", name, error)
    return found


def _standing(
    profile: Profile, by: str, way: Way, engine: Engine, sampled: Sequence[Sampled]
) -> Standing:
    its = Way(by, way.positions, way.layout, seed=way.seed)
    ranking = rank(profile, its, engine if by in NEEDS_MODEL else None)
    numbers = [as_numbers(score_E) for score_E in ranking.scores]
    shares = [normalised(score_E) for score_E in ranking.scores]
    return Standing(
        score=tuple(float(numbers[s.layer][s.row]) for s in sampled),
        share=tuple(float(shares[s.layer][s.row]) for s in sampled),
        place=tuple(ranking.orders[s.layer].index(s.row) for s in sampled),
    )
