"""What an edit does to held-out questions, scored in both models; the result goes into the plan."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from expertcut import stats
from expertcut.checkpoints.edit import Edit, RunEdited, simulated
from expertcut.checkpoints.prune_edit import PruneEdit
from expertcut.data import Quiz
from expertcut.data.questions import replace_questions
from expertcut.edits.layouts import LAYOUTS
from expertcut.edits.plan import BlockEdit, EditPlan
from expertcut.errors import ContractError
from expertcut.models.hooks import Routing, observe_routers
from expertcut.models.load import MoeModel
from expertcut.scoring.engine import Engine, stack_scores
from expertcut.scoring.layer_major import score_chunks
from expertcut.scoring.packing import Encoded, Pass
from expertcut.scoring.passes import OnPass, ignore
from expertcut.scoring.rerouting import ExpertCounts

NOT_REACHED = (
    "{}: all answers equal those of the unedited model to the last digit, though these questions "
    "are routed to removed experts: the edit did not reach the model, so no result is given"
)
NOT_REROUTED = (
    "{}: all answers equal those of the unedited model to the last digit, though their tokens use "
    "other numbers of experts: the edit did not reach the model, so no result is given"
)
_MOST_OFF = 0.1  # of log p in the median, where only the order of sums changes
_MIN_GATE_SHARE = 0.01  # of a token's gate weight; less may be lost in rounding


def _renumbered(plan: EditPlan) -> Mapping[str, BlockEdit]:
    """The edits by the numbers that the experts have in the checkpoint of the plan."""
    if LAYOUTS[plan.layout].keeps_rows:
        return plan.edits
    return {
        name: BlockEdit(
            keep=tuple(range(len(edit.keep))),
            bias={edit.keep.index(e): bias for e, bias in edit.bias.items()},
            scale={edit.keep.index(e): factor for e, factor in edit.scale.items()},
            order=edit.order,
        )
        for name, edit in plan.edits.items()
    }


class HeldOutScores:
    """Log p of choices, and what the routers do with removed, biased and scaled experts."""

    def __init__(
        self, engine: Engine, quiz: Quiz, edits: Mapping[str, BlockEdit], on_pass: OnPass = ignore
    ) -> None:
        self._on_pass, blocks = on_pass, engine.moe.blocks
        # Questions that each biased or scaled expert serves.
        self.n_served = {(b.layer, e): 0 for b in blocks for e in edits[b.name].tilted}
        # By layer with a bias, for each pass: experts (T, K) of all tokens but pads, and answers.
        self.routed: dict[int, list[tuple[Tensor, Tensor]]] = {
            b.layer: [] for b in blocks if edits[b.name].bias or edits[b.name].order
        }
        # By layer whose experts lie in another order: the distance (T,) to another choice.
        self.gaps: dict[int, list[Tensor]] = {b.layer: [] for b in blocks if edits[b.name].order}
        self._blocks = blocks
        self.depends_on_removed = False  # a removed expert has a gate weight that counts
        self._counts = ExpertCounts(blocks, len(quiz))
        self._removed = {b.layer: edits[b.name].removed(b.n_experts) for b in blocks}
        self._last_layer = blocks[-1].layer
        self._step: Pass
        self._engine = engine
        # Without a token that is routed to a removed expert; meaningless if renumbered.
        untouched: dict[str, Tensor] = {}

        def score(chunk: str, encoded: Encoded) -> Tensor:
            ones_N = torch.ones(len(encoded), dtype=torch.bool)
            self.is_untouched_N = untouched.setdefault(chunk, ones_N)
            with observe_routers(blocks, self._see), self._counts.listening():
                return engine.score(encoded, self._begin)

        self.logprob_NC = stack_scores(score_chunks(engine, engine.encode_all(quiz), score))
        self.is_untouched_N = torch.cat([*untouched.values()])

    @property
    def experts_per_token(self) -> float:
        """The mean over layers and tokens; those of a shared prefix count once a chunk."""
        return self._counts.per_token

    def _begin(self, step: Pass) -> None:
        self._step = self._counts.step = step
        if not self._engine.ends_early:  # layer by layer the tokens come again in each
            self._counts.begin(step)
        self._on_pass(step)

    def _see(self, routing: Routing) -> None:
        experts_TK = routing.experts_TK.cpu()
        chosen_NK = experts_TK[self._step.answers_N]
        for layer, expert in self.n_served:
            if layer == routing.layer:
                self.n_served[layer, expert] += int((chosen_NK == expert).sum())
        valid_T = self._step.valid_T
        if removed := self._removed[routing.layer]:
            is_removed_TK = torch.isin(experts_TK, experts_TK.new_tensor(removed))
            hit_T = is_removed_TK.any(dim=1)
            if valid_T is not None:
                hit_T &= valid_T
            if self._step.is_prefix:
                self.is_untouched_N &= ~hit_T.any()
            else:
                self.is_untouched_N[self._step.question_T[hit_T]] = False
            share_TK = routing.weights_TK.float().abs()
            share_TK = share_TK / share_TK.sum(dim=-1, keepdim=True)
            counts_T = (is_removed_TK & (share_TK > _MIN_GATE_SHARE).cpu()).any(dim=1)
            # Only the answers come after the last block.
            at = self._step.answers_N if routing.layer == self._last_layer else valid_T
            self.depends_on_removed |= bool((counts_T if at is None else counts_T[at]).any())
        if routing.layer in self.routed:
            is_answer_T = torch.zeros(len(experts_TK), dtype=torch.bool)
            is_answer_T[self._step.answers_N] = True
            kept = slice(None) if valid_T is None else valid_T
            routed = (experts_TK[kept].to(torch.int16), is_answer_T[kept])
            self.routed[routing.layer].append(routed)
            if routing.layer in self.gaps:
                block = self._blocks[routing.layer]
                score_TE = block.selection_scores(routing.logits_TE)
                gap_T = block.selection_gap(score_TE, routing.experts_TK).cpu()
                self.gaps[routing.layer].append(gap_T[kept])


def _score_alone(engine: Engine, quiz: Quiz, edits: Mapping[str, BlockEdit]) -> HeldOutScores:
    """One prompt at a time, so that no question's bits depend on its neighbours."""
    single = Engine(engine.moe, engine.batch_tokens)
    single.is_trusted = False
    return HeldOutScores(single, quiz, edits)


