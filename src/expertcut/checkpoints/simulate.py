"""A plan carried out in the unedited model while it runs, exactly or as its checkpoint will.

Merged experts under the router that was there before: what both papers' own code runs. That router
chooses among all E experts, each of which is its group's; two of one group may be chosen together.
No checkpoint of layout stock can say so, and this is what it is held against.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertcut.checkpoints.export import Gathered
from expertcut.checkpoints.tensor_names import match_blocks
from expertcut.edits.calibrate import Constants
from expertcut.edits.merge_groups import members_of
from expertcut.edits.plan import BlockEdit, EditPlan
from expertcut.errors import ContractError
from expertcut.models.hooks import own_expert, own_forward, replaced_forward
from expertcut.models.load import MoeModel
from expertcut.models.moe_block import MoeBlock
from expertcut.models.safetensors_index import DTYPES, read_headers
from expertcut.scoring.passes import OnPass
from expertcut.scoring.router_bias import Tilts, tilted

_ROUNDING = 2e-2  # of an output, where its last projection is rounded to half precision


@contextmanager
def apply_at_runtime(moe: MoeModel, draft: EditPlan, constants: Constants) -> Iterator[OnPass]:
    """The plan to the letter: biases, factors, and what removing means in its layout.

    Stock: removed experts cannot be chosen. Exact: they may be, and then give their constants.
    What it gives must be told of each forward pass before it starts.
    """
    tilts = tilts_of(moe.blocks, draft)
    with tilted(moe.blocks, tilts) as begin, constant_experts(moe.blocks, constants):
        yield begin


def renumbered(draft: EditPlan) -> dict[str, BlockEdit]:
    """The edits by the numbers that the experts have in the checkpoint that the plan makes."""
    if draft.layout == "exact":
        return dict(draft.edits)
    return {
        name: BlockEdit(
            keep=tuple(range(len(edit.keep))),
            bias={edit.keep.index(e): bias for e, bias in edit.bias.items()},
            scale={edit.keep.index(e): factor for e, factor in edit.scale.items()},
        )
        for name, edit in draft.edits.items()
    }


def tilts_of(blocks: Sequence[MoeBlock], draft: EditPlan) -> Tilts:
    """What a plan does to the routers of the unedited model."""
    edits = draft.edits
    biases = {b.layer: _logit_bias_E(b, edits[b.name], draft.layout) for b in blocks}
    scales = {b.layer: _scale_E(b, edits[b.name]) for b in blocks}
    return Tilts(
        {layer: bias_E for layer, bias_E in biases.items() if bool(bias_E.any())},
        {layer: scale_E for layer, scale_E in scales.items() if bool((scale_E != 1).any())},
        draft.apply_at,
    )


def _logit_bias_E(block: MoeBlock, edit: BlockEdit, layout: str) -> Tensor:
    bias_E = torch.zeros(block.n_experts)
    if layout == "stock":
        bias_E[list(edit.removed(block.n_experts))] = -torch.inf
    for expert, bias in edit.bias.items():
        bias_E[expert] = bias
    return bias_E


def _scale_E(block: MoeBlock, edit: BlockEdit) -> Tensor:
    scale_E = torch.ones(block.n_experts, dtype=torch.float64)
    for expert, factor in edit.scale.items():
        scale_E[expert] = factor
    return scale_E


@contextmanager
def constant_experts(blocks: Sequence[MoeBlock], constants: Constants) -> Iterator[None]:
    """Makes experts of a loaded, unedited model constant: the reference for the layout.

    Routing and gate weights after top-k stay; only the outputs are replaced. Each constant is seen
    to be given before the block runs.

    Raises:
        ContractError: experts that give something else.
    """
    with ExitStack() as stack:
        for block in blocks:
            if by_expert := constants.get(block.name):
                forward = _with_constants(own_forward(block.experts), by_expert)
                stack.enter_context(replaced_forward(block.experts, forward))
                _see_constants(block, by_expert)
        yield


@torch.inference_mode()
def _see_constants(block: MoeBlock, by_expert: Mapping[int, Tensor]) -> None:
    given = next(value for value in block.call.args if isinstance(value, Tensor))
    experts_M = torch.tensor([*by_expert], device=given.device)
    x_MD = given.new_ones(len(experts_M), given.shape[-1])
    found_MD = block.experts.forward(x_MD, experts_M[:, None], x_MD.new_ones(len(experts_M), 1))
    wanted_MD = torch.stack([*by_expert.values()]).to(found_MD)
    if not torch.allclose(found_MD, wanted_MD, atol=1e-6):
        raise ContractError(
            f"{block.name}: experts that are made constant give something else than their constants"
        )


def _with_constants(
    forward: Callable[..., Tensor], by_expert: Mapping[int, Tensor]
) -> Callable[..., Tensor]:
    def run(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        is_removed_TK = torch.isin(experts_TK, torch.tensor([*by_expert]).to(experts_TK))
        y_TD = forward(x_TD, experts_TK, weights_TK.masked_fill(is_removed_TK, 0))
        for expert, value_D in by_expert.items():
            tokens_M, slots_M = (experts_TK == expert).nonzero(as_tuple=True)
            weights_M1 = weights_TK[tokens_M, slots_M, None]
            y_TD = y_TD.index_add(0, tokens_M, (weights_M1 * value_D.to(x_TD)).to(y_TD))
        return y_TD

    return run


@contextmanager
def as_written(moe: MoeModel, draft: EditPlan, gathered: Gathered) -> Iterator[OnPass]:
    """The model answers as the checkpoint of a cut would, while the block runs.

    Layout exact: constants in place of outputs. Stock: a mask on the router, and the last
    projections of kept experts scaled by the folds, rounded as they would be on disk; these are
    in memory twice meanwhile. Where experts are offloaded their gate weights are scaled instead,
    without that rounding. What it gives must be told of each forward pass before it starts.

    Raises:
        ContractError: experts to be scaled whose last projection is not known, or is not used.
    """
    folds = gathered.fitted.folds
    dtypes = _stored_dtypes(moe, draft) if folds else {}
    with ExitStack() as stack:
        for block in moe.blocks:
            if block.layer in folds:
                kept = zip(draft.edits[block.name].keep, folds[block.layer], strict=True)
                factors = {expert: float(factor) for expert, factor in kept}
                if any(p.device.type == "meta" for p in block.experts.parameters()):
                    scale_E = torch.ones(block.n_experts, dtype=torch.float64)
                    scale_E[list(factors)] = torch.tensor([*factors.values()]).double()
                    its = Tilts(scale_by_layer={block.layer: scale_E})
                    stack.enter_context(tilted([block], its))
                else:
                    stack.enter_context(_scaled(block, factors, dtypes[block.name]))
        yield stack.enter_context(apply_at_runtime(moe, draft, gathered.constants))


def _stored_dtypes(moe: MoeModel, draft: EditPlan) -> dict[str, torch.dtype]:
    """The dtype that the last projections of each block have on disk."""
    headers = read_headers(moe.source.path)
    matched, _ = match_blocks(headers, draft.edits)
    return {
        name: next((DTYPES[headers[last].dtype] for last in sorted(block.last)), torch.float32)
        for name, block in matched.items()
    }


@contextmanager
def _scaled(block: MoeBlock, factors: Mapping[int, float], stored: torch.dtype) -> Iterator[None]:
    last = [p for n, p in block.experts.named_parameters() if n.startswith("down_proj")]
    if not last:
        raise ContractError(f"{block.name}: its experts have no down_proj to scale")
    before = [parameter.data for parameter in last]
    expert = max(factors, key=lambda expert: abs(factors[expert] - 1))
    plain_MD = _own_output(block, expert)
    try:
        for parameter in last:
            parameter.data = _scaled_rows(parameter.data, factors, stored)
        wanted_MD = (plain_MD * factors[expert]).float()
        off_MD = _own_output(block, expert).float() - wanted_MD
        if off_MD.norm() > _ROUNDING * wanted_MD.norm():
            raise ContractError(f"{block.name}: scaling its down_proj does not scale its outputs")
        yield
    finally:
        for parameter, data in zip(last, before, strict=True):
            parameter.data = data


@torch.inference_mode()
def _own_output(block: MoeBlock, expert: int) -> Tensor:
    down = next(p for name, p in block.experts.named_parameters() if name.startswith("down_proj"))
    generator = torch.Generator().manual_seed(0)
    width = next(v.shape[-1] for v in block.call.args if isinstance(v, Tensor))
    x_MD = torch.randn(4, width, generator=generator).to(down)
    return own_expert(block)(expert, x_MD)


def _scaled_rows(data: Tensor, factors: Mapping[int, float], stored: torch.dtype) -> Tensor:
    scaled = data.clone()
    for expert, factor in factors.items():
        scaled[expert] = (data[expert].double() * factor).to(stored).to(data.dtype)
    return scaled


@dataclass(frozen=True)
class Router:
    """A router and its bias on choosing, and at `place_E` which merged expert each expert is in."""

    module: nn.Module
    selection_E: Tensor | None
    place_E: Tensor


def unedited_routers(
    blocks: Sequence[MoeBlock], edits: Mapping[str, BlockEdit]
) -> dict[str, Router]:
    """Copies of the routers of a loaded, unedited model, by block name."""
    found = {}
    for block in blocks:
        place_E = torch.zeros(block.n_experts, dtype=torch.long)
        for place, members in enumerate(members_of(edits[block.name]).values()):
            place_E[list(members)] = place
        selection_E = block.selection_bias()
        kept = None if selection_E is None else selection_E.clone()
        found[block.name] = Router(copy.deepcopy(block.router), kept, place_E)
    return found


@contextmanager
def under(routers: Mapping[str, Router], blocks: Sequence[MoeBlock]) -> Iterator[None]:
    """The merged model runs with the unedited routers while the block runs."""
    with ExitStack() as stack:
        for block in blocks:
            forward = _routed(routers[block.name])
            stack.enter_context(replaced_forward(block.router, forward))
        yield


def _routed(router: Router) -> Callable[..., Any]:
    def route(x: Tensor, *biases: Tensor | None) -> Any:
        # Some families hand their router its bias on choosing with each call.
        own = [None if bias is None else router.selection_E for bias in biases]
        logits_TE, weights_TK, experts_TK = router.module(x, *own)
        return logits_TE, weights_TK, router.place_E.to(experts_TK.device)[experts_TK]

    return route
