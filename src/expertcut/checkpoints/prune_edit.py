"""The edit `prune`: which experts stay, and what takes the place of the others."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from expertcut.checkpoints.edit import Calibration, Edit, LayoutWriter, Simulation, TensorChanges
from expertcut.checkpoints.exact import as_stored, zero_constants
from expertcut.checkpoints.tensor_names import match_blocks
from expertcut.data.corpus import as_quiz
from expertcut.edits import calibrate
from expertcut.edits.calibrate import Constants
from expertcut.edits.layouts import LAYOUTS, Fold, Layout, Removed
from expertcut.edits.plan import BlockEdit, EditPlan, PlanFile, removed_experts
from expertcut.errors import ContractError
from expertcut.models.hooks import own_expert, own_forward, replaced_forward
from expertcut.models.moe_block import MoeBlock
from expertcut.models.parallel import local, put
from expertcut.models.safetensors_index import DTYPES
from expertcut.scoring.engine import Engine
from expertcut.scoring.router_bias import Tilts, tilted

_ROUNDING = 2e-2  # of an output, where its last projection is rounded to half precision


@dataclass(frozen=True)
class PruneEdit(Edit):
    """Of every plan of a cut, even of one that keeps every expert."""

    blocks: Mapping[str, BlockEdit]
    layout: Layout
    removed: Removed | None = None
    fold: Fold | None = None
    # Where routers lose rows, factors (kept,) by layer on the outputs of kept experts.
    folds: Mapping[int, np.ndarray[Any, Any]] = field(default_factory=dict)
    constants: Constants = field(default_factory=dict)  # where they keep rows: of removed experts
    is_named_alone = True

    @classmethod
    def of(cls, plan: EditPlan | PlanFile) -> Self | None:
        if isinstance(plan, EditPlan) and not plan.is_cut:
            return None
        layout = plan.rows_layout if isinstance(plan, PlanFile) else plan.layout
        return cls(plan.blocks, layout, plan.removed, plan.fold)

    def needs_engine(self, calibration: Calibration) -> bool:
        keeps_rows = LAYOUTS[self.layout].keeps_rows
        is_gathering = self.removed == "mean" if keeps_rows else self.fold == "all"
        return is_gathering and bool(removed_experts(self.blocks, calibration.n_experts))

    def fit(self, engine: Engine | None, calibration: Calibration) -> Self:
        questions, profile = calibration.questions, calibration.profile
        if LAYOUTS[self.layout].keeps_rows:
            removed = removed_experts(self.blocks, calibration.n_experts)
            if self.removed == "mean" and engine is not None:
                means = calibrate.mean_outputs(engine, questions.tuning, removed)
                return replace(self, constants=as_stored(calibration.source.headers, means))
            return replace(self, constants=zero_constants(calibration.source.headers, removed))
        if self.fold == "off":
            return self
        if self.fold == "all" and engine is not None:
            folds = calibrate.rescaling_over_tokens(engine, questions.tuning, self.blocks)
            return replace(self, folds=folds)
        judges = as_quiz(questions.held_out)
        is_same_split = judges.split == profile.info.quiz.split
        held_out = {(q.subject, q.row) for q in judges} if is_same_split else set()
        return replace(self, folds=calibrate.rescaling_at_answers(profile, self.blocks, held_out))

    def simulate(self, simulation: Simulation) -> None:
        """No token is routed to a removed expert, or it gives its constant."""
        blocks = simulation.moe.blocks
        if LAYOUTS[self.layout].keeps_rows:
            simulation.contexts.append(constant_experts(blocks, self.constants))
        else:
            for block in blocks:
                if removed := self.blocks[block.name].removed(block.n_experts):
                    simulation.biases[block.layer][list(removed)] = -torch.inf
        if simulation.is_as_written and self.folds:
            simulation.contexts.extend(self._rescaled(simulation))

    @property
    def reference(self) -> str:
        how = "after top-k" if LAYOUTS[self.layout].keeps_rows else "as a mask"
        return f"the same removal {how}"

    def _rescaled(self, simulation: Simulation) -> Iterator[AbstractContextManager[Any]]:
        """Scales last projections of kept experts as on disk; gate weights if offloaded."""
        moe, headers = simulation.moe, simulation.moe.source.headers
        matched, _ = match_blocks(headers, self.blocks)
        for block in moe.blocks:
            if block.layer not in self.folds:
                continue
            kept = zip(self.blocks[block.name].keep, self.folds[block.layer], strict=True)
            factors = {expert: float(factor) for expert, factor in kept}
            parameters = [*block.experts.parameters()]
            has_constants = len(parameters[0]) != block.n_experts  # of a packed model
            if has_constants or any(p.device.type == "meta" for p in parameters):
                scale_E = torch.ones(block.n_experts, dtype=torch.float64)
                scale_E[list(factors)] = torch.tensor([*factors.values()]).double()
                yield tilted([block], Tilts(scale_by_layer={block.layer: scale_E}))
                continue
            last = sorted(matched[block.name].last)
            dtype = DTYPES[headers[last[0]].dtype] if last else torch.float32
            yield _scaled_experts(block, factors, dtype)

    def rewrite(self, layout: LayoutWriter, tensors: TensorChanges) -> None:
        layout.remove_experts(tensors, self.constants)
        for layer, name in enumerate(self.blocks):
            if layer in self.folds:
                tensors.scale_outputs(name, dict(enumerate(map(float, self.folds[layer]))))

    def describe(self, n_experts: int | None) -> Iterable[str]:
        edits = self.blocks.values()
        n_keeps = [len(edit.keep) for edit in edits]
        n_least = max((edit.keep[-1] + 1 for edit in edits if edit.keep), default=0)
        if min(n_keeps) < (n_experts or n_least) and not any(edit.merged for edit in edits):
            kept = f"{min(n_keeps)} to {max(n_keeps)}" if len({*n_keeps}) > 1 else f"{n_keeps[0]}"
            of = f" of {n_experts}" if n_experts else ""
            then = "the others are cut out; the router takes the next best instead of a removed one"
            if LAYOUTS[self.layout].keeps_rows:
                gives = "its mean output" if self.removed == "mean" else "nothing"
                then = f"the router may still choose a removed expert, which then gives {gives}"
            yield f"Each of {len(n_keeps)} MoE layers keeps {kept}{of} experts; {then}."


@contextmanager
def constant_experts(
    blocks: Sequence[MoeBlock],
    constants: Constants,
    copied: Mapping[str, Mapping[int, float]] | None = None,
) -> Iterator[None]:
    """Makes outputs of experts of an unedited model constant: the layout's reference.

    `copied` are factors of their input, which is added.
    """
    with ExitStack() as stack:
        for block in blocks:
            if by_expert := constants.get(block.name):
                factors = (copied or {}).get(block.name, {})
                forward = partial(_with_constants, own_forward(block.experts), by_expert, factors)
                stack.enter_context(replaced_forward(block.experts, forward))
                _check_constants(block, {e: v + factors.get(e, 0) for e, v in by_expert.items()})
        yield


@torch.inference_mode()
def _check_constants(block: MoeBlock, by_expert: Mapping[int, Tensor]) -> None:
    """Checks the outputs of inputs of ones."""
    given = next(value for value in block.call.args if isinstance(value, Tensor))
    experts_M = torch.tensor([*by_expert], device=given.device)
    x_MD = given.new_ones(len(experts_M), block.width)
    found_MD = block.experts.forward(x_MD, experts_M[:, None], x_MD.new_ones(len(experts_M), 1))
    if not torch.allclose(found_MD, torch.stack([*by_expert.values()]).to(found_MD), atol=1e-6):
        raise ContractError(
            f"{block.name}: experts that are made constant give something else than their constants"
        )


def _with_constants(
    forward: Callable[..., Tensor],
    by_expert: Mapping[int, Tensor],
    factors: Mapping[int, float],
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    is_removed_TK = torch.isin(experts_TK, torch.tensor([*by_expert]).to(experts_TK))
    y_TD = forward(x_TD, experts_TK, weights_TK.masked_fill(is_removed_TK, 0))
    for expert, value_D in by_expert.items():
        tokens_M, slots_M = (experts_TK == expert).nonzero(as_tuple=True)
        weights_M1, given_D = weights_TK[tokens_M, slots_M, None], value_D.to(x_TD)
        if factor := factors.get(expert):
            given_D = given_D + factor * x_TD[tokens_M]
        y_TD = y_TD.index_add(0, tokens_M, (weights_M1 * given_D).to(y_TD))
    return y_TD


@contextmanager
def _scaled_experts(
    block: MoeBlock, factors: Mapping[int, float], stored: torch.dtype
) -> Iterator[None]:
    last = [p for n, p in block.experts.named_parameters() if n.startswith("down_proj")]
    if not last:
        raise ContractError(f"{block.name}: its experts have no down_proj to scale")
    share = getattr(block.experts, "share", None)
    ids = range(block.n_experts) if share is None else share.ids
    before = [p.data if share is None else local(p.data).clone() for p in last]
    expert = max(factors, key=lambda expert: abs(factors[expert] - 1))
    width = next(v.shape[-1] for v in block.call.args if isinstance(v, Tensor))
    x_MD = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(local(last[0]))
    with torch.inference_mode():
        plain_MD = own_expert(block)(expert, x_MD)
    try:
        for parameter in last:
            scaled = local(parameter.data).clone()
            for e, factor in factors.items():
                if e in ids:
                    row = scaled[ids.index(e)].double() * factor
                    scaled[ids.index(e)] = row.to(stored).to(scaled.dtype)
            put(parameter, scaled)
        with torch.inference_mode():
            wanted_MD = (plain_MD * factors[expert]).float()
            off_MD = own_expert(block)(expert, x_MD).float() - wanted_MD
        if off_MD.norm() > _ROUNDING * wanted_MD.norm():
            raise ContractError(f"{block.name}: scaling its down_proj does not scale its outputs")
        yield
    finally:
        for parameter, data in zip(last, before, strict=True):
            put(parameter, data)
