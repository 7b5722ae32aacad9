"""What a proof says: `proof.json`, and the verdict in one sentence."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np

from expertcut.documents import Format1, Record, load_record
from expertcut.edits.plan import PROOF_FILE, ExpertIds
from expertcut.edits.reweight_tune import Shift
from expertcut.errors import PlanError
from expertcut.evaluation.comparison import LEVEL, shows_change
from expertcut.evaluation.proving.crossfit import Judged
from expertcut.profiling.schema import BlockInfo

_FEWEST = 20  # distinct draws, with which p can lie below 0.05
NUMBERED_FROM_0 = ExpertIds()
Verdict = Literal["helps", "hurts", "no evidence"]


class Change(Record):
    """A change in accuracy on the same questions; see `evaluation.comparison.Comparison`."""

    delta: float
    ci95: tuple[float, float]
    gained: int
    lost: int
    mcnemar_p: float
    smallest_effect: float


class FoldResult(Record):
    """One fold: what was chosen without it (layer, expert, bias), and what that did to it."""

    questions: int
    biases: tuple[tuple[int, int, float], ...]
    delta: float


class RandomControl(Record):
    """The same procedure on random experts; `range95` holds 95 % of the draws."""

    draws: int
    distinct: int
    delta_mean: float
    range95: tuple[float, float]
    p: float


class ProofResult(Record):
    """`proof.json`. `same_questions` chose and scored on the same questions, so it flatters."""

    format: Format1 = 1
    procedure: str
    quiz: str
    split: str
    questions: int
    seed: int
    base_accuracy: float
    cross_fitted: Change
    same_questions: Change
    random: RandomControl
    folds: tuple[FoldResult, ...]
    verdict: Verdict
    sentence: str


def proof_result(
    judged: Judged,
    procedure: str,
    quiz: tuple[str, str],
    seed: int,
    numbers: ExpertIds = NUMBERED_FROM_0,
) -> ProofResult:
    """The figures of a finished proof; `quiz` is its id and split, `numbers` call its experts."""
    cross, control = judged.cross_fitted, judged.control
    p_random = control.p(cross.delta)
    low, high = np.percentile(control.delta_B, [2.5, 97.5])
    word = verdict(cross.ci95, cross.mcnemar_p, p_random)
    return ProofResult(
        procedure=procedure,
        quiz=quiz[0],
        split=quiz[1],
        questions=len(judged.records),
        seed=seed,
        base_accuracy=float(judged.records.is_correct_N.mean()),
        cross_fitted=Change(**asdict(cross)),
        same_questions=Change(**asdict(judged.same_questions)),
        random=RandomControl(
            draws=len(control.delta_B),
            distinct=control.distinct,
            delta_mean=float(control.delta_B.mean()),
            range95=(float(low), float(high)),
            p=p_random,
        ),
        folds=tuple(
            FoldResult(
                questions=fold.questions,
                biases=called(fold.shifts, judged.records.blocks, numbers),
                delta=fold.delta,
            )
            for fold in judged.folds
        ),
        verdict=word,
        sentence=_sentence(judged, word, p_random),
    )


def called(
    shifts: Sequence[Shift], blocks: Sequence[BlockInfo], numbers: ExpertIds
) -> tuple[tuple[int, int, float], ...]:
    """(layer, expert, bias) of each, experts by what they were before earlier cuts."""
    return tuple((s.layer, numbers.number(blocks[s.layer].name, s.expert), s.bias) for s in shifts)


def verdict(ci95: tuple[float, float], mcnemar_p: float, p_random: float) -> Verdict:
    """Helps: a significant gain that random experts seldom reach (design: §8)."""
    if not shows_change(ci95, mcnemar_p):
        return "no evidence"
    if ci95[1] < 0:
        return "hurts"
    return "helps" if p_random < LEVEL else "no evidence"


def _sentence(judged: Judged, word: Verdict, p_random: float) -> str:
    cross, n = judged.cross_fitted, len(judged.records)
    change = (
        f"{cross.delta * 100:+.2f} points (95 % interval {cross.ci95[0] * 100:+.2f} to "
        f"{cross.ci95[1] * 100:+.2f}, McNemar p = {cross.mcnemar_p:.2g}) on {n:,} questions that "
        "it was not chosen on"
    )
    if word == "helps":
        return f"This procedure helps: {change}; random experts do as well with p = {p_random:.2g}."
    if word == "hurts":
        return f"This procedure hurts: {change}."
    if shows_change(cross.ci95, cross.mcnemar_p):
        n_drawn = judged.control.distinct
        few = (
            f", and only {n_drawn} others were drawn, too few to show more"
            if n_drawn < _FEWEST
            else ""
        )
        reason = f"random experts do as well with p = {p_random:.2g}{few}"
    else:
        reason = f"{cross.smallest_effect * 100:.2f} points is the smallest effect they could show"
    return f"No evidence that this procedure helps: {change}; {reason}."


def proof_file(result: ProofResult) -> dict[str, bytes]:
    """`proof.json` by its name, for writing beside a plan."""
    return {PROOF_FILE: (result.model_dump_json(indent=1) + "\n").encode()}


def load_proof(folder: Path) -> ProofResult:
    """A proof from its folder.

    Raises:
        PlanError: none there, or one that does not hold together.
    """
    return load_record(folder / PROOF_FILE, ProofResult, PlanError, "is no proof")
