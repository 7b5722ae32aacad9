"""The MoE contract: which modules of a model route, which are experts, what the gate does.

What becomes of a MoE block's experts: block = shared + c · Σ w·f, decoder layer = x + d · block.
Read off what the modules of the layer do in one forward pass, whatever they are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from expertcut.errors import ContractError
from expertcut.models.gate_laws import check_blocks, explain_gate, verifying
from expertcut.models.hooks import Routing, replaced_forward
from expertcut.models.moe_block import MoeBlock, Residual, RouterCall

# Families that look alike but break the contract, by config.model_type.
REFUSED = {
    "llama4": "its router scales the expert's input, so an expert has no output of its own",
    "llama4_text": "its router scales the expert's input, so an expert has no output of its own",
    "jetmoe": "its attention is routed too, so its experts are not all in MoE blocks",
}


@contextmanager
def probing(model: nn.Module, blocks: Sequence[MoeBlock]) -> Iterator[Mapping[int, Probe]]:
    """A probe for each block, by layer, that watches what runs meanwhile."""
    probes = {b.layer: Probe(model.get_submodule(b.name.rpartition(".")[0]), b) for b in blocks}
    with ExitStack() as stack:
        for probe in probes.values():
            stack.enter_context(probe.watching())
        yield probes


class Probe:
    """One decoder layer in one forward pass; only a few tokens should be run."""

    def __init__(self, decoder: nn.Module, block: MoeBlock) -> None:
        self.decoder, self.block = decoder, block
        self.seen: list[tuple[nn.Module, Any, Any]] = []
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self.summed: Any = None
        self.gave: Any = None
        self.result: Any = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks the layer's modules but for what is inside the block, its experts excepted."""
        inside = set(self.block.module.modules()) - {self.block.module, self.block.experts}
        with ExitStack() as stack:
            for module in self.decoder.modules():
                if module not in inside:
                    handle = module.register_forward_hook(self._see, with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def _see(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        gave = _first(output)
        if module is self.block.module:
            self.call, self.gave = (args, kwargs), gave
        elif module is self.block.experts:
            self.summed = gave if self.summed is None else self.summed
        elif module is self.decoder:
            self.result = gave
        else:
            self.seen.append((module, args[0] if args else None, gave))

    @torch.inference_mode()
    def output_factor(self) -> float | None:
        """What the block multiplies the sum of its experts by; None where it does more to it."""
        if not isinstance(self.summed, Tensor):
            return None
        args, kwargs = self.call
        nothing = torch.zeros_like(self.summed)
        with replaced_forward(self.block.experts, lambda *_, **__: nothing):
            without = _first(self.block.module(*args, **kwargs))
        return _factor(without, self.summed, self.gave)

    def residual(self, output_factor: float | None) -> Residual | None:
        """None where the block's input is no module's output, or more is done to its own."""
        read = self.call[0][0] if self.call[0] else None
        for module, x_BTD, given in self.seen:
            if output_factor is not None and given is read and isinstance(x_BTD, Tensor):
                factor = _factor(x_BTD, self.gave, self.result)
                if factor is not None:
                    return Residual(module, factor * output_factor)
        return None


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _factor(x: Tensor, own: Any, result: Any) -> float | None:
    """The number c with result = x + c · own, if there is one."""
    if not isinstance(own, Tensor) or not isinstance(result, Tensor) or x.shape != result.shape:
        return None
    is_half = result.dtype.itemsize < 4
    added, given = (result.double() - x.double()).flatten(), own.double().flatten().to(x.device)
    if added.shape != given.shape or not given.any():
        return None
    factor = float(added @ given / (given @ given))
    tolerance, rounding = (2e-2, 4e-3) if is_half else (1e-3, 1e-6)
    allowed = tolerance * added.norm() + rounding * result.double().norm()
    if not bool((added - factor * given).norm() <= allowed):
        return None
    return round(factor, 2 if is_half else 4)


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
