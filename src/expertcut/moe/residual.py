"""What becomes of a MoE block's experts: block = shared + c · Σ w·f, decoder layer = x + d · block.

Read off what the modules of the layer do in one forward pass, whatever they are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expertcut.moe.observers import replaced_forward

if TYPE_CHECKING:
    from expertcut.moe.contract import MoeBlock


@dataclass(frozen=True)
class Residual:
    """`norm` reads the residual stream x and gives the block's input.

    The sum of the block's experts is added to x times `factor`, which is 1 in most.
    """

    norm: nn.Module
    factor: float


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
