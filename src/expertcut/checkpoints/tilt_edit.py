"""The edits of single experts: on the router's logits, on gate weights, on the selection bias."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor

from expertcut.checkpoints.edit import Calibration, Edit, LayoutWriter, Simulation, TensorChanges
from expertcut.checkpoints.tensor_names import selection_bias
from expertcut.data.corpus import CalibrationSet
from expertcut.edits.calibrate import Fit, direction_quality, fit_directions
from expertcut.edits.layouts import LAYOUTS, Layout, Positions
from expertcut.edits.plan import BlockEdit, EditPlan, PlanFile
from expertcut.errors import ContractError
from expertcut.models.load import Source
from expertcut.models.moe_block import MoeBlock
from expertcut.scoring.engine import Engine


@dataclass(frozen=True)
class BiasEdit(Edit):
    """Where the layout has no place for a bias, `directions` v (D,) of a layer stand for it."""

    blocks: Mapping[str, BlockEdit]
    layout: Layout
    apply_at: Positions
    directions: Mapping[int, Tensor] = field(default_factory=dict)
    reference = "the exact bias"

    @classmethod
    def of(cls, plan: EditPlan | PlanFile) -> Self | None:
        if not any(edit.bias for edit in plan.blocks.values()):
            return None
        return cls(plan.blocks, plan.layout, plan.apply_at or "all")

    def check(self, layout: LayoutWriter, source: Source, _plan: EditPlan) -> None:
        layout.check_biases(source, self.blocks)

    def needs_engine(self, _calibration: Calibration) -> bool:
        return LAYOUTS[self.layout].fits_biases

    def fit(self, engine: Engine | None, calibration: Calibration) -> Self:
        if engine is None or not LAYOUTS[self.layout].fits_biases:
            return self
        layers = [b.layer for b in engine.moe.blocks if self.blocks[b.name].bias]
        tuning = calibration.questions.tuning
        return replace(self, directions=fit_directions(engine, tuning, layers, self.apply_at))

    def judge(self, engine: Engine, held_out: CalibrationSet) -> Sequence[Fit]:
        if not self.directions:
            return ()
        return direction_quality(engine, held_out, dict(self.directions), self.apply_at)

    def simulate(self, simulation: Simulation) -> None:
        simulation.apply_at = self.apply_at
        for block in simulation.moe.blocks:
            for expert, bias in self.blocks[block.name].bias.items():
                simulation.biases[block.layer][expert] = bias

    def forms(self) -> Mapping[str, Self | None]:
        return {
            "the plan without biases": None,
            "bias at answer positions only": replace(self, apply_at="answer"),
            "bias everywhere": replace(self, apply_at="all"),
        }

    def rewrite(self, layout: LayoutWriter, tensors: TensorChanges) -> None:
        layout.add_biases(tensors, self.directions, self.apply_at)

    def describe(self, _n_experts: int | None) -> Iterable[str]:
        where = "at every token" if self.apply_at != "answer" else "where an answer is written"
        form = "a bias of the gate itself"
        if LAYOUTS[self.layout].fits_biases:
            form = "carried by a direction in the gate's row, which comes close to the bias itself"
        n_biased = sum(len(edit.bias) for edit in self.blocks.values())
        yield f"{_experts_get(n_biased)} a bias on the gate's logit, to act {where}: {form}."


@dataclass(frozen=True)
class ScaleEdit(Edit):
    """Multiplies outputs; routing is unchanged. On disk the last projection is scaled."""

    blocks: Mapping[str, BlockEdit]
    reference = "the same factors at run time"

    @classmethod
    def of(cls, plan: EditPlan | PlanFile) -> Self | None:
        return cls(plan.blocks) if any(edit.scale for edit in plan.blocks.values()) else None

    def simulate(self, simulation: Simulation) -> None:
        for block in simulation.moe.blocks:
            for expert, factor in self.blocks[block.name].scale.items():
                simulation.scales[block.layer][expert] = factor

    def rewrite(self, layout: LayoutWriter, tensors: TensorChanges) -> None:
        for name, edit in self.blocks.items():
            for expert in edit.scale:
                layout.check_expert(tensors, name, expert)
            if edit.scale:
                factors = {edit.keep.index(e): factor for e, factor in edit.scale.items()}
                tensors.scale_outputs(name, dict(sorted(factors.items())))

    def describe(self, _n_experts: int | None) -> Iterable[str]:
        n_scaled = sum(len(edit.scale) for edit in self.blocks.values())
        yield f"{_experts_get(n_scaled)} a factor on the gate weight; its routing is unchanged."


@dataclass(frozen=True)
class SelectionEdit(Edit):
    """Moves the family's selection bias, which chooses experts and is in no gate weight."""

    blocks: Mapping[str, BlockEdit]
    reference = "the same selection biases at run time"

    @classmethod
    def of(cls, plan: EditPlan | PlanFile) -> Self | None:
        return cls(plan.blocks) if any(e.selection for e in plan.blocks.values()) else None

    def check(self, layout: LayoutWriter, source: Source, plan: EditPlan) -> None:
        self.rewrite(layout, layout.changes(source, plan.edits))

    def simulate(self, simulation: Simulation) -> None:
        for block in simulation.moe.blocks:
            if added := self.blocks[block.name].selection:
                simulation.contexts.append(_moved(block, added))

    def rewrite(self, _layout: LayoutWriter, tensors: TensorChanges) -> None:
        for name, block in tensors.blocks.items():
            edit = self.blocks[name]
            if edit.selection:
                added = {edit.keep.index(e): value for e, value in edit.selection.items()}
                tensors.apply(selection_bias(block, tensors.headers), partial(_add, added=added))

    def describe(self, _n_experts: int | None) -> Iterable[str]:
        n_moved = sum(len(edit.selection or ()) for edit in self.blocks.values())
        yield (
            f"{_experts_get(n_moved)} another selection bias, which chooses experts and leaves "
            "their gate weights alone."
        )


@contextmanager
def _moved(block: MoeBlock, added: Mapping[int, float]) -> Iterator[None]:
    with torch.no_grad():
        bias_E = block.selection_bias()
        before_E = None if bias_E is None else bias_E.clone()
        if bias_E is not None:
            _add(bias_E, added)
        now_E = block.selection_bias()
        if bias_E is None or before_E is None or now_E is None or torch.equal(now_E, before_E):
            raise ContractError(f"{block.name}: its selection bias cannot be changed while it runs")
        try:
            yield
        finally:
            bias_E.copy_(before_E)


def _add(tensor: Tensor, added: Mapping[int, float]) -> Tensor:
    flat_E = tensor.view(-1)
    for expert, value in added.items():
        flat_E[expert] += value
    return tensor


def _experts_get(n: int) -> str:
    return "1 expert gets" if n == 1 else f"{n} experts get"
