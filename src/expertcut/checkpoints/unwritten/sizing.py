"""How large the weights of a cut will be, to the byte, and the largest cut that fits in a size."""

from collections.abc import Callable

from expertcut.checkpoints.export import check_layout, cut_rewrite
from expertcut.checkpoints.files.shards import lay_out
from expertcut.checkpoints.files.streaming import MAX_SHARD_BYTES
from expertcut.edits.budget import Keep, counts
from expertcut.edits.plan import Draft, Layout
from expertcut.edits.prune import Pruning, cut
from expertcut.edits.ranking import Ranking
from expertcut.errors import PlanError
from expertcut.models.load import Source
from expertcut.models.safetensors_index import read_stored

SizeOf = Callable[[Draft], int]


def size_of_cuts(source: Source, layout: Layout, n_experts: int) -> SizeOf:
    """Bytes of the safetensors files that a cut of this checkpoint will have, headers and all.

    Raises:
        ContractError: the layout does not know the model's family.
    """
    check_layout(source, layout, is_cutting=True)
    stored = read_stored(source.path)

    def size_of(draft: Draft) -> int:
        rewrite = cut_rewrite(source, stored, draft, n_experts)
        return sum(shard.size_bytes for shard in lay_out(stored, rewrite, MAX_SHARD_BYTES))

    return size_of


def largest(ranking: Ranking, keep: Keep, size_of: SizeOf) -> Pruning:
    """The cut that keeps most, with weights of at most `keep.max_bytes`.

    Raises:
        PlanError: not even the smallest is so small.
    """
    assert keep.max_bytes is not None
    keep.check(ranking.way.layout)
    choices = counts(keep, ranking.blocks, ranking.way.layout)
    best, fitting, too_large = cut(ranking, keep, choices[0]), 0, len(choices)
    if (smallest := size_of(best.draft)) > keep.max_bytes:
        raise PlanError(
            f"--max-bytes {keep.max_bytes:,} is too small: the smallest cut, "
            f"{best.draft.action.removeprefix('prune ')}, has {smallest:,} bytes"
        )
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        tried = cut(ranking, keep, choices[middle])
        if size_of(tried.draft) <= keep.max_bytes:
            best, fitting = tried, middle
        else:
            too_large = middle
    return best
