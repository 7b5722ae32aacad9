"""Layout `stock`: tensors that every loader knows, with fewer rows."""

import logging
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from expertcut.checkpoints.edit import LayoutWriter, TensorChanges
from expertcut.checkpoints.exact import is_exact, refuse_routed, refuse_unclear
from expertcut.checkpoints.tensor_names import (
    Headers,
    OutsideAxes,
    match_blocks,
    renumbered,
    with_constants,
)
from expertcut.edits.calibrate import Constants
from expertcut.edits.layouts import Positions
from expertcut.edits.plan import BlockEdit
from expertcut.errors import ContractError
from expertcut.models.checkpoint_dir import TEXT_PARTS, parts_of, read_config
from expertcut.models.expert_routing import ExpertRouting, routing_in
from expertcut.models.load import Source
from expertcut.models.meta_model import router_widths
from expertcut.models.modeling_packed import PACKING_KEY
from expertcut.models.moe_block import SELECTION_BIAS
from expertcut.models.validate import with_expert_count, with_top_k
from expertcut.scoring.rerouting import Rerouting

logger = logging.getLogger(__name__)
# num_nextn_predict_layers, num_mtp_layers, mtp_num_hidden_layers, num_mtp_modules, mtp_num_layers
_COUNT = re.compile(r"(num_|n_)(\w+_)?(mtp|nextn)(_\w+)?|(mtp|nextn)_num_\w+")
_NOT_BY_LAYER = re.compile(r".*(token_id|token_ids|architectures)")


class StockWriter(LayoutWriter):
    """Removed experts leave no row in any tensor, and no token is routed to them."""

    def check(self, source: Source, *, is_cutting: bool) -> None:
        config = read_config(source.path)
        refuse_routed(source, config)
        if is_exact(config):
            raise ContractError(
                f"{source.id} has layout exact, which layout stock cannot carry on: take --layout "
                "exact"
            )
        routing = routing_in(config)
        if routing is not None:
            if is_cutting:
                routing.check_cut()
            logger.warning("%s keeps its routing rule: %s", source.id, routing.rule)

    def check_routing(self, source: Source, routing: Rerouting) -> None:
        config = read_config(source.path)
        if is_exact(config):
            raise ContractError(
                f"{source.id} has layout exact, on which a rule is in layout routed only: take "
                "--layout routed"
            )
        if routing.rule.rule != "top-k":
            raise ContractError(
                "layout stock has no place for a threshold by token: take --layout routed, or "
                "--rule top-k"
            )
        asked, top_k = sorted(set(routing.thresholds)), int(max(routing.thresholds))
        widths = router_widths(with_top_k(config, top_k))
        if len(asked) > 1 or len(widths) != len(routing.at_by_layer):
            raise ContractError(
                f"layout stock has one number of experts per token for all {len(widths)} layers, "
                f"asked are {', '.join(f'{k:g}' for k in asked)} in {len(routing.at_by_layer)}: "
                "take --layout routed"
            )
        if set(widths) != {top_k}:
            raise ContractError(
                f"{source.id}: no known field of config.json sets the experts per token of its "
                "routers: take --layout routed"
            )

    def changes(self, source: Source, edits: Mapping[str, BlockEdit]) -> TensorChanges:
        """Matches blocks by name, then by layer; MTP layers match none."""
        headers = source.headers
        matched, unused = match_blocks(headers, edits, outside_axes(source, headers, edits))
        for name, block in matched.items():
            if edits[name].keep[-1] >= block.n_experts:
                raise ContractError(
                    f"{block.name} has {block.n_experts} experts on disk, the plan keeps "
                    f"{edits[name].keep[-1]}: it is of another model"
                )
        if source.packing is not None:
            matched = {name: with_constants(own, headers) for name, own in matched.items()}
        return TensorChanges(headers=headers, edits=edits, blocks=matched, unused=unused)

    def remove_experts(self, tensors: TensorChanges, constants: Constants) -> None:
        """Cuts rows, renumbers kept experts, and drops MTP layers: config.json has one count."""
        for name, block in tensors.blocks.items():
            keep = tensors.edits[name].keep
            if len(keep) == block.n_experts:
                continue
            for expert, own in enumerate(block.by_expert):
                if expert not in keep:
                    tensors.removed |= set(own.values())
                elif (position := keep.index(expert)) != expert:
                    tensors.renamed |= renumbered(block, expert, position)
            for tensor, axis in block.axes.items():
                tensors.keep_rows(tensor, axis, keep)
            tensors.removed |= tensors.unused

    def add_biases(
        self, tensors: TensorChanges, directions: Mapping[int, Tensor], apply_at: Positions
    ) -> None:
        """Adds b·v to the gate's row, or b to the router's own bias, which acts at every token."""
        for layer, (name, block) in enumerate(tensors.blocks.items()):
            edit = tensors.edits[name]
            if not edit.bias:
                continue
            refuse_unclear(block)
            uses_own = block.logit_bias and apply_at == "all"
            v_D = None if uses_own else directions.get(layer)
            added: dict[int, float | Tensor] = {
                edit.keep.index(expert): bias if v_D is None else bias * v_D
                for expert, bias in edit.bias.items()
            }
            target = block.logit_bias if v_D is None else block.router_weight
            assert target is not None
            tensors.apply(target, partial(_added, added=added))

    def config(self, source: Source, tensors: TensorChanges, n_experts: int) -> dict[str, Any]:
        n_kept = len(next(iter(tensors.edits.values())).keep)
        config = read_config(source.path)
        if n_kept < n_experts and (routing := tensors.routing or routing_in(config)):
            routing.check_cut(n_kept)
        counted = with_expert_count(config, n_experts, n_kept)
        if PACKING_KEY in counted:
            counted[PACKING_KEY] = _packing(counted[PACKING_KEY], tensors)
        if n_kept < n_experts and tensors.unused:
            counted = without_further_tokens(counted)
        return self._with_rule(counted, tensors.routing) if tensors.routing else counted

    def _with_rule(self, config: dict[str, Any], routing: ExpertRouting) -> dict[str, Any]:
        """The config with the rule in it."""
        return with_top_k(config, int(routing.layers[0]))


