"""`cache.json`: which experts stay in fast memory, what each cache policy hits, what is moved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from expertcut.documents import Format1, Record
from expertcut.edits.placement_results import trace_hash
from expertcut.edits.plan import Expert, ExpertIds, PlanModel
from expertcut.errors import OutputError, SettingsError
from expertcut.profiling import trace
from expertcut.profiling.expert_load import use_counts
from expertcut.profiling.locality import (
    POLICIES,
    Policy,
    Rate,
    cache_hits,
    choices,
    rate,
    static_hits,
)
from expertcut.stats import Array, Share

CACHE_FILE = "cache.json"
STATIC = "static"
SEARCHED = (STATIC, "lru", "belady")  # hit rates that a larger cache never lowers
_Size = Annotated[int, Field(ge=1, le=1 << 16)]


class CacheRate(Record):
    """A policy's hit rate over all choices, with its interval over sequences, and by layer.

    `moved_bytes` are those of the experts that a token misses; None without the model's files.
    """

    hits: Share
    ci95: tuple[Share, Share] | None
    by_layer: tuple[Share, ...] = Field(min_length=1)
    moved_bytes: float | None = Field(ge=0)


class CachedLayer(Record):
    """One layer: the experts used most, by their ids, the most used first, and their uses."""

    experts: tuple[Expert, ...] = Field(min_length=1)
    uses: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    expert_bytes: int | None = Field(ge=1)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if len(self.uses) != len(self.experts) or len({*self.experts}) < len(self.experts):
            raise ValueError("experts and uses are not one list")
        return self


class CacheFile(Record):
    """`cache.json`.

    `experts` are held in each layer. The list is chosen on the whole trace, the rate of `static`
    by the list of the half of the sequences that it is not scored on. `smallest` is the smallest
    cache that hits `target` of the choices, None where even all experts do not: caches of lru and
    belady start empty.
    """

    format: Format1 = 1
    model: PlanModel
    trace: str = Field(pattern="^[0-9a-f]{64}$")
    experts: _Size
    target: Share
    sequences: int = Field(ge=1)
    tokens: int = Field(ge=1)
    layers: dict[str, CachedLayer] = Field(min_length=1)
    rates: dict[str, CacheRate] = Field(min_length=1)
    smallest: dict[str, _Size | None]

    @model_validator(mode="after")
    def _is_of_its_layers(self) -> Self:
        if any(len(found.by_layer) != len(self.layers) for found in self.rates.values()):
            raise ValueError("a rate is not of each layer")
        return self


def load_cache(path: Path) -> CacheFile:
    """`cache.json` from its file or folder; an OutputError where it is missing or not valid."""
    file = path / CACHE_FILE if path.is_dir() else path
    return CacheFile.load(file, OutputError, "is not a valid cache plan")


def plan_cache(
    found: trace.Trace,
    experts: int,
    target: float,
    numbers: ExpertIds,
    expert_bytes: Sequence[int] | None,
) -> CacheFile:
    """The plan of a cache of so many experts in each layer; `expert_bytes` by layer, if known."""
    counts_of = found.n_experts_L.tolist()
    if experts > max(counts_of):
        raise SettingsError(
            f"--cache {experts} is more than the {max(counts_of)} experts of a layer: give fewer"
        )
    halves = found.halves()
    if not all(halves):
        raise OutputError(f"{found.path} has one sequence, and others must score: trace more")
    sequences = [*halves[0], *halves[1]]
    uses_LE = use_counts(sequences, len(counts_of), max(counts_of))
    sizes: list[int | None] = [None] * len(counts_of)
    if expert_bytes is not None:
        sizes = [*expert_bytes]
    n_tokens, model = sum(map(len, sequences)), found.info.model
    choices_SL = choices(sequences)
    hit_counts = {p: _hits(halves, counts_of, p, experts) for p in (STATIC, *POLICIES)}
    return CacheFile(
        model=PlanModel(id=model.id, revision=model.revision, fingerprint=model.fingerprint),
        trace=trace_hash(found),
        experts=experts,
        target=target,
        sequences=len(sequences),
        tokens=n_tokens,
        layers={
            name: _layer(uses_E[:n], experts, numbers, name, size)
            for name, uses_E, n, size in zip(
                found.block_names,
                uses_LE,
                counts_of,
                sizes,
                strict=True,
            )
        },
        rates={
            policy: _rate(hits_SL, choices_SL, n_tokens, expert_bytes)
            for policy, hits_SL in hit_counts.items()
        },
        smallest={
            policy: _smallest(halves, counts_of, policy, target, int(choices_SL.sum()))
            for policy in SEARCHED
        },
    )


def _hits(
    halves: Sequence[Sequence[trace.Sequence]],
    n_experts_L: Sequence[int],
    policy: str | Policy,
    experts: int,
) -> Array:
    """(S, L) hits of a cache of so many experts, or of all of a smaller layer."""
    size_L = [min(experts, n) for n in n_experts_L]
    if policy == STATIC:
        return static_hits(halves, n_experts_L, size_L)
    sequences = [s for half in halves for s in half]
    known = next(own for own in POLICIES if own == policy)
    return np.asarray(cache_hits(sequences, n_experts_L, [known], np.array([size_L]))[0, 0])


def _rate(
    hits_SL: Array, choices_SL: Array, n_tokens: int, expert_bytes: Sequence[int] | None
) -> CacheRate:
    found: Rate = rate(hits_SL, choices_SL)
    moved = None
    if expert_bytes is not None:
        misses_L = (choices_SL - hits_SL).sum(axis=0)
        moved = float(misses_L @ np.array(expert_bytes, float)) / n_tokens
    ci95 = None if found.ci95 is None else tuple(np.clip(found.ci95, 0, 1).tolist())
    return CacheRate(
        hits=found.whole,
        ci95=ci95,
        by_layer=tuple(np.nan_to_num(found.by_layer_L).tolist()),
        moved_bytes=moved,
    )


def _smallest(
    halves: Sequence[Sequence[trace.Sequence]],
    n_experts_L: Sequence[int],
    policy: str,
    target: float,
    n_choices: int,
) -> int | None:
    """The smallest cache that hits the target, by bisection: a larger one hits no less."""
    low, high = 0, max(n_experts_L) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if _hits(halves, n_experts_L, policy, middle).sum() >= target * n_choices:
            high = middle
        else:
            low = middle
    return high if high <= max(n_experts_L) else None


def _layer(
    uses_E: Array, experts: int, numbers: ExpertIds, name: str, size: int | None
) -> CachedLayer:
    rows = np.argsort(-uses_E, kind="stable")[:experts]
    return CachedLayer(
        experts=tuple(numbers.number(name, row) for row in rows.tolist()),
        uses=tuple(uses_E[rows].tolist()),
        expert_bytes=size,
    )
