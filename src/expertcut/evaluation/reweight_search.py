"""The stages behind `reweight`, `--tune` and `--prove`: one loaded model, scored repeatedly."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import get_args

import numpy as np
import torch

from expertcut.checkpoints.build import engine_as_profiled, profiled_source
from expertcut.checkpoints.export import check_layout
from expertcut.data import Quiz
from expertcut.edits.edit_settings import ReweightSettings
from expertcut.edits.plan import EditPlan, Point, expert_ids
from expertcut.edits.reweight_select import Array, QuestionOutcomes, check_settings, right
from expertcut.edits.router_edits import (
    Procedure,
    RouterEdit,
    Settled,
    check_place,
    procedure_name,
    procedure_of,
    reweight_draft,
    scalings,
    tilts,
)
from expertcut.edits.splits import profiled_quiz, questions_for
from expertcut.evaluation.cross_fit import (
    Biases,
    CrossFitResult,
    cross_fit,
    cross_fit_result,
    numbered,
    proof_file,
)
from expertcut.models.load import LoadOptions
from expertcut.profiling.measure import model_info
from expertcut.profiling.recorder import Recorder
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine, stack_scores
from expertcut.scoring.packing import Encoded
from expertcut.scoring.passes import OnPass, Replay
from expertcut.scoring.router_bias import ApplyAt, Tilts, tilted

logger = logging.getLogger(__name__)
KEPT_BYTES = 2 << 30  # of layer outputs, so that runs can start at a later layer


class CachedScorer:
    """Log p of a quiz's choices under any biases; each result is cached.

    The first run records the unedited model; later ones start at the first biased block, with the
    same bits as a whole run.
    """

    def __init__(self, engine: Engine, quiz: Quiz, kept_bytes: int = KEPT_BYTES) -> None:
        self.engine, self.quiz = engine, quiz
        self.chunks = list(engine.encode_all(quiz))
        blocks, model = engine.moe.blocks, engine.moe.model
        self.replay = Replay(model, blocks, sum(map(self._n_tokens, self.chunks)), kept_bytes)
        self.known: dict[tuple[tuple[RouterEdit, ...], ApplyAt], Array] = {}
        self.n_runs = 0
        self.records = self._first_run()
        if not self._replays_exactly():
            logger.warning("replay does not reproduce the same bits: every run starts at layer 0")
            self.replay.forget()

    def ask(self, shifts: tuple[RouterEdit, ...], apply_at: ApplyAt = "all") -> Array:
        """Log p (N, C), −∞ where a question has fewer choices."""
        if not shifts:
            return self.records.logprob_NC
        key = (tuple(sorted(shifts)), apply_at)
        if key not in self.known:
            self.known[key] = self._run(shifts, apply_at)
            self.n_runs += 1
        return self.known[key]

    @property
    def n_cut(self) -> int | None:
        """Prompts truncated on the left; None without `--truncate`."""
        return sum(c.n_cut for c in self.chunks) if self.quiz.truncate else None

    def _n_tokens(self, chunk: Encoded) -> int:
        n_all = sum(map(len, chunk.prompts))
        is_shared = self.engine.way(chunk) == "packed"
        return n_all - (len(chunk) - 1) * chunk.shared_prefix() if is_shared else n_all

    def _first_run(self) -> QuestionOutcomes:
        blocks = self.engine.moe.blocks
        scores, recorders = [], []
        with self.replay.recording():
            for chunk in self.chunks:
                recorder = Recorder(blocks, len(chunk), "answer")
                with recorder.listening():
                    scores.append(self.engine.score(chunk, recorder.begin))
                recorders.append(recorder.arrays())
        return QuestionOutcomes(
            blocks=model_info(self.engine.moe).blocks,
            subject_N=np.array([q.subject for q in self.quiz]),
            hash_N=np.array([q.overlap_hash for q in self.quiz]),
            answer_N=np.array([q.answer for q in self.quiz]),
            logprob_NC=stack_scores(scores).numpy(),
            alpha_NLE=np.concatenate([arrays["alpha_NLE"] for arrays in recorders]),
            chosen_NLK=np.concatenate([arrays["chosen_NLK"] for arrays in recorders]),
            selection_of=self._selection,
            line_N=np.array([q.hash_line for q in self.quiz]),
        )

    def _selection(self, layer: int) -> Array | None:
        bias_E = self.engine.moe.blocks[layer].selection_bias()
        return None if bias_E is None else np.asarray(bias_E.detach().double().cpu())

    def _run(self, shifts: tuple[RouterEdit, ...], apply_at: ApplyAt) -> Array:
        n_experts = {b.layer: b.n_experts for b in self.engine.moe.blocks}
        biases = {s.layer: torch.zeros(n_experts[s.layer]) for s in shifts}
        for shift in shifts:
            biases[shift.layer][shift.expert] += shift.bias
        tilts = Tilts(biases, apply_at=apply_at)
        return self.changed(min(biases), tilted(self.engine.moe.blocks, tilts))

    def changed(self, layer: int, change: AbstractContextManager[OnPass]) -> Array:
        """Log p (N, C) with a change of this MoE block, and of later ones."""
        with self.replay.starting_at(layer), change as begin:
            scores = [self.engine.score(chunk, begin) for chunk in self.chunks]
        logprob_NC: Array = stack_scores(scores).numpy()
        return logprob_NC

    def _replays_exactly(self) -> bool:
        """Whether the first subject has the same bits from every kept layer."""
        first = self.records.logprob_NC[: len(self.chunks[0])]
        for layer, number in self.replay.decoder_of.items():
            if number in self.replay.starts:
                with self.replay.starting_at(layer):
                    again = self.engine.score(self.chunks[0]).numpy()
                if not np.array_equal(again, first[:, : again.shape[1]]):
                    return False
        return True


@dataclass(frozen=True)
class Decision:
    """The choice on the tuning questions, and its cross-fit if requested.

    `settled` has router rows, `curve` and `chosen` the experts' numbers before earlier cuts.
    `base_accuracy` and `accuracy_at` are over the tuning questions, so the latter is optimistic.
    """

    tuning: Quiz
    settled: Settled
    curve: tuple[Point, ...]
    chosen: Biases
    base_accuracy: float
    accuracy_at: dict[ApplyAt, float]
    proof: CrossFitResult | None
    runs: int


def decide(
    profile: Profile,
    procedure: Procedure,
    settings: ReweightSettings,
    load_as: LoadOptions,
    report: Callable[[int, int], None],
) -> Decision:
    """Chooses experts and strengths on a profile's tuning questions; reports steps and total."""
    tuning = questions_for(profile, is_fitting=True).tuning
    engine = engine_as_profiled(profile, profiled_source(profile), load_as)
    rescorer = CachedScorer(engine, tuning)
    records = rescorer.records
    ask = partial(rescorer.ask, apply_at=settings.apply_at or "all")
    procedure.check(records)
    numbers = expert_ids(profile)
    proof = None
    if settings.prove:
        for step in cross_fit(records, procedure, ask, settings.draws, settings.seed):
            report(step.done, step.total)
        assert step.result is not None
        settled = step.result.settled
        proof = cross_fit_result(
            step.result,
            procedure_name(profile, settings, procedure),
            quiz=tuning.id,
            split=tuning.split,
            seed=settings.seed,
            numbers=numbers,
        )
    else:
        settled = procedure.settle(records, procedure.pick(records), ask)

    def accuracy(apply_at: ApplyAt) -> float:
        return float(right(rescorer.ask(settled.shifts, apply_at), records.answer_N).mean())

    return Decision(
        tuning=tuning,
        settled=settled,
        curve=tuple(
            point.model_copy(update={"biases": numbered(point.biases, records.blocks, numbers)})
            for point in settled.curve
        ),
        chosen=numbered(tuple(s[:3] for s in settled.shifts), records.blocks, numbers),
        base_accuracy=float(records.is_correct_N.mean()),
        accuracy_at={at: accuracy(at) for at in get_args(ApplyAt)},
        proof=proof,
        runs=rescorer.n_runs,
    )


