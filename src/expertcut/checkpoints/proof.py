"""What an edit did to held-out questions, scored in both models; the figures go into the plan."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expertcut.checkpoints.unedited import at_run_time
from expertcut.interventions.calibration.outputs import Constants
from expertcut.interventions.plan import Draft, Edit
from expertcut.moe.engine import Engine
from expertcut.moe.observers import Routing, observe_routers
from expertcut.moe.packing import Pass, encode
from expertcut.moe.passes import OnPass, ignore
from expertcut.quiz import Quiz
from expertcut.quiz.questions import group_by_subject, replace_questions


@dataclass(frozen=True)
class Difference:
    """Two models' log p of the same choices: |Δ log p| over all of them, and flipped answers."""

    against: str
    questions: int
    max_abs_logprob_diff: float
    median_abs_logprob_diff: float
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
class Answered:
    """log p of choices (N, C), and what the routers did meanwhile.

    `shares` gives per (layer, expert) watched the share of questions that it served;
    `is_untouched_N` tells the questions none of whose tokens chose an expert that the plan removes.
    """

    logprob_NC: Tensor
    shares: dict[tuple[int, int], float]
    is_untouched_N: Tensor


def difference(against: str, a_NC: Tensor, b_NC: Tensor) -> Difference:
    """Compares the choices that both have."""
    both_NC = a_NC.isfinite() & b_NC.isfinite()
    gap = (a_NC - b_NC)[both_NC].abs().double()
    flipped = int((a_NC.argmax(dim=1) != b_NC.argmax(dim=1)).sum())
    return Difference(against, len(a_NC), float(gap.max()), float(gap.quantile(0.5)), flipped)


def answer(
    engine: Engine, quiz: Quiz, edits: Mapping[str, Edit], on_pass: OnPass = ignore
) -> Answered:
    """Scores a quiz, watching the experts that the plan removes or tilts.

    Once experts are renumbered, `is_untouched_N` says nothing.
    """
    watch = _Watch(engine, edits, on_pass)
    scores, untouched = [], []
    with observe_routers(engine.moe.blocks, watch.see):
        for subject, questions in quiz.questions.items():
            encoded = encode(engine.moe.tokenizer, questions, quiz.shots_by_subject[subject])
            watch.open(len(questions))
            scores.append(engine.score(encoded, watch.begin))
            untouched.append(watch.is_untouched_N)
    most = max(score_NC.shape[1] for score_NC in scores)
    padded = [F.pad(s, (0, most - s.shape[1]), value=-torch.inf) for s in scores]
    shares = {key: n / len(quiz) for key, n in watch.n_served.items()}
    return Answered(torch.cat(padded), shares, torch.cat(untouched))


class _Watch:
    """Counts how many questions each tilted expert serves, and marks those that change."""

    def __init__(self, engine: Engine, edits: Mapping[str, Edit], on_pass: OnPass) -> None:
        self.on_pass = on_pass
        blocks = engine.moe.blocks
        self.n_served = {(b.layer, e): 0 for b in blocks for e in edits[b.name].bias}
        self.removed = {b.layer: edits[b.name].removed(b.n_experts) for b in blocks}
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

    def _mark(self, experts_TK: Tensor, removed: Collection[int]) -> None:
        hit_T = torch.isin(experts_TK, torch.tensor(removed, dtype=experts_TK.dtype)).any(dim=1)
        if self.step.valid_T is not None:
            hit_T &= self.step.valid_T
        if self.step.is_prefix:
            self.is_untouched_N &= ~hit_T.any()
        else:
            self.is_untouched_N[self.step.question_T[hit_T]] = False


@dataclass(frozen=True)
class Before:
    """What the unedited model says: as it is, with the plan at run time, and questions alone.

    Where layout exact removes experts, `quiet` are the questions none of whose tokens chose one,
    and `alone` the answers to them.
    """

    base: Answered
    reference: Answered
    is_cut_exactly: bool
    quiet: Quiz | None = None
    alone: Answered | None = None


@dataclass(frozen=True)
class Proof:
    """How far the checkpoint is from the unedited model on held-out questions of a split."""

    split: str
    differences: list[Difference]
    shares: dict[tuple[int, int], tuple[float, float, float]]
    alone: Alone | None

    def figures(self) -> dict[str, Any]:
        """As they stand in plan.json."""
        names = ("layer", "expert", "base", "exact", "edited")
        return {
            "held_out_split": self.split,
            "held_out": [asdict(row) for row in self.differences],
            "shares": [
                dict(zip(names, (*key, *shares), strict=True))
                for key, shares in self.shares.items()
            ],
            "alone": None if self.alone is None else asdict(self.alone),
        }


def prove_before(engine: Engine, quiz: Quiz, draft: Draft, constants: Constants) -> Before:
    """All that needs the unedited model, so that only one model is in memory at a time."""
    base = answer(engine, quiz, draft.edits)
    with at_run_time(engine.moe, draft, constants) as begin:
        reference = answer(engine, quiz, draft.edits, begin)
    if draft.layout == "stock" or not constants:
        return Before(base, reference, False)
    found = [q for q, is_it in zip(quiz, base.is_untouched_N.tolist(), strict=True) if is_it]
    quiet = replace_questions(quiz, group_by_subject(found)) if found else None
    alone = answer_alone(engine, quiet, draft.edits) if quiet else None
    return Before(base, reference, True, quiet, alone)


def prove_after(engine: Engine, quiz: Quiz, draft: Draft, before: Before) -> Proof:
    """The edited model against both."""
    edited = answer(engine, quiz, draft.edits)
    rows = [
        difference("the unedited base", edited.logprob_NC, before.base.logprob_NC),
        difference(_reference_name(draft), edited.logprob_NC, before.reference.logprob_NC),
    ]
    shares = {
        key: (share, before.reference.shares[key], edited.shares[key])
        for key, share in before.base.shares.items()
    }
    alone = _alone(engine, quiz, draft, before) if before.is_cut_exactly else None
    return Proof(quiz.split, rows, shares, alone)


def answer_alone(engine: Engine, quiz: Quiz, edits: Mapping[str, Edit]) -> Answered:
    """As `answer`, one prompt at a time, so that no question's bits depend on its neighbours."""
    single = Engine(engine.moe, engine.batch_tokens)
    single.is_trusted = False
    return answer(single, quiz, edits)


def _alone(engine: Engine, quiz: Quiz, draft: Draft, before: Before) -> Alone:
    """How many of the quiet questions the edited model answers with the same bits."""
    if before.quiet is None or before.alone is None:
        return Alone(len(quiz), 0, 0)
    untouched_N = before.alone.is_untouched_N
    edited = answer_alone(engine, before.quiet, draft.edits)
    same_N = (before.alone.logprob_NC == edited.logprob_NC).all(dim=1)
    return Alone(len(quiz), int(untouched_N.sum()), int((same_N & untouched_N).sum()))


def _reference_name(draft: Draft) -> str:
    if any(edit.bias for edit in draft.edits.values()):
        return "the exact bias"
    same = "as a mask" if draft.layout == "stock" else "after top-k"
    return f"the same removal {same}"
