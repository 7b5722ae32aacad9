"""A plan carried out in the unedited model while it runs: what a layout is held against."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from expertcut.interventions.calibration.outputs import Constants
from expertcut.interventions.plan import Draft, Edit
from expertcut.moe.contract import MoeBlock
from expertcut.moe.loading import MoeModel
from expertcut.moe.observers import replaced_forward, tilt_routers


@contextmanager
def at_run_time(moe: MoeModel, draft: Draft, constants: Constants) -> Iterator[None]:
    """The plan to the letter: biases on logits, and what removing means in its layout.

    Stock: removed experts cannot be chosen. Exact: they may be, and then give their constants.
    """
    biases = {b.layer: _logit_bias_E(b, draft.edits[b.name], draft.layout) for b in moe.blocks}
    touched = {layer: bias_E for layer, bias_E in biases.items() if bool(bias_E.any())}
    with tilt_routers(moe.blocks, touched), constant_experts(moe.blocks, constants):
        yield


def _logit_bias_E(block: MoeBlock, edit: Edit, layout: str) -> Tensor:
    bias_E = torch.zeros(block.n_experts)
    if layout == "stock":
        bias_E[list(edit.removed(block.n_experts))] = -torch.inf
    for expert, bias in edit.bias.items():
        bias_E[expert] = bias
    return bias_E


@contextmanager
def constant_experts(blocks: Sequence[MoeBlock], constants: Constants) -> Iterator[None]:
    """Makes experts of a loaded, unedited model constant: the reference for the layout.

    Routing and gate weights after top-k stay; only the outputs are replaced.
    """
    with ExitStack() as stack:
        for block in blocks:
            if by_expert := constants.get(block.name):
                forward = _with_constants(block.experts.forward, by_expert)
                stack.enter_context(replaced_forward(block.experts, forward))
        yield


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
