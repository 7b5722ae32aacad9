"""A Mixture-of-Experts model, some of whose experts give a constant: expertcut's layout `exact`.

The router keeps a row for every expert, so all gate weights are those of the unedited model. A
removed expert adds its `approx_value` (zero, or its mean output) times its gate weight, and has no
other weights left; every layer has its own number of them. A gate may have a bias, added to its
logits before the softmax. `config.json` says where:

    "compression_config": {"transform_config": {"expert_substitution": {"targets": {
        "model.layers.<layer>.mlp.experts": {"replacements": {"<id of a removed expert>": ...}}}}}}
    "biased_gates": [layers whose gate has a bias]

The first is vLLM's declaration of constant experts, version 1. The weights hold the constants as
`model.layers.<layer>.mlp.constant_experts.<id>.approx_value`. No loader takes that name for one of
an expert: one that does not know constant experts stops there. Earlier checkpoints declare
`"approximate_experts": {"<layer>": [ids]}` and name constants `...mlp.experts.<id>.approx_value`.
They are loaded too, and saved again under the names that they had.

Kept experts keep their ids and names in the files, and `save_pretrained` writes them so. Needs
transformers 5.22 or later, and nothing of expertcut. Names of tensors end in their axes: T tokens,
D width, E experts of a layer, K experts per token, R removed experts.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    FlexOlmoForCausalLM,
    OlmoeForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
)

# As the files have them; the second is the name in checkpoints with "approximate_experts".
CONSTANT_NAMES = (".mlp.constant_experts.*.approx_value", ".mlp.experts.*.approx_value")


def removed_experts(config: Any, layer: int) -> list[int]:
    """Sorted ids of a layer's constant experts."""
    if by_layer := getattr(config, "approximate_experts", None):
        return sorted(by_layer.get(str(layer), by_layer.get(layer, ())))
    transforms = (getattr(config, "compression_config", None) or {}).get("transform_config") or {}
    targets = (transforms.get("expert_substitution") or {}).get("targets") or {}
    target = targets.get(f"model.layers.{layer}.mlp.experts") or {}
    return sorted(map(int, target.get("replacements") or ()))


def kept_experts(n_experts: int, removed: list[int]) -> list[int]:
    """Sorted ids of the others."""
    return [expert for expert in range(n_experts) if expert not in removed]


class ConstantExperts(nn.Module):
    """Goes before a family's experts class, which then holds the kept experts only, in id order.

    `places` says where each expert is: its row among the kept, or behind them among the constants.
    It is a list because a tensor made in `__init__` would stay on the meta device.
    """

    config: Any
    places: list[int]
    num_experts: int
    down_proj: Tensor
    approx_value: Tensor

    def make_constant(self, removed: list[int]) -> None:
        """Drops the weights of the removed experts; their constants (R, D) start as zeros."""
        order = [*kept_experts(self.num_experts, removed), *removed]
        self.places = [order.index(expert) for expert in range(len(order))]
        self.num_experts -= len(removed)
        for name, weight in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(weight.detach()[order[: self.num_experts]]))
        width = self.down_proj.shape[1]
        self.approx_value = nn.Parameter(self.down_proj.new_zeros(len(removed), width))

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """As the family's own; expert ids are those of the router."""
        places_TK = torch.tensor(self.places, device=experts_TK.device)[experts_TK]
        is_removed_TK = places_TK >= self.num_experts
        # Loops skip an index behind the last row (by_expert is expertcut's own); others need a row.
        is_skipping = self.config._experts_implementation in ("eager", "by_expert", None)
        rows_TK = places_TK.masked_fill(is_removed_TK, self.num_experts if is_skipping else 0)
        y_TD: Tensor = super().forward(x_TD, rows_TK, weights_TK.masked_fill(is_removed_TK, 0))
        weights_TE = x_TD.new_zeros(len(x_TD), len(self.places), dtype=torch.float)
        weights_TE = weights_TE.scatter(1, places_TK, weights_TK.float())
        constant_TD = weights_TE[:, self.num_experts :] @ self.approx_value.float()
        # A token that chose no removed expert keeps its output to the sign of its zeros.
        is_changed_T1 = is_removed_TK.any(dim=1, keepdim=True)
        return torch.where(is_changed_T1, y_TD + constant_TD.to(y_TD.dtype), y_TD)


class BiasedRouter(nn.Module):
    """Goes before a family's router class: a bias (E,) on the logits, else what they all do."""

    weight: Tensor
    bias: Tensor
    top_k: int
    norm_topk_prob: bool

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (T, E), gate weights (T, K) and chosen experts (T, K)."""
        x_TD = x_TD.reshape(-1, self.weight.shape[1])
        logits_TE = nn.functional.linear(x_TD, self.weight) + self.bias
        alpha_TE = logits_TE.softmax(dim=-1, dtype=torch.float)
        weights_TK, experts_TK = alpha_TE.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return logits_TE, weights_TK.to(logits_TE.dtype), experts_TK


def _extend(module: Any, mixin: Any) -> None:
    """The class of the one module changes, as in torch's own parametrize and fully_shard."""
    base: Any = type(module)
    module.__class__ = _joined(mixin, base)


