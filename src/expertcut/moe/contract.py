"""The MoE contract: which modules of a model route, which are experts, and what the gate does."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from expertcut.errors import ContractError
from expertcut.moe.gate_laws import (
    SCORES,
    Scoring,
    Selection,
    WeightRule,
    check_blocks,
    explain_gate,
    verifying,
)
from expertcut.moe.observers import Routing
from expertcut.moe.residual import Probe, Residual, probing
from expertcut.moe.router_ops import LogitsOp, RouterCall

# Families that look alike but break the contract, by config.model_type.
REFUSED = {
    "llama4": "its router scales the expert's input, so an expert has no output of its own",
    "llama4_text": "its router scales the expert's input, so an expert has no output of its own",
    "jetmoe": "its attention is routed too, so its experts are not all in MoE blocks",
}
SELECTION_BIAS = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class MoeBlock:
    """One MoE block of a loaded model; `layer` counts MoE blocks from 0.

    `scoring` says what α is: a function of the logits. `weights` says how gate weights come from
    α, None where they do not. `inflates` is true where they are a softmax over all E experts cut
    to K, so that removing a router row makes every other weight larger (OLMoE, Qwen2-MoE, ...).
    `selection` says how experts are chosen: by α plus the selection bias, by the logits plus that
    bias, or by a table of token ids (hash routing). `residual` says where the residual stream is
    read that the block's output is added to. `output_factor` is what the block multiplies the sum
    of its experts by, None where it does more to it (a projection, a norm). `call` is how the
    router was called on the probe, `logits_op` where its logits can be changed, None where they
    cannot. `is_linear` is false where logits are more than the gate matrix times the input, so
    that no row of it adds just a bias.
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
    weights: WeightRule | None = None
    selection: Selection = "score"
    residual: Residual | None = None
    output_factor: float | None = 1.0
    call: RouterCall = field(default=RouterCall(()), compare=False, repr=False)
    logits_op: LogitsOp | None = None
    is_linear: bool = True

    @property
    def is_hashed(self) -> bool:
        """Whether a table of token ids chooses the experts, so that none can be cut."""
        return self.selection == "table"

    def alpha(self, logits_TE: Tensor) -> Tensor:
        """Router probability of every expert before top-k, (T, E) float32."""
        return SCORES[self.scoring](logits_TE.float())

    def selection_tensor(self) -> Tensor | None:
        """The router's own selection bias as it is now, on the meta device where it is offloaded.

        None where there is none, or the block hands it to the router with each call.
        """
        return next((t for _, n, t in _owned(self.router) if n in SELECTION_BIAS), None)

    def selection_bias(self) -> Tensor | None:
        """The values (E,) of the selection bias, where the family has one: not to be changed."""
        for owner, name, tensor in _owned(self.module):
            if name in SELECTION_BIAS:
                return _at_hand(owner, name, tensor).reshape(-1)
        return None

    def router_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The router's tensors by their own names, not to be changed."""
        for owner, name, tensor in _owned(self.router):
            yield name, _at_hand(owner, name, tensor)

    def selection_scores(self, logits_TE: Tensor, alpha_TE: Tensor | None = None) -> Tensor:
        """What experts are ranked by where they are chosen, (T, E) float32; α if it is known."""
        if self.selection == "logits":
            score_TE = logits_TE.float()
        else:
            score_TE = self.alpha(logits_TE) if alpha_TE is None else alpha_TE
        bias_E = self.selection_bias()
        return score_TE if bias_E is None else score_TE + bias_E.to(score_TE.device)

    def group_scores(self, score_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (T, groups) of groups, in the two ways in which families rank them.

        By their best expert, as DeepSeek-V2, and by the sum of their best two, as all others.
        """
        score_TGE = score_TE.unflatten(1, (self.n_groups, -1))
        best = score_TGE.topk(min(2, score_TGE.shape[-1]), dim=-1).values
        return best[..., 0], best.sum(dim=-1)

    def selection_gap(self, score_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """How close each token came to another set of experts, (T,): a distance of scores.

        Where experts lie in groups, also the distance between the last group used and the next.
        """
        if self.is_hashed:
            return score_TE.new_full((len(score_TE),), torch.inf)
        last_T1 = score_TE.gather(1, experts_TK).min(dim=-1, keepdim=True).values
        gap_TE = (score_TE - last_T1).abs().scatter(1, experts_TK, torch.inf)
        gap_T = gap_TE.min(dim=-1).values
        if self.top_groups == self.n_groups:
            return gap_T
        for group_score_TG in self.group_scores(score_TE):
            ranked_TG = group_score_TG.sort(dim=-1, descending=True).values
            gap_T = gap_T.minimum(ranked_TG[:, self.top_groups - 1] - ranked_TG[:, self.top_groups])
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
    model_type = _model_type(model)
    check_family(model_type)
    unprobed = tuple(_block(name, module, i) for i, (name, module) in enumerate(_candidates(model)))
    if not unprobed:
        raise ContractError(f"not a MoE model: no module of this {model_type} holds experts")
    check_blocks(unprobed)
    seen: dict[int, tuple[RouterCall, Routing]] = {}
    with (
        torch.inference_mode(),
        probing(model, unprobed) as probes,
        verifying(unprobed, model_type, lambda b, *found: seen.update({b.layer: found})),
    ):
        model(input_ids=input_ids_1T, use_cache=False)
    return tuple(
        _placed(_probed(block, seen.get(block.layer), model_type), probes[block.layer])
        for block in unprobed
    )


def routers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that route, of whatever blocks look like ones."""
    for _, module in _candidates(model):
        yield from _routers(module)


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "experts", None), nn.Module)
    ]


