"""A cut carried out in the unedited model as its checkpoint will do it, folds and rounding too."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from expertcut.checkpoints.export import Gathered
from expertcut.checkpoints.layouts.names import match_blocks
from expertcut.checkpoints.unedited import at_run_time
from expertcut.edits.plan import Draft
from expertcut.errors import ContractError
from expertcut.models.hooks import own_expert
from expertcut.models.load import MoeModel
from expertcut.models.moe_block import MoeBlock
from expertcut.models.safetensors_index import DTYPES, read_headers
from expertcut.scoring.passes import OnPass
from expertcut.scoring.router_bias import Tilts, tilted

_ROUNDING = 2e-2  # of an output, where its last projection is rounded to half precision


@contextmanager
def as_written(moe: MoeModel, draft: Draft, gathered: Gathered) -> Iterator[OnPass]:
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
        yield stack.enter_context(at_run_time(moe, draft, gathered.constants))


def _stored_dtypes(moe: MoeModel, draft: Draft) -> dict[str, torch.dtype]:
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
