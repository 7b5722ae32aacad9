"""Routing rules: which experts a token uses, and with which gate weights, after its router ran.

A rule takes what a family's router gave for T tokens (`Tokens`) and the threshold of the layer, and
gives gate weights and expert ids (T, M). The id E, one above the last expert, means nobody: that
place has weight 0 and no expert runs for it. Where a rule leaves a token as it is, its weights and
ids are the router's own, to the bit.

Needs nothing of expertcut: this file travels with checkpoints. Names of tensors end in their axes:
T tokens, E experts of a layer, K experts per token of the router, M places per token of the rule,
D width, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]
Weights = Literal["gate", "renormalised"]
Level = Literal["token", "prompt"]
Chosen = tuple[Tensor, Tensor]  # weights_TM, experts_TM
SCORES: dict[Scoring, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits_TE: F.softplus(logits_TE).sqrt(),
}


@dataclass(frozen=True)
class Gate:
    """How a family makes gate weights: `factor`·α, divided by the sum of the chosen α or not."""

    scoring: Scoring = "softmax"  # gives α from the logits
    is_renormalised: bool = False
    factor: float = 1.0


@dataclass(frozen=True)
class Options:
    """What a rule is told beside the threshold of the layer."""

    most: int | None = None  # experts per token at most; None is the router's K
    # "gate": as the family's gate would for the kept experts; "renormalised": scaled to the sum of
    # the router's K weights in every family.
    weights: Weights = "gate"
    share: float = 0.02  # odp: of the tokens that keep all of their experts
    temperature: float = 1.0  # smooth: of the similarity of tokens
    level: Level = "token"  # random: what gets its own experts
    seed: int = 0


@dataclass(frozen=True)
class Tokens:
    """What a block's router gave for T tokens."""

    gate: Gate
    logits_TE: Tensor
    score_TE: Tensor  # float32, that experts are chosen by: α, or with a selection bias
    weights_TK: Tensor
    experts_TK: Tensor
    # Only for rules that need them: the router's input; attention to each token (queries, keys),
    # the mean over heads; a key of each token that random numbers come from; coefficients of a fit.
    input_TD: Tensor | None = None
    attention_TT: Tensor | None = None
    key_T: Tensor | None = None
    fit_KK: Tensor | None = None

    @property
    def n_experts(self) -> int:
        """E, the id that means nobody."""
        return self.logits_TE.shape[1]

    @property
    def top_k(self) -> int:
        """Experts per token of the router."""
        return self.experts_TK.shape[1]

    @cached_property
    def alpha_TE(self) -> Tensor:
        """The router's score of every expert, float32."""
        return SCORES[self.gate.scoring](self.logits_TE.float())

    @cached_property
    def probability_TE(self) -> Tensor:
        """α with the sum 1 over all experts, which it has for a softmax."""
        if self.gate.scoring == "softmax":
            return self.alpha_TE
        return self.alpha_TE / self.alpha_TE.sum(dim=-1, keepdim=True)

    @cached_property
    def rank_TK(self) -> Tensor:
        """The place of each chosen expert among the chosen by selection score, from 0."""
        score_TK = self.score_TE.gather(1, self.experts_TK)
        return score_TK.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


Rule = Callable[[Tokens, float, Options], Chosen]


def top_k(tokens: Tokens, at: float, options: Options) -> Chosen:
    """The `at` best by selection score."""
    n_T = tokens.experts_TK.new_full((len(tokens.experts_TK),), int(at))
    return best(tokens, n_T, options.most or max(tokens.top_k, int(at)), options)


def skip(tokens: Tokens, at: float, options: Options) -> Chosen:
    """Those with a gate weight of at least `at` times the token's largest.

    NAEE (arXiv:2402.14800, method/dynamic_skipping.py) compares the second of two; here each is
    compared with the first.
    """
    return kept(tokens, _is_large(tokens, at), options)


def _is_large(tokens: Tokens, at: float) -> Tensor:
    weights_TK = tokens.weights_TK.double()
    largest_T1 = weights_TK.amax(dim=1, keepdim=True)
    return (weights_TK >= at * largest_T1) | (weights_TK == largest_T1)


