"""What an edit did to held-out questions, scored in both models; the figures go into the plan."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from expertcut.checkpoints.simulate import apply_at_runtime, renumbered
from expertcut.data import Quiz
from expertcut.data.questions import group_by_subject, replace_questions
from expertcut.edits.calibrate import Constants
from expertcut.edits.plan import BlockEdit, EditPlan, ExpertIds, Positions
from expertcut.edits.splits import HASHES, Judged, n_used
from expertcut.errors import ContractError
from expertcut.models.hooks import Routing, observe_routers
from expertcut.models.load import MoeModel
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import Pass
from expertcut.scoring.passes import OnPass, ignore

NOT_REACHED = (
    "{}: all answers equal those of the unedited model to the last digit, though these questions "
    "chose experts that it removes: the change did not reach the model, so nothing is concluded"
)
_COUNTS = 0.01  # of a token's gate weight: what is less may be lost in rounding


@dataclass(frozen=True)
class Chosen:
    """The experts that each token of a pass chose, pads left out, and which are answer positions.

    Ids are int16: they are kept for every token of every question.
    """

    experts_TK: Tensor
    is_answer_T: Tensor


@dataclass(frozen=True)
class Answered:
    """log p of choices (N, C), and what the routers did meanwhile.

    `shares` gives per (layer, expert) watched the share of questions that it served;
    `is_untouched_N` tells the questions none of whose tokens chose an expert that the plan removes;
    `is_felt` is true where an answer depends on a removed expert: one that was chosen with a weight
    that counts, in the last block at an answer position. `chosen` is by layer with a bias what was
    chosen in each pass.
    """

    logprob_NC: Tensor
    shares: dict[tuple[int, int], float]
    is_untouched_N: Tensor
    is_felt: bool = False
    chosen: dict[int, list[Chosen]] = field(default_factory=dict)


def answer(
    engine: Engine, quiz: Quiz, edits: Mapping[str, BlockEdit], on_pass: OnPass = ignore
) -> Answered:
    """Scores a quiz, watching the experts that the plan removes or tilts.

    Once experts are renumbered, `is_untouched_N` says nothing.
    """
    watch = _Watch(engine, edits, on_pass)
    scores, untouched = [], []
    with observe_routers(engine.moe.blocks, watch.see):
        for encoded in engine.encode_all(quiz):
            watch.open(len(encoded))
            scores.append(engine.score(encoded, watch.begin))
            untouched.append(watch.is_untouched_N)
    most = max(score_NC.shape[1] for score_NC in scores)
    padded = [F.pad(s, (0, most - s.shape[1]), value=-torch.inf) for s in scores]
    shares = {key: n / len(quiz) for key, n in watch.n_served.items()}
    is_felt = watch.is_felt
    return Answered(torch.cat(padded), shares, torch.cat(untouched), is_felt, watch.chosen)


def check_reached(what: str, base: Answered, changed: Answered) -> None:
    """That a cut at run time changed an answer, where answers depend on what it removes.

    Raises:
        ContractError: not one differs in its last digit.
    """
    if base.is_felt and torch.equal(base.logprob_NC, changed.logprob_NC):
        raise ContractError(NOT_REACHED.format(what))


class _Watch:
    """Counts how many questions each tilted expert serves, and marks those that change."""

    def __init__(self, engine: Engine, edits: Mapping[str, BlockEdit], on_pass: OnPass) -> None:
        self.on_pass = on_pass
        blocks = engine.moe.blocks
        self.n_served = {(b.layer, e): 0 for b in blocks for e in edits[b.name].tilted}
        self.chosen: dict[int, list[Chosen]] = {b.layer: [] for b in blocks if edits[b.name].bias}
        self.removed = {b.layer: edits[b.name].removed(b.n_experts) for b in blocks}
        self.last_layer = blocks[-1].layer
        self.is_felt = False
        self.step: Pass

    def begin(self, step: Pass) -> None:
        """Before each forward pass."""
        self.step = step
        self.on_pass(step)

    def open(self, n_questions: int) -> None:
        """Before each chunk."""
        self.is_untouched_N = torch.ones(n_questions, dtype=torch.bool)

    def see(self, routing: Routing) -> None:
        """After each router."""
        experts_TK = routing.experts_TK.cpu()
        chosen_NK = experts_TK[self.step.answers_N]
        for layer, expert in self.n_served:
            if layer == routing.layer:
                self.n_served[layer, expert] += int((chosen_NK == expert).sum())
        self._mark(experts_TK, self.removed[routing.layer])
        self.is_felt = self.is_felt or self._is_felt(routing)
        if routing.layer in self.chosen:
            self.chosen[routing.layer].append(self._chosen(experts_TK))

    def _is_felt(self, routing: Routing) -> bool:
        removed = self.removed[routing.layer]
        if not removed:
            return False
        share_TK = routing.weights_TK.float().abs()
        share_TK = share_TK / share_TK.sum(dim=-1, keepdim=True)
        removed_E = torch.tensor(removed, device=routing.experts_TK.device)
        is_hit_T = (torch.isin(routing.experts_TK, removed_E) & (share_TK > _COUNTS)).any(dim=1)
        # Nothing comes after the last block but the answers themselves.
        at = self.step.answers_N if routing.layer == self.last_layer else self.step.valid_T
        return bool((is_hit_T if at is None else is_hit_T.cpu()[at]).any())

    def _chosen(self, experts_TK: Tensor) -> Chosen:
        is_answer_T = torch.zeros(len(experts_TK), dtype=torch.bool)
        is_answer_T[self.step.answers_N] = True
        valid_T = slice(None) if self.step.valid_T is None else self.step.valid_T
        return Chosen(experts_TK[valid_T].to(torch.int16), is_answer_T[valid_T])

    def _mark(self, experts_TK: Tensor, removed: Collection[int]) -> None:
        hit_T = torch.isin(experts_TK, torch.tensor(removed, dtype=experts_TK.dtype)).any(dim=1)
        if self.step.valid_T is not None:
            hit_T &= self.step.valid_T
        if self.step.is_prefix:
            self.is_untouched_N &= ~hit_T.any()
        else:
            self.is_untouched_N[self.step.question_T[hit_T]] = False


def answer_alone(engine: Engine, quiz: Quiz, edits: Mapping[str, BlockEdit]) -> Answered:
    """As `answer`, one prompt at a time, so that no question's bits depend on its neighbours."""
    single = Engine(engine.moe, engine.batch_tokens)
    single.is_trusted = False
    return answer(single, quiz, edits)


