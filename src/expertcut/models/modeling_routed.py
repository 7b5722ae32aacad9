"""Routing rules: which experts a token uses, and with which gate weights, after its router ran.

A rule takes what a family's router gave for T tokens (`Tokens`) and the threshold of the layer, and
gives gate weights and expert ids (T, M). The id E, one above the last expert, means nobody: that
place has weight 0 and no expert runs for it. Where a rule leaves a token as it is, its weights and
ids are the router's own, to the bit.

In a checkpoint of expertcut's layout `routed`, `config.json` says which rule acts, and at which
threshold in which MoE layer, counted from 0:

    "expert_routing": {"rule": "skip", ..., "gate": {...}, "layers": {"0": 0.41, "1": 0.38}}

Needs transformers 5.22 or later, and nothing of expertcut. Names of tensors end in their axes:
T tokens, E experts of a layer, K experts per token of the router, M places per token of the rule,
D width, G groups.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]
Weights = Literal["gate", "renormalised"]
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
    # A control: as many experts are left out, but random ones of the router's K.
    shuffle: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Tokens:
    """What a block's router gave for T tokens."""

    gate: Gate
    logits_TE: Tensor
    score_TE: Tensor  # float32, that experts are chosen by: α, or with a selection bias
    weights_TK: Tensor
    experts_TK: Tensor
    # Only for rules that need them: the router's input; the attention of each token (rows) to each,
    # mean over heads; a key (int64) of each token for random numbers; coefficients of `fitted`.
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
    return kept(tokens, _is_large(tokens, at, options), options)


def top_p(tokens: Tokens, at: float, options: Options) -> Chosen:
    """The shortest prefix of the experts, best first, whose probability exceeds `at`.

    Dynamic_MoE (arXiv:2403.07652, modeling/modeling_moe.py): the expert that crosses stays. It has
    no cap, which is `most` here, and weights of α, which is a gate without renormalisation.
    """
    most = options.most or tokens.top_k
    if at >= 1:  # a sum of probabilities may exceed 1 by rounding
        return best(tokens, torch.full_like(tokens.experts_TK[:, 0], most), most, options)
    probability_TM = tokens.probability_TE.gather(1, best_first(tokens, most)).cumsum(dim=1)
    return best(tokens, 1 + (probability_TM[:, :-1] <= at).sum(dim=1), most, options)


def entropy(tokens: Tokens, at: float, options: Options) -> Chosen:
    """The best ⌈`at` · exp(H)⌉, at least 1; H is the entropy of the router's probabilities."""
    n_T = at * torch.special.entr(tokens.probability_TE.double()).sum(dim=1).exp()
    most = options.most or tokens.top_k
    return best(tokens, n_T.clamp(1, most).ceil().long(), most, options)


def null(tokens: Tokens, at: float, options: Options) -> Chosen:
    """The chosen experts with a logit above `at`, maybe none.

    As a router with K or more null experts of that logit (AdaMoE, arXiv:2406.13233).
    """
    return kept(tokens, tokens.logits_TE.gather(1, tokens.experts_TK) > at, options)


def odp(tokens: Tokens, at: float, options: Options) -> Chosen:
    """As `skip`, but all experts for the `share` of tokens that matter most to later ones.

    The importance of token j is ‖x_j‖₁ times the mean attention to it of tokens i ≥ j (MC-MoE,
    arXiv:2410.06270; its code sums over the other axis, so that only the position counts).
    """
    assert tokens.input_TD is not None and tokens.attention_TT is not None
    size_T = tokens.input_TD.double().abs().sum(dim=1)
    n_later_T = torch.arange(len(size_T), 0, -1, device=size_T.device)
    attention_T = tokens.attention_TT.to(size_T).tril().sum(dim=0) / n_later_T
    importance_T = size_T * attention_T
    first_N = importance_T.topk(math.ceil(options.share * len(importance_T))).indices
    is_first_T = torch.zeros_like(importance_T, dtype=torch.bool).index_fill(0, first_N, True)
    return kept(tokens, _is_large(tokens, at, options) | is_first_T[:, None], options)


def fitted(tokens: Tokens, at: float, options: Options) -> Chosen:
    """The fewest experts whose relative error, as fitted, is at most `at`.

    The error of the best k < K is linear in `log_shares`; `fit_KK` (K - 1, K) has a row for each k.
    """
    assert tokens.fit_KK is not None
    error_TK = log_shares(tokens.weights_TK) @ tokens.fit_KK.to(tokens.weights_TK.device).double().T
    is_enough_TK = F.pad(error_TK <= at, (0, 1), value=True)
    return best(tokens, 1 + is_enough_TK.int().argmax(dim=1), tokens.top_k, options)


