"""The MoE contract: which modules of a model route, which are experts, and what the gate does."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expertcut.errors import ContractError
from expertcut.moe.observers import Routing, observe_routers
from expertcut.moe.residual import Residual, probing

Scoring = Literal["softmax", "sigmoid"]

# Families that look alike but break the contract, by config.model_type.
REFUSED = {
    "llama4": "its router scales the expert's input, so an expert has no output of its own",
    "llama4_text": "its router scales the expert's input, so an expert has no output of its own",
    "jetmoe": "its attention is routed too, so its experts are not all in MoE blocks",
}
_SELECTION_BIAS = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class MoeBlock:
    """One MoE block of a loaded model; `layer` counts MoE blocks from 0.

    `scoring` says what α is: the softmax over all E logits or the sigmoid of each.
    `inflates` is true where the gate weight is a softmax over all E experts cut to K, so that
    removing a router row makes every other weight larger (OLMoE, Qwen2-MoE, Jamba, ...).
    `residual` says where the residual stream is read that the block's output is added to.
    """

    name: str
    layer: int
    module: nn.Module
    router: nn.Module
    experts: nn.Module
    n_experts: int
    top_k: int
    n_groups: int
    top_groups: int
    scoring: Scoring
    inflates: bool
    residual: Residual | None = None

    def alpha(self, logits_TE: Tensor) -> Tensor:
        """Router probability of every expert before top-k, (T, E) float32."""
        logits_TE = logits_TE.float()
        return logits_TE.sigmoid() if self.scoring == "sigmoid" else logits_TE.softmax(dim=-1)

    def selection_bias(self) -> Tensor | None:
        """The bias (E,) added to α for choosing only, where the family has one."""
        for owner, name, tensor in _owned(self.module):
            if name in _SELECTION_BIAS:
                return _at_hand(owner, name, tensor).reshape(-1)
        return None

    def selection_gap(self, alpha_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """How close each token came to another set of experts, (T,): a distance of scores.

        Where experts lie in groups, also the distance between the last group used and the next.
        """
        bias_E = self.selection_bias()
        score_TE = alpha_TE if bias_E is None else alpha_TE + bias_E.to(alpha_TE.device)
        last_T1 = score_TE.gather(1, experts_TK).min(dim=-1, keepdim=True).values
        gap_TE = (score_TE - last_T1).abs().scatter(1, experts_TK, torch.inf)
        gap_T = gap_TE.min(dim=-1).values
        if self.top_groups == self.n_groups:
            return gap_T
        score_TGE = score_TE.unflatten(1, (self.n_groups, -1))
        best = score_TGE.topk(min(2, score_TGE.shape[-1]), dim=-1).values
        # DeepSeek-V2 ranks groups by their best expert, all others by the sum of their best two.
        for group_score in (best[..., 0], best.sum(dim=-1)):
            ranked = group_score.sort(dim=-1, descending=True).values
            gap_T = gap_T.minimum(ranked[:, self.top_groups - 1] - ranked[:, self.top_groups])
        return gap_T

    def expert_weights(self) -> Iterator[Tensor]:
        """The matrices (E, ·, ·) of the experts, biases left out."""
        for owner, name, tensor in _owned(self.experts):
            if tensor.ndim == 3 and len(tensor) == self.n_experts:
                yield _at_hand(owner, name, tensor)

    def expert_tensors(self) -> Iterator[tuple[nn.Module, str, Tensor, int]]:
        """Every (owner, name, tensor, axis) of the block with an axis of length E."""
        yield from ((m, n, t, 0) for m, n, t in _owned(self.experts))
        direct = ((self.module, n, t) for n, t in _direct(self.module))
        for owner, name, tensor in (*_owned(self.router), *direct):
            if self.n_experts in tensor.shape:
                yield owner, name, tensor, tensor.shape.index(self.n_experts)


def check_family(model_type: object) -> None:
    """That a family, by its config.model_type, is none that is known to break the contract.

    Raises:
        ContractError: it is one of `REFUSED`.
    """
    if isinstance(model_type, str) and model_type in REFUSED:
        raise ContractError(f"{model_type} models are not supported: {REFUSED[model_type]}")


def find_blocks(model: nn.Module, input_ids_1T: Tensor) -> tuple[MoeBlock, ...]:
    """The MoE blocks in layer order; the tokens are run once to see what the gates do.

    Raises:
        ContractError: no block, or one that breaks the contract.
    """
    model_type = getattr(model.config, "model_type", "?")
    check_family(model_type)
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "experts", None), nn.Module)
    ]
    unprobed = tuple(_block(name, module, i) for i, (name, module) in enumerate(candidates))
    if not unprobed:
        raise ContractError(f"not a MoE model: no module of this {model_type} holds experts")
    seen: dict[int, Routing] = {}
    with (
        torch.inference_mode(),
        probing(model, unprobed) as probes,
        observe_routers(unprobed, lambda r: seen.update({r.layer: r})),
    ):
        model(input_ids=input_ids_1T, use_cache=False)
    return tuple(
        replace(_probed(b, seen.get(b.layer)), residual=probes[b.layer].residual())
        for b in unprobed
    )


def _block(name: str, module: nn.Module, layer: int) -> MoeBlock:
    experts = module.experts
    assert isinstance(experts, nn.Module)
    places = getattr(experts, "places", None)  # layout exact: kept experts, then constants
    lengths = (
        {len(places)} if places else {p.shape[0] if p.ndim else 0 for p in experts.parameters()}
    )
    routers = [m for m in module.children() if m is not experts and hasattr(m, "top_k")]
    if len(routers) != 1 or len(lengths) != 1:
        raise ContractError(
            f"{name}: found {len(routers)} routers and expert tensors of lengths "
            f"{sorted(lengths)}, must be one router and one length"
        )
    n_experts, top_k = lengths.pop(), int(routers[0].top_k)  # type: ignore[arg-type]
    if not 1 <= top_k <= n_experts:
        raise ContractError(f"{name} cannot route each token to {top_k} of {n_experts} experts")
    groups = int(getattr(routers[0], "num_group", 1) or 1)
    return MoeBlock(
        name=name,
        layer=layer,
        module=module,
        router=routers[0],
        experts=experts,
        n_experts=n_experts,
        top_k=top_k,
        n_groups=groups,
        top_groups=int(getattr(routers[0], "topk_group", 1) or 1) if groups > 1 else 1,
        scoring="softmax",
        inflates=False,
    )


def _probed(block: MoeBlock, routing: Routing | None) -> MoeBlock:
    """The block with its gate's kind read off what the gate did, whatever its class is called."""
    if routing is None:
        raise ContractError(f"{block.name}: its router did not run on a forward pass")
    shapes = (*routing.logits_TE.shape[1:], *routing.experts_TK.shape[1:])
    if shapes != (block.n_experts, block.top_k):
        raise ContractError(
            f"{block.name}: router gave logits and choices of widths {shapes}, "
            f"must be {(block.n_experts, block.top_k)}"
        )
    scoring, inflates = _gate_kind(routing)
    return replace(block, scoring=scoring, inflates=inflates)


