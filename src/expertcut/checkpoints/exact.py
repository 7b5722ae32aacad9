"""Layout `exact`: removed experts become constants, biases become biases of the gate.

The files follow vLLM's constant-expert substitution (0.33 and later): kept experts keep ids and
names, a removed one leaves `<block>.constant_experts.<id>.approx_value` (D,), `config.json`
declares each under `compression_config.transform_config.expert_substitution`, and
`modeling_exact.py` beside it runs them in transformers. Where one tensor holds all experts, it
keeps the rows of the kept ones.
"""

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from expertcut.checkpoints import tensor_names
from expertcut.checkpoints.edit import LayoutWriter, TensorChanges
from expertcut.checkpoints.tensor_names import DiskBlock, Headers, blocks_of, constant_name
from expertcut.edits.calibrate import Constants, Removed
from expertcut.edits.layouts import Positions
from expertcut.edits.plan import BlockEdit
from expertcut.errors import ContractError
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.expert_routing import ROUTING_KEY
from expertcut.models.load import MODELLING_FILE, ROUTED_EXACT_FILE, Source, modelling_code
from expertcut.models.safetensors_index import DTYPES
from expertcut.models.validate import expert_count
from expertcut.scoring.rerouting import Rerouting

_MODULE = MODELLING_FILE.removesuffix(".py")
_CODE = (MODELLING_FILE, ROUTED_EXACT_FILE)
_CAP = re.compile(r"\w*router\w*softcap\w*")  # of logits, behind which a bias would have to act
# By config.model_type, of families that layout stock cuts.
REFUSED = frozenset(("dots3_note", "muse_spark", "qwen3_omni_moe", "step3p7"))


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

    def check_biases(self, source: Source, edits: Mapping[str, BlockEdit]) -> None:
        config = read_config(source.path)
        fields = {**config, **(config.get("text_config") or {})}
        if cap := next((f for f, value in fields.items() if _CAP.fullmatch(f) and value), None):
            raise ContractError(
                f"{source.id} caps the logits of its routers ({cap}), so that a bias of a gate "
                "would not move them by just that much: boost and suppress are not supported here"
            )
        own = set(config.get("biased_gates", ()))
        for block in blocks_of(source.headers, edits).values():
            if block.unclear_bias and _layer_number(block.name) not in own:
                refuse_unclear(block)

    def changes(self, source: Source, edits: Mapping[str, BlockEdit]) -> TensorChanges:
        """Constants with earlier names get today's."""
        headers = source.headers
        renamed = tensor_names.earlier_constants(headers)
        blocks = blocks_of(headers, edits)
        return TensorChanges(headers=headers, edits=edits, blocks=blocks, renamed=renamed)

    def remove_experts(self, tensors: TensorChanges, constants: Constants) -> None:
        """Replaces experts by constants in the dtype of the experts."""
        for name, by_expert in as_stored(tensors.headers, constants).items():
            block = tensors.blocks[name]
            for expert, value_D in sorted(by_expert.items()):
                tensors.removed.update(_own_tensors(block, expert))
                tensors.added[constant_name(block.name, expert)] = value_D
            for fused in block.fused:
                kept = tuple(e for e in range(block.n_experts) if e not in by_expert)
                tensors.keep_rows(fused, 0, kept)

    def reorder_experts(self, tensors: TensorChanges) -> None:
        super().reorder_experts(tensors)
        orders = {tensors.blocks[n].name: edit.order for n, edit in tensors.edits.items()}
        for tensor, (block, expert) in tensor_names.constants_in(tensors.headers).items():
            if order := orders.get(block):
                tensors.renamed[tensor] = constant_name(block, order.index(expert))

    def check_expert(self, tensors: TensorChanges, block: str, expert: int) -> None:
        _own_tensors(tensors.blocks[block], expert)

    def add_biases(
        self, tensors: TensorChanges, directions: Mapping[int, Tensor], apply_at: Positions
    ) -> None:
        """Adds a tensor of the gate (E,), or to that of the family or of an earlier reweighting."""
        for name, edit in tensors.edits.items():
            if not edit.bias:
                continue
            block, bias_E = tensors.blocks[name], torch.zeros(tensors.blocks[name].n_experts)
            for expert, bias in edit.bias.items():
                bias_E[expert] = bias
            if (gate := f"{block.router_weight.removesuffix('weight')}bias") in tensors.headers:
                tensors.apply(gate, partial(Tensor.add_, other=bias_E))
            else:  # float32: in bfloat16 a bias of 12.3 would be 12.3125
                tensors.added[gate] = bias_E

    def config(self, source: Source, tensors: TensorChanges, n_experts: int) -> dict[str, Any]:
        config, edits = read_config(source.path), tensors.edits
        constants: dict[str, Collection[int]] = {}
        for name, block in tensors.blocks.items():
            order, gone = edits[name].order, edits[name].removed(n_experts)
            before = map(order.index, block.constants) if order else block.constants
            constants[block.name] = sorted({*before, *gone})
        biased = [tensors.blocks[name] for name, edit in edits.items() if edit.bias]
        return exact_config(config, constants, [b.name for b in biased if not b.logit_bias])

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
    if model_type in REFUSED:
        raise ContractError(
            f"layout exact does not support {model_type}, whose modelling file could not load the "
            "result: use --layout stock"
        )
    if "auto_map" in config and not is_exact(config):
        raise ContractError(
            f"this {model_type[:50]} model brings code of its own, which layout exact would "
            "replace: use --layout stock"
        )
    _class_names(config)
    if "compression_config" in config and not has_constants(config):
        raise ContractError(
            "config.json has a compression_config, where layout exact declares the removed "
            "experts: use --layout stock"
        )


