"""Routing rules as a table, and the settings of one, as plans and routed checkpoints hold them.

The functions are in `modeling_routed.py`, under the same names. This file needs no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from pydantic import Field, FiniteFloat, model_validator

from expertcut.documents import Record
from expertcut.errors import ContractError

if TYPE_CHECKING:
    from expertcut.models.modeling_routed import Options
    from expertcut.models.moe_block import MoeBlock

Weights = Literal["gate", "renormalised"]
Level = Literal["token", "prompt"]
ErrorCoefficients = tuple[tuple[FiniteFloat, ...], ...]  # coefficients (K - 1, K) of rule fitted
MOST_EXPERTS = 65_535
SEEDS = 1 << 32
"""Seeds of random rules; those of further draws start again at 0."""


@dataclass(frozen=True)
class RuleKind:
    """What a rule does, and which thresholds it takes; sources are in `modeling_routed.py`."""

    threshold: str  # what the threshold of a layer means; empty if there is none
    low: float = 0.0  # the least threshold
    high: float = 0.0
    is_whole: bool = False  # the threshold is a whole number
    # drops: leaves out some of the router's choices; widens: or takes more of the best, if `most`
    # allows it; chooses: takes others.
    effect: Literal["drops", "widens", "chooses"] = "drops"
    keeps_weights: bool = True  # of the router, as long as it takes K experts
    needs_prompt: bool = False  # whole prompts, one at a time
    needs_attention: bool = False
    is_exportable: bool = True  # needs nothing but what a router has

    @property
    def may_widen(self) -> bool:
        """Whether it takes more than the router's K experts if `most` allows it."""
        return self.effect == "widens"


_INF = float("inf")
RULE_KINDS: Mapping[str, RuleKind] = {
    "top-k": RuleKind(
        threshold="experts per token", low=1, high=MOST_EXPERTS, is_whole=True, effect="widens"
    ),
    "skip": RuleKind(threshold="share of the largest gate weight", high=1),
    "top-p": RuleKind(threshold="sum of probabilities", high=1, effect="widens"),
    "entropy": RuleKind(threshold="factor of exp(entropy)", high=_INF, effect="widens"),
    "null": RuleKind(threshold="logit of null experts", low=-_INF, high=_INF),
    "odp": RuleKind(
        threshold="share of the largest gate weight",
        high=1,
        needs_prompt=True,
        needs_attention=True,
        is_exportable=False,
    ),
    "fitted": RuleKind(threshold="relative error of the output", high=_INF),
    "grouped": RuleKind(
        threshold="number of groups",
        low=1,
        high=MOST_EXPERTS,
        is_whole=True,
        effect="chooses",
        keeps_weights=False,
    ),
    "smooth": RuleKind(
        threshold="share of the similar tokens' scores",
        high=1,
        effect="chooses",
        keeps_weights=False,
        needs_prompt=True,
        is_exportable=False,
    ),
    "random": RuleKind(threshold="", effect="chooses", is_exportable=False),
    "dropout": RuleKind(
        threshold="probability that an expert is left out", high=1, is_exportable=False
    ),
    "contrast": RuleKind(
        threshold="rank of the weak run's expert, from 0",
        high=MOST_EXPERTS,
        is_whole=True,
        effect="chooses",
        is_exportable=False,
    ),
}


class ProfiledBlock(NamedTuple):
    """What a rule must know of a MoE block; the law of its weights is not known to a profile."""

    name: str
    n_experts: int
    top_k: int
    n_groups: int
    top_groups: int
    is_hashed: bool
    weights: object = True


class RoutingRule(Record):
    """A rule and its options; thresholds are set for each layer."""

    rule: str
    most: int | None = Field(default=None, ge=1, le=MOST_EXPERTS)  # a token; None is K
    weights: Weights = "gate"
    share: FiniteFloat = Field(default=0.02, ge=0, le=1)  # odp: tokens that keep all experts
    temperature: FiniteFloat = Field(default=1.0, gt=0)  # smooth
    level: Level = "token"  # random: what gets experts of its own
    shuffle: bool = False  # a control: leaves out as many experts, but random ones of the K
    seed: int = Field(default=0, ge=0, lt=SEEDS)

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.rule not in RULE_KINDS:
            raise ValueError(f"{self.rule[:40]!a} is not a rule: take {', '.join(RULE_KINDS)}")
        if self.shuffle and self.kind.effect == "chooses":
            raise ValueError(f"rule {self.rule} leaves out no experts, so none can be shuffled")
        return self

    @property
    def kind(self) -> RuleKind:
        """The rule in the table."""
        return RULE_KINDS[self.rule]

    @property
    def options(self) -> "Options":
        """As the rule's function takes them."""
        from expertcut.models.modeling_routed import Options

        return Options(**{field.name: getattr(self, field.name) for field in fields(Options)})

    @property
    def needs_prompt(self) -> bool:
        """Whether prompts must be scored whole, one at a time."""
        return self.kind.needs_prompt or (self.rule == "random" and self.level == "prompt")

    @property
    def is_random(self) -> bool:
        """Whether tokens need keys for random numbers."""
        return self.shuffle or self.rule in ("random", "dropout")

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

    def check(self, block: "MoeBlock | ProfiledBlock", at: float) -> None:
        """Raises a ContractError if the gate of the block does not allow the rule."""
        most = self.n_columns(block.top_k, [at])
        if self.rule == "contrast":  # ranks experts that the router may not have chosen
            most = max(most, int(at) + 1)
        if most > block.n_experts:
            raise ContractError(
                f"{block.name} has {block.n_experts} experts, rule {self.rule} asks for {most}: "
                "take fewer"
            )
        if self.rule == "grouped" and (block.n_experts % at or block.top_k % at):
            raise ContractError(
                f"{block.name} takes {block.top_k} of {block.n_experts} experts: {at:g} groups do "
                "not divide both, take a common divisor"
            )
        if self.rule == "grouped" and self.most is not None and self.most < block.top_k:
            raise ContractError(
                f"rule grouped takes all {block.top_k} experts of {block.name}, equally many of "
                f"each group: leave out the limit of {self.most}"
            )
        if self.shuffle and most > block.top_k:
            raise ContractError(
                f"rule {self.rule} above the {block.top_k} experts of {block.name} leaves out none "
                f"to shuffle: take at most {block.top_k}"
            )
        if most == block.top_k and self.kind.keeps_weights:
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
