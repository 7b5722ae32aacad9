"""The strength of a bias: given, the admission gap, or searched on the tuning questions."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from expertcut.edits.plan import Point
from expertcut.edits.reweight_select import (
    Chooser,
    QuestionOutcomes,
    SelectedExpert,
    admission_gap,
    no_default_strength,
    right,
)
from expertcut.errors import PlanError
from expertcut.stats import gained_lost, wilson_interval

Array = np.ndarray[Any, Any]
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # logits


class RouterEdit(NamedTuple):
    """A bias on the logit, or a factor on the gate weight, of the expert in a row of a router.

    `block` is its block's name, `origin` says in words where the bias came from.
    """

    layer: int
    expert: int
    bias: float = 0.0
    scale: float = 1.0
    block: str = ""
    origin: str = ""

    @property
    def verb(self) -> str:
        """`boost` or `suppress`."""
        return "boost" if self.bias > 0 else "suppress"


Ask = Callable[[tuple[RouterEdit, ...]], Array]
"""Log p (N, C) of all questions with these biases on the gates."""


@dataclass(frozen=True)
class Settled:
    """The chosen biases, and the curve of a search: the result of each strength."""

    shifts: tuple[RouterEdit, ...]
    curve: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Procedure:
    """A procedure that chooses experts and strengths, and can be repeated for cross-fitting.

    `named` are chosen by hand, each with its strength or None; `chooser` adds to them. `strength`
    is for experts without a strength of their own; None is the admission gap.
    """

    named: tuple[tuple[SelectedExpert, float | None], ...] = ()
    chooser: Chooser = field(default_factory=Chooser)
    strength: float | None = None
    is_tuned: bool = False

    def pick(
        self, records: QuestionOutcomes, left_out: Collection[str] = ()
    ) -> tuple[SelectedExpert, ...]:
        """The experts, the ones named by hand first."""
        named = {(pick.layer, pick.expert): pick for pick, _ in self.named}
        chosen = self.chooser.choose(records, left_out)
        return (*named.values(), *(p for p in chosen if (p.layer, p.expert) not in named))

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
        given = {(pick.layer, pick.expert) for pick, strength in self.named if strength}
        is_given = self.strength is not None or (shift.layer, shift.expert) in given
        return "given" if is_given else "its admission gap"

    def check(self, records: QuestionOutcomes) -> None:
        """Raises a PlanError for too few candidates, or an expert without a strength."""
        self.chooser.check(records)
        if self.is_tuned:
            return
        picks = self.pick(records)
        tilted = {(shift.layer, shift.expert) for shift in self.untuned(records, picks)}
        for pick in picks:
            if (pick.layer, pick.expert) not in tilted:
                why = no_default_strength(pick.layer, pick.expert, pick.sign, gap(records, pick))
                verb = "boost" if pick.sign > 0 else "suppress"
                raise PlanError(
                    f"{why}, so there is no default strength to {verb} it by: give --strength or "
                    "--tune"
                )


def gap(records: QuestionOutcomes, pick: SelectedExpert) -> float:
    """The admission gap of a selected expert."""
    layer, block = pick.layer, records.blocks[pick.layer]
    return admission_gap(
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
        self.ask = ask
        self.used = records.part(is_used_N)
        self.is_used_N = is_used_N
        self.base_N = self.used.is_correct_N
        self.best: tuple[RouterEdit, ...] = ()
        self.most_right = int(self.base_N.sum())
        self.curve = [self._point((), 0.0, self.base_N)]

    def run(self, picks: Sequence[SelectedExpert], n_named: int) -> Settled:
        for few in firsts(picks, n_named):
            self._climb(few)
        if best := self.best:
            point = max(self.curve, key=lambda p: p.accuracy)
            for factor in (2**-0.5, 2**0.5):
                finer = tuple(s._replace(bias=s.bias * factor) for s in best)
                self._try(finer, point.strength * factor)
        return Settled(self.best, tuple(self.curve))

    def _climb(self, picks: Sequence[SelectedExpert]) -> None:
        before_NC = self.used.logprob_NC
        gaps = [gap(self.used, pick) for pick in picks if pick.sign > 0]
        enough = max(STRENGTHS[-1], *gaps, 0)
        for strength in (*STRENGTHS, 16.0, 32.0, 64.0):
            shifts = tuple(RouterEdit(p.layer, p.expert, p.sign * strength) for p in picks)
            logprob_NC = self._try(shifts, strength)
            gained, lost = gained_lost(self.base_N, right(logprob_NC, self.used.answer_N))
            is_same = not gaps and np.allclose(logprob_NC, before_NC, rtol=0, atol=1e-5)
            is_hurting = lost - gained > 2 * math.sqrt(lost + gained)
            if is_hurting or is_same or (strength >= enough and self.best != shifts):
                return
            before_NC = logprob_NC

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
            biases=tuple((s.layer, s.expert, s.bias) for s in shifts),
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
        yield (*named, *(p for found in by_sign for p in found[:count]))
        count *= 2
    yield (*named, *others)
