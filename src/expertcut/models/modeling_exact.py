"""A Mixture-of-Experts model, some of whose experts give a constant: expertcut's layout `exact`.

It is the family's own model, of which three things are wrapped: experts modules, routers with a
bias, and the names on disk. The router keeps a row for every expert, so all gate weights are those
of the unedited model. A removed expert adds its `approx_value` (zero, or its mean output) times its
gate weight, and has no other weights left; every layer has its own number of them. A gate may have
a bias, added to its logits. `config.json` says where, by the names and numbers of decoder layers:

    "compression_config": {"transform_config": {"expert_substitution": {"targets": {
        "model.layers.<layer>.mlp.experts": {"replacements": {"<id of a removed expert>": ...}}}}}}
    "biased_gates": [layers whose gate has a bias]

The first is vLLM's declaration of constant experts, version 1. The weights hold the constants as
`model.layers.<layer>.mlp.constant_experts.<id>.approx_value`. No loader takes that name for one of
an expert: one that does not know constant experts stops there. Earlier checkpoints declare
`"approximate_experts": {"<layer>": [ids]}` and name constants `...mlp.experts.<id>.approx_value`.
They are loaded too, and saved again under the names that they had.

Kept experts keep their ids and names in the files, and `save_pretrained` writes them so; a tensor
of all experts holds the rows of those that are kept, in the order of their ids. Needs transformers
5.22 or later, and nothing of expertcut. Names of tensors end in their axes: T tokens, D width,
E experts of a layer, K experts per token, R removed experts.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
)

# The last part of a router's name, or of the matrix in it, on disk and in the model.
_GATE = r"(gate|router|layer|proj|wg)"


def layer_number(name: str) -> int:
    """The decoder layer in a module's or tensor's name: its first number."""
    found = re.search(r"\.(\d+)(?=\.|$)", name)
    return int(found[1]) if found else -1


def removed_experts(config: Any, layer: int) -> list[int]:
    """Sorted ids of a layer's constant experts."""
    if by_layer := getattr(config, "approximate_experts", None):
        return sorted(by_layer.get(str(layer), by_layer.get(layer, ())))
    transforms = (getattr(config, "compression_config", None) or {}).get("transform_config") or {}
    targets = (transforms.get("expert_substitution") or {}).get("targets") or {}
    own = [target for name, target in targets.items() if layer_number(name) == layer]
    return sorted(int(expert) for target in own for expert in target.get("replacements") or ())


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
    has_bias: bool
    has_gate: bool
    is_transposed: bool
    down_proj: Tensor
    approx_value: Tensor

    def make_constant(self, removed: list[int]) -> None:
        """Drops the weights of the removed experts; their constants (R, D) start as zeros."""
        order = [*kept_experts(self.num_experts, removed), *removed]
        self.places = [order.index(expert) for expert in range(len(order))]
        self.num_experts -= len(removed)
        for name, weight in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(weight.detach()[order[: self.num_experts]]))
        width = self.down_proj.shape[2 if self.is_transposed else 1]
        self.approx_value = nn.Parameter(self.down_proj.new_zeros(len(removed), width))

    @property
    def is_skipping(self) -> bool:
        """Whether an index behind the last row is skipped; else a removed expert needs some row.

        Loops do so (by_expert is expertcut's own), but for those of GPT-OSS and Nemotron.
        """
        how = self.config._experts_implementation
        is_plain = self.has_gate and not self.has_bias
        return how == "by_expert" or (how in ("eager", None) and is_plain)

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """As the family's own; expert ids are those of the router."""
        places_TK = torch.tensor(self.places, device=experts_TK.device)[experts_TK]
        is_removed_TK = places_TK >= self.num_experts
        row = self.num_experts if self.is_skipping else 0
        rows_TK = places_TK.masked_fill(is_removed_TK, row)
        y_TD: Tensor = super().forward(x_TD, rows_TK, weights_TK.masked_fill(is_removed_TK, 0))
        weights_TE = x_TD.new_zeros(len(x_TD), len(self.places), dtype=torch.float)
        weights_TE = weights_TE.scatter(1, places_TK, weights_TK.float())
        constant_TD = weights_TE[:, self.num_experts :] @ self.approx_value.float()
        # A token that chose no removed expert keeps its output to the sign of its zeros.
        is_changed_T1 = is_removed_TK.any(dim=1, keepdim=True)
        return torch.where(is_changed_T1, y_TD + constant_TD.to(y_TD.dtype), y_TD)


class BiasedRouter(nn.Module):
    """Goes before a family's router class: a bias (E,) on the product that gives its logits."""

    bias: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the family's own."""
        with _Biased(self.bias):
            return super().forward(*args, **kwargs)


class _Biased(TorchFunctionMode):
    def __init__(self, bias_E: Tensor) -> None:
        super().__init__()
        self.bias_E = bias_E

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        is_gate = func is F.linear and result.shape[-1] == len(self.bias_E)
        return result + self.bias_E.to(result.dtype) if is_gate else result


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
        full_name: str = details["full_layer_name"]
        before, _, after = full_name.partition(target_patterns[0])
        removed = removed_experts(details["config"], layer_number(full_name))
        named: dict[str, Tensor] = {}
        for source, found in input_dict.items():
            stacked = found[0] if isinstance(found, list) else found
            name = source if "*" in source else target_patterns[0]
            is_constant = name.endswith("approx_value")
            ids = removed if is_constant else kept_experts(len(stacked) + len(removed), removed)
            for expert, tensor in zip(ids, stacked.detach(), strict=True):
                named[before + name.replace("*", str(expert)) + after] = tensor.contiguous()
        return named

    @property
    def reverse_op(self) -> Stack:
        """What loading does."""
        return Stack()