@dataclass(frozen=True)
class Tilted:
    """What came of it; no draft where nothing is to be tilted. `beside` is the proof, if any."""

    draft: EditPlan | None
    tilts: list[RouterEdit] = field(default_factory=list)
    scalings: list[RouterEdit] = field(default_factory=list)
    beside: Mapping[str, bytes] = field(default_factory=dict)


def by_hand(profile: Profile, settings: ReweightSettings) -> Tilted:
    """Experts and strengths as named."""
    check_settings(settings)
    found = tilts(profile, settings.boost or [], settings.suppress or [])
    scaled = scalings(profile, settings.scale or [])
    draft = reweight_draft(profile, found, settings.layout, scaled, settings.apply_at)
    return Tilted(draft, found, scaled)


def prepared(profile: Profile, settings: ReweightSettings) -> Procedure:
    """The procedure; invalid settings are refused before a model runs."""
    check_place(settings.layout, settings.apply_at, is_biased=True)
    check_layout(profiled_source(profile), settings.layout, is_cutting=False)
    return procedure_of(profile, settings)


def chosen(
    profile: Profile, settings: ReweightSettings, procedure: Procedure, decision: Decision | None
) -> Tilted:
    """The edit of a decision, or without one the choice on the profile's own questions."""
    if decision is None:
        records = QuestionOutcomes.of(profile, profiled_quiz(profile))
        procedure.check(records)
        settled = Settled(procedure.untuned(records, procedure.pick(records)))
    else:
        settled = decision.settled
    beside = proof_file(decision.proof) if decision and decision.proof else {}
    if not settled.shifts:
        return Tilted(None, beside=beside)
    blocks = profile.info.model.blocks
    found = [
        shift._replace(block=blocks[shift.layer].name, origin=procedure.origin(shift))
        for shift in settled.shifts
    ]
    draft = replace(
        reweight_draft(profile, found, settings.layout, (), settings.apply_at),
        criterion=settings.criterion,
        is_tuned=decision is not None,
        tuning=decision.curve if decision else (),
        used=procedure.chooser.looked_at(profile),
    )
    return Tilted(draft, found, beside=beside)