def compare_logprobs(against: str, a_NC: Tensor, b_NC: Tensor) -> stats.LogprobShift:
    """Compares the choices that both have."""
    largest, median = stats.logprob_shift(a_NC.numpy(), b_NC.numpy(), np.float64)
    return stats.LogprobShift(
        against=against,
        questions=len(a_NC),
        max_abs_logprob_diff=largest,
        median_abs_logprob_diff=median,
        flipped=int((a_NC.argmax(dim=1) != b_NC.argmax(dim=1)).sum()),
    )


def form_result(form: str, quiz: Quiz, logprob_NC: Tensor, base_NC: Tensor) -> stats.FormResult:
    """Accuracy of one form of the model, compared with the unedited one."""
    answers = [question.answer for question in quiz]
    best_N = logprob_NC.argmax(dim=1)
    n_right = sum(a == b for a, b in zip(best_N.tolist(), answers, strict=True))
    return stats.FormResult(
        form=form,
        questions=len(answers),
        accuracy=n_right / len(answers),
        right_logprob=float(logprob_NC.double()[range(len(answers)), answers].mean()),
        flipped=int((best_N != base_NC.argmax(dim=1)).sum()),
    )


@dataclass(frozen=True)
class BaseScores:
    """All that the unedited model answers."""

    base: HeldOutScores
    reference_name: str
    reference: HeldOutScores | None = None  # with the edits applied at run time
    run_edited: RunEdited | None = None  # in its place: how the edited model runs as the reference
    forms: Mapping[str, HeldOutScores] = field(default_factory=dict)  # other forms of the edits
    is_cut_exactly: bool = False  # layout exact, which only removes experts
    alone: HeldOutScores | None = None  # then: of the `untouched` questions

    @property
    def experts_per_token(self) -> float | None:
        """The mean with the edits at run time."""
        return self.reference.experts_per_token if self.reference else None


