"""What an edit did to held-out questions, scored in both models; the figures go into the plan."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from torch import Tensor

from expertcut.checkpoints.agreement import Agreement, agreements
from expertcut.checkpoints.answering import Answered, answer, answer_alone, check_reached
from expertcut.checkpoints.unedited import at_run_time, renumbered
from expertcut.data import Quiz
from expertcut.data.questions import group_by_subject, replace_questions
from expertcut.edits.calibrate import Constants
from expertcut.edits.plan import Draft, ExpertIds, Positions
from expertcut.edits.splits import HASHES, Judged, n_used
from expertcut.scoring.engine import Engine


@dataclass(frozen=True)
class Difference:
    """Two models' log p of the same choices: |Δ log p| over all of them, and flipped answers."""

    against: str
    questions: int
    max_abs_logprob_diff: float
    median_abs_logprob_diff: float
    flipped: int


@dataclass(frozen=True)
class Outcome:
    """How well a form of the model answers; `flipped` counts answers that the unedited one has not.

    `right_logprob` is the mean log p of the right choice.
    """

    form: str
    questions: int
    accuracy: float
    right_logprob: float
    flipped: int


@dataclass(frozen=True)
class Alone:
    """Questions scored alone: those without a token that chose a removed expert must not change.

    `untouched` of the `questions` have none, shots included; `bit_equal` of these came out equal.
    """

    questions: int
    untouched: int
    bit_equal: int


@dataclass(frozen=True)
class Before:
    """What the unedited model says: as it is, with the plan at run time, and questions alone.

    `placed` is with the plan's biases nowhere (if there is more in the plan), at answer positions
    alone and everywhere, by name. Where
    layout exact removes experts and tilts none, `quiet` are the questions none of whose tokens
    chose a removed one, and `alone` the answers to them.
    """

    base: Answered
    reference: Answered
    is_cut_exactly: bool
    placed: dict[str, Answered] = field(default_factory=dict)
    quiet: Quiz | None = None
    alone: Answered | None = None


@dataclass(frozen=True)
class Proof:
    """How far the checkpoint is from the unedited model on questions of a split.

    `judges` are their hash lines, `used` of them had a part in the edit; None is not known.
    `shares` are by layer and row of the unedited router: before, with the plan at run time, and in
    the checkpoint. `agreement` is there where layout stock carries biases, `outcomes` where any
    layout does.
    """

    split: str
    differences: list[Difference]
    shares: dict[tuple[int, int], tuple[float, float, float]]
    alone: Alone | None
    agreement: list[Agreement] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    judges: tuple[str, ...] = ()
    used: int | None = None

    @property
    def judged(self) -> Judged:
        """What the questions may be called."""
        return Judged(self.split, self.differences[0].questions, self.used)

    def judged_by(self, quiz: Quiz, used: frozenset[str]) -> Self:
        """The proof with its questions held against the hash lines of all that were used."""
        lines = tuple(sorted(question.hash_line for question in quiz))
        return replace(self, judges=lines, used=n_used(quiz, used))

    def figures(self, draft: Draft) -> dict[str, Any]:
        """As they stand in plan.json, with the numbers that experts are called by."""
        names, blocks = ("layer", "expert", "base", "exact", "edited"), list(draft.edits)
        numbers = draft.numbers or ExpertIds()
        return {
            "held_out_split": self.split,
            "held_out": [asdict(row) for row in self.differences],
            HASHES: list(self.judges),
            "shares": [
                dict(zip(names, (layer, numbers.number(blocks[layer], row), *its), strict=True))
                for (layer, row), its in self.shares.items()
            ],
            "alone": None if self.alone is None else asdict(self.alone),
            "agreement": [asdict(row) for row in self.agreement],
            "outcomes": [asdict(row) for row in self.outcomes],
        }


def difference(against: str, a_NC: Tensor, b_NC: Tensor) -> Difference:
    """Compares the choices that both have."""
    both_NC = a_NC.isfinite() & b_NC.isfinite()
    gap = (a_NC - b_NC)[both_NC].abs().double()
    flipped = int((a_NC.argmax(dim=1) != b_NC.argmax(dim=1)).sum())
    return Difference(against, len(a_NC), float(gap.max()), float(gap.quantile(0.5)), flipped)


