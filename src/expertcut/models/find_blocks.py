"""Finds the MoE blocks of a model: routers, experts, gates and residual connections.

Block = shared + c · Σ w·f, decoder layer = x + d · block: both factors are measured in one forward
pass, independent of module names.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from expertcut.errors import ContractError
from expertcut.models.gate_laws import check_blocks, explain_gate, first, verifying
from expertcut.models.hooks import Routing, registered, replaced_forward
from expertcut.models.moe_block import MoeBlock, Residual


class Probe:
    """Records the calls of a decoder layer's modules in one forward pass of a few tokens."""

    def __init__(self, decoder: nn.Module, block: MoeBlock) -> None:
        self.decoder, self.block = decoder, block
        self.calls: list[tuple[nn.Module, Any, Any, Any]] = []  # module, args, kwargs, output

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hooks the modules of the layer, and of the block only itself and its experts."""
        inside = set(self.block.module.modules()) - {self.block.module, self.block.experts}
        for module in self.decoder.modules():
            if module not in inside:
                yield module.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.calls.append((module, args, kwargs, first(output)))

    @torch.inference_mode()
    def connections(self) -> tuple[float | None, Residual | None]:
        """The factor of the experts' sum and the residual connection; None if not so plain."""
        nothing: tuple[Any, Any, Any] = (), {}, None
        last_calls = {module: call for module, *call in self.calls}
        args, kwargs, block_output = last_calls.get(self.block.module, nothing)
        *_, layer_output = last_calls.get(self.decoder, nothing)
        # The laws of the block are checked with other sums in later calls.
        sums = (output for module, *_, output in self.calls if module is self.block.experts)
        if not isinstance(expert_sum := next(sums, None), Tensor):
            return None, None
        zeros = torch.zeros_like(expert_sum)
        with replaced_forward(self.block.experts, lambda *_, **__: zeros):
            without = first(self.block.module(*args, **kwargs))
        output_factor = _factor(without, expert_sum, block_output)
        if output_factor is None or not args:
            return output_factor, None
        for module, inputs, _, output in self.calls:
            if output is args[0] and inputs and isinstance(inputs[0], Tensor):
                factor = _factor(inputs[0], block_output, layer_output)
                if factor is not None:
                    return output_factor, Residual(module, factor * output_factor)
        return output_factor, None


def _factor(x: Tensor, own: Any, result: Any) -> float | None:
    """The number c with result = x + c · own, or None."""
    if not isinstance(own, Tensor) or not isinstance(result, Tensor) or x.shape != result.shape:
        return None
    added, given = (result.double() - x.double()).flatten(), own.double().flatten().to(x.device)
    if added.shape != given.shape or not given.any():
        return None
    factor = float(added @ given / (given @ given))
    is_half = result.dtype.itemsize < 4
    tolerance, rounding, digits = (2e-2, 4e-3, 2) if is_half else (1e-3, 1e-6, 4)
    allowed = tolerance * added.norm() + rounding * result.double().norm()
    is_plain = bool((added - factor * given).norm() <= allowed)
    return round(factor, digits) if is_plain else None


def find_blocks(model: Any, input_ids_1T: Tensor) -> tuple[MoeBlock, ...]:
    """The MoE blocks in layer order, probed on the tokens; ContractError if one breaks the laws."""
    model_type = str(getattr(model.config, "model_type", "?"))
    unprobed = tuple(_block(name, module, i) for i, (name, module) in enumerate(_candidates(model)))
    if not unprobed:
        raise ContractError(f"not a MoE model: no module of this {model_type} holds experts")
    check_blocks(unprobed)
    seen: dict[int, tuple[MoeBlock, Routing]] = {}
    probes = {b.layer: Probe(model.get_submodule(b.name.rpartition(".")[0]), b) for b in unprobed}
    with (
        torch.inference_mode(),
        registered(handle for probe in probes.values() for handle in probe.hooks()),
        verifying(unprobed, model_type, lambda b, routing: seen.update({b.layer: (b, routing)})),
    ):
        model(input_ids=input_ids_1T, use_cache=False)
    found = []
    for unseen in unprobed:
        if unseen.layer not in seen:
            raise ContractError(f"{unseen.name}: its router did not run on a forward pass")
        block, routing = seen[unseen.layer]
        shapes = (*routing.logits_TE.shape[1:], *routing.experts_TK.shape[1:])
        if shapes != (block.n_experts, block.n_places):
            raise ContractError(
                f"{block.name}: router gave logits and choices of widths {shapes}, "
                f"must be {(block.n_experts, block.n_places)}"
            )
        probed = explain_gate(block, routing, model_type)
        output_factor, residual = probes[block.layer].connections()
        found.append(replace(probed, output_factor=output_factor, residual=residual))
    return tuple(found)


def routers(model: nn.Module) -> Iterator[nn.Module]:
    """The routers of all MoE blocks."""
    return (router for _, module in _candidates(model) for router in _routers(module))


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "experts", None), nn.Module)
    ]


def _routers(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.children() if m is not module.experts and hasattr(m, "top_k")]


def _block(name: str, module: nn.Module, layer: int) -> MoeBlock:
    experts: Any = module.experts
    lengths = {p.shape[0] if p.ndim else 0 for p in experts.parameters()}
    if places := getattr(experts, "places", None):  # layout exact: kept experts, then constants
        lengths = {len(places)}
    found = _routers(module)
    if len(found) != 1 or len(lengths) != 1:
        raise ContractError(
            f"{name}: found {len(found)} routers and expert tensors of lengths {sorted(lengths)}, "
            "must be one router and one length"
        )
    router: Any = found[0]
    n_experts, top_k = lengths.pop(), int(router.top_k)
    if not 1 <= top_k <= n_experts:
        raise ContractError(f"{name} cannot route each token to {top_k} of {n_experts} experts")
    n_groups = int(getattr(router, "num_group", 1) or 1)
    top_groups = int(getattr(router, "topk_group", 1) or 1) if n_groups > 1 else 1
    parts = (router, experts, n_experts, top_k, n_groups, top_groups)
    most = getattr(router, "n_places", None)  # of a router with a routing rule
    return MoeBlock(name, layer, module, *parts, most=most)
