"""A plan carried out in the unedited model while it runs: what a layout is held against."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from expertcut.edits.calibrate import Constants
from expertcut.edits.plan import Draft, Edit
from expertcut.errors import ContractError
from expertcut.models.hooks import own_forward, replaced_forward
from expertcut.models.load import MoeModel
from expertcut.models.moe_block import MoeBlock
from expertcut.scoring.passes import OnPass
from expertcut.scoring.router_bias import Tilts, tilted


@contextmanager
def at_run_time(moe: MoeModel, draft: Draft, constants: Constants) -> Iterator[OnPass]:
    """The plan to the letter: biases, factors, and what removing means in its layout.

    Stock: removed experts cannot be chosen. Exact: they may be, and then give their constants.
    What it gives must be told of each forward pass before it starts.
    """
    tilts = tilts_of(moe.blocks, draft)
    with tilted(moe.blocks, tilts) as begin, constant_experts(moe.blocks, constants):
        yield begin


def renumbered(draft: Draft) -> dict[str, Edit]:
    """The edits by the numbers that the experts have in the checkpoint that the plan makes."""
    if draft.layout == "exact":
        return dict(draft.edits)
    return {
        name: Edit(
            keep=tuple(range(len(edit.keep))),
            bias={edit.keep.index(e): bias for e, bias in edit.bias.items()},
            scale={edit.keep.index(e): factor for e, factor in edit.scale.items()},
        )
        for name, edit in draft.edits.items()
    }


def tilts_of(blocks: Sequence[MoeBlock], draft: Draft) -> Tilts:
    """What a plan does to the routers of the unedited model."""
    edits = draft.edits
    biases = {b.layer: _logit_bias_E(b, edits[b.name], draft.layout) for b in blocks}
    scales = {b.layer: _scale_E(b, edits[b.name]) for b in blocks}
    return Tilts(
        {layer: bias_E for layer, bias_E in biases.items() if bool(bias_E.any())},
        {layer: scale_E for layer, scale_E in scales.items() if bool((scale_E != 1).any())},
        draft.apply_at,
    )


def _logit_bias_E(block: MoeBlock, edit: Edit, layout: str) -> Tensor:
    bias_E = torch.zeros(block.n_experts)
    if layout == "stock":
        bias_E[list(edit.removed(block.n_experts))] = -torch.inf
    for expert, bias in edit.bias.items():
        bias_E[expert] = bias
    return bias_E


def _scale_E(block: MoeBlock, edit: Edit) -> Tensor:
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
