"""Cross-fitting: a procedure chooses on four folds and is scored on the fifth, for each of five.

The baseline are random experts in place of the chosen ones. `proof.json` holds the result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, repeat
from pathlib import Path
from typing import Literal

import numpy as np

from expertcut.documents import Format1, Record
from expertcut.edits.plan import PROOF_FILE, ExpertIds
from expertcut.edits.reweight_select import (
    Array,
    Chooser,
    QuestionOutcomes,
    SelectedExpert,
    appearances,
    places,
    right,
)
from expertcut.edits.router_edits import Ask, Procedure, RouterEdit, Settled
from expertcut.errors import PlanError, QuizError
from expertcut.profiling.schema import BlockInfo
from expertcut.stats import LEVEL, Comparison, compare

FOLDS = 5
DRAWS = 99
_MIN_DISTINCT = 20  # distinct draws with which p can lie below 0.05
Biases = tuple[tuple[int, int, float], ...]  # (layer, expert, bias in logits)
Picks = Sequence[SelectedExpert]
Verdict = Literal["helps", "hurts", "no evidence"]


def deal(subjects: Sequence[str], hashes: Sequence[str], seed: int, folds: int = FOLDS) -> Array:
    """The fold (N,) of each question, random within its first subject; repeats share one."""
    first: dict[str, str] = {}
    for name, content in zip(subjects, hashes, strict=True):
        first.setdefault(content, name)
    by_subject: dict[str, list[str]] = {}
    for content, name in first.items():
        by_subject.setdefault(name, []).append(content)
    rng = np.random.default_rng(seed)
    # Dealt across subjects, so that small ones do not all fill the first folds.
    order = [content for own in by_subject.values() for content in rng.permutation(own).tolist()]
    fold = {content: i % folds for i, content in enumerate(order)}
    return np.array([fold[content] for content in hashes])


def draw(
    chooser: Chooser, records: QuestionOutcomes, picks: Picks, rng: np.random.Generator
) -> dict[SelectedExpert, SelectedExpert]:
    """For each pick another expert of its sign and layers, matched in appearances, while any is."""
    by_id = places(records.blocks)
    appears_X = appearances(records)
    is_free_X = chooser.candidates(records)
    is_free_X[[by_id.index((pick.layer, pick.expert)) for pick in picks]] = False
    drawn = {}
    for pick in picks:
        appears = appears_X[by_id.index((pick.layer, pick.expert))]
        free = np.flatnonzero(is_free_X & (appears_X > 0))
        distance = np.abs(np.log(appears_X[free] / max(appears, appears_X[free].min(initial=1))))
        n_within = int((distance <= np.log(2.0)).sum())  # at most twice as often, or as seldom
        # At least the 25 nearest.
        matched = free[np.argsort(distance, kind="stable")[: max(n_within, 25)]]
        if len(matched):
            x = int(rng.choice(matched))
            is_free_X[x] = False
            drawn[pick] = SelectedExpert(*by_id[x], pick.sign)
    return drawn


class FoldResult(Record):
    """One fold: what was chosen without it, and the change in accuracy on it."""

    questions: int
    biases: Biases
    delta: float


@dataclass(frozen=True)
class RandomBaseline:
    """Change in accuracy with random experts, per draw; `distinct` counts different draws."""

    delta_B: Array
    distinct: int

    def p(self, delta: float) -> float:
        """(1 + draws at least as good) / (1 + draws), but no less than 1 / (1 + distinct ones)."""
        reached = (1 + int((self.delta_B >= delta - 1e-12).sum())) / (1 + len(self.delta_B))
        return max(reached, 1 / (1 + self.distinct))


@dataclass(frozen=True)
class CrossFit:
    """A procedure scored by cross-fitting, on its own questions, and against random experts."""

    records: QuestionOutcomes
    cross_fitted: Comparison
    same_questions: Comparison
    random: RandomBaseline
    folds: tuple[FoldResult, ...]  # experts by router rows
    settled: Settled


def cross_fit(
    records: QuestionOutcomes,
    procedure: Procedure,
    ask: Ask,
    draws: int = DRAWS,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> CrossFit:
    """Five folds, all questions at once, then the random draws; reports each search of them."""
    if len(set(records.hash_N.tolist())) < FOLDS:
        raise QuizError(
            f"{len(records)} tuning questions cannot be split into {FOLDS} folds: profile more"
        )
    fold_N = deal(records.subject_N.tolist(), records.hash_N.tolist(), seed)
    total = FOLDS + 1 + draws * (FOLDS if procedure.is_tuned else 1)
    advance = map(report, count(), repeat(total)).__next__  # reports one more
    advance()
    folded = partial(_cross_fitted, records, procedure, ask, fold_N, advance)
    cross_N, folds = folded()
    picks = procedure.pick(records)
    settled = procedure.settle(records, picks, ask)
    same_N = right(ask(settled.shifts), records.answer_N)
    advance()
    bias_of = {(shift.layer, shift.expert): shift.bias for shift in settled.shifts}
    rng = np.random.default_rng(seed)
    deltas: list[float] = []
    seen: set[tuple[SelectedExpert, ...]] = set()
    for _ in range(draws):
        others = draw(procedure.chooser, records, picks, rng)
        seen.add(tuple(sorted(others.values(), key=lambda p: (p.layer, p.expert))))
        if procedure.is_tuned:
            random_N, _ = folded(tuple(others.values()))
        else:  # without a search they take the picks' biases
            shifts = (
                RouterEdit(other.layer, other.expert, bias_of[pick.layer, pick.expert])
                for pick, other in others.items()
                if (pick.layer, pick.expert) in bias_of
            )
            random_N = right(ask(tuple(shifts)), records.answer_N)
            advance()
        deltas.append(float(random_N.mean() - records.is_correct_N.mean()))
    crossed, same = (compare(records.is_correct_N, right_N) for right_N in (cross_N, same_N))
    random = RandomBaseline(np.array(deltas), len(seen))
    return CrossFit(records, crossed, same, random, folds, settled)


def _cross_fitted(
    records: QuestionOutcomes,
    procedure: Procedure,
    ask: Ask,
    fold_N: Array,
    advance: Callable[[], None],
    picks: Picks | None = None,
) -> tuple[Array, tuple[FoldResult, ...]]:
    """Correct answers (N,), each with these picks, or those chosen without the question's fold."""
    right_N, folds = records.is_correct_N.copy(), []
    for fold in range(FOLDS):
        is_own_N = fold_N == fold
        left_out = frozenset(records.hash_N[is_own_N].tolist())
        own_picks = procedure.pick(records, left_out) if picks is None else picks
        shifts = procedure.settle(records, own_picks, ask, left_out).shifts
        right_N[is_own_N] = right(ask(shifts), records.answer_N)[is_own_N]
        change_n = right_N[is_own_N].astype(int) - records.is_correct_N[is_own_N]
        biases = tuple(shift[:3] for shift in shifts)
        n, delta = int(is_own_N.sum()), float(change_n.mean())
        folds.append(FoldResult(questions=n, biases=biases, delta=delta))
        advance()
    return right_N, tuple(folds)


