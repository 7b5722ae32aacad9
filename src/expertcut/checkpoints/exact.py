"""Layout `exact`: removed experts become constants, biases become biases of the gate.

The files follow vLLM's constant-expert substitution (0.33 and later): kept experts keep ids and
names, a removed one leaves `<block>.constant_experts.<id>.approx_value` (D,), `config.json`
declares each under `compression_config.transform_config.expert_substitution`, and
`modeling_exact.py` beside it runs them in transformers.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from expertcut.checkpoints import tensor_names
from expertcut.checkpoints.edit import LayoutWriter, TensorChanges
from expertcut.checkpoints.tensor_names import DiskBlock
from expertcut.edits.calibrate import Constants, Removed
from expertcut.edits.layouts import Positions
from expertcut.edits.plan import BlockEdit, removed_experts
from expertcut.errors import ContractError
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.expert_routing import ROUTING_KEY
from expertcut.models.load import MODELLING_FILE, ROUTED_EXACT_FILE, Source, modelling_code
from expertcut.models.safetensors_index import DTYPES, StoredTensor
from expertcut.models.validate import expert_count
from expertcut.scoring.rerouting import Rerouting

# By config.model_type, the name before `ForCausalLM`: those that the modelling file knows.
FAMILIES = dict(flex_olmo="FlexOlmo", olmoe="Olmoe", qwen2_moe="Qwen2Moe", qwen3_moe="Qwen3Moe")
_MODULE = MODELLING_FILE.removesuffix(".py")
_CODE = (MODELLING_FILE, ROUTED_EXACT_FILE)


class ExactWriter(LayoutWriter):
    """Removed experts become constants; a bias stays a bias, and nothing else changes."""

    def check(self, source: Source, *, is_cutting: bool) -> None:
        config = read_config(source.path)
        source.refuse_packed("cut with layout exact")
        refuse_routed(source, config)
        _check_exact(config, is_cutting=is_cutting)

    def check_routing(self, source: Source, routing: Rerouting) -> None:
        raise ContractError(
            "layout exact has no place for a routing rule: take --layout routed, or stock with "
            "--rule top-k"
        )

    def changes(self, source: Source, edits: Mapping[str, BlockEdit]) -> TensorChanges:
        """Constants with earlier names get today's."""
        headers = source.headers
        blocks = tensor_names.find_disk_blocks(headers)
        renamed = tensor_names.earlier_constants(headers)
        return TensorChanges(headers=headers, edits=edits, blocks=blocks, renamed=renamed)

    def remove_experts(self, tensors: TensorChanges, constants: Constants) -> None:
        """Replaces experts by constants in the dtype of the experts."""
        for name, by_expert in as_stored(tensors.headers, constants).items():
            for expert, value_D in sorted(by_expert.items()):
                tensors.removed.update(_own_tensors(tensors.blocks, name, expert))
                tensors.added[tensor_names.constant_name(name, expert)] = value_D

    def reorder_experts(self, tensors: TensorChanges) -> None:
        super().reorder_experts(tensors)
        for tensor, (block, expert) in tensor_names.constants_in(tensors.headers).items():
            if order := tensors.edits[block].order:
                tensors.renamed[tensor] = tensor_names.constant_name(block, order.index(expert))

    def check_expert(self, tensors: TensorChanges, block: str, expert: int) -> None:
        _own_tensors(tensors.blocks, block, expert)

    def add_biases(
        self, tensors: TensorChanges, directions: Mapping[int, Tensor], apply_at: Positions
    ) -> None:
        """Adds a tensor of the gate (E,), or to that of an earlier reweighting."""
        for name, edit in tensors.edits.items():
            if not edit.bias:
                continue
            gate, bias_E = f"{name}.gate.bias", torch.zeros(tensors.blocks[name].n_experts)
            for expert, bias in edit.bias.items():
                bias_E[expert] = bias
            if gate in tensors.headers:
                tensors.apply(gate, partial(Tensor.add_, other=bias_E))
            else:  # float32: in bfloat16 a bias of 12.3 would be 12.3125
                tensors.added[gate] = bias_E

    def config(self, source: Source, tensors: TensorChanges, n_experts: int) -> dict[str, Any]:
        config = read_config(source.path)
        biased = [name for name, edit in tensors.edits.items() if edit.bias]
        earlier = constants_on_disk(tensors.headers) if is_exact(config) else None
        for name in earlier or ():
            if earlier and (order := tensors.edits[name].order):
                earlier[name] = tuple(sorted(map(order.index, earlier[name])))
        return exact_config(config, removed_experts(tensors.edits, n_experts), biased, earlier)

    def files(self, _source: Source, _tensors: TensorChanges) -> Mapping[str, bytes]:
        return {MODELLING_FILE: modelling_code()}


def is_exact(config: Mapping[str, Any]) -> bool:
    """Whether a model has this layout."""
    classes = config.get("auto_map")
    named = classes.get("AutoModelForCausalLM") if isinstance(classes, Mapping) else None
    is_named = isinstance(named, str) and f"{named.rpartition('.')[0]}.py" in _CODE
    return is_named or has_constants(config) or "biased_gates" in config


def refuse_routed(source: Source, config: Mapping[str, Any]) -> None:
    """Raises ContractError for a model of this layout that has a routing rule too."""
    if is_exact(config) and ROUTING_KEY in config:
        raise ContractError(
            f"{source.id} has layout exact and a routing rule ({config[ROUTING_KEY]['rule']}), so "
            "it is neither cut nor reweighted: edit the model that it was made from, then route"
        )


