"""The stage behind `audit`: experts are removed one at a time from one loaded model."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from expertcut.checkpoints.build import engine_as_profiled, profiled_source
from expertcut.checkpoints.export import check_layout
from expertcut.checkpoints.held_out_check import NOT_REACHED
from expertcut.checkpoints.simulate import apply_at_runtime
from expertcut.edits.calibrate import zero_outputs
from expertcut.edits.criteria import CALIBRATED
from expertcut.edits.plan import Edit, plan_model
from expertcut.edits.ranking import Way
from expertcut.edits.reweight_select import QuestionOutcomes, right
from expertcut.edits.splits import HELD_OUT, hashes, judges_or_fifth, n_used, questions_for
from expertcut.errors import ContractError, PlanError, ProfileError
from expertcut.evaluation.auditing.outcome import (
    AUDIT_FILE,
    Audit,
    AuditAsked,
    Harm,
    Sampled,
    save_audit,
)
from expertcut.evaluation.auditing.sample import sampled_experts, standings
from expertcut.evaluation.auditing.verdict import verdict
from expertcut.evaluation.comparison import mcnemar
from expertcut.evaluation.folders import begun, check_same, profile_hash
from expertcut.interventions.reweighting.rescoring import Rescorer
from expertcut.models.load import LoadOptions
from expertcut.profiling.locks import alone
from expertcut.profiling.storage import Profile
from expertcut.scoring.packing import Pass
from expertcut.scoring.passes import OnPass

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class AuditOptions:
    """What to remove, what to score it by, and on how many held-out questions.

    With `is_all` the criteria are all that there are, of which the profile need not serve each.
    """

    by: tuple[str, ...]
    fractions: tuple[float, ...]
    way: Way
    load_as: LoadOptions
    sample: int = 64
    questions: int = HELD_OUT
    is_all: bool = False


@dataclass(frozen=True)
class AuditProgress:
    """How far an audit is, in questions asked; `left_s` is None while that is unknown."""

    done: int
    total: int
    tokens: int
    left_s: float | None


class Auditing:
    """One loaded model and its sampled experts; `found` is what is known so far.

    Raises:
        ContractError: the layout does not know the model's family.
        PlanError: no expert can go without leaving fewer than top-k.
        ProfileError: the model or the quiz is not the one that was profiled.
    """

    def __init__(self, profile: Profile, options: AuditOptions) -> None:
        self.profile, self.options = profile, options
        self.blocks, layout = profile.info.model.blocks, options.way.layout
        for block in self.blocks:
            if block.experts <= block.top_k and layout == "stock":
                raise PlanError(
                    f"{block.name} routes each token to all of its {block.experts} experts: "
                    "none can be removed"
                )
        source = profiled_source(profile)
        check_layout(source, layout, is_cutting=True)
        is_fitting = not CALIBRATED.isdisjoint(options.by)
        asked = questions_for(profile, is_fitting=is_fitting, n_held_out=options.questions)
        self.quiz = judges_or_fifth(asked, options.questions)
        looked_at = hashes(asked.profiled) | (hashes(asked.tuning) if is_fitting else frozenset())
        self.overlap = n_used(self.quiz, looked_at | asked.inherited)
        self.engine = engine_as_profiled(profile, source, options.load_as)

    @property
    def n_questions(self) -> int:
        """That will be asked in all, but for those of the first run."""
        n_experts = sum(block.experts for block in self.blocks)
        return len(self.quiz) * min(self.options.sample, n_experts)

    def run(self, folder: Path, on_pass: OnPass) -> Iterator[AuditProgress]:
        """Removes every expert that the folder lacks; each is kept when it is done.

        Raises:
            OutputError: the folder holds something else, or another audit, or another run is at
                work there.
        """
        asked = self._asked()
        earlier = _earlier(folder, asked)
        if earlier is not None and earlier.verdicts:
            self.found = earlier
            return
        with alone(folder, "audit"):
            yield from self._run(folder, asked, on_pass)

    def _run(self, folder: Path, asked: AuditAsked, on_pass: OnPass) -> Iterator[AuditProgress]:
        earlier = _earlier(folder, asked)  # another run may have ended since
        rescorer = Rescorer(self.engine, self.quiz)
        self.found = earlier or self._begin(asked, rescorer)
        save_audit(folder, self.found)
        yield from self._remove(rescorer, folder, on_pass)
        options, found = self.options, self.found
        verdicts = (
            verdict(by, standing, found.harms, options.fractions, options.way.seed)
            for by, standing in found.standings.items()
        )
        self.found = found.model_copy(update={"verdicts": tuple(verdicts)})
        save_audit(folder, self.found)

    def _asked(self) -> AuditAsked:
        options, info = self.options, self.profile.info
        content = "\n".join(f"{q.content_hash} {q.answer}" for q in self.quiz)
        return AuditAsked(
            model=plan_model(info.model),
            settings=info.settings,
            profile=profile_hash(info),
            quiz=self.quiz.id,
            split=self.quiz.split,
            shots=self.quiz.shots,
            questions=len(self.quiz),
            asked=hashlib.sha256(content.encode()).hexdigest(),
            by=options.by,
            positions=options.way.positions,
            layout=options.way.layout,
            fractions=options.fractions,
            sample=options.sample,
            seed=options.way.seed,
            truncate=self.quiz.truncate,
        )

    def _begin(self, asked: AuditAsked, rescorer: Rescorer) -> Audit:
        options, records = self.options, rescorer.records
        sampled = sampled_experts(self.profile, options.sample, options.way.seed)
        common = (self.profile, options.by, options.way, self.engine, sampled)
        found = standings(*common, is_all=options.is_all)
        if not found:
            raise ProfileError(f"{self.profile.path} can serve none of {', '.join(options.by)}")
        return Audit(
            asked=asked,
            overlap=self.overlap,
            cut=rescorer.n_cut,
            accuracy=float(records.is_correct_N.mean()),
            right_logprob=float(_right(records.logprob_NC, records.answer_N).mean()),
            sampled=sampled,
            standings=found,
        )

    def _remove(self, rescorer: Rescorer, folder: Path, on_pass: OnPass) -> Iterator[AuditProgress]:
        n_each, n_before, started = len(self.quiz), len(self.found.harms), time.monotonic()
        total = len(self.found.sampled)
        for done, expert in enumerate(self.found.sampled[n_before:], start=n_before + 1):
            change = _told(self._without(expert), on_pass)
            found = rescorer.changed(expert.layer, change)
            self._check_reached(expert, rescorer.records, found)
            harm = _harm(expert, rescorer.records, found)
            self.found = self.found.model_copy(update={"harms": (*self.found.harms, harm)})
            save_audit(folder, self.found)
            left_s = (time.monotonic() - started) * (total - done) / (done - n_before)
            yield AuditProgress(done * n_each, total * n_each, 0, left_s)

    def _check_reached(self, expert: Sampled, base: QuestionOutcomes, logprob_NC: Array) -> None:
        """That answers changed, where the expert had a share in one that counts."""
        is_chosen_N = (base.chosen_NLK[:, expert.layer] == expert.row).any(axis=1)
        is_masked = self.options.way.layout == "stock"
        if is_masked and is_chosen_N.any() and np.array_equal(base.logprob_NC, logprob_NC):
            alpha_NE = base.alpha_NLE[is_chosen_N, expert.layer]
            if (alpha_NE[:, expert.row] > 0.01 * alpha_NE.sum(axis=1)).any():
                name = f"without expert {expert.layer}:{expert.expert}"
                raise ContractError(NOT_REACHED.format(name))

    def _without(self, expert: Sampled) -> AbstractContextManager[OnPass]:
        """The unedited model without one expert, as the layout means it."""
        way, model = self.options.way, self.engine.moe.model
        ids = {block.name: tuple(range(block.experts)) for block in self.blocks}
        name = self.blocks[expert.layer].name
        ids[name] = tuple(row for row in ids[name] if row != expert.row)
        edits = {block: Edit(keep=keep) for block, keep in ids.items()}
        draft = replace(way.draft("", "", ""), edits=edits)
        width = int(model.config.get_text_config().hidden_size)
        is_exact = way.layout == "exact"
        constants = zero_outputs({name: (expert.row,)}, width) if is_exact else {}
        return apply_at_runtime(self.engine.moe, draft, constants)


def _earlier(folder: Path, asked: AuditAsked) -> Audit | None:
    earlier = begun(folder / AUDIT_FILE, Audit)
    if earlier is not None:
        check_same(folder, earlier.asked, asked, "audit")
    return earlier


@contextmanager
def _told(change: AbstractContextManager[OnPass], on_pass: OnPass) -> Iterator[OnPass]:
    """The change, and another that is told of each pass."""
    with change as begin:

        def both(step: Pass) -> None:
            begin(step)
            on_pass(step)

        yield both


def _harm(expert: Sampled, base: QuestionOutcomes, logprob_NC: Array) -> Harm:
    lost_N = _right(base.logprob_NC, base.answer_N) - _right(logprob_NC, base.answer_N)
    was_N, is_N = base.is_correct_N, right(logprob_NC, base.answer_N)
    gained, lost = int((~was_N & is_N).sum()), int((was_N & ~is_N).sum())
    both_NC = np.isfinite(base.logprob_NC)
    n = len(lost_N)
    return Harm(
        layer=expert.layer,
        expert=expert.expert,
        logprob=float(lost_N.mean()),
        stderr=float(lost_N.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0,
        accuracy=(lost - gained) / n,
        gained=gained,
        lost=lost,
        mcnemar_p=mcnemar(gained, lost),
        largest=float(np.abs(base.logprob_NC - logprob_NC)[both_NC].max()),
    )


def _right(logprob_NC: Array, answer_N: Array) -> Array:
    """Log p of the right answers (N,)."""
    found_N: Array = logprob_NC[np.arange(len(answer_N)), answer_N].astype(np.float64)
    return found_N