class RandomResult(Record):
    """Random experts; `range95` holds 95 % of the draws."""

    draws: int
    distinct: int
    delta_mean: float
    range95: tuple[float, float]
    p: float


class CrossFitResult(Record):
    """`proof.json`; `same_questions` is optimistic: chosen and scored on the same questions."""

    format: Format1 = 1
    procedure: str
    quiz: str
    split: str
    questions: int
    seed: int
    base_accuracy: float
    cross_fitted: Comparison
    same_questions: Comparison
    random: RandomResult
    folds: tuple[FoldResult, ...]
    verdict: Verdict
    sentence: str


def cross_fit_result(
    outcome: CrossFit,
    procedure: str,
    *,
    quiz: str,
    split: str,
    seed: int,
    numbers: ExpertIds | None = None,
) -> CrossFitResult:
    """The record of a finished run; `numbers` are those of its experts before earlier cuts."""
    numbers = numbers or ExpertIds()
    cross, random, blocks = outcome.cross_fitted, outcome.random, outcome.records.blocks
    p_random = random.p(cross.delta)
    low, high = np.percentile(random.delta_B, [2.5, 97.5])
    word = verdict(cross, p_random)
    return CrossFitResult(
        procedure=procedure,
        quiz=quiz,
        split=split,
        questions=len(outcome.records),
        seed=seed,
        base_accuracy=float(outcome.records.is_correct_N.mean()),
        cross_fitted=cross,
        same_questions=outcome.same_questions,
        random=RandomResult(
            draws=len(random.delta_B),
            distinct=random.distinct,
            delta_mean=float(random.delta_B.mean()),
            range95=(float(low), float(high)),
            p=p_random,
        ),
        folds=tuple(
            fold.model_copy(update={"biases": numbered(fold.biases, blocks, numbers)})
            for fold in outcome.folds
        ),
        verdict=word,
        sentence=_sentence(outcome, word, p_random),
    )


def numbered(biases: Biases, blocks: Sequence[BlockInfo], numbers: ExpertIds) -> Biases:
    """Biases of router rows by the experts' numbers before earlier cuts."""
    return tuple((i, numbers.number(blocks[i].name, row), bias) for i, row, bias in biases)


def verdict(cross: Comparison, p_random: float) -> Verdict:
    """Helps: a significant gain that random experts seldom reach."""
    if not cross.is_significant:
        return "no evidence"
    if cross.ci95[1] < 0:
        return "hurts"
    return "helps" if p_random < LEVEL else "no evidence"


def _sentence(outcome: CrossFit, word: Verdict, p_random: float) -> str:
    cross, n = outcome.cross_fitted, len(outcome.records)
    change = (
        f"{cross.delta * 100:+.2f} points (95 % interval {cross.ci95[0] * 100:+.2f} to "
        f"{cross.ci95[1] * 100:+.2f}, McNemar p = {cross.mcnemar_p:.2g}) on {n:,} questions that "
        "it was not chosen on"
    )
    if word == "helps":
        return f"This procedure helps: {change}; random experts do as well with p = {p_random:.2g}."
    if word == "hurts":
        return f"This procedure hurts: {change}."
    reason = f"{cross.smallest_effect * 100:.2f} points is the smallest effect they could show"
    if cross.is_significant:
        reason = f"random experts do as well with p = {p_random:.2g}"
        if (n_drawn := outcome.random.distinct) < _MIN_DISTINCT:
            reason += f", and only {n_drawn} others were drawn, too few to show more"
    return f"No evidence that this procedure helps: {change}; {reason}."


def load_cross_fit(folder: Path) -> CrossFitResult:
    """`proof.json` of a folder, a PlanError where it is missing or not valid."""
    return CrossFitResult.load(folder / PROOF_FILE, PlanError, "is not a valid proof")