def _packing(said: Mapping[str, Any], tensors: TensorChanges) -> dict[str, Any]:
    """How experts are stored, by their new numbers."""
    options = {name: dict(own) for name, own in said["options"].items()}
    for name, block in tensors.blocks.items():
        rows = tensors.edits[name].order or tensors.edits[name].keep
        own = options.get(block.name, {"*": "whole"})
        if {*own} != {"*"}:
            options[block.name] = {
                str(i): own.get(str(row), own.get("*", "")) for i, row in enumerate(rows)
            }
    return {**said, "options": options}


def _added(tensor: Tensor, added: Mapping[int, float | Tensor]) -> Tensor:
    for row, addend in added.items():
        tensor[row] += addend.cpu().to(tensor.dtype) if isinstance(addend, Tensor) else addend
    return tensor


def outside_axes(source: Source, headers: Headers, edits: Mapping[str, BlockEdit]) -> OutsideAxes:
    """Tensors on disk with an axis of experts outside their block, and unclear selection biases."""
    matched, unused = match_blocks(headers, edits)
    n_experts = {block.n_experts for block in matched.values()}
    inside = tuple(f"{block.name}." for block in matched.values())
    suspects = [
        name
        for name, tensor in headers.items()
        if n_experts & set(tensor.shape) and not name.startswith(inside) and name not in unused
    ]
    unclear = {block.unclear_bias for block in matched.values() if block.unclear_bias}
    suspects += sorted(unclear)
    if not suspects:
        return {}
    found: dict[str, dict[str, int]] = {}
    # The conversions of transformers assign them to blocks, by name.
    for name, (parameter, axis) in source.expert_axes(suspects).items():
        block = next((b for b in matched if parameter.startswith(f"{b}.")), None)
        if block is None:
            raise ContractError(
                f"{name} has an entry for each expert, but belongs to no MoE block of the model: "
                "this form is not supported"
            )
        if name not in unclear or parameter.rpartition(".")[2] in SELECTION_BIAS:
            found.setdefault(block, {})[name] = axis
    return found


def without_further_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without layers that predict further tokens: counts are 0, lists lose their end."""
    *_, text = parts_of(config)
    fields = {**config, **text}
    nested = fields.get("mtp_config")
    pairs = [*fields.items(), *(nested.items() if isinstance(nested, dict) else ())]
    counts = [value for key, value in pairs if _COUNT.fullmatch(key)]
    n_layers = fields.get("num_hidden_layers")
    n_further = max((value for value in counts if type(value) is int), default=0)
    length = n_layers + n_further if isinstance(n_layers, int) and n_further else None
    edited = _without_layers(config, length, n_further)
    if not counts:  # several families then count 1
        parts_of(edited)[-1]["num_nextn_predict_layers"] = 0
    return edited


def _without_layers(
    config: Mapping[str, Any], length: int | None, n_further: int
) -> dict[str, Any]:
    edited = dict(config)
    for key, value in config.items():
        if key in (*TEXT_PARTS, "mtp_config") and isinstance(value, dict):
            edited[key] = _without_layers(value, length, n_further)
        elif _COUNT.fullmatch(key) and type(value) in (int, type(None)):
            edited[key] = 0
        elif key == "use_mtp":
            edited[key] = False
        elif isinstance(value, list) and len(value) == length and not _NOT_BY_LAYER.fullmatch(key):
            edited[key] = value[:-n_further]
    return edited
