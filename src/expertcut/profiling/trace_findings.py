"""What `show` says of a trace: locality, predictability, load, drops, transitions."""

from collections import abc
from functools import cached_property
from typing import Any

import numpy as np

from expertcut.errors import ProfileError
from expertcut.profiling import expert_load, locality, predictability
from expertcut.profiling.locality import Locality, Rate, Srp
from expertcut.profiling.predictability import Predictability
from expertcut.profiling.trace import Sequence, Trace
from expertcut.stats import Array

SEGMENTS = (4, 16, 64, 256)
CACHES = (1.0, 2.0, 4.0)
CAPACITIES = (1.0, 1.25, 2.0)


class TraceFindings:
    """Every part is computed when it is asked for, once. Rates are of all tokens of all sequences.

    Shots count as often as there are questions; only predictability leaves them out.
    """

    def __init__(
        self,
        trace: Trace,
        segments: abc.Sequence[int] = SEGMENTS,
        caches: abc.Sequence[float] = CACHES,
    ) -> None:
        self.trace, self.segments, self.caches = trace, segments, caches
        self.n_experts_L: list[int] = [int(n) for n in trace.n_experts_L]

    @cached_property
    def _halves(self) -> tuple[list[Sequence], list[Sequence]]:
        """The trace's, or of one document every other piece, or of one piece its two ends."""
        halves = self.trace.halves()
        if all(halves):
            return halves
        whole = [*halves[0], *halves[1]]
        if len(whole) > 1:
            return whole[::2], whole[1::2]
        if not (middle := len(whole[0]) // 2):
            raise ProfileError(f"{self.trace.path} has one token: trace more to see what follows")
        return [_cut(whole[0], slice(0, middle))], [_cut(whole[0], slice(middle, None))]

    @cached_property
    def _sequences(self) -> list[Sequence]:
        return [s for half in self._halves for s in half]

    @cached_property
    def locality(self) -> Locality:
        """SRP, SCH and hit rates."""
        return locality.measure(self._halves, self.n_experts_L, self.segments, self.caches)

    @cached_property
    def predictability(self) -> Predictability:
        """What follows from the token's id, popularity and the layer before."""
        return predictability.measure(self._halves, self.n_experts_L)

    @cached_property
    def load(self) -> expert_load.Load:
        """MaxVio and its kin."""
        return expert_load.load(self._sequences, self.n_experts_L)

    @cached_property
    def drops(self) -> expert_load.Drops:
        """Choices over an expert's capacity."""
        return expert_load.drops(self._sequences, self.n_experts_L, CAPACITIES)

    @cached_property
    def uses_LE(self) -> Array:
        """Tokens that chose each expert."""
        return expert_load.use_counts(self._sequences, len(self.n_experts_L), max(self.n_experts_L))

    @cached_property
    def transitions(self) -> list[Array]:
        """Counts (E, F) of experts and those of the next layer, L − 1 of them."""
        return expert_load.transition_counts(self._sequences, self.n_experts_L)

    @cached_property
    def information_nats(self) -> list[float]:
        """I(expert; expert of the next layer), L − 1 of them."""
        return [expert_load.mutual_information(count_EF) for count_EF in self.transitions]

    def as_json(self) -> dict[str, Any]:
        """All numbers; NaN is null."""
        found, told, load = self.locality, self.predictability, self.load
        hits = [
            {"policy" if isinstance(policy, str) else "segment": policy, "cache": cache, **_rate(r)}
            for (policy, cache), r in found.hits.items()
        ]
        share, recall = told.token_share, {k: _rate(r) for k, r in told.recall.items()}
        batches = {
            str(n): {"as_they_come": _list(b.as_they_come_L), "grouped": _list(b.grouped_L)}
            for n, b in told.batches.items()
        }
        dropped = self.drops.dropped_CLX.sum(1) / np.maximum(self.drops.choices_LX.sum(0), 1)
        pairs = zip(self.drops.capacities, dropped, strict=True)
        loss = load.balance_loss_L
        return {
            "srp": {str(m): _rate(srp) for m, srp in found.srp.items()},
            "cache_experts": dict(zip(map(str, found.caches), found.size_CL.tolist(), strict=True)),
            "hits": hits,
            "token_share": {
                "by_layer": _list(share.share_L),
                "shuffled": _list(share.shuffled_L),
                "tokens": share.n_tokens,
                "ids": share.n_ids,
            },
            "recall": recall,
            "load": {
                "max_vio": _list(load.max_vio_L),
                "variation": _list(load.variation_L),
                "balance_loss": None if loss is None else _list(loss),
            },
            "dropped_by_tenth": {str(c): _list(by_tenth_X) for c, by_tenth_X in pairs},
            "batch_experts": batches,
            "transition_information_nats": self.information_nats,
        }


def _cut(s: Sequence, tokens: slice) -> Sequence:
    parts = [None if part is None else part[tokens] for part in (s.weights_TLK, s.logits_TLE)]
    return Sequence(s.experts_TLK[tokens], s.token_T[tokens], 0, *parts)


def _rate(rate: Rate) -> dict[str, Any]:
    ci95 = None if rate.ci95 is None else list(rate.ci95)
    own = {
        "value": None if np.isnan(rate.whole) else rate.whole,
        "ci95": ci95,
        "by_layer": _list(rate.by_layer_L),
    }
    if isinstance(rate, Srp):
        own |= {"experts": rate.size, "experts_by_layer": _list(rate.size_L)}
    return own


def _list(values: Array) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
