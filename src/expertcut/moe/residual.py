"""Where a MoE block stands in the residual stream: its decoder layer gives x + factor · block.

Read off what the modules of the layer do in one forward pass, whatever they are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from expertcut.moe.contract import MoeBlock


@dataclass(frozen=True)
class Residual:
    """`norm` reads the residual stream x and gives the block's input; `factor` is 1 in most."""

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
        self.read: Any = None
        self.gave: Any = None
        self.result: Any = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks the layer's modules but for what is inside the block."""
        inside = set(self.block.module.modules())
        with ExitStack() as stack:
            for module in self.decoder.modules():
                if module not in inside or module is self.block.module:
                    handle = module.register_forward_hook(self._see)
                    stack.callback(handle.remove)
            yield

    def _see(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        read, gave = (args[0] if args else None), _first(output)
        if module is self.block.module:
            self.read, self.gave = read, gave
        elif module is self.decoder:
            self.result = gave
        else:
            self.seen.append((module, read, gave))

    def residual(self) -> Residual | None:
        """None where the block's input is no module's output, or more is done to its own."""
        for module, x_BTD, given in self.seen:
            if given is self.read and isinstance(x_BTD, Tensor):
                factor = _factor(x_BTD, self.gave, self.result)
                if factor is not None:
                    return Residual(module, factor)
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
