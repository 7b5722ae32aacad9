"""The edit `scale`: gate weights of single experts are multiplied."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from expertcut.checkpoints.edit import Edit, LayoutWriter, Simulation, TensorChanges, experts_get
from expertcut.edits.plan import BlockEdit, EditPlan, PlanFile


@dataclass(frozen=True)
class ScaleEdit(Edit):
    """Multiplies outputs; routing is unchanged. On disk the last projection is scaled."""

    blocks: Mapping[str, BlockEdit]

    @classmethod
    def of(cls, plan: EditPlan | PlanFile) -> Self | None:
        return cls(plan.blocks) if any(edit.scale for edit in plan.blocks.values()) else None

    def simulate(self, simulation: Simulation) -> None:
        for block in simulation.moe.blocks:
            for expert, factor in self.blocks[block.name].scale.items():
                simulation.scales[block.layer][expert] = factor

    @property
    def reference(self) -> str:
        return "the same factors at run time"

    def rewrite(self, layout: LayoutWriter, tensors: TensorChanges) -> None:
        for name, edit in self.blocks.items():
            for expert in edit.scale:
                layout.check_expert(tensors, name, expert)
            if edit.scale:
                factors = {edit.keep.index(e): factor for e, factor in edit.scale.items()}
                tensors.scale_outputs(name, dict(sorted(factors.items())))

    def describe(self, _n_experts: int | None) -> Iterable[str]:
        n_scaled = sum(len(edit.scale) for edit in self.blocks.values())
        yield f"{experts_get(n_scaled)} a factor on the gate weight; its routing is unchanged."
