"""Constant experts behind routers that choose by a rule: layout `routed` of a model of `exact`.

`modeling_exact.py` and `modeling_routed.py` lie beside this file, and `config.json` has what both
read. The rule acts on what the routers give, biases of gates included; then the constants take the
places of removed experts. Expert id E, one above the last, means nobody, as in every routed model.
Names of tensors end in their axes: T tokens, D width, E experts, M places per token.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .modeling_exact import ConstantExperts, _extend
from .modeling_routed import RoutedExperts, RoutedModel

_MADE: dict[str, Any] = {}


class RoutedConstants(nn.Module):
    """Goes before `ConstantExperts` in a layer with a rule: nobody is one more place, the last."""

    places: list[int]
    num_experts: int  # those that are kept
    config: Any
    is_skipping: bool
    approx_value: Tensor

    def forward(self, x_TD: Tensor, experts_TM: Tensor, weights_TM: Tensor) -> Tensor:
        """As `ConstantExperts`; no expert runs for a constant or for nobody."""
        places = torch.tensor([*self.places, len(self.places)], device=experts_TM.device)
        places_TM, n_kept = places[experts_TM], self.num_experts
        is_kept_TM = places_TM < n_kept
        # Loops and kernels alike skip the row behind the last, as `RoutedModel` tells them; not
        # those of GPT-OSS and Nemotron, whose first row runs with weight 0.
        is_loop = self.config._experts_implementation in ("eager", None)
        rows_TM = places_TM.masked_fill(
            ~is_kept_TM, 0 if is_loop and not self.is_skipping else n_kept
        )
        family: Any = super(ConstantExperts, self)
        y_TD: Tensor = family.forward(x_TD, rows_TM, weights_TM.masked_fill(~is_kept_TM, 0))
        weights_TX = x_TD.new_zeros(len(x_TD), len(places), dtype=torch.float)
        weights_TX = weights_TX.scatter(1, places_TM, weights_TM.float())
        constant_TD = weights_TX[:, n_kept:-1] @ self.approx_value.float()
        is_changed_T1 = (~is_kept_TM & (experts_TM < len(self.places))).any(dim=1, keepdim=True)
        return torch.where(is_changed_T1, y_TD + constant_TD.to(y_TD.dtype), y_TD)


class RoutedExactModel(RoutedModel):
    """Goes before a class of `modeling_exact.py`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for module in self.modules():
            if isinstance(module, ConstantExperts) and isinstance(module, RoutedExperts):
                _extend(module, RoutedConstants)


def _defined(name: str) -> Any:
    """`RoutedExactOlmoeForCausalLM` and `RoutedExactOlmoeConfig`, of those without `Routed`."""
    if name not in _MADE:
        base = getattr(sys.modules[ConstantExperts.__module__], name.removeprefix("Routed"))
        body: dict[str, Any] = {"__module__": __name__}
        if hasattr(base, "config_class"):
            body["config_class"] = _defined(f"Routed{base.config_class.__name__}")
            _MADE[name] = type(name, (RoutedExactModel, base), body)
        else:
            body["model_type"] = f"routed_{base.model_type}"
            _MADE[name] = type(name, (base,), body)
    return _MADE[name]


def __getattr__(name: str) -> Any:
    """The classes of a family, made when they are asked for."""
    if name.startswith("RoutedExact"):
        return _defined(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