@cache
def _joined(mixin: Any, base: Any) -> Any:
    return type(f"{mixin.__name__}Of{base.__name__}", (mixin, base), {"__module__": __name__})


class Stack(MergeModulelist):
    """On loading: a layer's experts, in id order, become one tensor."""

    @property
    def reverse_op(self) -> Any:
        """What saving does."""
        return Unstack()


class Unstack(ConversionOps):
    """On saving: each row goes back under the id that its expert has in the unedited model."""

    def convert(
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, **details: Any
    ) -> Any:
        """Full names, because the caller cannot find the prefix where expert 0 is removed."""
        prefix, layer = re.split(r"\.(\d+)\.", details["full_layer_name"], maxsplit=1)[:2]
        removed = removed_experts(details["config"], int(layer))
        named: dict[str, Tensor] = {}
        for source, found in input_dict.items():
            stacked = found[0] if isinstance(found, list) else found
            name = source if "*" in source else target_patterns[0]
            is_constant = name.endswith("approx_value")
            ids = removed if is_constant else kept_experts(len(stacked) + len(removed), removed)
            for expert, tensor in zip(ids, stacked.detach(), strict=True):
                named[f"{prefix}.{layer}{name.replace('*', str(expert))}"] = tensor.contiguous()
        return named

    @property
    def reverse_op(self) -> Stack:
        """What loading does."""
        return Stack()


def _conversions(constants: tuple[str, ...] = CONSTANT_NAMES) -> list[Any]:
    # The leading dot sets the patterns apart from the family's own, which come along unasked.
    experts = ".mlp.experts"
    gate_up = [f"{experts}.*.gate_proj.weight", f"{experts}.*.up_proj.weight"]
    return [
        WeightConverter(gate_up, f"{experts}.gate_up_proj", [Stack(), Concatenate(dim=1)]),
        WeightConverter(f"{experts}.*.down_proj.weight", f"{experts}.down_proj", [Stack()]),
        *(WeightConverter(name, f"{experts}.approx_value", [Stack()]) for name in constants),
    ]


class ExactModel:
    """Goes before a family's class for causal language modelling."""

    config: Any
    model: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        is_earlier = bool(getattr(config, "approximate_experts", None))
        self._weight_conversions = _conversions((CONSTANT_NAMES[is_earlier],))
        for layer, block in enumerate(self.model.layers):
            if removed := removed_experts(config, layer):
                _extend(block.mlp.experts, ConstantExperts)
                block.mlp.experts.make_constant(removed)
            if layer in (getattr(config, "biased_gates", None) or ()):
                gate = block.mlp.gate
                _extend(gate, BiasedRouter)
                gate.bias = nn.Parameter(gate.weight.new_zeros(len(gate.weight)))

    def initialize_weights(self) -> None:
        """As every model; constants and biases that were not loaded become zeros."""
        super().initialize_weights()  # type: ignore[misc]
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            is_loaded = getattr(parameter, "_is_hf_initialized", False)
            if name.endswith((".approx_value", ".gate.bias")) and not is_loaded:
                nn.init.zeros_(parameter)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As every model, on one process or by `device_map`."""
        for option in ("tp_plan", "tp_size", "distributed_config"):
            if kwargs.get(option) is not None:
                raise ValueError(f"{option} is not supported: every rank would add the constants")
        _register(cls)  # the file of an earlier checkpoint may have registered since
        return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As every model; without biased gates under the name that vLLM knows the family by."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        is_written = (Path(save_directory) / "config.json").exists()  # not for a PEFT adapter
        if is_written and not getattr(self.config, "biased_gates", None):
            self.config.architectures = [type(self).__name__.removeprefix("Exact")]
            self.config.save_pretrained(save_directory)


def _define(family: Any) -> None:
    """From `OlmoeForCausalLM`: `ExactOlmoeForCausalLM` and `ExactOlmoeConfig`, names of this file.

    The config is that of checkpoints with biased gates alone. Its `model_type` is its own, for
    whatever knows the family only would load those without the biases, with a warning at best.
    """
    base = family.config_class
    body: dict[str, Any] = {"model_type": f"exact_{base.model_type}", "__module__": __name__}
    config = type(f"Exact{base.__name__}", (base,), body)
    body = {"config_class": config, "__module__": __name__}
    model = type(f"Exact{family.__name__}", (ExactModel, family), body)
    globals().update({made.__name__: made for made in (config, model)})
    _register(model)


def _register(model: Any) -> None:
    """Custom code is given no conversions of its family; it gets its own by the class's name."""
    register_checkpoint_conversion_mapping(model.__name__, _conversions(), overwrite=True)


# Their gates and experts are the same modules under the same names.
FAMILIES = (FlexOlmoForCausalLM, OlmoeForCausalLM, Qwen2MoeForCausalLM, Qwen3MoeForCausalLM)
for _family in FAMILIES:
    _define(_family)