def reference_name(edits: Sequence[Edit]) -> str:
    """What the edited model is compared with, beside the unedited one; empty if nothing else."""
    names = [edit.reference for edit in edits if edit.reference]
    is_mixed = len(names) > 1 and any(edit.is_named_alone for edit in edits)
    return "the same plan at run time" if is_mixed else ["", *names][-1]


def score_base(engine: Engine, quiz: Quiz, plan: EditPlan, edits: Sequence[Edit]) -> BaseScores:
    """Everything that needs the unedited model, so that one model is in memory at a time."""
    base = HeldOutScores(engine, quiz, plan.edits)
    name = reference_name(edits)
    if not name:
        return BaseScores(base, name, base)
    for edit in edits:
        if run_edited := edit.reference_of_edited(engine.moe):
            return BaseScores(base, name, run_edited=run_edited)
    reference = _score_at_runtime(engine, quiz, plan, edits)
    must_change = not LAYOUTS[plan.layout].keeps_rows and base.depends_on_removed
    is_rerouted = reference.experts_per_token != base.experts_per_token
    if (must_change or is_rerouted) and torch.equal(base.logprob_NC, reference.logprob_NC):
        raise ContractError((NOT_REROUTED if is_rerouted else NOT_REACHED).format(name))
    forms: dict[str, HeldOutScores] = {}
    for edit in edits:
        others = [other for other in edits if other is not edit]
        for form_name, form in edit.forms().items():
            if form == edit:
                forms[form_name] = reference
            elif form is not None or any(other.reference for other in others):
                changed = [*others, form] if form else others
                forms[form_name] = _score_at_runtime(engine, quiz, plan, changed)
    is_exact = all(isinstance(e, PruneEdit) and e.constants for e in edits if e.reference)
    quiet = untouched(quiz, base) if is_exact else None
    alone = _score_alone(engine, quiet, plan.edits) if quiet else None
    return BaseScores(base, name, reference, forms=forms, is_cut_exactly=is_exact, alone=alone)


def untouched(quiz: Quiz, base: HeldOutScores) -> Quiz:
    """The questions without a token that chose a removed expert."""
    kept = [q for q, is_own in zip(quiz, base.is_untouched_N.tolist(), strict=True) if is_own]
    return replace_questions(quiz, kept)


def _score_at_runtime(
    engine: Engine, quiz: Quiz, plan: EditPlan, edits: Sequence[Edit]
) -> HeldOutScores:
    with simulated(engine.moe, edits, is_as_written=False) as begin:
        return HeldOutScores(engine, quiz, plan.edits, begin)


def score_edited(
    engine: Engine, quiz: Quiz, plan: EditPlan, before: BaseScores
) -> stats.HeldOutResult:
    """The checkpoint compared with the unedited model, as it is and with the plan at run time."""
    numbered, base, reference = _renumbered(plan), before.base, before.reference
    edited = HeldOutScores(engine, quiz, numbered)
    if before.run_edited is not None:
        with before.run_edited(engine.moe.blocks):
            reference = HeldOutScores(engine, quiz, numbered)
    assert reference is not None
    reordered = tuple(_reorderings(base, edited, plan, engine.moe))
    if reordered:
        _check_same(edited.logprob_NC, base.logprob_NC)
    pairs = [("the unedited base", edited, base)]
    if before.reference_name:
        pairs.append((before.reference_name, edited, reference))
    if before.run_edited is not None:
        pairs.append(("these against the unedited base", reference, base))
    forms = {"unedited": base, **before.forms, "this checkpoint": edited} if before.forms else {}
    answer_N = np.array([question.answer for question in quiz])
    base_N, edited_N = (s.logprob_NC.numpy().argmax(axis=1) == answer_N for s in (base, edited))
    change = stats.compare(base_N, edited_N)
    numbers, names, n = plan.numbers, list(plan.edits), len(quiz)
    # The checkpoint has the same experts in the same order.
    served = zip(base.n_served.items(), edited.n_served.values(), strict=True)
    return stats.HeldOutResult(
        held_out_split=quiz.split,
        held_out=tuple(compare_logprobs(n, a.logprob_NC, b.logprob_NC) for n, a, b in pairs),
        answered=stats.HeldOutAccuracy(base=float(base_N.mean()), change=change),
        chance=stats.chance(base.logprob_NC.numpy()),
        held_out_hashes=tuple(sorted(question.hash_line for question in quiz)),
        shares=tuple(
            stats.ExpertShares(
                layer=layer,
                expert=numbers.number(names[layer], row),
                base=n_base / n,
                exact=reference.n_served[layer, row] / n,
                edited=n_edited / n,
            )
            for ((layer, row), n_base), n_edited in served
        ),
        alone=_bit_exact_check(engine, quiz, plan, before) if before.is_cut_exactly else None,
        agreement=tuple(_agreements(reference, edited, plan, engine.moe)),
        outcomes=tuple(
            form_result(form, quiz, s.logprob_NC, base.logprob_NC) for form, s in forms.items()
        ),
        rows=reordered,
    )


