"""Routed checkpoints of tiny models, as `build` writes them, without a profile."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoModelForCausalLM

from expertcut.checkpoints.edit import Edit
from expertcut.checkpoints.export import check_export, edits_of, export
from expertcut.edits.layouts import Layout
from expertcut.edits.plan import BlockEdit, EditPlan
from expertcut.edits.router_edits import with_routing
from expertcut.models.load import MoeModel
from expertcut.models.routing_rule import ErrorCoefficients, RoutingRule


def routed_plan(
    moe: MoeModel,
    rule: str,
    at: float | Mapping[int, float],
    layout: Layout = "routed",
    fits: Mapping[int, ErrorCoefficients] | None = None,
) -> EditPlan:
    """All experts stay; the rule acts in all layers, or in those with a threshold."""
    edits = {b.name: BlockEdit(keep=tuple(range(b.n_experts))) for b in moe.blocks}
    draft = EditPlan("", "route", "by hand", "answer", edits, layout)
    at_by_layer = at if isinstance(at, Mapping) else {b.layer: at for b in moe.blocks}
    return with_routing(draft, RoutingRule(rule=rule), at_by_layer, fits or {})


def make_routed(moe: MoeModel, plan: EditPlan, folder: Path) -> list[Edit]:
    """Writes the checkpoint of a plan; gives its edits, fitted."""
    n_experts = moe.blocks[0].n_experts
    check_export(moe.source, plan, n_experts, folder)
    engine: Any = SimpleNamespace(moe=moe)
    nothing: Any = SimpleNamespace(questions=None, profile=None)
    edits = [edit.fit(engine, nothing) for edit in edits_of(plan)]
    folder.mkdir()
    export(moe.source, plan, n_experts, edits, folder)
    return edits


def load_plainly(folder: Path, experts: str = "eager") -> Any:
    """As any user of transformers loads it."""
    model: Any
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model.set_experts_implementation(experts)
    return model.eval()
