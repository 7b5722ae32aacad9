"""Finds the MoE blocks of a model: routers, experts, gates and residual connections.

Block = shared + c · Σ w·f, decoder layer = x + d · block: both factors are measured in one forward
pass, independent of module names. Where norms or projections follow the experts, or more is added
to the stream, the layer is run with and without Σ w·f.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from expertcut.errors import ContractError
from expertcut.models.devices import runs_on
from expertcut.models.gate_laws import check_blocks, explain_gate, first, verifying
from expertcut.models.hooks import (
    Routing,
    give_logits,
    own_forward,
    registered,
    replaced_forward,
)
from expertcut.models.moe_block import MoeBlock, Residual, Step, parameters_of
from expertcut.models.validate import ALL_TOP_K_FIELDS

_N_DIGITS = 5  # of factors that two runs tell
_Run = tuple[nn.Module, Tensor, Tensor]  # a module, its first input and its output


class Probe:
    """Records the calls of a decoder layer's modules in one forward pass of a few tokens."""

    def __init__(self, decoder: nn.Module, block: MoeBlock) -> None:
        self.decoder, self.block = decoder, block
        self.calls: list[tuple[nn.Module, Any, Any, Any]] = []  # module, args, kwargs, output

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hooks the modules of the layer, and of the block only itself and its experts."""
        inside = set(self.block.module.modules()) - {self.block.module, self.block.experts}
        for module in self._modules():
            if module not in inside:
                yield module.register_forward_hook(self._record, with_kwargs=True)

    def _modules(self) -> Iterator[nn.Module]:
        """Those of the layer, and router and experts of a contract, which are none of its own."""
        yield from dict.fromkeys((*self.decoder.modules(), self.block.router, self.block.experts))

    def _record(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.calls.append((module, args, kwargs, first(output)))

    @torch.inference_mode()
    def connections(self) -> tuple[float | None, Residual | None]:
        """The factor of the experts' sum and the residual connection; None if not so plain."""
        nothing: tuple[Any, Any, Any] = (), {}, None
        last_calls = {module: call for module, *call in self.calls}
        args, kwargs, block_output = last_calls.get(self.block.module, nothing)
        *_, layer_output = last_calls.get(self.decoder, nothing)
        if self.block.module not in last_calls:  # one of several calls of a contract
            return None, None
        # The laws of the block are checked with other sums in later calls.
        sums = (output for module, *_, output in self.calls if module is self.block.experts)
        if not isinstance(expert_sum := next(sums, None), Tensor):
            return None, None
        if self.block.is_layer:
            return None, self._residual()
        zeros = torch.zeros_like(expert_sum)
        with replaced_forward(self.block.experts, lambda *_, **__: zeros):
            without = first(self.block.module(*args, **kwargs))
        output_factor = _factor(without, expert_sum, block_output)
        if output_factor is None or not args:
            return output_factor, self._residual()
        for module, inputs, _, output in self.calls:
            if output is args[0] and inputs and isinstance(inputs[0], Tensor):
                factor = _factor(inputs[0], block_output, layer_output)
                if factor is not None:
                    return output_factor, Residual(module, factor * output_factor)
        return output_factor, self._residual()

    def _residual(self) -> Residual | None:
        """The connection by two more runs of the layer, with Σ experts and without."""
        with_sum, without = self._runs(is_zero=False), self._runs(is_zero=True)
        if [call[0] for call in with_sum] != [call[0] for call in without]:
            return None
        part = next(output for module, _, output in with_sum if module is self.block.experts)
        steps: list[Step] = []
        read = with_sum[0][2].new_empty(0)  # what the last step gave
        inside = set(self.block.module.modules())
        for (module, x, y), (_, x_0, y_0) in zip(with_sum[:-1], without[:-1], strict=True):
            is_moved = x.shape == x_0.shape and not torch.equal(x, x_0)
            if module is self.block.module:
                read = y
            if not is_moved or any(module in step.module.modules() for step in steps):
                continue
            factor = _factor(x_0, part, x, _N_DIGITS)
            # Whoever runs a block on some of its tokens passes its output on to such a module.
            if factor is None or (module not in inside and x is not read):
                return None
            steps.append(Step(module, factor))
            part, read = y - y_0, y
        (*_, layer_output), (*_, layer_output_0) = with_sum[-1], without[-1]
        factor = _factor(layer_output_0, part, layer_output, _N_DIGITS)
        if factor is None:
            return None
        for module, x, shared in self._streams(without):
            is_wide = x.numel() == layer_output_0.numel()
            if is_wide and (own := _share(x, shared, layer_output_0)):
                return Residual(module, round(factor / own, _N_DIGITS), tuple(steps))
        return None

    def _runs(self, *, is_zero: bool) -> list[_Run]:
        """Module, input and output of each call in the layer, in the order in which they end."""
        experts, router = self.block.experts, self.block.router
        deep = {*experts.modules(), *router.modules()} - {experts, router}
        (args, kwargs) = next((a, k) for module, a, k, _ in self.calls if module is self.decoder)
        runs: list[_Run] = []

        def record(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            given = (v for v in (*inputs, *named.values()) if isinstance(v, Tensor))
            x, y = next(given, None), first(output)
            if isinstance(x, Tensor) and isinstance(y, Tensor):
                runs.append((module, x, y))

        forward = own_forward(experts)

        def nothing(*inputs: Any, **named: Any) -> Tensor:
            return torch.zeros_like(forward(*inputs, **named))

        changed = nothing if is_zero else forward
        with (
            replaced_forward(experts, changed),
            registered(
                module.register_forward_hook(record, with_kwargs=True)
                for module in self._modules()
                if module not in deep
            ),
        ):
            self.decoder(*args, **kwargs)
        return runs

    def _streams(self, runs: list[_Run]) -> Iterator[tuple[nn.Module, Tensor, list[Tensor]]]:
        """Modules that may read the residual stream, with what else may be added to it."""
        block = self.block
        reader = block.experts if block.is_layer else block.module
        read = next(x for module, x, _ in runs if module is reader)
        norms = [(module, x) for module, x, y in runs if y is read and module is not reader]
        reader = block.router if block.is_layer else reader
        children = set(self.decoder.children()) | set(block.module.children())
        for module, x in (*norms, (reader, next(x for m, x, _ in runs if m is reader))):
            others = [y for m, _, y in runs if m in children and m is not module and y is not x]
            yield module, x, [y for y in others if y.numel() == x.numel()]


def _share(x: Tensor, others: list[Tensor], result: Tensor) -> float | None:
    """The number a with result = a · x + a sum of multiples of the others; None if it is 0."""
    columns = torch.stack([t.double().flatten().cpu() for t in (x, *others)], dim=1)
    wanted = result.double().flatten().cpu()
    found = torch.linalg.lstsq(columns, wanted[:, None], driver="gelsd").solution[:, 0]
    tolerance = 2e-2 if result.dtype.itemsize < 4 else 1e-4
    is_plain = bool((columns @ found - wanted).norm() <= tolerance * wanted.norm())
    is_part = bool((columns[:, 0] * found[0]).norm() > tolerance * wanted.norm())
    return float(found[0]) if is_plain and is_part else None


def _factor(x: Tensor, own: Any, result: Any, n_digits: int | None = None) -> float | None:
    """The number c with result = x + c · own, or None."""
    if not isinstance(own, Tensor) or not isinstance(result, Tensor) or x.shape != result.shape:
        return None
    added, given = (result.double() - x.double()).flatten(), own.double().flatten().to(x.device)
    if added.shape != given.shape or not given.any():
        return None
    factor = float(added @ given / (given @ given))
    is_half = result.dtype.itemsize < 4
    tolerance, rounding, usual = (2e-2, 4e-3, 2) if is_half else (1e-3, 1e-6, 4)
    allowed = tolerance * added.norm() + rounding * result.double().norm()
    is_plain = bool((added - factor * given).norm() <= allowed)
    return round(factor, n_digits or usual) if is_plain else None


def find_blocks(
    model: Any, input_ids_1T: Tensor, declared: tuple[MoeBlock, ...] = ()
) -> tuple[MoeBlock, ...]:
    """The MoE blocks in layer order, probed on the tokens; ContractError if one breaks the laws.

    Those that a contract `declared` are taken as they are, and others are not looked for.
    """
    model_type = str(getattr(model.config, "model_type", "?"))
    unprobed = declared or tuple(
        _block(name, module, i) for i, (name, module) in enumerate(candidates(model))
    )
    if not unprobed:
        raise ContractError(f"not a MoE model: no module of this {model_type} holds experts")
    check_blocks(unprobed)
    seen: dict[int, tuple[MoeBlock, Routing]] = {}
    probes = {b.layer: Probe(_decoder_layer(model, b), b) for b in unprobed}
    with (
        torch.inference_mode(),
        registered(handle for probe in probes.values() for handle in probe.hooks()),
        verifying(
            unprobed,
            model_type,
            lambda b, routing: seen.update({b.layer: (b, routing)}),
            is_one_pass=True,
        ),
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
        found.append(_probed(block, routing, probes[block.layer], model_type))
    return tuple(found)


def _probed(block: MoeBlock, routing: Routing, probe: Probe, model_type: str) -> MoeBlock:
    probed = explain_gate(block, routing, model_type)
    output_factor, residual = probe.connections()
    probed = replace(probed, output_factor=output_factor, residual=residual)
    if residual is not None and block.is_layer:
        is_norm = residual.norm is not block.router
        probed = replace(probed, norm=residual.norm if is_norm else nn.Identity())
    return probed


def probe_ids(model: Any) -> Tensor:
    """The tokens (1, T) that blocks are probed on."""
    ids_T = torch.arange(16, device=runs_on(model.get_input_embeddings()))
    vocabulary: int = model.config.get_text_config().vocab_size
    return ids_T[None] % vocabulary


def probe_again(model: Any, block: MoeBlock, run: Callable[[], Any]) -> MoeBlock:
    """A block probed again, on other weights than before; `run` runs its decoder layer once."""
    unprobed, model_type = _block(block.name, block.module, block.layer), model.config.model_type
    probe, seen = Probe(_decoder_layer(model, block), unprobed), list[tuple[MoeBlock, Routing]]()
    with (
        registered(probe.hooks()),
        verifying([unprobed], str(model_type), lambda *found: seen.append(found)),
    ):
        run()
    return _probed(*seen[0], probe, str(model_type))


def _decoder_layer(model: nn.Module, block: MoeBlock) -> nn.Module:
    if block.is_layer:
        return block.module
    return model.get_submodule(block.name.rpartition(".")[0])


def routers(model: nn.Module) -> Iterator[nn.Module]:
    """The routers of all MoE blocks."""
    return (router for _, module in candidates(model) for router in _routers(module))


def candidates(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules that hold experts, by name."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "experts", None), nn.Module)
    ]


def _routers(module: Any) -> list[nn.Module]:
    children = [m for m in module.children() if m is not module.experts]
    places = getattr(module.experts, "places", None)  # layout exact
    n_experts = len(places or next(module.experts.parameters(), ()))
    return [m for m in children if hasattr(m, "top_k")] or [
        m for m in children if experts_per_token(m) and _scores(m, n_experts)
    ]


def _scores(module: nn.Module, n_experts: int) -> bool:
    """Whether a module has a matrix of one row for each expert, in a Linear or by itself."""
    parts = (module, *(m for m in module.children() if isinstance(m, nn.Linear)))
    own = [p for part in parts for p in part.parameters(recurse=False)]
    return any(p.ndim == 2 and len(p) == n_experts for p in own)


def experts_per_token(router: Any) -> int:
    """The router's K, by itself or by its config; 0 if neither says it."""
    config = getattr(router, "config", None)
    named = (getattr(config, field, None) for field in ALL_TOP_K_FIELDS)
    return int(getattr(router, "top_k", next((k for k in named if type(k) is int), 0)))


def _block(name: str, module: nn.Module, layer: int) -> MoeBlock:
    experts: Any = module.experts
    lengths = {p.shape[0] if p.ndim else 0 for p in parameters_of(experts).values()}
    if places := getattr(experts, "places", None):  # kept experts, then constants
        lengths = {len(places)}
    found = _routers(module)
    if len(found) != 1 or len(lengths) != 1:
        raise ContractError(
            f"{name}: found {len(found)} routers and expert tensors of lengths {sorted(lengths)}, "
            "must be one router and one length"
        )
    router: Any = found[0]
    n_experts, top_k = lengths.pop(), experts_per_token(router)
    if not hasattr(router, "top_k"):
        give_logits(router)
    if not 1 <= top_k <= n_experts:
        raise ContractError(f"{name} cannot route each token to {top_k} of {n_experts} experts")
    n_groups = int(getattr(router, "num_group", 1) or 1)
    top_groups = int(getattr(router, "topk_group", 1) or 1) if n_groups > 1 else 1
    parts = (router, experts, n_experts, top_k, n_groups, top_groups)
    most = getattr(router, "n_places", None)  # of a router with a routing rule
    return MoeBlock(name, layer, module, *parts, most=most)
