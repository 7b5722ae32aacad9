"""The settings of `route`: rules of the router, their thresholds, and how they are judged."""

import math
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, FiniteFloat

from expertcut.documents import Record
from expertcut.edits.edit_settings import CHECKPOINT, RANK, ROUTER
from expertcut.errors import ContractError, SettingsError
from expertcut.models.routing_rule import (
    MOST_EXPERTS,
    RULE_KINDS,
    SEEDS,
    Level,
    ProfiledBlock,
    RoutingRule,
    Weights,
)
from expertcut.settings import Settings, numbers_in, option, refuse

if TYPE_CHECKING:
    from expertcut.profiling.schema import BlockInfo, ModelInfo

CALIBRATED = ("skip", "top-p", "entropy", "null", "odp", "fitted")
"""Rules whose thresholds follow from a mean number of experts."""
USUAL = {"skip": 0.5, "top-p": 0.4, "grouped": 2.0, "smooth": 0.5}
"""The `at` of a rule where neither it nor a mean is given."""
_SHARES = (0.75, 0.5, 0.25)  # of K, the means that a sweep tries
_ACTIONS = ("sweep", "tune", "oracle")

_router = partial(option, panel=ROUTER)
_judging = partial(option, panel="Judging", in_recipe=False)


def _number_texts(value: Any) -> Any:
    """Numbers of YAML and Python as the text of the command line."""
    several = value if isinstance(value, list | tuple) else [value]
    if all(isinstance(one, int | float) and not isinstance(one, bool) for one in several):
        return ",".join(f"{one:.17g}" for one in several)
    return value


def _check_numbers(text: str) -> str:
    for part, number in numbers_in(text):
        if math.isnan(number):
            refuse(f"{part[:60]!a} is not a number: write 0.5, or 0.3,0.5 for several")
    return text


def _check_rules(text: str) -> str:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in RULE_KINDS:
            refuse(f"no rule {name[:60]!a}: take {', '.join(RULE_KINDS)}")
        if names.count(name) > 1:
            refuse(f"{text[:100]!a} has {name} twice")
    return ",".join(names)


def _check_weak(text: str) -> str:
    kind, _, rank = text.partition(":")
    if kind != "rank" or not rank.isdecimal():
        refuse(f"{text[:60]!a} is not a weak run: write rank:2 for the third best expert alone")
    return text


Numbers = Annotated[str, BeforeValidator(_number_texts), AfterValidator(_check_numbers)]
Rules = Annotated[str, AfterValidator(_check_rules)]
RoutedLayout = Literal["stock", "routed"]


def read_numbers(text: str) -> tuple[float, ...]:
    """`0.3,0.5` as numbers, each once."""
    return tuple(dict.fromkeys(number for _, number in numbers_in(text)))


class RouteSetting(Record):
    """One setting of a rule: `at`, or thresholds calibrated to `experts` a token in the mean.

    `draw` numbers the random controls: of rule random, or of another rule where as many experts are
    left out, but random ones. Of contrast `at` is the rank of the weak run's expert. With `shared`
    all layers have one calibrated threshold.
    """

    rule: str
    at: FiniteFloat | None = None
    experts: FiniteFloat | None = None
    draw: int | None = Field(default=None, ge=0)
    beta: FiniteFloat | None = Field(default=None, ge=0)
    shared: Literal[True] | None = None

    @property
    def is_control(self) -> bool:
        """Whether this is one of the draws of a random control."""
        return self.draw is not None

    @property
    def is_matched(self) -> bool:
        """Whether it leaves out as many experts as a setting, but random ones."""
        return self.is_control and self.rule != "random"

    @property
    def label(self) -> str:
        """The setting without its rule, as tables write it."""
        text = "" if self.at is None else f"{self.at:g}"
        if self.experts is not None:
            text = f"to {self.experts:g}{' shared' if self.shared else ''}"
        if self.beta is not None:
            text = f"{self.beta:g} rank {self.at:g}"
        return text if self.draw is None else f"{text} draw {self.draw}".strip()

    @property
    def slug(self) -> str:
        """The name of outputs."""
        return "-".join([self.rule, *self.label.split()])


def _profiled(block: "BlockInfo") -> ProfiledBlock:
    groups = (block.groups, block.top_groups)
    return ProfiledBlock(block.name, block.experts, block.top_k, *groups, block.is_hashed)


