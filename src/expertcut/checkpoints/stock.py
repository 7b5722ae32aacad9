"""Layout `stock`: a plan as a rewrite of the tensors on disk, in tensors that every loader knows.

Pruning slices the expert axis everywhere; where that inflates gate weights, the mean inflation is
folded back into `down_proj`. A bias goes into the router's own bias where it has one, else b·v is
added to the expert's gate row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertcut.checkpoints.shards import Change, Rewrite
from expertcut.checkpoints.tensor_names import DiskBlock, Headers, OutsideAxes, match_blocks
from expertcut.edits.plan import BlockEdit, Positions
from expertcut.errors import ContractError

Apply = Callable[[Tensor], Tensor]

_PART = 1 << 15  # values that are scaled at a time: their float64 copies stay in the CPU's cache


@dataclass(frozen=True)
class Fitted:
    """What the layout needs beside the plan, by layer.

    `folds` scales the kept experts' outputs (kept,), `directions` are v (D,).
    """

    folds: Mapping[int, "np.ndarray[Any, Any]"] = field(default_factory=dict)
    directions: Mapping[int, Tensor] = field(default_factory=dict)


def stock_rewrite(
    headers: Headers,
    edits: Mapping[str, BlockEdit],
    fitted: Fitted,
    apply_at: Positions = "all",
    outside: OutsideAxes | None = None,
) -> Rewrite:
    """What becomes of each tensor; layers in `fitted` are MoE blocks, in the order of `edits`.

    A router's own bias acts at every token, so with `apply_at` `answer` it is left alone. Layers
    that the model has no place for are removed by a cut: config.json states one count of experts
    for all layers.

    Raises:
        ContractError: tensors on disk that cannot be told apart, or do not fit the edits.
    """
    matched, unused = match_blocks(headers, edits, outside)
    is_cut = any(len(edits[name].keep) < block.n_experts for name, block in matched.items())
    removed: set[str] = set(unused) if is_cut else set()
    renamed: dict[str, str] = {}
    changed: dict[str, Change] = {}
    for layer, (name, block) in enumerate(matched.items()):
        edit = edits[name]
        _check(block, edit)
        for position, expert in enumerate(edit.keep):
            own = block.by_expert[expert].values() if block.by_expert else ()
            renamed |= {n: block.renamed(n, position) for n in own if position != expert}
        for expert in set(range(len(block.by_expert))) - set(edit.keep):
            removed |= set(block.by_expert[expert].values())
        changed |= scaled_experts(headers, block, edit, fitted.folds.get(layer))
        directions = {} if block.logit_bias and apply_at == "all" else fitted.directions
        tilts = _tilts(block, edit, directions.get(layer))
        changed |= _shared_tensors(headers, block, edit, tilts, fitted.folds.get(layer))
    return Rewrite(frozenset(removed), renamed, changed)


def _check(block: DiskBlock, edit: BlockEdit) -> None:
    if edit.keep[-1] >= block.n_experts:
        raise ContractError(
            f"{block.name} has {block.n_experts} experts on disk, the plan keeps {edit.keep[-1]}: "
            "it is of another model"
        )


def scaled_experts(
    headers: Headers, block: DiskBlock, edit: BlockEdit, folds: "np.ndarray[Any, Any] | None" = None
) -> dict[str, Change]:
    """The last projections of experts that lie one by one, scaled where the plan or a fold asks."""
    factors = output_factors(edit, folds)
    if factors and not block.last:
        raise ContractError(
            f"{block.name}: which projection of its experts is the last is not known, so their "
            "outputs cannot be scaled"
        )
    return {
        name: Change(headers[name].shape, partial(_scaled, factors=factors[position]))
        for position, expert in enumerate(edit.keep)
        if block.by_expert and position in factors
        for name in block.by_expert[expert].values()
        if name in block.last
    }


def output_factors(
    edit: BlockEdit, folds: "np.ndarray[Any, Any] | None" = None
) -> dict[int, tuple[float, ...]]:
    """What each kept expert's output is multiplied by, one after another, by its new number."""
    folds_E = [1.0] * len(edit.keep) if folds is None else folds
    factors = {
        position: (edit.scale.get(expert, 1.0), float(fold))
        for position, (expert, fold) in enumerate(zip(edit.keep, folds_E, strict=True))
    }
    return {
        i: tuple(f for f in both if f != 1.0) for i, both in factors.items() if set(both) != {1}
    }


def _shared_tensors(
    headers: Headers,
    block: DiskBlock,
    edit: BlockEdit,
    tilts: Mapping[str, Apply],
    folds: "np.ndarray[Any, Any] | None",
) -> dict[str, Change]:
    """The tensors with an axis of length E: their kept rows, scaled or tilted where asked for."""
    is_cut = len(edit.keep) < block.n_experts
    applies = dict(tilts)
    if factors := output_factors(edit, folds):
        applies |= {n: partial(_scaled_rows, factors=factors) for n in block.last & set(block.axes)}
    changed: dict[str, Change] = {}
    for name, axis in block.axes.items():
        shape = list(headers[name].shape)
        shape[axis] = len(edit.keep)
        if is_cut and axis != 0:
            select = partial(torch.index_select, dim=axis, index=torch.tensor(edit.keep))
            changed[name] = Change(tuple(shape), select)
        elif is_cut or name in applies:
            rows = edit.keep if is_cut else None
            changed[name] = Change(tuple(shape), applies.get(name), rows)
    return changed


def _tilts(block: DiskBlock, edit: BlockEdit, v_D: Tensor | None) -> dict[str, Apply]:
    """How the biases go into the router: as b·v, or into its own bias without a direction."""
    if not edit.bias:
        return {}
    if block.unclear_bias:
        raise ContractError(
            f"{block.unclear_bias} may act on gate logits or on choosing only, which its name does "
            "not tell: boost and suppress are not supported here"
        )
    added: dict[int, float | Tensor] = {
        edit.keep.index(expert): bias if v_D is None else bias * v_D
        for expert, bias in edit.bias.items()
    }
    name = block.logit_bias if v_D is None else block.router_weight
    assert name is not None
    return {name: partial(_added, added=added)}


def _scaled(tensor: Tensor, factors: tuple[float, ...]) -> Tensor:
    """Multiplied in float64 and rounded after each factor, as the loaded model would be."""
    for part in tensor.view(-1).split(_PART):
        for factor in factors:
            part.copy_(part.double().mul_(factor))
    return tensor


def _scaled_rows(tensor: Tensor, factors: Mapping[int, tuple[float, ...]]) -> Tensor:
    for row, several in factors.items():
        _scaled(tensor[row], several)
    return tensor


def _added(tensor: Tensor, added: Mapping[int, float | Tensor]) -> Tensor:
    for row, addend in added.items():
        tensor[row] += addend.cpu().to(tensor.dtype) if isinstance(addend, Tensor) else addend
    return tensor
