"""Cross-fitting: a procedure chooses on four folds and is scored on the fifth, for each of five.

It judges the procedure; the plan that ships is chosen on all tuning questions (design: §8).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expertcut.edits.reweight_select import QuestionOutcomes, SelectedExpert, right
from expertcut.edits.reweight_tune import Ask, Procedure, Settled, Shift
from expertcut.errors import QuizError
from expertcut.evaluation.comparison import Comparison, compare
from expertcut.evaluation.proving.control import DRAWS, draw
from expertcut.evaluation.proving.folds import FOLDS, deal

Array = np.ndarray[Any, Any]
Choose = Callable[[QuestionOutcomes, frozenset[str]], tuple[SelectedExpert, ...]]


@dataclass(frozen=True)
class Fold:
    """What was chosen without one fold, and what that did to it."""

    questions: int
    shifts: tuple[Shift, ...]
    delta: float


@dataclass(frozen=True)
class Control:
    """The same procedure on random experts: the change in accuracy of each draw.

    `distinct` draws had other experts than all before.
    """

    delta_B: Array
    distinct: int

    def p(self, delta: float) -> float:
        """(1 + draws at least as good) / (1 + draws), but no less than 1 / (1 + distinct ones)."""
        reached = (1 + int((self.delta_B >= delta - 1e-12).sum())) / (1 + len(self.delta_B))
        return max(reached, 1 / (1 + self.distinct))


@dataclass(frozen=True)
class Judged:
    """A procedure's outcome: judged fairly, judged on its own questions, and by chance."""

    records: QuestionOutcomes
    cross_fitted: Comparison
    same_questions: Comparison
    control: Control
    folds: tuple[Fold, ...]
    settled: Settled


@dataclass(frozen=True)
class Progress:
    """How far a proof is; the last carries the outcome."""

    done: int
    total: int
    judged: Judged | None = None


def judge(
    records: QuestionOutcomes, procedure: Procedure, ask: Ask, draws: int = DRAWS, seed: int = 0
) -> Iterator[Progress]:
    """Five folds, all questions at once, then the random draws.

    Raises:
        QuizError: fewer different questions than folds.
    """
    if len(set(records.hash_N.tolist())) < FOLDS:
        raise QuizError(
            f"{len(records)} tuning questions cannot be split into {FOLDS} folds: profile more"
        )
    trial = _Trial(records, procedure, ask, seed)
    total = 2 + draws
    cross_N, folds = trial.cross_fitted(procedure.pick)
    yield Progress(1, total)
    picks = procedure.pick(records)
    settled = procedure.settle(records, picks, ask)
    same_N = trial.right(settled.shifts)
    yield Progress(2, total)
    rng = np.random.default_rng(seed)
    deltas: list[float] = []
    seen: set[tuple[SelectedExpert, ...]] = set()
    for done in range(draws):
        others = draw(procedure.chooser, records, picks, rng)
        seen.add(tuple(sorted(others.values(), key=lambda p: (p.layer, p.expert))))
        deltas.append(trial.random_delta(others, settled.shifts))
        yield Progress(3 + done, total)
    base_N = records.is_correct_N
    judged = Judged(
        records=records,
        cross_fitted=compare(base_N, cross_N),
        same_questions=compare(base_N, same_N),
        control=Control(np.array(deltas), len(seen)),
        folds=folds,
        settled=settled,
    )
    yield Progress(total, total, judged)


class _Trial:
    """One set of folds, and what any choice does on them."""

    def __init__(
        self, records: QuestionOutcomes, procedure: Procedure, ask: Ask, seed: int
    ) -> None:
        self.records = records
        self.procedure = procedure
        self.ask = ask
        self.fold_N = deal(records.subject_N.tolist(), records.hash_N.tolist(), seed)

    def right(self, shifts: tuple[Shift, ...]) -> Array:
        """Right answers (N,) with these shifts."""
        if not shifts:
            return self.records.is_correct_N
        return right(self.ask(shifts), self.records.answer_N)

    def cross_fitted(self, choose: Choose) -> tuple[Array, tuple[Fold, ...]]:
        """Right answers (N,), each question's with what was chosen without its fold."""
        right_N, found = self.records.is_correct_N.copy(), []
        for fold in range(FOLDS):
            is_own_N = self.fold_N == fold
            left_out = frozenset(self.records.hash_N[is_own_N].tolist())
            picks = choose(self.records, left_out)
            shifts = self.procedure.settle(self.records, picks, self.ask, left_out).shifts
            right_N[is_own_N] = self.right(shifts)[is_own_N]
            change_n = right_N[is_own_N].astype(int) - self.records.is_correct_N[is_own_N]
            found.append(Fold(int(is_own_N.sum()), shifts, float(change_n.mean())))
        return right_N, tuple(found)

    def random_delta(
        self, others: Mapping[SelectedExpert, SelectedExpert], like: Sequence[Shift]
    ) -> float:
        """The change in accuracy with other experts in the place of those that were picked.

        Without a search each gets the bias of the one whose place it takes.
        """
        if self.procedure.is_tuned:
            right_N, _ = self.cross_fitted(lambda _records, _left_out: tuple(others.values()))
        else:
            bias_of = {(shift.layer, shift.expert): shift.bias for shift in like}
            right_N = self.right(
                tuple(
                    Shift(other.layer, other.expert, bias_of[pick.layer, pick.expert])
                    for pick, other in others.items()
                    if (pick.layer, pick.expert) in bias_of
                )
            )
        return float(right_N.mean() - self.records.is_correct_N.mean())
