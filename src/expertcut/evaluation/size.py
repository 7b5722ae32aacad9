"""How large a checkpoint is: parameters, those that a token uses, bytes."""

from dataclasses import dataclass

from expertcut.moe.loading import MoeModel


@dataclass(frozen=True)
class Size:
    """`active_parameters` are all but those of the experts that a token does not choose."""

    parameters: int
    active_parameters: int
    size_bytes: int


def size(moe: MoeModel) -> Size:
    """Counts what is loaded, tied weights once; bytes are those of the safetensors files."""
    total = sum(p.numel() for p in moe.model.parameters())
    idle = sum(
        sum(p.numel() for p in b.experts.parameters()) // b.n_experts * (b.n_experts - b.top_k)
        for b in moe.blocks
    )
    size_bytes = sum(file.stat().st_size for file in moe.source.weight_files)
    return Size(total, total - idle, size_bytes)
