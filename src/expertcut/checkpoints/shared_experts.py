"""Bytes of several cuts of one model if the experts that they share were held once."""

from collections.abc import Sequence

from expertcut.checkpoints.tensor_names import blocks_of, find_disk_blocks
from expertcut.edits.plan import BlockEdit, PlanFile, lineage
from expertcut.models.load import Source
from expertcut.models.safetensors_index import read_headers

Piece = tuple[str, str, int, int]
"""The model before any cut (its fingerprint), the block, the expert's id, and its bytes."""


def union_bytes(sources: Sequence[Source]) -> int:
    """Bytes of all weights, each expert of one unedited model counted once.

    Healed and merged experts are a checkpoint's own. The folded growth of gate weights (layout
    stock) is a factor of an expert, and does not make it another.
    """
    pieces = [expert_pieces(source) for source in sources]
    total = sum(file.stat().st_size for source in sources for file in source.weight_files)
    shared = set().union(*pieces)
    return total - sum(p[-1] for own in pieces for p in own) + sum(p[-1] for p in shared)


def expert_pieces(source: Source) -> set[Piece]:
    """The experts that a checkpoint holds, by their ids before any cut."""
    plans = list(lineage(source.path))
    headers = read_headers(source.path)
    if not plans:
        blocks, edits = find_disk_blocks(headers), dict[str, BlockEdit]()
        origin = source.fingerprint
    else:
        plan = plans[0][0]
        edits, blocks = dict(plan.blocks), blocks_of(headers, plan.blocks)
        is_own = any(_changes_experts(step) for step, _ in plans)
        origin = source.fingerprint if is_own else plans[-1][0].model.fingerprint
    pieces = set()
    for name, block in blocks.items():
        held = [e for e in range(block.n_experts) if e not in block.constants]
        names = [n for own in block.by_expert for n in own.values()] + [*block.fused]
        size_bytes = sum(headers[n].end - headers[n].begin for n in names) // len(held)
        ids = edits[name].keep if name in edits else tuple(held)
        pieces |= {(origin, block.name, expert, size_bytes) for expert in ids}
    return pieces


def _changes_experts(plan: PlanFile) -> bool:
    return plan.removal == "merge" or plan.healed_from is not None