@dataclass(frozen=True)
class Agreement:
    """One layer: the share of positions that chose the very same experts, and of experts in common.

    Over answer positions, and over every distinct token.
    """

    layer: int
    same_answer: float
    overlap_answer: float
    same_all: float
    overlap_all: float


def agreements(
    reference: Answered, edited: Answered, draft: EditPlan, moe: MoeModel
) -> list[Agreement]:
    """Per layer with a bias, the checkpoint against the plan in the unedited model at run time.

    Both were asked the same questions in the same passes.
    """
    keeps = {b.layer: torch.tensor(draft.edits[b.name].keep) for b in moe.blocks}
    return [
        _agreement(layer, passes, edited.chosen[layer], keeps[layer])
        for layer, passes in reference.chosen.items()
    ]


def _agreement(layer: int, a: list[Chosen], b: list[Chosen], keep: Tensor) -> Agreement:
    """`keep` gives the number in the unedited model of each row of the edited one."""
    is_answer_T = torch.cat([chosen.is_answer_T for chosen in a])
    overlap_T = torch.cat(
        [_overlap(x.experts_TK, keep[y.experts_TK.long()]) for x, y in zip(a, b, strict=True)]
    )
    answer_N = overlap_T[is_answer_T]
    return Agreement(
        layer=layer,
        same_answer=float((answer_N == 1).double().mean()),
        overlap_answer=float(answer_N.mean()),
        same_all=float((overlap_T == 1).double().mean()),
        overlap_all=float(overlap_T.mean()),
    )


def _overlap(a_TK: Tensor, b_TK: Tensor) -> Tensor:
    """The share of a token's experts that are chosen in both, (T,) float64."""
    is_in_both_TK = (a_TK[:, :, None] == b_TK[:, None, :]).any(dim=2)
    return is_in_both_TK.double().mean(dim=1)


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

    def figures(self, draft: EditPlan) -> dict[str, Any]:
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


def score_base(engine: Engine, quiz: Quiz, draft: EditPlan, constants: Constants) -> Before:
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


def _at_run_time(engine: Engine, quiz: Quiz, draft: EditPlan, constants: Constants) -> Answered:
    with apply_at_runtime(engine.moe, draft, constants) as begin:
        return answer(engine, quiz, draft.edits, begin)


def _placed(
    engine: Engine, quiz: Quiz, draft: EditPlan, constants: Constants, reference: Answered
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


def score_edited(engine: Engine, quiz: Quiz, draft: EditPlan, before: Before) -> Proof:
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


def _alone(engine: Engine, quiz: Quiz, draft: EditPlan, before: Before) -> Alone:
    """How many of the quiet questions the edited model answers with the same bits."""
    if before.quiet is None or before.alone is None:
        return Alone(len(quiz), 0, 0)
    untouched_N = before.alone.is_untouched_N
    edited = answer_alone(engine, before.quiet, draft.edits)
    same_N = (before.alone.logprob_NC == edited.logprob_NC).all(dim=1)
    return Alone(len(quiz), int(untouched_N.sum()), int((same_N & untouched_N).sum()))


def _reference_name(draft: EditPlan) -> str:
    if draft.is_tilted and draft.is_cut:
        return "the same plan at run time"
    if draft.is_tilted:
        return "the exact bias" if draft.is_biased else "the same factors at run time"
    same = "as a mask" if draft.layout == "stock" else "after top-k"
    return f"the same removal {same}"