def _class_names(config: Mapping[str, Any]) -> tuple[str, str, str]:
    """The family's classes for config and model, and the Auto class of that."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = family_type(config)
    own: Any = CONFIG_MAPPING[family] if family in CONFIG_MAPPING else None  # noqa: SIM401
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if own not in auto._model_mapping:
            continue
        model: Any = auto._model_mapping[own]
        if model.config_class is own:  # not of its text part alone
            return own.__name__, model.__name__, auto.__name__
    raise ContractError(
        f"layout exact needs a model class of transformers, which {family[:50]} has not: use "
        "--layout stock"
    )


def _has_text_class(config: Mapping[str, Any]) -> bool:
    """Whether transformers has a class of the text part, which cannot load constants."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[family_type(config)] in AutoModelForCausalLM._model_mapping


def exact_config(
    config: Mapping[str, Any], constants: Removed, biased: Collection[str] = ()
) -> dict[str, Any]:
    """The original config with the data of the modelling file, by the names of blocks on disk.

    `constants` are all there will be, `biased` the blocks whose gates get a bias; gates that have
    one already keep it. Without biases `architectures` and `model_type` stay the family's, by which
    vLLM reads the checkpoint. Neither vLLM nor the family's class in transformers has a place for a
    gate's bias, so that with one both names change and both refuse the checkpoint.
    """
    own_config, model, auto = _class_names(config)
    auto_map = {auto: f"{_MODULE}.Exact{model}"}
    if auto != "AutoModelForCausalLM" and _has_text_class(config):
        auto_map["AutoModelForCausalLM"] = auto_map[auto]
    edited = {**config, "auto_map": auto_map}
    edited.pop("approximate_experts", None)
    if constants := {block: ids for block, ids in constants.items() if ids}:
        declared = _substitution(constants, expert_count(dict(config)) or 0)
        edited["compression_config"] = {"transform_config": {"expert_substitution": declared}}
    if gates := {*config.get("biased_gates", ()), *map(_layer_number, biased)}:
        # Of a config of its own the text model's Auto class is asked.
        auto_map["AutoModelForCausalLM"] = auto_map[auto]
        auto_map["AutoConfig"] = f"{_MODULE}.Exact{own_config}"
        edited["architectures"] = [f"Exact{model}"]
        edited["model_type"] = f"exact_{family_type(config)}"
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
                    "tensors": {"value": constant_name(block, expert)},
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


def constants_on_disk(headers: Headers) -> dict[str, tuple[int, ...]]:
    """The experts of each block that are constants, by either name."""
    blocks = tensor_names.find_disk_blocks(headers)
    return {block.name: block.constants for block in blocks.values() if block.constants}


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


def as_stored(headers: Headers, constants: Constants) -> Constants:
    """The constants in the dtype of their experts' weights on disk."""
    stored: dict[str, dict[int, Tensor]] = {}
    for name, block in blocks_of(headers, constants).items():
        for expert, value_D in constants[name].items():
            like = headers[_own_tensors(block, expert)[0] if block.by_expert else block.fused[0]]
            stored.setdefault(name, {})[expert] = value_D.to(DTYPES[like.dtype])
    return stored


def zero_constants(headers: Headers, removed: Removed) -> Constants:
    """Zeros (D,) for experts of a checkpoint."""
    blocks = blocks_of(headers, removed)
    width = {name: tensor_names.output_width(block, headers) for name, block in blocks.items()}
    return {name: {e: torch.zeros(width[name]) for e in ids} for name, ids in removed.items()}


def _own_tensors(block: DiskBlock, expert: int) -> list[str]:
    """The tensors of one expert alone; ContractError for a constant."""
    if expert in block.constants:
        raise ContractError(
            f"expert {expert} of {block.name} is a constant already: it cannot be changed"
        )
    return sorted(block.by_expert[expert].values()) if block.by_expert else []


def refuse_unclear(block: DiskBlock) -> None:
    """Raises ContractError for a bias of the gate that may be one of choosing."""
    if block.unclear_bias:
        raise ContractError(
            f"{block.unclear_bias} may act on gate logits or on choosing only, which its "
            "name does not tell: boost and suppress are not supported here"
        )