def outcome(form: str, quiz: Quiz, found: Answered, base: Answered) -> Outcome:
    """How well the questions are answered in one form of the model."""
    logprob_NC, said_N = found.logprob_NC.double(), found.logprob_NC.argmax(dim=1).tolist()
    answers = [question.answer for question in quiz]
    n_right = sum(said == right for said, right in zip(said_N, answers, strict=True))
    right = logprob_NC[range(len(answers)), answers].mean()
    flipped = int((found.logprob_NC.argmax(dim=1) != base.logprob_NC.argmax(dim=1)).sum())
    return Outcome(form, len(answers), n_right / len(answers), float(right), flipped)


def prove_before(engine: Engine, quiz: Quiz, draft: Draft, constants: Constants) -> Before:
    """All that needs the unedited model, so that only one model is in memory at a time."""
    base = answer(engine, quiz, draft.edits)
    reference = _at_run_time(engine, quiz, draft, constants)
    if draft.is_cut and draft.layout == "stock":
        check_reached(_reference_name(draft), base, reference)
    placed = _placed(engine, quiz, draft, constants, reference) if draft.is_biased else {}
    if draft.layout == "stock" or draft.is_tilted or not constants:
        return Before(base, reference, False, placed)
    found = [q for q, is_it in zip(quiz, base.is_untouched_N.tolist(), strict=True) if is_it]
    quiet = replace_questions(quiz, group_by_subject(found)) if found else None
    alone = answer_alone(engine, quiet, draft.edits) if quiet else None
    return Before(base, reference, True, placed, quiet, alone)


def _at_run_time(engine: Engine, quiz: Quiz, draft: Draft, constants: Constants) -> Answered:
    with at_run_time(engine.moe, draft, constants) as begin:
        return answer(engine, quiz, draft.edits, begin)


def _placed(
    engine: Engine, quiz: Quiz, draft: Draft, constants: Constants, reference: Answered
) -> dict[str, Answered]:
    """The plan at run time without its biases, with them at answer positions, and everywhere."""
    places: dict[Positions, str] = {
        "answer": "bias at answer positions only",
        "all": "bias everywhere",
    }
    rest = replace(
        draft, edits={n: e.model_copy(update={"bias": {}}) for n, e in draft.edits.items()}
    )
    found = {}
    if draft.is_cut or rest.is_tilted:
        found["the plan without biases"] = _at_run_time(engine, quiz, rest, constants)
    for place, name in places.items():
        its = replace(draft, apply_at=place)
        is_known = place == draft.apply_at
        found[name] = reference if is_known else _at_run_time(engine, quiz, its, constants)
    return found


def prove_after(engine: Engine, quiz: Quiz, draft: Draft, before: Before) -> Proof:
    """The edited model against both."""
    edited = answer(engine, quiz, renumbered(draft))
    rows = [
        difference("the unedited base", edited.logprob_NC, before.base.logprob_NC),
        difference(_reference_name(draft), edited.logprob_NC, before.reference.logprob_NC),
    ]
    of_edited = edited.shares.values()  # in the same order, under the new numbers
    shares = {
        key: (share, before.reference.shares[key], its)
        for (key, share), its in zip(before.base.shares.items(), of_edited, strict=True)
    }
    alone = _alone(engine, quiz, draft, before) if before.is_cut_exactly else None
    is_stock = draft.layout == "stock"
    agreement = agreements(before.reference, edited, draft, engine.moe) if is_stock else []
    return Proof(quiz.split, rows, shares, alone, agreement, _outcomes(quiz, before, edited))


def _outcomes(quiz: Quiz, before: Before, edited: Answered) -> list[Outcome]:
    if not before.placed:
        return []
    forms = {"unedited": before.base, **before.placed, "this checkpoint": edited}
    return [outcome(form, quiz, found, before.base) for form, found in forms.items()]


def _alone(engine: Engine, quiz: Quiz, draft: Draft, before: Before) -> Alone:
    """How many of the quiet questions the edited model answers with the same bits."""
    if before.quiet is None or before.alone is None:
        return Alone(len(quiz), 0, 0)
    untouched_N = before.alone.is_untouched_N
    edited = answer_alone(engine, before.quiet, draft.edits)
    same_N = (before.alone.logprob_NC == edited.logprob_NC).all(dim=1)
    return Alone(len(quiz), int(untouched_N.sum()), int((same_N & untouched_N).sum()))


def _reference_name(draft: Draft) -> str:
    if draft.is_tilted and draft.is_cut:
        return "the same plan at run time"
    if draft.is_tilted:
        return "the exact bias" if draft.is_biased else "the same factors at run time"
    same = "as a mask" if draft.layout == "stock" else "after top-k"
    return f"the same removal {same}"
