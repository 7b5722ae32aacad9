"""The routing rule of a checkpoint: `expert_routing` in config.json, for modeling_routed.py."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, ValidationError

from expertcut.documents import Record, first_fault
from expertcut.errors import ContractError, ModelError
from expertcut.models.moe_block import MoeBlock
from expertcut.models.routing_rule import ErrorCoefficients, RoutingRule

ROUTING_KEY = "expert_routing"
TYPE_PREFIX = "routed_"  # of config.model_type: whatever knows the family only would drop the rule
_Layer = Annotated[int, Field(ge=0)]
# Why the thresholds of a rule mean something else once experts are removed.
_OF_ALL_EXPERTS = {
    "null": "has thresholds that refer to the logits of all experts",
    "grouped": "has groups of neighbours, which a cut changes",
}
_ROUNDING = 1e-3  # of a measured factor, in half precision


class RoutedGate(Record):
    """How the family's gates make weights from logits, and what they choose by."""

    scoring: Literal["softmax", "sigmoid", "sqrtsoftplus"]
    is_renormalised: bool
    factor: FiniteFloat
    selection: Literal["score", "logits"]

    @classmethod
    def of(cls, block: MoeBlock) -> Self:
        """That of a block that ran."""
        rule = block.weights
        return cls(
            scoring=block.scoring,
            is_renormalised=rule is not None and rule.is_renormalised,
            factor=1.0 if rule is None else rule.factor,
            selection="logits" if block.selection == "logits" else "score",
        )

    def is_like(self, other: Self) -> bool:
        """Whether it is the same up to rounding."""
        is_near = abs(self.factor - other.factor) <= _ROUNDING * abs(self.factor)
        return is_near and self == other.model_copy(update={"factor": self.factor})


class ExpertRouting(RoutingRule):
    """The rule with its gate, and a threshold for each MoE layer where it acts, from 0."""

    gate: RoutedGate
    places: int  # per token (M), that routers give
    layers: dict[_Layer, FiniteFloat] = Field(min_length=1)
    fits: dict[_Layer, ErrorCoefficients] | None = None  # of rule fitted

    @classmethod
    def of(
        cls,
        blocks: Sequence[MoeBlock],
        rule: RoutingRule,
        at_by_layer: Mapping[int, float],
        fit_by_layer: Mapping[int, ErrorCoefficients],
    ) -> Self:
        """The declaration for a loaded model; ContractError if its gates differ."""
        gates = {b.name: RoutedGate.of(b) for b in blocks if b.layer in at_by_layer}
        (first, gate), *_ = gates.items()
        for name, other in gates.items():
            if not gate.is_like(other):
                raise ContractError(
                    f"{name} makes gate weights in another way than {first}: layout routed has one "
                    "gate for all layers, so this form is not supported"
                )
        options = {name: getattr(rule, name) for name in RoutingRule.model_fields}
        places = rule.n_columns(blocks[0].top_k, at_by_layer.values())
        if places > blocks[0].top_k:
            options["most"] = places  # all layers give as many places
        fits = dict(fit_by_layer) or None
        return cls(**options, gate=gate, places=places, layers=dict(at_by_layer), fits=fits)

    def check_cut(self, n_left: int | None = None) -> None:
        """Raises a ContractError unless the rule goes on after a cut, to `n_left` if known."""
        if fault := _OF_ALL_EXPERTS.get(self.rule):
            raise ContractError(
                f"rule {self.rule} {fault}: cut the model that it was made from, then route"
            )
        thresholds = self.layers.values() if self.rule == "top-k" else ()
        asked = max(self.places, self.most or 1, *map(int, thresholds))
        if n_left is not None and asked > n_left:
            raise ContractError(
                f"rule {self.rule} takes up to {asked} experts a token, and the cut leaves "
                f"{n_left}: keep at least {asked}, or cut the model that it was made from"
            )


def routing_in(config: Mapping[str, Any]) -> ExpertRouting | None:
    """The rule that config.json declares; None without one."""
    if ROUTING_KEY not in config:
        return None
    try:
        return ExpertRouting.model_validate(config[ROUTING_KEY])
    except ValidationError as error:
        fault = first_fault(error)
        raise ModelError(f"config.json declares no valid {ROUTING_KEY}: {fault}") from None
