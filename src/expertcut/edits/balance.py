"""Biases on the choice of experts that even out their loads, without another loss.

Loss-Free Balancing (arXiv:2408.15664) adds a bias to the score that experts are chosen by, and
moves it against the load by a step of fixed length: b ← b + u·sign(mean − load). There a model is
trained meanwhile; here the logits of a trace stay as they are, and steps get shorter. The load of a
layer is measured by MaxVio: the largest load over the mean load, less 1.

The load less its mean is a subgradient of a convex function of b, whose least value is the largest
sum of scores of any choice with even loads, so ever shorter steps find it. That choice splits fewer
tokens than there are experts; b cannot split tokens of equal logits, which is all that stays.

Families with a selection bias get b there, so gate weights are untouched. In the others b goes on
the logits, and so also into gate weights. Names of tensors: T tokens, E experts, K experts a token.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from expertcut.edits.plan import BalancedLoads, MaxVio
from expertcut.errors import ProfileError
from expertcut.models.modeling_routed import SCORES
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.trace import Sequence
from expertcut.stats import Array


@dataclass(frozen=True)
class Sweep:
    """Steps from `first` to `last` times the spread of the scores, along the sign or the excess."""

    is_sign: bool
    first: float
    last: float
    count: int


# Steps of one length never settle. Along the excess they end where tokens of equal logits cannot be
# split, along the sign they wander, and may find a better side of these.
SWEEPS = (Sweep(False, 0.5, 0.005, 100), Sweep(True, 0.2, 0.001, 400))
_NUDGE, _MOST_NUDGES = 0.02, 32  # of the spread; until none helps
_EXPLAINED = 0.98  # share of the traced choices that must follow from the traced logits


@dataclass(frozen=True)
class Gate:
    """How a block chooses: by α, or logits, plus the selection bias; or with b on the logits."""

    block: BlockInfo
    selection_E: Array | None = None  # of the family
    n_best: int = 2  # experts whose scores rank a group

    def scores(self, logits_TE: Tensor, bias_E: Tensor) -> Tensor:
        """The scores (T, E) that experts are chosen by, under b."""
        if self.selection_E is None:
            logits_TE = logits_TE + bias_E
        is_by_order = self.selection_E is None and self.block.groups == 1  # of the logits
        is_by_logits = self.block.selection == "logits" or is_by_order
        score_TE = logits_TE if is_by_logits else SCORES[self.block.scoring](logits_TE)
        if self.selection_E is None:
            return score_TE
        return score_TE + torch.as_tensor(self.selection_E, dtype=score_TE.dtype) + bias_E

    def choose(self, logits_TE: Tensor, bias_E: Tensor) -> Tensor:
        """The experts (T, K) of each token."""
        score_TE, block = self.scores(logits_TE, bias_E), self.block
        if block.top_groups < block.groups:
            score_TGE = score_TE.unflatten(1, (block.groups, -1))
            n_best = min(self.n_best, score_TGE.shape[2])
            group_TG = score_TGE.topk(n_best, dim=2).values.sum(dim=2)
            is_out_TG = torch.ones_like(group_TG, dtype=torch.bool)
            is_out_TG.scatter_(1, group_TG.topk(block.top_groups, dim=1).indices, value=False)
            score_TE = score_TGE.masked_fill(is_out_TG[:, :, None], -torch.inf).flatten(1)
        return score_TE.topk(block.top_k, dim=1, sorted=False).indices


@dataclass(frozen=True)
class Tokens:
    """One layer of a trace; tokens that several sequences begin with stand once, with a weight."""

    logits_TE: Tensor
    experts_TK: Tensor  # as traced
    weight_T: Tensor

    @classmethod
    def of(
        cls,
        sequences: Iterable[Sequence],
        layer: int,
        block: BlockInfo,
        *,
        has_shots: bool = True,
    ) -> "Tokens":
        """The tokens of sequences, with or without their shots; ProfileError without logits."""
        shots: dict[bytes, int] = {}
        parts: list[tuple[Array, Array]] = []
        weights: list[int] = []
        for sequence in sequences:
            if sequence.logits_TLE is None:
                raise ProfileError("the trace keeps no logits: trace again with --logits")
            n = sequence.n_shared
            own = sequence.logits_TLE[:, layer, : block.experts], sequence.experts_TLK[:, layer]
            key = sequence.token_T[:n].tobytes()
            if n and has_shots and key not in shots:
                shots[key] = len(parts)
                parts.append((own[0][:n], own[1][:n]))
                weights.append(0)
            if n and has_shots:
                weights[shots[key]] += 1
            parts.append((own[0][n:], own[1][n:]))
            weights.append(1)
        logits_TE, experts_TK = (np.concatenate(of_all) for of_all in zip(*parts, strict=True))
        weight_T = np.repeat(weights, [len(part[0]) for part in parts])
        return cls(
            torch.from_numpy(logits_TE.astype(np.float32)),
            torch.from_numpy(experts_TK.astype(np.int64))[:, : block.n_places],
            torch.from_numpy(weight_T.astype(np.float64)),
        )

    def load(self, experts_TK: Tensor, n_experts: int) -> Array:
        """Uses of each expert (E,)."""
        weight_TK = self.weight_T[:, None].expand_as(experts_TK)
        counted_TK = experts_TK >= 0  # a place may be empty
        load_E = torch.bincount(experts_TK[counted_TK], weight_TK[counted_TK], n_experts)
        return np.asarray(load_E.numpy())

    def same(self, a_TK: Tensor, b_TK: Tensor) -> float:
        """The share of the choices of b that a makes too."""
        is_same_TK = (b_TK[:, :, None] == a_TK[:, None, :]).any(dim=2)
        return float((is_same_TK.double().mean(dim=1) * self.weight_T).sum() / self.weight_T.sum())

    @property
    def heaviest(self) -> float:
        """The largest weight of tokens with equal logits, which no bias can split."""
        _, row_T = np.unique(self.logits_TE.numpy(), axis=0, return_inverse=True)
        return float(np.bincount(row_T.ravel(), self.weight_T.numpy()).max())


@dataclass(frozen=True)
class BalancedLayer:
    """The biases of one layer, and its loads before and under them."""

    block: str
    bias_E: Array
    acts_on_selection: bool
    loads: BalancedLoads


def max_violation(load_E: Array, constant: Collection[int] = ()) -> float:
    """MaxVio, of the experts that are not constants; 0 without any load."""
    load_E = np.delete(load_E, [*constant])
    return float(load_E.max() / load_E.mean() - 1) if load_E.any() else 0.0


def balancing_bias(
    tokens: Tokens, gate: Gate, target: float, constant: Collection[int] = ()
) -> Array:
    """The bias b (E,), of mean 0, that brings MaxVio to the target, or else nearest to it.

    `constant` experts have no weights and keep b = 0.
    """
    search = _Search(tokens, gate, target, constant)
    for sweep in SWEEPS:
        search.sweep(sweep)
    search.nudge()
    best_E = search.best_E
    if not search.constant:  # moves no choice, and least of all gate weights
        best_E = best_E - best_E.mean()
    return np.asarray(best_E.double().numpy().round(6))


class _Search:
    """The b of the smallest MaxVio so far; done where that is within the target."""

    def __init__(
        self, tokens: Tokens, gate: Gate, target: float, constant: Collection[int]
    ) -> None:
        self.tokens, self.gate, self.target, self.constant = tokens, gate, target, [*constant]
        zero_E = torch.zeros(gate.block.experts)
        score_TE = gate.scores(tokens.logits_TE, zero_E)
        self.spread = float((score_TE - score_TE.mean(dim=1, keepdim=True)).std())
        self.smallest = np.inf
        self.best_E, self.excess_E = zero_E, zero_E
        self.tried(zero_E)

    @property
    def is_done(self) -> bool:
        return self.smallest <= self.target

    def tried(self, bias_E: Tensor) -> Tensor:
        """Keeps b if its MaxVio is the smallest; load over the mean less 1, of a constant 0."""
        chosen_TK = self.gate.choose(self.tokens.logits_TE, bias_E)
        load_E = self.tokens.load(chosen_TK, len(bias_E))
        violation = max_violation(load_E, self.constant)
        mean = max(np.delete(load_E, self.constant).mean(), 1e-300)
        excess_E = torch.from_numpy(load_E / mean - 1).float()
        excess_E[self.constant] = 0
        if violation < self.smallest:
            self.best_E, self.smallest, self.excess_E = bias_E, violation, excess_E
        return excess_E

    def sweep(self, sweep: "Sweep") -> None:
        """Steps against the loads from b = 0, each shorter than the one before."""
        bias_E = torch.zeros_like(self.best_E)
        steps = np.geomspace(sweep.first, sweep.last, sweep.count) * self.spread
        for step in steps.tolist():
            if self.is_done:
                return
            excess_E = self.tried(bias_E)
            bias_E = bias_E - step * (excess_E.sign() if sweep.is_sign else excess_E.clamp(max=1))

    def nudge(self) -> None:
        """Moves the bias of one of the most or least loaded experts at a time, if that helps."""
        step = _NUDGE * self.spread
        for _ in range(_MOST_NUDGES):
            order, before = self.excess_E.argsort(descending=True).tolist(), self.smallest
            for expert, factor in product((*order[:2], *order[-2:]), (1.0, 0.3)):
                if self.smallest < before or self.is_done:
                    break
                bias_E = self.best_E.clone()
                bias_E[expert] -= step * factor * self.excess_E[expert].sign()
                self.tried(bias_E)
            step /= 1 if self.smallest < before else 2


def fitting_gate(tokens: Tokens, block: BlockInfo, selection_E: Array | None) -> Gate:
    """The gate that explains the traced choices; ProfileError if none does."""
    zero_E = torch.zeros(block.experts)
    gates = [Gate(block, selection_E, n_best) for n_best in (2, 1)[: 1 + (block.groups > 1)]]
    shares = [tokens.same(g.choose(tokens.logits_TE, zero_E), tokens.experts_TK) for g in gates]
    best = int(np.argmax(shares))
    if shares[best] < _EXPLAINED:
        raise ProfileError(
            f"{block.name}: {shares[best]:.1%} of the traced choices follow from the traced "
            f"logits, and {_EXPLAINED:.0%} must: biases found on them would not act as said"
        )
    return gates[best]


def balance_layer(
    halves: tuple[list[Sequence], list[Sequence]],
    layer: int,
    block: BlockInfo,
    target: float,
    *,
    selection_E: Array | None = None,
    constant: Collection[int] = (),
) -> BalancedLayer:
    """Finds b on the first half of the sequences, and judges it on the second.

    The second begins with the same shots as the first, so it is judged behind them too.
    """
    tuning, held_out = (Tokens.of(half, layer, block) for half in halves)
    behind = Tokens.of(halves[1], layer, block, has_shots=False)
    gate, zero_E = fitting_gate(tuning, block, selection_E), torch.zeros(block.experts)
    bias_E = balancing_bias(tuning, gate, target, constant)
    biases = (zero_E, torch.from_numpy(bias_E).float())

    frozen = [*constant]

    def loads(tokens: Tokens) -> list[Array]:
        """Before and under b, without constants."""
        chosen = (gate.choose(tokens.logits_TE, b_E) for b_E in biases)
        return [np.delete(tokens.load(own_TK, block.experts), frozen) for own_TK in chosen]

    def violations(tokens: Tokens) -> MaxVio:
        before, after = map(max_violation, loads(tokens))
        return before, after

    least, least_after = (float(load_E.min() / load_E.mean()) for load_E in loads(held_out))
    before_TK, after_TK = (gate.choose(held_out.logits_TE, b_E) for b_E in biases)
    return BalancedLayer(
        block=block.name,
        bias_E=bias_E,
        acts_on_selection=selection_E is not None,
        loads=BalancedLoads(
            tuned=violations(tuning),
            held_out=violations(held_out),
            behind=violations(behind),
            smallest=(least, least_after),
            kept=held_out.same(after_TK, before_TK),
            heaviest=tuning.heaviest / float(loads(tuning)[0].mean()),
        ),
    )