def log_shares(weights_TK: Tensor) -> Tensor:
    """1, and log g_i/g_1 of the gate weights g_1 ≥ g_2 ≥ …, (T, K) float64."""
    ranked_TK = weights_TK.double().sort(dim=1, descending=True).values
    shares_TK = (ranked_TK / ranked_TK[:, :1]).nan_to_num(0.0).clamp(min=1e-9).log()
    return torch.cat([torch.ones_like(shares_TK[:, :1]), shares_TK[:, 1:]], dim=1)


def grouped(tokens: Tokens, at: float, options: Options) -> Chosen:
    """The best K/G experts of each of G = `at` groups of neighbours (MoGE, arXiv:2505.21411)."""
    n_groups = int(at)
    score_TGE = tokens.score_TE.unflatten(1, (n_groups, -1))
    best_TGK = score_TGE.topk(tokens.top_k // n_groups, dim=2).indices
    first_G1 = torch.arange(n_groups, device=best_TGK.device)[:, None] * score_TGE.shape[2]
    return chosen(tokens, (best_TGK + first_G1).flatten(1), options)


def smooth(tokens: Tokens, at: float, options: Options) -> Chosen:
    """The top K of (1 - λ)·α + λ·S·α with λ = `at`: similar earlier tokens share experts.

    S_ij is the softmax over j ≤ i of cos(x_i, x_j)/temperature (arXiv:2505.00792, with an
    untrained similarity).
    """
    if at == 0:
        return kept(tokens, torch.ones_like(tokens.experts_TK, dtype=torch.bool), options)
    assert tokens.input_TD is not None
    x_TD = F.normalize(tokens.input_TD.float(), dim=1)
    later_TT = torch.ones(len(x_TD), len(x_TD), device=x_TD.device, dtype=torch.bool).triu(1)
    cosine_TT = (x_TD @ x_TD.T / options.temperature).masked_fill(later_TT, -torch.inf)
    alpha_TE = torch.lerp(tokens.alpha_TE, cosine_TT.softmax(dim=1) @ tokens.alpha_TE, at)
    score_TE = tokens.score_TE + (alpha_TE - tokens.alpha_TE)
    score_TE = score_TE.masked_fill(tokens.logits_TE.isneginf(), -torch.inf)
    experts_TK = score_TE.topk(tokens.top_k, dim=1).indices
    experts_TK[:, options.most or tokens.top_k :] = tokens.n_experts
    return chosen(tokens, experts_TK, options, alpha_TE)


def random(tokens: Tokens, at: float, options: Options) -> Chosen:
    """K distinct experts at random, with the router's own weights: a control (THOR)."""
    chance_TE = uniform(tokens, options.seed).masked_fill(tokens.logits_TE.isneginf(), -1.0)
    experts_TK = chance_TE.topk(tokens.top_k, dim=1).indices
    weights_TK, own_TK = kept(tokens, torch.ones_like(tokens.experts_TK, dtype=torch.bool), options)
    return weights_TK, experts_TK.masked_fill(own_TK == tokens.n_experts, tokens.n_experts)


def dropout(tokens: Tokens, at: float, options: Options) -> Chosen:
    """All but those left out by chance, each with probability `at`; the best stays: a control."""
    chance_TK = uniform(tokens, options.seed).gather(1, tokens.experts_TK)
    return kept(tokens, (chance_TK >= at) | (tokens.rank_TK == 0), options)


def rank(tokens: Tokens, at: float, options: Options) -> Chosen:
    """The expert of rank `at` alone, from 0, with the sum of the router's weights.

    The weak run of rule contrast (SCMoE, arXiv:2405.14507).
    """
    expert_T1 = best_first(tokens, int(at) + 1)[:, int(at) :]
    total_T1 = tokens.weights_TK.double().sum(dim=1, keepdim=True).to(tokens.weights_TK.dtype)
    is_cut_T1 = tokens.logits_TE.gather(1, expert_T1).isneginf()  # by a mask
    weights_T1 = total_T1.masked_fill(is_cut_T1, 0)
    expert_T1 = expert_T1.masked_fill(is_cut_T1, tokens.n_experts)
    n_empty = tokens.top_k - 1
    return F.pad(weights_T1, (0, n_empty)), F.pad(expert_T1, (0, n_empty), value=tokens.n_experts)


def uniform(tokens: Tokens, seed: int) -> Tensor:
    """A number in [0, 1) for each token and expert (T, E) float64; a function of keys and seed."""
    assert tokens.key_T is not None, "random rules need a key of each token"
    expert_E = torch.arange(tokens.n_experts, device=tokens.key_T.device)
    return (mixed(mixed(tokens.key_T + seed)[:, None] + expert_E) >> 11 & (1 << 53) - 1) / 2**53


def mixed(key: Tensor) -> Tensor:
    """A hash of int64 numbers (splitmix64)."""
    key = key + (0x9E3779B97F4A7C15 - (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        key = (key ^ (key >> shift & (1 << 64 - shift) - 1)) * (factor - (1 << 64))
    return key ^ (key >> 31 & (1 << 33) - 1)


def _is_large(tokens: Tokens, at: float, options: Options) -> Tensor:
    """Against the largest weight of those that `most` allows."""
    weights_TK = tokens.weights_TK.double()
    if options.most is not None:
        weights_TK = weights_TK.masked_fill(tokens.rank_TK >= options.most, 0)
    largest_T1 = weights_TK.amax(dim=1, keepdim=True)
    return (weights_TK >= at * largest_T1) | (weights_TK == largest_T1)


def best(tokens: Tokens, n_T: Tensor, most: int, options: Options) -> Chosen:
    """Each token's `n_T` best experts by selection score, at most `most`.

    They are the router's own choices unless `most` exceeds K.
    """
    n_T1 = n_T.clamp(max=most)[:, None]
    if most <= tokens.top_k:
        return kept(tokens, tokens.rank_TK < n_T1, options)
    experts_TM = best_first(tokens, most)
    is_cut_TM = tokens.logits_TE.gather(1, experts_TM).isneginf()  # by a mask
    is_left_out_TM = is_cut_TM | (torch.arange(most, device=n_T.device) >= n_T1)
    return chosen(tokens, experts_TM.masked_fill(is_left_out_TM, tokens.n_experts), options)


def best_first(tokens: Tokens, most: int) -> Tensor:
    """Ids of the `most` best experts: of the router's own choices, or of all if that is more."""
    if most <= tokens.top_k:
        return tokens.experts_TK.gather(1, tokens.rank_TK.argsort(dim=1))[:, :most]
    score_TE = tokens.score_TE.masked_fill(tokens.logits_TE.isneginf(), -torch.inf)
    return score_TE.topk(most, dim=1).indices


def kept(tokens: Tokens, is_kept_TK: Tensor, options: Options) -> Chosen:
    """Some of the router's own choices, each in its place; with `shuffle` others, but as many."""
    if options.most is not None:
        is_kept_TK = is_kept_TK & (tokens.rank_TK < options.most)
    if options.shuffle:
        chance_TK = uniform(tokens, options.seed).gather(1, tokens.experts_TK)
        is_kept_TK = chance_TK.argsort(dim=1).argsort(dim=1) < is_kept_TK.sum(dim=1, keepdim=True)
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


def fill_empty_slots(weights_TM: Tensor, experts_TM: Tensor, n_experts: int) -> Chosen:
    """Nobody becomes an expert that the token does not use, with weight 0: for loops without E."""
    is_nobody_TM = experts_TM >= n_experts
    used_TE = torch.zeros(len(experts_TM), n_experts + 1, device=experts_TM.device)
    idle_T1 = used_TE.scatter(1, experts_TM, 1.0)[:, :n_experts].argmin(dim=1, keepdim=True)
    return weights_TM.masked_fill(is_nobody_TM, 0), torch.where(is_nobody_TM, idle_T1, experts_TM)


RULE_FUNCTIONS: dict[str, Rule] = {
    "top-k": top_k,
    "skip": skip,
    "top-p": top_p,
    "entropy": entropy,
    "null": null,
    "odp": odp,
    "fitted": fitted,
    "grouped": grouped,
    "smooth": smooth,
    "random": random,
    "dropout": dropout,
    "contrast": rank,
}


class RoutedRouter(nn.Module):
    """Goes before a family's router class: the rule chooses among what its router gives."""

    expert_routing: dict[str, Any]
    layer: int  # counts MoE blocks from 0
    # Names of the bias that experts are chosen by, in routers or given to them.
    selection_biases = ("e_score_correction_bias", "expert_bias")

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (T, E), gate weights (T, M) and chosen experts (T, M)."""
        logits_TE, weights_TK, experts_TK = self.family_forward(*args, **kwargs)
        said = self.expert_routing
        gate = Gate(*(said["gate"][field.name] for field in fields(Gate)))
        alpha_TE = SCORES[gate.scoring](logits_TE.float())
        score_TE = logits_TE.float() if said["gate"]["selection"] == "logits" else alpha_TE
        bias_E = self._selection_bias(logits_TE.shape[1], *args[1:], *kwargs.values())
        score_TE = score_TE if bias_E is None else score_TE + bias_E.to(score_TE.device)
        fit = (said.get("fits") or {}).get(str(self.layer))
        fit_KK = None if fit is None else torch.tensor(fit, dtype=torch.float64)
        tokens = Tokens(gate, logits_TE, score_TE, weights_TK, experts_TK, fit_KK=fit_KK)
        options = Options(**{field.name: said[field.name] for field in fields(Options)})
        at = said["layers"][str(self.layer)]
        return logits_TE, *RULE_FUNCTIONS[said["rule"]](tokens, at, options)

    def family_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the family's router gives, before the rule."""
        return super().forward(*args, **kwargs)

    @property
    def n_places(self) -> int:
        """Places per token (M); some hold nobody (id E)."""
        places: int = self.expert_routing["places"]
        return places

    def _selection_bias(self, n_experts: int, *given: Any) -> Tensor | None:
        tensors = [*self.named_parameters(), *self.named_buffers()]
        own = [t for name, t in tensors if name.rpartition(".")[2] in self.selection_biases]
        own += [t for t in given if isinstance(t, Tensor) and t.is_floating_point()]
        return next((t.reshape(-1) for t in own if t.numel() == n_experts), None)


class RoutedExperts(nn.Module):
    """Goes before a family's experts class: no expert runs for nobody, where loops allow it."""

    config: Any
    num_experts: int

    def forward(self, x_TD: Tensor, experts_TM: Tensor, weights_TM: Tensor) -> Tensor:
        """As the family's own."""
        # The eager loop of some families counts E experts only.
        is_skipping = self.config._experts_implementation not in ("eager", None)
        if not is_skipping or not hasattr(self, "_is_expert_parallel"):
            weights_TM, experts_TM = fill_empty_slots(weights_TM, experts_TM, self.num_experts)
        y_TD: Tensor = super().forward(x_TD, experts_TM, weights_TM)
        return y_TD


class RoutedModel:
    """Goes before a family's class for causal language modelling."""

    config: Any
    modules: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        blocks = [m for m in self.modules() if isinstance(getattr(m, "experts", None), nn.Module)]
        for layer, block in enumerate(blocks):
            if str(layer) not in config.expert_routing["layers"]:
                continue
            (router,) = (
                m for m in block.children() if hasattr(m, "top_k") and m is not block.experts
            )
            _extend(router, RoutedRouter)
            router.expert_routing, router.layer = config.expert_routing, layer
            _extend(block.experts, RoutedExperts)
            block.experts._is_expert_parallel = True  # the id E is allowed

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As every model, on one process or by `device_map`."""
        for option in ("tp_plan", "tp_size", "distributed_config"):
            if kwargs.get(option) is not None:
                raise ValueError(
                    f"{option} is not supported: the id of nobody is one of this model"
                )
        return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]


def _extend(module: Any, mixin: Any) -> None:
    """The class of the one module changes, as in torch's own parametrize and fully_shard."""
    base: Any = type(module)
    module.__class__ = _joined(mixin, base)


@cache
def _joined(mixin: Any, base: Any) -> Any:
    return type(f"{mixin.__name__}Of{base.__name__}", (mixin, base), {"__module__": __name__})


@cache
def _defined(name: str) -> Any:
    """`RoutedOlmoeForCausalLM` and `RoutedOlmoeConfig`, of the classes without `Routed`.

    The config has a `model_type` of its own: whatever knows the family only would load the model
    without its rule.
    """
    base = getattr(transformers, name.removeprefix("Routed"))
    if issubclass(base, transformers.PreTrainedConfig):
        body = {"model_type": f"routed_{base.model_type}", "__module__": __name__}
        return type(name, (base,), body)
    config = _defined(f"Routed{base.config_class.__name__}")
    model = type(name, (RoutedModel, base), {"config_class": config, "__module__": __name__})
    # Custom code is given no conversions of its family; it gets them by the class's name.
    own = get_checkpoint_conversion_mapping(base.__name__)
    family = get_checkpoint_conversion_mapping(base.config_class.model_type)
    if (conversions := own or family) is not None:
        register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
    return model


def __getattr__(name: str) -> Any:
    """The classes of a family, made when they are asked for."""
    if name.startswith("Routed"):
        return _defined(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