def _conversions(model: Any, quantizer: Any = None) -> list[Any]:
    """The family's, which keep the ids of experts, and those of constants and biases.

    Constants go as if they were of experts, and biases as if they were of matrices, so that
    whatever the family renames on its way is renamed for them too.
    """
    config: Any = model.config
    own, model_type = type(model), config.model_type
    try:  # transformers finds them by the names of the family
        model.__class__, config.model_type = _family_of(own), _family_of(type(config)).model_type
        family = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    finally:
        model.__class__, config.model_type = own, model_type
    for one in family:
        if isinstance(one, WeightConverter) and "experts" in one.target_patterns[0]:
            one.operations = [Stack() if _is_stack(op) else op for op in one.operations]
    first, last = [], []
    if not getattr(config, "approximate_experts", None):
        name = r"experts\.(\d+)\.approx_value"
        first.append(WeightRenaming(rf"\.constant_{name}", r"\.experts\.\1\.approx_value"))
    if getattr(config, "biased_gates", None):
        first.append(WeightRenaming(rf"\.{_GATE}\.bias", r"\.\1\.weight\.bias"))
        last.append(WeightRenaming(rf"\.{_GATE}\.weight\.bias", r"\.\1\.bias"))
    constants = WeightConverter(".experts.*.approx_value", ".experts.approx_value", [Stack()])
    return [*first, *family, *last, constants]


def _is_stack(operation: Any) -> bool:
    return isinstance(operation, MergeModulelist) and operation.dim == 0


def _family_of(made: Any) -> Any:
    return next(base for base in made.__mro__ if base.__module__.startswith("transformers."))


class ExactModel:
    """Goes before a family's class for causal language modelling."""

    config: Any
    added: tuple[str, ...] = (
        ".approx_value",
    )  # ends of the names of parameters that the family does not have

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        biased = getattr(config, "biased_gates", None) or ()
        for name, block in self._blocks():
            layer = layer_number(name)
            if layer in biased:
                gate, path = _gate(name, block)
                if not isinstance(gate, nn.Linear):
                    _extend(gate, BiasedRouter)
                gate.bias = nn.Parameter(gate.weight.new_zeros(len(gate.weight)))
                self.added += (f"{path}.bias",)
            if removed := removed_experts(config, layer):
                _extend(block.experts, ConstantExperts)
                block.experts.make_constant(removed)
        own = _conversions(self)
        self._weight_conversions = [one for one in own if not isinstance(one, PrefixChange)]

    def _blocks(self) -> Iterator[tuple[str, Any]]:
        """The modules with experts that run as one, by name."""
        for name, module in self.named_modules():  # type: ignore[attr-defined]
            if hasattr(getattr(module, "experts", None), "down_proj"):
                yield name, module

    def initialize_weights(self) -> None:
        """As every model; constants and biases that were not loaded become zeros."""
        super().initialize_weights()  # type: ignore[misc]
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            is_loaded = getattr(parameter, "_is_hf_initialized", False)
            if name.endswith(self.added) and not is_loaded:
                nn.init.zeros_(parameter)

    @classmethod
    def _load_pretrained_model(
        cls, model: Any, state_dict: Any, files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As every model, by its own names on disk."""
        mapping = _conversions(model, load_config.hf_quantizer)
        load_config = replace(load_config, weight_mapping=mapping)
        family: Any = super()
        return family._load_pretrained_model(model, state_dict, files, load_config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As every model, on one process or by `device_map`."""
        for option in ("tp_plan", "tp_size", "distributed_config"):
            if kwargs.get(option) is not None:
                raise ValueError(f"{option} is not supported: every rank would add the constants")
        return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As every model; without biased gates under the name that vLLM knows the family by."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        is_written = (Path(save_directory) / "config.json").exists()  # not for a PEFT adapter
        if is_written and not getattr(self.config, "biased_gates", None):
            self.config.architectures = [type(self).__name__.removeprefix("Exact")]
            self.config.save_pretrained(save_directory)


def _gate(name: str, block: Any) -> tuple[Any, str]:
    """The module that holds the matrix of a block's router, and its name: the router or a part."""
    routers = [n for n, m in block.named_children() if n == "router" or hasattr(m, "top_k")]
    for path, module in block.named_modules():
        shape: Any = getattr(getattr(module, "weight", None), "shape", ())
        is_gate = len(shape) == 2 and shape[0] == block.experts.num_experts
        if is_gate and path.partition(".")[0] in routers:
            return module, f"{name}.{path}"
    raise ValueError(f"{name} has no router with a matrix of {block.experts.num_experts} rows")


@cache
def _defined(name: str) -> Any:
    """`ExactOlmoeForCausalLM` and `ExactOlmoeConfig`, of the classes without `Exact`.

    The config is that of checkpoints with biased gates alone. Its `model_type` is its own, for
    whatever knows the family only would load those without the biases, with a warning at best.
    """
    base = getattr(transformers, name.removeprefix("Exact"))
    if issubclass(base, transformers.PreTrainedConfig):
        body: dict[str, Any] = {"model_type": f"exact_{base.model_type}", "__module__": __name__}
        return type(name, (base,), body)
    config = _defined(f"Exact{base.config_class.__name__}")
    return type(name, (ExactModel, base), {"config_class": config, "__module__": __name__})


def __getattr__(name: str) -> Any:
    """The classes of a family, made when they are asked for."""
    if name.startswith("Exact"):
        return _defined(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
