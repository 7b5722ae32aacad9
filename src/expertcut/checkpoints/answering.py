"""A model's answers to a quiz, and what its routers did meanwhile."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from expertcut.data import Quiz
from expertcut.edits.plan import Edit
from expertcut.errors import ContractError
from expertcut.models.hooks import Routing, observe_routers
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
    engine: Engine, quiz: Quiz, edits: Mapping[str, Edit], on_pass: OnPass = ignore
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

    def __init__(self, engine: Engine, edits: Mapping[str, Edit], on_pass: OnPass) -> None:
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


def answer_alone(engine: Engine, quiz: Quiz, edits: Mapping[str, Edit]) -> Answered:
    """As `answer`, one prompt at a time, so that no question's bits depend on its neighbours."""
    single = Engine(engine.moe, engine.batch_tokens)
    single.is_trusted = False
    return answer(single, quiz, edits)
