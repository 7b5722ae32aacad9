"""Router edits: experts named or chosen, the strength of their biases, rules, and the plan."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from expertcut.edits import reweight_select as select
from expertcut.edits.edit_settings import ReweightSettings
from expertcut.edits.layouts import LAYOUTS, Layout, Positions
from expertcut.edits.plan import (
    BlockEdit,
    EditPlan,
    PlanBalance,
    Point,
    expert_ids,
    find_row,
    ids_text,
)
from expertcut.edits.reweight_select import Chooser, QuestionOutcomes, SelectedExpert, right
from expertcut.errors import PlanError, SettingsError
from expertcut.models.routing_rule import ErrorCoefficients, RoutingRule
from expertcut.profiling.statistics import LayerStatistics
from expertcut.profiling.storage import Profile
from expertcut.stats import Array, gained_lost, wilson_interval

if TYPE_CHECKING:  # with torch
    from expertcut.edits.balance import BalancedLayer

_EXPRESSION = re.compile(r"(?:(\d{1,9}):)?(\d{1,9})(?:=([+-]?[\d.]+(?:[eE][+-]?\d+)?))?")
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # logits


class RouterEdit(NamedTuple):
    """A bias on the logit, or a factor on the gate weight, of the expert in a row of a router."""

    layer: int
    expert: int
    bias: float = 0.0
    scale: float = 1.0
    block: str = ""  # the block's name
    origin: str = ""  # of the bias, in words

    @property
    def verb(self) -> str:
        """`boost` or `suppress`; `scale` without a bias."""
        if not self.bias:
            return "scale"
        return "boost" if self.bias > 0 else "suppress"


Ask = Callable[[tuple[RouterEdit, ...]], Array]  # log p (N, C) with these biases on the gates


class Settled(NamedTuple):
    """The chosen biases, and the curve of a search: the result of each strength."""

    shifts: tuple[RouterEdit, ...]
    curve: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Procedure:
    """A procedure that chooses experts and strengths, and can be repeated for cross-fitting."""

    named: tuple[tuple[SelectedExpert, float | None], ...] = ()  # by hand, with any own strength
    chooser: Chooser = field(default_factory=Chooser)  # adds to those
    strength: float | None = None  # of experts without an own one; None is the admission gap
    is_tuned: bool = False

    def pick(
        self, records: QuestionOutcomes, left_out: Collection[str] = ()
    ) -> tuple[SelectedExpert, ...]:
        """The experts, the ones named by hand first."""
        named = {pick[:2]: pick for pick, _ in self.named}
        chosen = self.chooser.choose(records, left_out)
        return (*named.values(), *(pick for pick in chosen if pick[:2] not in named))

    def settle(
        self,
        records: QuestionOutcomes,
        picks: Sequence[SelectedExpert],
        ask: Ask,
        left_out: Collection[str] = (),
    ) -> Settled:
        """The strengths, without questions whose overlap hash is in `left_out`."""
        is_used_N = ~np.isin(records.hash_N, list(left_out))
        if self.is_tuned:
            return _Search(records, is_used_N, ask).run(picks, len(self.named))
        return Settled(self.untuned(records.part(is_used_N), picks))

    def untuned(
        self, records: QuestionOutcomes, picks: Sequence[SelectedExpert]
    ) -> tuple[RouterEdit, ...]:
        """Given strengths, or gaps; none for an expert whose gap has the other sign."""
        given = dict(self.named)
        shifts = []
        for pick in picks:
            strength = given.get(pick) or self.strength
            bias = gap(records, pick) if strength is None else pick.sign * strength
            if math.isfinite(bias) and bias * pick.sign > 0:
                shifts.append(RouterEdit(pick.layer, pick.expert, bias))
        return tuple(shifts)

    def origin(self, shift: RouterEdit) -> str:
        """The origin of a strength, in words."""
        if self.is_tuned:
            return "found by a search"
        given = {pick[:2] for pick, strength in self.named if strength}
        return "given" if self.strength or shift[:2] in given else "its admission gap"

    def check(self, records: QuestionOutcomes) -> None:
        """Raises a PlanError for too few candidates, or an expert without a strength."""
        self.chooser.check(records)
        if self.is_tuned:
            return
        picks = self.pick(records)
        tilted = {shift[:2] for shift in self.untuned(records, picks)}
        for pick in picks:
            if pick[:2] not in tilted:
                verb = "boost" if pick.sign > 0 else "suppress"
                why = select.no_default_strength(*pick, gap(records, pick))
                raise PlanError(
                    f"{why}, so there is no default strength to {verb} it by: give --strength or "
                    "--tune"
                )


def gap(records: QuestionOutcomes, pick: SelectedExpert) -> float:
    """The admission gap of a selected expert."""
    layer, block = pick.layer, records.blocks[pick.layer]
    return select.admission_gap(
        block,
        records.alpha_NLE[:, layer, : block.experts],
        records.chosen_NLK[:, layer],
        pick.expert,
        records.selection_of(layer),
    )


class _Search:
    """Strengths in doubling steps for the first 1, 2, 4, … experts, then finer around the best.

    Strengths stop at a clear loss (two standard errors), and once stronger suppression changes no
    log-probability (a stronger boost may still admit its expert). They go beyond 8 logits while the
    strongest is the best or below the admission gap of a boosted expert. Only a gain replaces the
    best, so of equals the fewest experts and the weakest bias stay, or no bias at all.
    """

    def __init__(self, records: QuestionOutcomes, is_used_N: Array, ask: Ask) -> None:
        self.ask, self.is_used_N = ask, is_used_N
        self.used = records.part(is_used_N)
        self.base_N = self.used.is_correct_N
        self.best: tuple[RouterEdit, ...] = ()
        self.most_right = int(self.base_N.sum())
        self.curve = [self._point((), 0.0, self.base_N)]

    def run(self, picks: Sequence[SelectedExpert], n_named: int) -> Settled:
        for few in firsts(picks, n_named):
            before_NC = self.used.logprob_NC
            gaps = [gap(self.used, pick) for pick in few if pick.sign > 0]
            enough = max(STRENGTHS[-1], *gaps, 0)
            for strength in (*STRENGTHS, 16.0, 32.0, 64.0):
                shifts = tuple(RouterEdit(p.layer, p.expert, p.sign * strength) for p in few)
                logprob_NC = self._try(shifts, strength)
                gained, lost = gained_lost(self.base_N, right(logprob_NC, self.used.answer_N))
                is_same = not gaps and np.allclose(logprob_NC, before_NC, rtol=0, atol=1e-5)
                is_hurting = lost - gained > 2 * math.sqrt(lost + gained)
                if is_hurting or is_same or (strength >= enough and self.best != shifts):
                    break
                before_NC = logprob_NC
        if best := self.best:
            point = max(self.curve, key=lambda p: p.accuracy)
            for factor in (2**-0.5, 2**0.5):
                finer = tuple(s._replace(bias=s.bias * factor) for s in best)
                self._try(finer, point.strength * factor)
        return Settled(self.best, tuple(self.curve))

    def _try(self, shifts: tuple[RouterEdit, ...], strength: float) -> Array:
        logprob_NC: Array = self.ask(shifts)[self.is_used_N]
        right_N = right(logprob_NC, self.used.answer_N)
        self.curve.append(self._point(shifts, strength, right_N))
        if right_N.sum() > self.most_right:
            self.most_right, self.best = int(right_N.sum()), shifts
        return logprob_NC

    def _point(self, shifts: tuple[RouterEdit, ...], strength: float, right_N: Array) -> Point:
        share = float(right_N.mean())
        return Point(
            experts=len(shifts),
            strength=strength,
            biases=tuple(shift[:3] for shift in shifts),
            questions=len(right_N),
            accuracy=share,
            ci95=wilson_interval(share, len(right_N)),
        )


def firsts(picks: Sequence[SelectedExpert], n_named: int) -> Iterator[tuple[SelectedExpert, ...]]:
    """The named experts with the first 1, 2, 4, … and finally all others of each sign."""
    named, others = tuple(picks[:n_named]), picks[n_named:]
    by_sign = [[p for p in others if p.sign == sign] for sign in (+1, -1)]
    most, count = max(map(len, by_sign)), 1
    while count < most:
        yield (*named, *(pick for own in by_sign for pick in own[:count]))
        count *= 2
    yield (*named, *others)


class Target(NamedTuple):
    """An expert to reweight; `layer` None is the last MoE block, `strength` None the default."""

    layer: int | None
    expert: int
    strength: float | None


def parse_target(expression: str, what: str = "bias") -> Target:
    """`12` (last layer) or `3:12` (layer 3), either with a finite `=0.25`; or SettingsError."""
    match = _EXPRESSION.fullmatch(expression.strip())
    if match is None:
        raise SettingsError(
            f"{expression!r} names no expert: write E, L:E, E={what} or L:E={what}, as in 3:12=0.25"
        )
    layer, expert, number = match.groups()
    try:
        value = None if number is None else float(number)
    except ValueError:
        raise SettingsError(f"{expression!r}: {number!r} is not a number") from None
    if value is not None and not math.isfinite(value):
        raise SettingsError(f"{expression!r}: a {what} of {number} cannot tilt anything")
    if value == 0 and what == "bias":
        raise SettingsError(f"{expression!r}: a bias of 0 cannot tilt anything")
    return Target(None if layer is None else int(layer), int(expert), value)


def tilts(profile: Profile, boost: Sequence[str], suppress: Sequence[str]) -> list[RouterEdit]:
    """Biases for all targets; the default strength is the admission gap."""
    biases = []
    for layer, (index, row, sign), target in _targets(profile, boost, suppress):
        bias, origin = sign * abs(target.strength or 0), "given"
        if target.strength is None:
            origin = "its admission gap"
            bias = select.admission_gap(
                profile.info.model.blocks[index],
                profile.array("alpha_NLE")[:, index, : layer.n_experts],
                profile.array("chosen_NLK")[:, index],
                row,
                select.stored_selection(profile.info.model, index),
            )
            if not math.isfinite(bias) or bias * sign <= 0:
                option = "--boost" if sign > 0 else "--suppress"
                why = select.no_default_strength(index, target.expert, sign, bias)
                raise PlanError(
                    f"{why}: give the strength, as in {option} {index}:{target.expert}=0.5"
                )
        biases.append(RouterEdit(index, row, bias, block=layer.block, origin=origin))
    return biases


def _targets(
    profile: Profile, boost: Sequence[str], suppress: Sequence[str] = (), what: str = "bias"
) -> list[tuple[LayerStatistics, SelectedExpert, Target]]:
    """Layer (default: the last), router row and target of each expression."""
    layers = profile.layers
    targets: dict[str, tuple[LayerStatistics, SelectedExpert, Target]] = {}
    for sign, text in [*((+1, text) for text in boost), *((-1, text) for text in suppress)]:
        target = parse_target(text, what)
        index = len(layers) - 1 if target.layer is None else target.layer
        row, name = find_row(profile, index, target.expert), f"{index}:{target.expert}"
        if name in targets:
            raise PlanError(f"expert {name} is named twice: name it once")
        if what == "bias" and sign > 0 and (target.strength or 0) < 0:
            raise PlanError(f"--boost {name}={target.strength:g}: use --suppress")
        targets[name] = (layers[index], SelectedExpert(index, row, sign), target)
    return list(targets.values())


def scalings(profile: Profile, expressions: Sequence[str]) -> list[RouterEdit]:
    """Factors for all targets, `12=1.5` or `3:12=1.5`, not 1; 0 silences an expert."""
    factors = []
    targets = _targets(profile, expressions, what="factor")
    for text, (layer, pick, target) in zip(expressions, targets, strict=True):
        factor = target.strength
        if factor is None or factor < 0 or factor == 1:
            raise SettingsError(
                f"--scale {text} must give a factor, 0 or above and not 1: as in 3:12=1.5"
            )
        factors.append(RouterEdit(pick.layer, pick.expert, scale=factor, block=layer.block))
    return factors


def reweight_draft(
    profile: Profile,
    biased: Sequence[RouterEdit],
    layout: Layout = "stock",
    scaled: Sequence[RouterEdit] = (),
    apply_at: Positions | None = None,
) -> EditPlan:
    """A plan that keeps every expert, with biases and factors."""
    blocks = profile.info.model.blocks
    edits = {block.name: BlockEdit(keep=tuple(range(block.experts))) for block in blocks}
    words, numbers = ("", "reweight", "by hand"), expert_ids(profile)
    draft = EditPlan(*words, "answer", edits, layout, numbers=numbers)
    return with_tilts(draft, biased, scaled, apply_at)


def balance_draft(
    profile: Profile, layers: Sequence["BalancedLayer"], found: PlanBalance, layout: Layout
) -> EditPlan | None:
    """A plan with the biases that even out loads, on selection biases or logits; None without."""
    draft = reweight_draft(profile, (), layout)
    edits = dict(draft.edits)
    for own in layers:
        bias = {e: b for e, b in enumerate(own.bias_E.tolist()) if b}
        field_name = "selection" if own.acts_on_selection else "bias"
        if bias:
            edits[own.block] = edits[own.block].model_copy(update={field_name: bias})
    if not any(edit.bias or edit.selection for edit in edits.values()):
        return None
    mark = LAYOUTS[layout].mark
    return replace(
        draft,
        slug=f"balance-{found.target:g}" + (f"-{mark}" if mark else ""),
        action=f"reweight --balance {found.target:g}",
        criterion="load",
        positions="all",
        edits=edits,
        balance=found,
    )


def with_tilts(
    draft: EditPlan,
    biased: Sequence[RouterEdit],
    scaled: Sequence[RouterEdit] = (),
    apply_at: Positions | None = None,
) -> EditPlan:
    """A plan with biases and factors on experts that it keeps."""
    check_place(draft.layout, apply_at, is_biased=bool(biased))
    words, slugs, edits = [draft.action], [draft.slug] if draft.slug else [], {}
    for tilt in (*biased, *scaled):
        expert = draft.numbers.number(tilt.block, tilt.expert)
        if tilt.expert not in (keep := draft.edits[tilt.block].keep):
            raise PlanError(
                f"expert {tilt.layer}:{expert} is removed by this cut, which keeps "
                f"{ids_text(draft.numbers.kept(tilt.block, keep))} there: tilt one that stays"
            )
        words.append(f"--{tilt.verb} {tilt.layer}:{expert}={abs(tilt.bias) or tilt.scale:.6g}")
        slugs.append(f"{tilt.verb}-{tilt.layer}.{expert}")
    for name, edit in draft.edits.items():
        bias = {t.expert: t.bias for t in biased if t.block == name}
        scale = {s.expert: s.scale for s in scaled if s.block == name}
        edits[name] = edit.model_copy(update={"bias": bias, "scale": scale})
    slug = "-".join(slugs)[:100]
    if apply_at == "answer":
        words, slug = [*words, "--apply-at answer"], f"{slug}-answer"
    mark = LAYOUTS[draft.layout].mark
    slug += f"-{mark}" if mark and not draft.is_cut else ""
    return replace(
        draft, slug=slug, action=" ".join(words), edits=edits, apply_at=apply_at or "all"
    )


def route_draft(
    profile: Profile,
    rule: RoutingRule,
    at_by_layer: Mapping[int, float],
    layout: Layout = "routed",
    *,
    fit_by_layer: Mapping[int, ErrorCoefficients] | None = None,
    action: str = "",
    is_tuned: bool = False,
) -> EditPlan:
    """A plan that keeps every expert, with routers that choose by a rule.

    `fit_by_layer` is of rule fitted, `action` the command in words; `is_tuned` says that tuning
    questions chose the thresholds.
    """
    draft = reweight_draft(profile, (), layout)
    draft = replace(draft, action=action or f"route --rule {rule.rule}", is_tuned=is_tuned)
    return with_routing(draft, rule, at_by_layer, fit_by_layer or {})


def with_routing(
    draft: EditPlan,
    rule: RoutingRule,
    at_by_layer: Mapping[int, float],
    fit_by_layer: Mapping[int, ErrorCoefficients],
) -> EditPlan:
    """A plan whose routers choose by a rule; layers without a threshold keep their routing."""
    names = list(draft.edits)
    if not at_by_layer or not set(at_by_layer) <= set(range(len(names))):
        raise PlanError(
            f"thresholds for layers {sorted(at_by_layer)} do not fit: MoE layers are 0 to "
            f"{len(names) - 1} (counted from 0), and one must have a threshold"
        )
    for at in at_by_layer.values():
        try:
            rule.check_threshold(at)
        except ValueError as error:
            raise PlanError(str(error)) from None
        if not math.isfinite(at):
            raise PlanError(f"threshold {at} of rule {rule.rule} is not finite: take a number")
    edits = {
        name: edit.model_copy(update={"at": at_by_layer.get(layer), "fit": fit_by_layer.get(layer)})
        for layer, (name, edit) in enumerate(draft.edits.items())
    }
    return replace(draft, edits=edits, routing=rule)


def check_place(layout: Layout, apply_at: Positions | None, *, is_biased: bool) -> None:
    """Raises a SettingsError unless there is a bias that can act at these positions."""
    if apply_at is not None and not is_biased:
        raise SettingsError(
            f"--apply-at {apply_at} says where a bias acts, and there is none: a factor acts at "
            "every token, leave it out"
        )
    if apply_at == "answer" and not LAYOUTS[layout].fits_biases:
        raise SettingsError(
            "--apply-at answer is of layout stock: gate.bias of layout exact acts at every token, "
            "so take --layout stock or leave it out"
        )


def procedure_of(profile: Profile, settings: ReweightSettings) -> Procedure:
    """The way of choosing experts and strengths that the settings say."""
    picks = tuple(
        (pick, None if target.strength is None else abs(target.strength))
        for _, pick, target in _targets(profile, settings.boost or [], settings.suppress or [])
    )
    if settings.tune and any(strength for _, strength in picks):
        raise SettingsError("--tune searches for the strength: leave the number out")
    return Procedure(picks, select.chooser_of(profile, settings), settings.strength, settings.tune)


def procedure_name(profile: Profile, settings: ReweightSettings, procedure: Procedure) -> str:
    """The procedure in words, which also name the outputs."""
    numbers, blocks = expert_ids(profile), profile.info.model.blocks
    words = []
    for pick, _ in procedure.named:
        expert = numbers.number(blocks[pick.layer].name, pick.expert)
        words.append(f"{'boost' if pick.sign > 0 else 'suppress'} {pick.layer}:{expert}")
    chosen = (("boost-best", settings.boost_best), ("suppress-worst", settings.suppress_worst))
    words += [f"{name} {n}" for name, n in chosen if n]
    if settings.criterion not in ("by hand", "difference"):
        words.append(f"by {settings.criterion}")
    return " ".join([*words, "tuned"] if procedure.is_tuned else words)
