"""The edit `routing`: routers choose by a rule; no tensor changes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

from expertcut.checkpoints.edit import Calibration, Edit, LayoutWriter, Simulation, TensorChanges
from expertcut.checkpoints.exact import is_exact
from expertcut.edits.layouts import Layout
from expertcut.edits.plan import BlockEdit, EditPlan, PlanFile, PlanRouting
from expertcut.errors import ContractError
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.expert_routing import ExpertRouting
from expertcut.models.load import Source
from expertcut.models.moe_block import MoeBlock
from expertcut.models.routing_rule import RoutingRule
from expertcut.scoring.engine import Engine
from expertcut.scoring.rerouting import Rerouting


@dataclass(frozen=True)
class RerouteEdit(Edit):
    """`declared` is what config.json of layout routed says, known once the gates are."""

    blocks: Mapping[str, BlockEdit]
    rule: RoutingRule
    layout: Layout
    declared: ExpertRouting | None = None
    reference = "the rule at run time"
    is_named_alone = True

    @classmethod
    def of(cls, plan: EditPlan | PlanFile) -> Self | None:
        return None if plan.routing is None else cls(plan.blocks, plan.routing, plan.layout)

    @property
    def rerouting(self) -> Rerouting:
        """The rule with its thresholds by layer."""
        edits = [*enumerate(self.blocks.values())]
        at_by_layer = {layer: edit.at for layer, edit in edits if edit.at is not None}
        fit_by_layer = {layer: edit.fit for layer, edit in edits if edit.fit is not None}
        return Rerouting(self.rule, at_by_layer, fit_by_layer)

    def check(self, layout: LayoutWriter, source: Source, plan: EditPlan) -> None:
        layout.check_routing(source, self.rerouting)
        is_tilted = any(edit.tilted for edit in plan.edits.values())
        if is_tilted and is_exact(read_config(source.path)):
            raise ContractError(
                f"{source.id} has layout exact, where a rule goes alone: reweight it first, with "
                "--layout exact, then route that"
            )
        if plan.is_biased and plan.apply_at == "answer":
            raise ContractError(
                "a routing rule goes with biases at every token only: leave --apply-at answer out"
            )

    def needs_engine(self, _calibration: Calibration) -> bool:
        return True  # only a model that runs shows its gate

    def fit(self, engine: Engine | None, _calibration: Calibration) -> Self:
        assert engine is not None, "asked for"
        blocks, routing = engine.moe.blocks, self.rerouting
        for block in blocks:
            if (at := routing.at_by_layer.get(block.layer)) is not None:
                routing.rule.check(block, at)
                self._check_layout(block)
        known = (self.rule, routing.at_by_layer, routing.fit_by_layer)
        return replace(self, declared=ExpertRouting.of(blocks, *known))

    def _check_layout(self, block: MoeBlock) -> None:
        if self.layout == "stock" and (block.weights is None or block.is_hashed):
            raise ContractError(
                f"{block.name} works with {block.top_k} experts per token only, whatever its "
                "config.json says: take --layout routed"
            )
        if self.layout == "routed" and block.is_layer:
            raise ContractError(
                f"{block.name} holds its router beside other modules of the decoder layer, which "
                "layout routed does not write: see what rules do there with --sweep"
            )

    def simulate(self, simulation: Simulation) -> None:
        simulation.routing = self.rerouting

    def rewrite(self, _layout: LayoutWriter, tensors: TensorChanges) -> None:
        tensors.routing = self.declared

    def describe(self, _n_experts: int | None) -> Iterable[str]:
        thresholds = sorted({edit.at for edit in self.blocks.values() if edit.at is not None})
        first, last = (f"{at:.4g}" for at in (thresholds[0], thresholds[-1]))
        at = f" at {first}" if first == last else f" at {first} to {last} by layer"
        n_used = self.rule.experts_per_token if isinstance(self.rule, PlanRouting) else None
        used = f": {n_used:.2f} experts a token on held-out questions" if n_used else ""
        at = at if self.rule.kind.threshold else ""
        yield f"Routers choose by rule {self.rule.rule}{at}{used}."