def _bit_exact_check(
    engine: Engine, quiz: Quiz, plan: EditPlan, before: BaseScores
) -> stats.BitExactCheck:
    if before.alone is None:
        return stats.BitExactCheck(questions=len(quiz), untouched=0, bit_equal=0)
    is_untouched_N = before.alone.is_untouched_N
    edited = _score_alone(engine, untouched(quiz, before.base), plan.edits)
    is_same_N = (before.alone.logprob_NC == edited.logprob_NC).all(dim=1)
    return stats.BitExactCheck(
        questions=len(quiz),
        untouched=int(is_untouched_N.sum()),
        bit_equal=int((is_same_N & is_untouched_N).sum()),
    )


def _check_same(edited_NC: Tensor, base_NC: Tensor) -> None:
    off = compare_logprobs("the unedited base", edited_NC, base_NC).median_abs_logprob_diff
    if off > _MOST_OFF:
        raise ContractError(
            f"with its experts in another order the model answers otherwise (log p moves by "
            f"{off:.3g} in the median): the order did not reach every tensor, so no result is given"
        )


def _overlap(
    reference: HeldOutScores, edited: HeldOutScores, edit: BlockEdit, layer: int
) -> Tensor:
    """The share (T,) of each token's experts that are chosen in both."""
    # The expert in the unedited model of each row of the edited one; nobody stays nobody.
    own = edit.order or edit.keep
    expert_X = torch.tensor([*own, len(own)])
    overlaps = []
    # Passes over the same tokens.
    for (a_TK, _), (b_TK, _) in zip(reference.routed[layer], edited.routed[layer], strict=True):
        is_in_both_TKK = a_TK[:, :, None] == expert_X[b_TK.long()][:, None, :]
        overlaps.append(is_in_both_TKK.any(dim=2).double().mean(dim=1))
    return torch.cat(overlaps)


def _reorderings(
    base: HeldOutScores, edited: HeldOutScores, plan: EditPlan, moe: MoeModel
) -> Iterator[dict[str, int | float]]:
    """Per layer in another order: tokens, those with other experts, and the widest gap of these."""
    for block in moe.blocks:
        if plan.edits[block.name].order is None:
            continue
        overlap_T = _overlap(base, edited, plan.edits[block.name], block.layer)
        gap_T = torch.cat(base.gaps[block.layer])[overlap_T < 1]
        yield {
            "layer": block.layer,
            "tokens": len(overlap_T),
            "moved": len(gap_T),
            "largest_gap": float(gap_T.max()) if len(gap_T) else 0.0,
        }


def _agreements(
    reference: HeldOutScores, edited: HeldOutScores, plan: EditPlan, moe: MoeModel
) -> Iterator[stats.RoutingAgreement]:
    """Layout stock, per layer with a bias: the checkpoint against the plan at run time."""
    for block in moe.blocks if LAYOUTS[plan.layout].fits_biases else ():
        if not plan.edits[block.name].bias:
            continue
        overlap_T = _overlap(reference, edited, plan.edits[block.name], block.layer)
        passes = reference.routed[block.layer]
        answer_N = overlap_T[torch.cat([is_answer_T for _, is_answer_T in passes])]
        yield stats.RoutingAgreement(
            layer=block.layer,
            same_answer=float((answer_N == 1).double().mean()),
            overlap_answer=float(answer_N.mean()),
            same_all=float((overlap_T == 1).double().mean()),
            overlap_all=float(overlap_T.mean()),
        )
