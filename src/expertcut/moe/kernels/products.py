"""Matrix products by the faster of the libraries that torch's CPU build carries.

torch multiplies float32 matrices on a CPU with MKL, which on AMD processors does not use all of
their vector units: oneDNN, which torch carries too, is more than twice as fast there
(docs/benchmarks.md).
"""

from collections.abc import Iterable
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INNER = "_old_forward"  # where accelerate keeps the forward that its own goes around
_IS_THERE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `F.linear`, without gradients where oneDNN computes it."""
    if not _IS_THERE or not _suits(x, weight):
        return F.linear(x, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _suits(x: Tensor, weight: Tensor) -> bool:
    # In half precision F.linear takes oneDNN by itself.
    is_float32_on_cpu = weight.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return is_float32_on_cpu and not needs_gradient and x.numel() > 0


class Linear(nn.Linear):
    """An `nn.Linear` by this module's `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """As every `nn.Linear`."""
        return linear(input, self.weight, self.bias)


def use_faster_products(model: nn.Module, routers: Iterable[nn.Module]) -> None:
    """Changes the class of the model's linear layers, as torch's own parametrize does.

    Those inside routers stay: they are small, and watched operation by operation.
    """
    kept = {id(part) for router in routers for part in router.modules()}
    for module in model.modules():
        if type(module) is nn.Linear and id(module) not in kept:
            module.__class__ = Linear
            if INNER in vars(module):
                setattr(module, INNER, MethodType(Linear.forward, module))