def best(tokens: Tokens, n_T: Tensor, most: int, options: Options) -> Chosen:
    """Each token's `n_T` best experts by selection score, at most `most`.

    They are the router's own choices unless `most` exceeds K.
    """
    n_T1 = n_T.clamp(max=most)[:, None]
    if most <= tokens.top_k:
        return kept(tokens, tokens.rank_TK < n_T1, options)
    score_TE = tokens.score_TE.masked_fill(tokens.logits_TE.isneginf(), -torch.inf)
    score_TM, experts_TM = score_TE.topk(most, dim=1)
    place_M = torch.arange(most, device=n_T.device)
    is_kept_TM = (place_M < n_T1) & ~score_TM.isneginf()
    return chosen(tokens, experts_TM.masked_fill(~is_kept_TM, tokens.n_experts), options)


def kept(tokens: Tokens, is_kept_TK: Tensor, options: Options) -> Chosen:
    """Some of the router's own choices, each in its place."""
    weights_TK = tokens.weights_TK.masked_fill(~is_kept_TK, 0)
    if tokens.gate.is_renormalised or options.weights == "renormalised":
        weights_TK = _scaled(tokens, weights_TK)
    weights_TK = torch.where(is_kept_TK.all(dim=1, keepdim=True), tokens.weights_TK, weights_TK)
    return weights_TK, tokens.experts_TK.masked_fill(~is_kept_TK, tokens.n_experts)


def _scaled(tokens: Tokens, weights_TM: Tensor) -> Tensor:
    """The weights with the sum of the router's; all 0 stay so."""
    total_T1 = tokens.weights_TK.double().sum(dim=1, keepdim=True)
    own_T1 = weights_TM.double().sum(dim=1, keepdim=True)
    factor_T1 = torch.where(own_T1 > 0, total_T1 / own_T1, 0.0)
    return (weights_TM.double() * factor_T1).to(weights_TM.dtype)


def chosen(
    tokens: Tokens, experts_TM: Tensor, options: Options, alpha_TE: Tensor | None = None
) -> Chosen:
    """Any experts, with weights as the family's gate makes them of α (T, E), by default its own.

    Tokens that get the router's own choice and α get its weights.
    """
    gate, n_more = tokens.gate, experts_TM.shape[1] - tokens.top_k
    own_TE = (tokens.alpha_TE if alpha_TE is None else alpha_TE).double()
    weights_TM = gate.factor * F.pad(own_TE, (0, 1)).gather(1, experts_TM)
    if gate.is_renormalised:
        total_T1 = weights_TM.sum(dim=1, keepdim=True)
        weights_TM = torch.where(total_T1 > 0, weights_TM * gate.factor / total_T1, 0.0)
    elif options.weights == "renormalised":
        weights_TM = _scaled(tokens, weights_TM)
    weights_TM = weights_TM.to(tokens.weights_TK.dtype)
    if alpha_TE is not None:
        return weights_TM, experts_TM
    before_TM = F.pad(tokens.experts_TK, (0, n_more), value=tokens.n_experts)
    is_same_T1 = (before_TM.sort(dim=1).values == experts_TM.sort(dim=1).values).all(dim=1)[:, None]
    weights_TM = torch.where(is_same_T1, F.pad(tokens.weights_TK, (0, n_more)), weights_TM)
    return weights_TM, torch.where(is_same_T1, before_TM, experts_TM)


def with_idle(weights_TM: Tensor, experts_TM: Tensor, n_experts: int) -> Chosen:
    """Nobody becomes an expert that the token does not use, with weight 0: for loops without E."""
    is_nobody_TM = experts_TM >= n_experts
    used_TE = torch.zeros(len(experts_TM), n_experts + 1, device=experts_TM.device)
    idle_T1 = used_TE.scatter(1, experts_TM, 1.0)[:, :n_experts].argmin(dim=1, keepdim=True)
    return weights_TM.masked_fill(is_nobody_TM, 0), torch.where(is_nobody_TM, idle_T1, experts_TM)


RULES: dict[str, Rule] = {"top-k": top_k, "skip": skip}
