"""How large a checkpoint is: parameters, those that a token uses, bytes."""

from dataclasses import dataclass

from torch import nn

from expertcut.edits.plan import Draft
from expertcut.models.load import MoeModel
from expertcut.models.moe_block import MoeBlock


@dataclass(frozen=True)
class Size:
    """`active_parameters` are all but those of the experts that a token does not choose.

    Where removed experts are constants, these are not active: the token that uses most is meant.
    """

    parameters: int
    active_parameters: int
    size_bytes: int


def size(moe: MoeModel) -> Size:
    """Counts what is loaded, tied weights once; bytes are those of the safetensors files."""
    total = sum(p.numel() for p in moe.model.parameters())
    idle = sum(map(_idle_parameters, moe.blocks))
    size_bytes = sum(file.stat().st_size for file in moe.source.weight_files)
    return Size(total, total - idle, size_bytes)


def size_of_cut(moe: MoeModel, draft: Draft, size_bytes: int) -> Size:
    """What `size` will say of the checkpoint that a cut of this unedited model makes."""
    total = sum(p.numel() for p in moe.model.parameters())
    idle = 0
    for block in moe.blocks:
        n_kept = len(draft.edits[block.name].keep)
        n_removed = block.n_experts - n_kept
        own = sum(p.numel() for p in block.experts.parameters()) // block.n_experts
        n_constants = 0
        if draft.layout == "exact":
            width = int(moe.model.config.get_text_config().hidden_size)
            n_constants = n_removed * width
            total += n_constants - n_removed * own
        else:
            rows = (t for _, _, t, _ in block.expert_tensors() if isinstance(t, nn.Parameter))
            total -= n_removed * sum(t.numel() // block.n_experts for t in rows)
        idle += own * max(0, n_kept - block.top_k) + n_constants
    return Size(total, total - idle, size_bytes)


def _idle_parameters(block: MoeBlock) -> int:
    experts = dict(block.experts.named_parameters())
    constants = experts.pop("approx_value", None)
    n_kept = len(next(iter(experts.values())))
    per_expert = sum(p.numel() for p in experts.values()) // n_kept
    n_constants = 0 if constants is None else constants.numel()
    return per_expert * max(0, n_kept - block.top_k) + n_constants
