"""Whether edits fit a model's blocks, and whether a layout can carry them."""

from collections.abc import Mapping, Sequence

from expertcut.errors import PlanError
from expertcut.interventions.plan import Edit, Layout
from expertcut.profiling.schema import BlockInfo


def check_edits(edits: Mapping[str, Edit], blocks: Sequence[BlockInfo], layout: Layout) -> None:
    """That the edits fit the blocks and that the layout can carry them.

    Stock has one count for all layers, and the router must find K experts among those that stay;
    exact only needs one that stays.

    Raises:
        PlanError: naming the block and what it must be.
    """
    if list(edits) != [block.name for block in blocks]:
        raise PlanError(
            f"the plan names {len(edits)} blocks, the model has {len(blocks)}: "
            f"list {blocks[0].name} … {blocks[-1].name} in order"
        )
    for block in blocks:
        _check_hashed(block, edits[block.name])
        _check_block(block, edits[block.name], least_of(block, layout))
    if layout == "exact":
        return
    for block in blocks:
        _check_groups(block, edits[block.name])
    counts = {len(edit.keep) for edit in edits.values()}
    if len(counts) > 1 or len({block.experts for block in blocks}) > 1:
        raise PlanError(
            f"layout stock needs one count for all layers, found {sorted(counts)}: "
            "keep the same number in each, or take --layout exact"
        )


def _check_hashed(block: BlockInfo, edit: Edit) -> None:
    if not block.is_hashed:
        return
    if len(edit.keep) < block.experts or edit.merged:
        raise PlanError(
            f"{block.name} chooses its experts by a table of token ids, so all {block.experts} "
            "must stay, and one count holds for all layers of this family: it cannot be cut"
        )
    if edit.bias:
        raise PlanError(
            f"{block.name} chooses its experts by a table of token ids, so a bias changes no "
            "choice there: take an expert of another layer, or --scale"
        )


def _check_block(block: BlockInfo, edit: Edit, least: int) -> None:
    name, n_kept = block.name, len(edit.keep)
    outside = [e for e in edit.keep if not 0 <= e < block.experts]
    if outside:
        raise PlanError(
            f"{name} keeps expert {outside[0]} but has experts 0 to {block.experts - 1}"
        )
    if n_kept < least:
        raise PlanError(
            f"{name} keeps {n_kept} experts but routes each token to {block.top_k}: "
            f"keep at least {least}"
        )
    unknown = sorted({*edit.bias, *edit.scale} - set(edit.keep))
    if unknown:
        raise PlanError(f"{name}: expert {unknown[0]} has a bias or scale but is not kept")


def _check_groups(block: BlockInfo, edit: Edit) -> None:
    if block.groups == 1 or len(edit.keep) == block.experts:
        return
    size = block.experts // block.groups
    per_group = [sum(e // size == g for e in edit.keep) for g in range(block.groups)]
    least = least_per_group(block)
    if len(set(per_group)) > 1 or per_group[0] < least:
        raise PlanError(
            f"{block.name} routes in {block.groups} groups and keeps {per_group} of them: "
            f"keep equally many in each, at least {least}"
        )


def least_of(block: BlockInfo, layout: Layout) -> int:
    """The fewest that may stay: in layout stock the router needs K, and one expert is no mixture.

    A model of one expert would be refused wherever it is read again.
    """
    return max(2, block.top_k) if layout == "stock" else 1


def least_per_group(block: BlockInfo) -> int:
    """Experts that each group must keep: 2 rank a group, and those used must hold the top k."""
    return max(2, -(-block.top_k // block.top_groups))
