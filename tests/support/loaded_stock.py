"""Layout `stock` carried out on a loaded model: what the streamed export must equal bit by bit."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from expertcut.checkpoints.stock import Fitted
from expertcut.edits.plan import BlockEdit
from expertcut.errors import ContractError
from expertcut.models.load import MoeModel
from expertcut.models.moe_block import MoeBlock
from expertcut.models.validate import EXPERT_COUNT_FIELDS

_COUNT_ATTRIBUTES = (*EXPERT_COUNT_FIELDS, "n_experts")


def apply_stock(moe: MoeModel, edits: Mapping[str, BlockEdit], fitted: Fitted) -> None:
    """Carries out the edits in the loaded model."""
    for block in moe.blocks:
        edit = edits[block.name]
        for expert, bias in edit.bias.items():
            _add_bias(block, expert, bias, fitted.directions)
        for expert, factor in edit.scale.items():
            scale_outputs(block, {expert: factor})
        if block.layer in fitted.folds:
            fold = zip(edit.keep, fitted.folds[block.layer], strict=True)
            scale_outputs(block, {expert: float(factor) for expert, factor in fold})
        if len(edit.keep) < block.n_experts:
            cut(block, edit.keep)
    _set_counts(moe.model.config, moe.blocks[0], edits)


def cut(block: MoeBlock, keep: tuple[int, ...]) -> None:
    """Keeps the given experts, in this order, in every tensor with an expert axis."""
    for owner, name, tensor, axis in list(block.expert_tensors()):
        ids = torch.tensor(keep, device=tensor.device)
        kept = tensor.detach().index_select(axis, ids).contiguous()
        if isinstance(tensor, nn.Parameter):
            setattr(owner, name, nn.Parameter(kept, requires_grad=tensor.requires_grad))
        else:
            setattr(owner, name, kept)
    for module in (block.module, block.router, block.experts):
        for attribute in _COUNT_ATTRIBUTES:
            if getattr(module, attribute, None) == block.n_experts:
                setattr(module, attribute, len(keep))


def scale_outputs(block: MoeBlock, factors: Mapping[int, float]) -> None:
    """Multiplies experts' outputs, which equals multiplying their gate weights."""
    last = [p for n, p in block.experts.named_parameters() if n.startswith("down_proj")]
    if not last:
        raise ContractError(f"{block.name}: its experts have no down_proj to scale")
    for expert, factor in factors.items():
        for parameter in last:
            parameter.data[expert] = (parameter.data[expert].double() * factor).to(parameter.dtype)


def _add_bias(block: MoeBlock, expert: int, bias: float, directions: Mapping[int, Tensor]) -> None:
    own = getattr(block.router, "bias", None)
    if isinstance(own, Tensor):
        own.data[expert] += bias
        return
    row_D = block.router.get_parameter("weight").data[expert]
    row_D += (bias * directions[block.layer].to(row_D.device)).to(row_D.dtype)


def _set_counts(config: Any, block: MoeBlock, edits: Mapping[str, BlockEdit]) -> None:
    count = len(edits[block.name].keep)
    for field in EXPERT_COUNT_FIELDS:
        if getattr(config, field, None) == block.n_experts:
            setattr(config, field, count)