def _routers(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.children() if m is not module.experts and hasattr(m, "top_k")]


def _model_type(model: Any) -> str:
    return str(getattr(model.config, "model_type", "?"))


def _block(name: str, module: nn.Module, layer: int) -> MoeBlock:
    experts = module.experts
    assert isinstance(experts, nn.Module)
    places = getattr(experts, "places", None)  # layout exact: kept experts, then constants
    lengths = (
        {len(places)} if places else {p.shape[0] if p.ndim else 0 for p in experts.parameters()}
    )
    found = _routers(module)
    if len(found) != 1 or len(lengths) != 1:
        raise ContractError(
            f"{name}: found {len(found)} routers and expert tensors of lengths "
            f"{sorted(lengths)}, must be one router and one length"
        )
    n_experts, top_k = lengths.pop(), int(found[0].top_k)  # type: ignore[arg-type]
    if not 1 <= top_k <= n_experts:
        raise ContractError(f"{name} cannot route each token to {top_k} of {n_experts} experts")
    groups = int(getattr(found[0], "num_group", 1) or 1)
    return MoeBlock(
        name=name,
        layer=layer,
        module=module,
        router=found[0],
        experts=experts,
        n_experts=n_experts,
        top_k=top_k,
        n_groups=groups,
        top_groups=int(getattr(found[0], "topk_group", 1) or 1) if groups > 1 else 1,
        scoring="softmax",
        inflates=False,
    )


def _probed(block: MoeBlock, seen: tuple[RouterCall, Routing] | None, model_type: str) -> MoeBlock:
    """The block with its gate's kind read off what the gate did, whatever its class is called."""
    if seen is None:
        raise ContractError(f"{block.name}: its router did not run on a forward pass")
    call, routing = seen
    shapes = (*routing.logits_TE.shape[1:], *routing.experts_TK.shape[1:])
    if shapes != (block.n_experts, block.top_k):
        raise ContractError(
            f"{block.name}: router gave logits and choices of widths {shapes}, "
            f"must be {(block.n_experts, block.top_k)}"
        )
    block = replace(block, call=call)
    gate = explain_gate(block, routing, model_type)
    return replace(
        block,
        scoring=gate.scoring,
        inflates=gate.inflates,
        weights=gate.weights,
        selection=gate.selection,
        logits_op=gate.logits_op,
        is_linear=gate.is_linear,
    )


def _placed(block: MoeBlock, probe: Probe) -> MoeBlock:
    """The block with what becomes of the sum of its experts."""
    output_factor = probe.output_factor()
    residual = probe.residual(output_factor)
    return replace(block, output_factor=output_factor, residual=residual)


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
