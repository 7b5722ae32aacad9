"""Routing rules as a table, and the settings of one, as plans and routed checkpoints hold them.

The functions are in `modeling_routed.py`, under the same names. This file needs no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from expertcut.documents import Record
from expertcut.errors import ContractError

if TYPE_CHECKING:
    from expertcut.models.modeling_routed import Options
    from expertcut.models.moe_block import MoeBlock

Weights = Literal["gate", "renormalised"]
Level = Literal["token", "prompt"]
MOST_EXPERTS = 65_535


@dataclass(frozen=True)
class RuleKind:
    """What a rule does, and which thresholds it takes."""

    help: str
    threshold: str  # what the threshold of a layer means; empty if there is none
    low: float = 0.0  # the least threshold
    high: float = 0.0
    is_whole: bool = False  # the threshold is a whole number
    may_widen: bool = False  # takes more than the router's K experts if `most` allows it
    is_rescored: bool = False  # makes gate weights anew for experts that the router did not choose
    needs_prompt: bool = False  # whole prompts, one at a time
    is_exportable: bool = True  # needs nothing but what a router has
    paper: str = ""


RULES: Mapping[str, RuleKind] = {
    "top-k": RuleKind(
        help="The K best experts.",
        threshold="experts per token",
        low=1,
        high=MOST_EXPERTS,
        is_whole=True,
        may_widen=True,
    ),
    "skip": RuleKind(
        help="Skip experts whose gate weight is small beside the largest.",
        threshold="share of the largest gate weight",
        high=1,
        paper="2402.14800",
    ),
}


class RoutingRule(Record):
    """A rule and its options; thresholds are set for each layer."""

    rule: str
    most: int | None = Field(default=None, ge=1, le=MOST_EXPERTS)  # a token; None is K
    weights: Weights = "gate"
    share: FiniteFloat = Field(default=0.02, ge=0, le=1)  # odp: tokens that keep all
    temperature: FiniteFloat = Field(default=1.0, gt=0)  # smooth
    level: Level = "token"  # random
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.rule not in RULES:
            raise ValueError(f"{self.rule[:40]!a} is not a rule: take {', '.join(RULES)}")
        return self

    @property
    def kind(self) -> RuleKind:
        """The rule in the table."""
        return RULES[self.rule]

    @property
    def options(self) -> "Options":
        """As the rule's function takes them."""
        from expertcut.models.modeling_routed import Options

        return Options(**{field.name: getattr(self, field.name) for field in fields(Options)})

    @property
    def needs_prompt(self) -> bool:
        """Whether prompts must be scored whole, one at a time."""
        return self.kind.needs_prompt or (self.rule == "random" and self.level == "prompt")

    def n_columns(self, top_k: int, thresholds: Iterable[float] = ()) -> int:
        """Places per token (M) that routers with this rule give: K, or more if it widens."""
        asked = max(map(int, thresholds), default=1) if self.rule == "top-k" else 1
        return max(top_k, self.most or asked) if self.kind.may_widen else top_k

    def check_threshold(self, at: float) -> None:
        """Raises a ValueError unless the rule takes this threshold."""
        kind = self.kind
        if not kind.low <= at <= kind.high or (kind.is_whole and at != int(at)):
            number = "a whole number" if kind.is_whole else "a number"
            raise ValueError(
                f"{at:g} is not a threshold of rule {self.rule} ({kind.threshold or 'it has none'})"
                f": take {number} from {kind.low:g} to {kind.high:g}"
            )

    def check(self, block: "MoeBlock", at: float) -> None:
        """Raises a ContractError if the gate of the block does not allow the rule."""
        most = self.n_columns(block.top_k, [at])
        if most > block.n_experts:
            raise ContractError(
                f"{block.name} has {block.n_experts} experts, rule {self.rule} asks for {most}: "
                "take fewer"
            )
        if most == block.top_k and not self.kind.is_rescored:
            return
        if block.is_hashed:
            fault = "chooses its experts by a table of token ids"
        elif block.weights is None:
            fault = "has gate weights that are no function of its scores"
        elif block.top_groups < block.n_groups:
            fault = f"routes in {block.n_groups} groups and picks from {block.top_groups}"
        else:
            return
        asked = f"{self.rule} above {block.top_k}" if most > block.top_k else f"rule {self.rule}"
        raise ContractError(
            f"{block.name} {fault}, so {asked} has no gate weights there: take a rule that leaves "
            f"out experts, with at most {block.top_k}"
        )