def _gate_kind(routing: Routing) -> tuple[Scoring, bool]:
    """How weights come from logits, and whether they are left as they were before top-k.

    Weights that are one constant times softmax (or sigmoid) for all tokens were not renormalised;
    a factor that is constant within each token only says that they were. PhiMoE's sparse mixer
    is neither, and counts as a renormalised softmax.
    """
    logits_TE, weights_TK = routing.logits_TE.float(), routing.weights_TK.float()
    softmax_TK = weights_TK / logits_TE.softmax(dim=-1).gather(1, routing.experts_TK)
    sigmoid_TK = weights_TK / logits_TE.sigmoid().gather(1, routing.experts_TK)
    is_half = routing.weights_TK.dtype.itemsize < 4 or routing.logits_TE.dtype.itemsize < 4
    tolerance = 2e-2 if is_half else 1e-4
    for dim in (None, -1):
        by_softmax, by_sigmoid = _spread(softmax_TK, dim), _spread(sigmoid_TK, dim)
        if min(by_softmax, by_sigmoid) < tolerance:
            is_sigmoid = by_sigmoid < by_softmax
            return ("sigmoid" if is_sigmoid else "softmax"), dim is None and not is_sigmoid
    return "softmax", False


def _spread(ratio_TK: Tensor, dim: int | None) -> float:
    """Largest relative distance from the mean, over the whole tensor or per token."""
    mean = ratio_TK.mean() if dim is None else ratio_TK.mean(dim, keepdim=True)
    return float(((ratio_TK - mean).abs() / mean.abs()).max())


def _at_hand(owner: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where accelerate keeps it in another place until it is used."""
    if tensor.device.type != "meta":
        return tensor
    hook: Any = owner._hf_hook
    values: Tensor = hook.weights_map[name]
    return values.to(hook.execution_device)


def _owned(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    return ((m, n, t) for m in module.modules() for n, t in _direct(m))


def _direct(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)