class RouteSettings(Settings):
    """Which experts a token uses, by which rule."""

    rule: Rules = _router("skip", f"Rule, or several with --sweep: {', '.join(RULE_KINDS)}.")
    at: Numbers | None = _router(
        None, "Threshold of the rule (k of top-k, groups of grouped); several separated by "
        "commas.  [default: the rule's own]", metavar="F",
    )  # fmt: skip
    experts: Numbers | None = _router(
        None, "Calibrate thresholds, layer by layer, to this mean number of experts a token.",
        metavar="N",
    )  # fmt: skip
    shared: bool = _router(False, "Calibrate one threshold for all layers together.")
    most: Annotated[str, BeforeValidator(_number_texts)] | None = _router(
        None, "Use at most this many experts a token, or all.  [default: the model's K]",
        metavar="N",
    )  # fmt: skip
    level: Level = _router(
        "token", "Draw experts anew for each token or each prompt, with --rule random."
    )
    weights: Weights = _router(
        "gate", "Gate weights of the experts that stay: as the gate gives them, or renormalised."
    )
    weak: Annotated[str, AfterValidator(_check_weak)] = _judging(
        "rank:2", "Weak run of --rule contrast: the expert of this rank alone; rank:0 is the best.",
        metavar="rank:R",
    )  # fmt: skip
    beta: FiniteFloat = _judging(
        0.5, "How much the weak run of --rule contrast counts; 0 changes no answer.", ge=0
    )
    layout: RoutedLayout = option(
        "routed", "Form of the checkpoint: routed loads in transformers with --trust-remote-code, "
        "stock holds top-k alone and loads wherever the base does.", panel=CHECKPOINT,
    )  # fmt: skip
    sweep: bool = _judging(False, "Score every setting, and write no checkpoint.")
    tune: bool = option(
        False, "Choose the fewest experts that hold within the margin, on the tuning questions.",
        panel=RANK,
    )  # fmt: skip
    prove: bool = _judging(
        False, "Cross-fit --tune and compare it with random experts left out.",
        flags=("--cross-fit",), aliases=("--prove",),
    )  # fmt: skip
    oracle: bool = _judging(
        False, "Score the best setting of each question against as many noise variants."
    )
    draws: int | None = _judging(
        None, "Draws of random experts that are compared with.  [default: 20]",
        flags=("--random-draws",), aliases=("--draws",), ge=0, le=10**4,
    )  # fmt: skip
    matched: int = _judging(
        0, "With --sweep, draws for each setting that leave out as many experts of each token, but "
        "random ones.", flags=("--matched-draws",), ge=0, le=10**4,
    )  # fmt: skip
    seed: int = _router(0, "Seed of random experts, folds and draws.", ge=0, lt=SEEDS)

    @property
    def is_judging(self) -> bool:
        """Whether settings are scored, and no checkpoint is made."""
        return self.sweep or self.oracle

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules by name."""
        return tuple(self.rule.split(","))

    @property
    def n_most(self) -> int | None:
        """`most` as a number; 0 is all, None the model's K."""
        if self.most is None:
            return None
        is_number = self.most.isdecimal() and 0 < int(self.most[:9]) <= MOST_EXPERTS
        if self.most != "all" and not (is_number and len(self.most) < 10):
            raise SettingsError(
                f"--most {self.most[:60]} must be a number from 1 to {MOST_EXPERTS}, or all"
            )
        return 0 if self.most == "all" else int(self.most)

    def check(self) -> None:
        """Refuses options that do not go together, with a SettingsError."""
        actions = [f"--{name}" for name in _ACTIONS if getattr(self, name)]
        if len(actions) > 1:
            raise SettingsError(f"{' and '.join(actions)} do different things: give one of them")
        if self.prove and not self.tune:
            raise SettingsError("--cross-fit judges how --tune chooses: add --tune")
        if self.matched and not self.sweep:
            raise SettingsError("--matched-draws are controls of a sweep: add --sweep")
        if self.level != "token" and "random" not in self.rules:
            raise SettingsError(f"--level {self.level} is of --rule random: add it to the rules")
        if self.at is not None and self.experts is not None:
            raise SettingsError("--at and --experts both set the threshold: leave one of them out")
        if self.shared and (self.at is not None or not {*self.rules} & {*CALIBRATED}):
            raise SettingsError(
                "--shared calibrates one threshold for all layers: give --experts, or one of the "
                f"rules {', '.join(CALIBRATED)} without --at"
            )
        for rule in self.rules:
            self._check_rule(rule)
        self._check_contrast()
        if self.oracle and self.draws == 0:
            raise SettingsError(
                "--oracle compares with noise variants, and --random-draws 0 makes none: give at "
                "least 1"
            )
        if self.sweep and self.draws == 0 and self.rules == ("random",):
            raise SettingsError("--random-draws 0 leaves nothing of --rule random: give at least 1")
        _ = self.n_most  # refused if it is no number
        if not self.is_judging:
            self._check_checkpoint()

    def _check_checkpoint(self) -> None:
        n_settings = len(self.rules) * len((self.at or self.experts or "").split(","))
        if n_settings > 1:
            raise SettingsError(
                "a checkpoint has one rule and one threshold: give one of each, or --sweep to "
                "score several"
            )
        if self.layout == "stock" and (self.rules, self.weights) != (("top-k",), "gate"):
            is_other = self.rules != ("top-k",)
            what = "a threshold by token" if is_other else f"--weights {self.weights}"
            raise SettingsError(
                f"--layout stock has no place for {what}: take --layout routed, or --rule top-k "
                "with the gate's own weights"
            )
        if self.rules != ("contrast",) and not RULE_KINDS[self.rules[0]].is_exportable:
            raise SettingsError(
                f"--rule {self.rule} needs more than a router has, or is a control, so no "
                "checkpoint can carry it: score it with --sweep"
            )
        tuned = [rule for rule in CALIBRATED if RULE_KINDS[rule].is_exportable]
        if self.tune and (self.at or self.experts or self.rules[0] not in tuned):
            raise SettingsError(
                f"--tune chooses the threshold of one of the rules {', '.join(tuned)}: take one of "
                "these, without --at and --experts"
            )
        if self.draws is not None and not self.prove:
            raise SettingsError(
                "--random-draws are controls of --sweep, --oracle and --cross-fit: add one of them"
            )

    def _check_rule(self, rule: str) -> None:
        if rule == "contrast" or (rule == "random" and len(self.rules) > 1):
            return  # --at and --experts are those of the other rules
        for at in read_numbers(self.at) if self.at is not None else ():
            try:
                RoutingRule(rule=rule).check_threshold(at)
            except ValueError as error:
                raise SettingsError(f"--at {error}") from None
            if rule == "top-k" and self.n_most and at > self.n_most:
                raise SettingsError(
                    f"--at {at:g} takes more experts than --most {self.most} allows: leave --most "
                    "out, or take a smaller number"
                )
        if self.experts is None:
            return
        if rule not in (*CALIBRATED, "top-k"):
            raise SettingsError(
                f"--experts calibrates thresholds, and {rule} has none: give --at, or one of the "
                f"rules {', '.join(CALIBRATED)}"
            )
        for experts in read_numbers(self.experts):
            if experts < 1:
                raise SettingsError(f"--experts {experts:g} must be at least 1")
            if rule == "top-k" and experts != int(experts):
                raise SettingsError(f"--experts {experts:g} must be a whole number for top-k")

    def _check_contrast(self) -> None:
        if "contrast" not in self.rules:
            usual = {name: type(self).model_fields[name].default for name in ("weak", "beta")}
            for name, default in usual.items():
                if getattr(self, name) != default:
                    raise SettingsError(f"--{name} sets --rule contrast: add it to the rules")
        elif self.tune or self.oracle:
            raise SettingsError(
                "--rule contrast runs the model twice and leaves no expert out: score it with "
                "--sweep"
            )
        elif self.rules == ("contrast",) and (self.at or self.experts):
            given = "--at" if self.at else "--experts"
            raise SettingsError(
                f"{given} is no setting of contrast: give --weak rank:R and --beta B"
            )

    def choices(self, top_k: int) -> tuple[RouteSetting, ...]:
        """Every setting, rule by rule, for a model of this K; each once."""
        found = [choice for rule in self.rules for choice in self._of_rule(rule, top_k)]
        return tuple(dict.fromkeys(found))

    def check_blocks(self, model: "ModelInfo") -> None:
        """Refuses what the blocks of a profiled model rule out, as far as a profile tells."""
        if any(block.places and block.declared for block in model.blocks):
            raise SettingsError(
                f"{model.id} takes more experts for some tokens than for others by itself, as its "
                "contract says: rules act on a fixed number"
            )
        if any(block.places for block in model.blocks):
            raise SettingsError(
                f"{model.id} has a routing rule already: route the model that it was made from"
            )
        top_k, n_experts = (min(getattr(b, k) for b in model.blocks) for k in ("top_k", "experts"))
        if self.tune:
            self.candidates(top_k)
        found = (RouteSetting(rule=self.rule),) if self.tune else self.choices(top_k)
        if self.matched or self.prove:
            dropping = (one for one in found if RULE_KINDS[one.rule].effect != "chooses")
            found += tuple(one.model_copy(update={"draw": 0}) for one in dropping)
        for setting in found:
            rule = self.rule_of(setting, n_experts)
            try:
                for block in model.blocks:
                    rule.check(_profiled(block), setting.at or 0.0)
            except ContractError as error:
                raise SettingsError(f"--rule {setting.rule}: {error}") from None

    def calibrated(self, rule: str, experts: float) -> RouteSetting:
        """A setting whose thresholds give this mean number of experts a token."""
        return RouteSetting(rule=rule, experts=experts, shared=self.shared or None)

    def candidates(self, top_k: int) -> tuple[float, ...]:
        """Means of experts a token that `--tune` tries, below K and from the most on."""
        steps = int(2 * min(top_k - 0.5, self.most_of(self.rule, top_k) or top_k))
        if steps < 2:
            raise SettingsError(
                f"--tune looks for fewer experts than the {top_k} that a token uses, and there are "
                "none: try other rules with --sweep"
            )
        self._check_most(self.rule, top_k)
        return tuple(step / 2 for step in range(steps, 1, -1))

    def rule_of(self, setting: RouteSetting, n_experts: int) -> RoutingRule:
        """The rule of a setting, for blocks of at least so many experts."""
        return RoutingRule(
            rule=setting.rule,
            most=n_experts if self.n_most == 0 else self.n_most,
            weights=self.weights,
            level=self.level,
            seed=(self.seed + (setting.draw or 0)) % SEEDS,
            shuffle=setting.is_matched,
        )

    def most_of(self, rule: str, top_k: int) -> int | None:
        """The most experts that a token may use by a rule; None for all of a block."""
        if self.n_most == 0 and RULE_KINDS[rule].may_widen:
            return None
        most = self.n_most or top_k
        return most if RULE_KINDS[rule].may_widen else min(most, top_k)

    def _of_rule(self, rule: str, top_k: int) -> list[RouteSetting]:
        if rule == "random":
            return [RouteSetting(rule=rule)]
        if rule == "contrast":
            rank = float(self.weak.removeprefix("rank:"))
            return [RouteSetting(rule=rule, at=rank, beta=self.beta)]
        if self.at is not None:
            return [RouteSetting(rule=rule, at=at) for at in read_numbers(self.at)]
        if rule in (*CALIBRATED, "top-k") and (self.experts is not None or self.is_judging):
            means = self._means(rule, top_k)
        elif rule in USUAL:
            return [RouteSetting(rule=rule, at=USUAL[rule])]
        else:
            how = ", or --experts N" if rule in (*CALIBRATED, "top-k") else ""
            raise SettingsError(f"--rule {rule} needs a threshold: give --at F{how}")
        if rule == "top-k":
            return [RouteSetting(rule=rule, at=float(round(mean))) for mean in means]
        return [self.calibrated(rule, mean) for mean in means]

    def _check_most(self, rule: str, top_k: int) -> None:
        if self.most_of(rule, top_k) == 1 and rule not in ("null", "top-k"):
            how = "--most" if top_k > 1 else "the model"
            raise SettingsError(
                f"{how} lets a token use 1 expert, so --rule {rule} has no threshold to calibrate: "
                "give --at F, or rule top-p or entropy with --most above 1"
            )

    def _means(self, rule: str, top_k: int) -> tuple[float, ...]:
        """Means of experts a token to calibrate to: as given, or shares of K."""
        self._check_most(rule, top_k)
        most = self.most_of(rule, top_k)
        whole = RoutingRule(rule=rule).share if rule == "odp" else 0.0  # of tokens that keep K
        n_all = min(top_k, most or top_k)
        least = 1 + whole * (n_all - 1)
        if self.experts is None:
            return tuple(max(least, share * n_all) for share in _SHARES)
        means = read_numbers(self.experts)
        if min(means) < least:
            raise SettingsError(
                f"--experts {min(means):g} is below {least:g}: --rule {rule} keeps all {n_all} "
                f"experts of {whole:.0%} of the tokens, so take more"
            )
        if most is not None and max(means) > most:
            may_widen = RULE_KINDS[rule].may_widen
            how = "add --most N" if may_widen else f"{rule} only leaves out, take at most {most}"
            raise SettingsError(
                f"--experts {max(means):g} is above {most}, the most that a token may use: {how}"
            )
        return means
