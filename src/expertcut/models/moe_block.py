"""A MoE block under the contract: its router, its experts and its gate."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertcut.errors import ContractError
from expertcut.models.modeling_routed import SCORES, Scoring

Selection = Literal["score", "logits", "table"]
SELECTION_BIAS = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class WeightRule:
    """Gate weights are `factor`·α, divided by the sum of the chosen α if renormalised."""

    is_renormalised: bool
    factor: float


@dataclass(frozen=True)
class RouterCall:
    """The arguments of a router on the probe tokens, to call it again."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LogitsOp:
    """The operation in a router's forward that gives its logits: position and name."""

    index: int
    name: str


@dataclass(frozen=True)
class Step:
    """A norm or projection behind the experts, whose input holds `factor` times the sum so far."""

    module: nn.Module
    factor: float


@dataclass(frozen=True)
class Residual:
    """The residual connection: `norm` reads x, to which `factor` · Σ experts is added.

    With `steps`, what the last of them makes of Σ experts: its output less that without them.
    """

    norm: nn.Module
    factor: float
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class MoeBlock:
    """One MoE block of a loaded model."""

    name: str
    layer: int  # counts MoE blocks from 0
    module: nn.Module
    router: nn.Module
    experts: nn.Module
    n_experts: int
    top_k: int
    n_groups: int
    top_groups: int
    scoring: Scoring = "softmax"  # gives α from the logits
    # Weights are a softmax over all E experts cut to K, so removing a router row makes the others
    # larger (OLMoE, Qwen2-MoE, ...).
    inflates: bool = False
    weights: WeightRule | None = None  # gives gate weights from α; None is another rule
    # The name of a tensor (E,) of the router that multiplies such weights; `weights` is None then.
    scaled: tuple[str, WeightRule] | None = None
    selection: Selection = "score"  # α or logits, each plus selection bias; or a table of token ids
    residual: Residual | None = None
    output_factor: float | None = 1.0  # multiplies the experts' sum; None is a projection or norm
    call: RouterCall = field(default=RouterCall(()), compare=False, repr=False)  # on the probe
    logits_op: LogitsOp | None = None  # where logits can be changed; None is nowhere
    is_linear: bool = True  # logits are gate matrix times input plus bias
    norm: nn.Module | None = None  # of a whole layer: gives the experts' input from the router's
    most: int | None = None  # places per token that a routing rule gives; None is `top_k`
    declared: Any = field(default=None, compare=False, repr=False)  # `DeclaredBlock` of a contract
    is_ranked: bool = True  # the law of choice holds; else only a contract knows how it chooses

    def run(self, x_BTD: Tensor) -> Any:
        """The output for inputs of its router; Σ experts alone in a layer that holds more."""
        if state := self.call.args[1:] if self.declared is not None else ():
            if self.has_state:
                raise ContractError(
                    f"{self.name} is routed by what an earlier block hands on, so it cannot run on "
                    "stored inputs: this criterion or edit is not available"
                )
            return self.module(x_BTD, *state)
        if self.norm is None:
            return self.module(x_BTD)
        x_TD = x_BTD.flatten(0, -2)
        _, weights_TK, experts_TK = self.router(x_TD)
        return self.experts(self.norm(x_TD), experts_TK, weights_TK).view_as(x_BTD)

    @property
    def width(self) -> int:
        """The width D of an expert's output."""
        down = [p for n, p in self.experts.named_parameters() if n == "down_proj"]
        if not down:
            return int(next(v.shape[-1] for v in self.call.args if isinstance(v, Tensor)))
        return down[0].shape[2 if getattr(self.experts, "is_transposed", False) else 1]

    @property
    def is_layer(self) -> bool:
        """Whether `module` is a decoder layer, which holds router and experts beside others."""
        return self.declared is None and self.name.rpartition(".")[2].isdecimal()

    @property
    def has_state(self) -> bool:
        """Whether its router takes tensors beside the tokens, as a contract may have it."""
        return self.declared is not None and any(isinstance(v, Tensor) for v in self.call.args[1:])

    @property
    def is_hashed(self) -> bool:
        """Whether a table of token ids chooses the experts, so none can be removed."""
        return self.selection == "table"

    @property
    def n_places(self) -> int:
        """Places per token that the router gives; with a routing rule some hold nobody (id E)."""
        return self.most or self.top_k

    def alpha(self, logits_TE: Tensor) -> Tensor:
        """Router score of every expert before top-k, (T, E) float32."""
        return SCORES[self.scoring](logits_TE.float())

    def selection_tensor(self) -> Tensor | None:
        """The router's own selection bias, on the meta device if offloaded; None without one."""
        return next((t for _, n, t in _owned(self.router) if n in SELECTION_BIAS), None)

    def selection_bias(self) -> Tensor | None:
        """The values (E,) of the selection bias, read-only; None without one."""
        biases = (_loaded(*of).reshape(-1) for of in _owned(self.module) if of[1] in SELECTION_BIAS)
        return next(biases, None)

    def router_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the router by name, read-only."""
        for owner, name, tensor in _owned(self.router):
            yield name, _loaded(owner, name, tensor)

    def selection_scores(self, logits_TE: Tensor, alpha_TE: Tensor | None = None) -> Tensor:
        """The scores (T, E) float32 that experts are chosen by; `alpha_TE` is α if known."""
        if self.selection == "logits":
            score_TE = logits_TE.float()
        else:
            score_TE = self.alpha(logits_TE) if alpha_TE is None else alpha_TE
        bias_E = self.selection_bias()
        return score_TE if bias_E is None else score_TE + bias_E.to(score_TE.device)

    def group_scores(self, score_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (T, groups): by the best expert (DeepSeek-V2) and by the best two (others)."""
        score_TGE = score_TE.unflatten(1, (self.n_groups, -1))
        best = score_TGE.topk(min(2, score_TGE.shape[-1]), dim=-1).values
        return best[..., 0], best.sum(dim=-1)

    def selection_gap(self, score_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Each token's distance of scores (T,) to another set of experts or groups.

        The id E means nobody.
        """
        if self.is_hashed:
            return score_TE.new_full((len(score_TE),), torch.inf)
        score_TX = F.pad(score_TE, (0, 1), value=torch.inf)
        last_T1 = score_TX.gather(1, experts_TK).min(dim=-1, keepdim=True).values
        if self.is_even:
            return self._gap_in_groups(score_TE, experts_TK)
        gap_TE = (score_TX - last_T1).abs().scatter(1, experts_TK, torch.inf)[:, : self.n_experts]
        gap_T = gap_TE.min(dim=-1).values
        if self.top_groups == self.n_groups:
            return gap_T
        for group_score_TG in self.group_scores(score_TE):
            ranked_TG = group_score_TG.sort(dim=-1, descending=True).values
            gap_T = gap_T.minimum(ranked_TG[:, self.top_groups - 1] - ranked_TG[:, self.top_groups])
        return gap_T

    @property
    def is_even(self) -> bool:
        """Whether each group gives equally many of a token's experts, as a contract says."""
        return self.declared is not None and self.n_groups > 1

    def _gap_in_groups(self, score_TE: Tensor, experts_TK: Tensor) -> Tensor:
        is_chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, experts_TK, True)
        last_TE = score_TE.where(is_chosen_TE, torch.inf)
        best_TE = score_TE.masked_fill(is_chosen_TE, -torch.inf)
        last_TG, best_TG = (t.unflatten(1, (self.n_groups, -1)) for t in (last_TE, best_TE))
        gap_T: Tensor = (last_TG.amin(dim=-1) - best_TG.amax(dim=-1)).abs().amin(dim=-1)
        return gap_T

    def expert_weights(self) -> Iterator[Tensor]:
        """The matrices (E, ·, ·) of the experts, without biases."""
        if self.declared is not None:
            yield from self.declared.expert_weights()
            return
        for owner, name, tensor in _owned(self.experts):
            if tensor.ndim == 3 and len(tensor) == self.n_experts:
                yield _loaded(owner, name, tensor)

    def expert_tensors(self) -> Iterator[tuple[nn.Module, str, Tensor, int]]:
        """Every (owner, name, tensor, axis) of the block with an axis of length E."""
        owned = _owned(self.experts)
        yield from ((m, n, t, 0) for m, n, t in owned if t.ndim > 1 or m is self.experts)
        for owner, name, tensor in (*_owned(self.router), *_direct(self.module)):
            if self.n_experts in tensor.shape:
                yield owner, name, tensor, tensor.shape.index(self.n_experts)


def parameters_of(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Those with a row for each expert, by name: a norm behind them (Muse Spark) has none."""
    return {n: p for n, p in experts.named_parameters() if p.ndim > 1 or "." not in n}


def _loaded(owner: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The tensor, or a copy if accelerate offloads it or several processes hold it together."""
    if hasattr(tensor, "full_tensor"):
        whole: Tensor = tensor.full_tensor()
        return whole
    if tensor.device.type != "meta":
        return tensor
    hook: Any = owner._hf_hook
    values: Tensor = hook.weights_map[name]
    return values.to(hook.execution_device)


def _owned(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    return (owned for part in module.modules() for owned in _direct(part))


def _direct(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    yield from ((module, n, t) for n, t in module.named_parameters(recurse=False))
    yield from ((module, n, t) for n, t in module.named_buffers(recurse=False))