def has_constants(config: Mapping[str, Any]) -> bool:
    """Whether the config declares removed experts, in either form."""
    declared: Any = config
    for key in ("compression_config", "transform_config", "expert_substitution", "targets"):
        declared = declared.get(key) if isinstance(declared, Mapping) else None
    return bool(declared) or has_earlier_names(config)


def has_earlier_names(config: Mapping[str, Any]) -> bool:
    """Whether constants have their earlier names, which vLLM 0.32 skips: it answers NaN."""
    return bool(config.get("approximate_experts"))


def _check_exact(config: Mapping[str, Any], *, is_cutting: bool) -> None:
    model_type = family_type(config)
    if is_exact(config) and is_cutting:
        raise ContractError(
            "the model has layout exact already: it can be reweighted, but to cut it again, cut "
            "the one it was made from"
        )
    if model_type not in FAMILIES:
        raise ContractError(
            f"layout exact does not support {model_type} models, only "
            f"{', '.join(sorted(FAMILIES))}: use --layout stock"
        )
    if "compression_config" in config and not has_constants(config):
        raise ContractError(
            "config.json has a compression_config, where layout exact declares the removed "
            "experts: use --layout stock"
        )


def exact_config(
    config: Mapping[str, Any],
    removed: Removed,
    biased: Collection[str] = (),
    earlier: Removed | None = None,
) -> dict[str, Any]:
    """The original config with the data of the modelling file; `biased` are block names.

    `earlier` are the constants of a model of this layout, which stay, as do its biased gates.
    Without biases `architectures` and `model_type` stay the family's, by which vLLM reads the
    checkpoint. Neither vLLM nor the family's class in transformers has a place for a gate's bias,
    so that with one both names change and both refuse the checkpoint.
    """
    _check_exact(config, is_cutting=any(removed.values()))
    model_type, n_experts = family_type(config), expert_count(dict(config)) or 0
    family = FAMILIES[model_type]
    auto_map = {"AutoModelForCausalLM": f"{_MODULE}.Exact{family}ForCausalLM"}
    edited = {**config, "auto_map": auto_map}
    edited.pop("approximate_experts", None)
    constants = {block: ids for block, ids in (earlier or removed).items() if ids}
    if constants:
        declared = _substitution(constants, n_experts)
        edited["compression_config"] = {"transform_config": {"expert_substitution": declared}}
    if gates := {*config.get("biased_gates", ()), *map(_layer_number, biased)}:
        auto_map["AutoConfig"] = f"{_MODULE}.Exact{family}Config"
        edited["architectures"] = [f"Exact{family}ForCausalLM"]
        edited["model_type"] = f"exact_{model_type}"
        edited["biased_gates"] = sorted(gates)
    return edited


def _substitution(constants: Removed, n_experts: int) -> dict[str, Any]:
    """As vLLM 0.33 reads it, in model_executor/layers/fused_moe/expert_substitution.py."""
    targets = {
        f"{block}.experts": {
            "num_logical_experts": n_experts,
            "weight_layout": "compact_retained_experts",
            "replacements": {
                str(expert): {
                    "format": "constant-v1",
                    "tensors": {"value": tensor_names.constant_name(block, expert)},
                }
                for expert in sorted(constants[block])
            },
        }
        for block in sorted(constants, key=_layer_number)
    }
    routing = {
        "preserve_logical_expert_ids": True,
        "preserve_router_weights": True,
        "renormalize_after_substitution": False,
    }
    return {"version": 1, "router_semantics": routing, "targets": targets}


def constants_on_disk(headers: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    """The experts of each block that are constants, by either name."""
    return {
        block.name: constants
        for block in tensor_names.find_disk_blocks(headers).values()
        if (constants := tuple(e for e, own in enumerate(block.by_expert) if not own))
    }


def family_type(config: Mapping[str, Any]) -> str:
    """The family's `model_type`, also for a model with biased gates."""
    model_type = str(config.get("model_type"))
    return model_type.removeprefix("exact_") if is_exact(config) else model_type


def _layer_number(block: str) -> int:
    """The decoder layer of a block: `model.layers.3.mlp` is in layer 3, dense layers counted."""
    numbers = [int(part) for part in block.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise ContractError(f"{block} must have one layer number in its name, has {len(numbers)}")
    return numbers[0]


def as_stored(headers: Mapping[str, StoredTensor], constants: Constants) -> Constants:
    """The constants in the dtype of their experts' weights on disk."""
    blocks = tensor_names.find_disk_blocks(headers)
    stored: dict[str, dict[int, Tensor]] = {}
    for name, by_expert in constants.items():
        for expert, value_D in by_expert.items():
            like = headers[_own_tensors(blocks, name, expert)[0]]
            stored.setdefault(name, {})[expert] = value_D.to(DTYPES[like.dtype])
    return stored


def _own_tensors(blocks: Mapping[str, DiskBlock], name: str, expert: int) -> list[str]:
    if name in blocks and blocks[name].by_expert and not blocks[name].by_expert[expert]:
        raise ContractError(
            f"expert {expert} of {name} is a constant already: it cannot be changed"
        )
    if name not in blocks or not blocks[name].by_expert:
        raise ContractError(
            f"{name} has no tensors of its own for each expert on disk, which layout exact needs: "
            "save the model in its original format"
        )
    return sorted(blocks[name].by_expert[expert].values())
