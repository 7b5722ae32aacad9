"""The stages behind `reweight`, `--tune` and `--prove`: one loaded model, scored repeatedly."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from expertcut import __version__
from expertcut.checkpoints.build import engine_as_profiled, profiled_source
from expertcut.checkpoints.export import WRITERS
from expertcut.checkpoints.tensor_names import blocks_of
from expertcut.data import Quiz
from expertcut.data.corpus import as_quiz
from expertcut.edits import router_edits
from expertcut.edits.balance import balance_layer
from expertcut.edits.edit_settings import ReweightSettings
from expertcut.edits.layouts import LAYOUTS, Layout
from expertcut.edits.plan import PROOF_FILE, EditPlan, PlanBalance, Point, expert_ids
from expertcut.edits.reweight_select import Array, QuestionOutcomes, right, stored_selection
from expertcut.edits.router_edits import Procedure, RouterEdit, Settled
from expertcut.edits.splits import profiled_quiz, questions_for
from expertcut.errors import ContractError, ProfileError
from expertcut.evaluation.cross_fit import CrossFitResult, cross_fit, cross_fit_result, numbered
from expertcut.models.load import LoadOptions, Source
from expertcut.profiling.measure import decided, engine_settings, is_writer, model_info
from expertcut.profiling.recorder import Recorder
from expertcut.profiling.schema import ModelInfo
from expertcut.profiling.storage import Arrays, Profile, chunk_or_fault, write_chunk
from expertcut.profiling.trace import Trace
from expertcut.scoring.engine import Engine, stack_scores
from expertcut.scoring.packing import Encoded
from expertcut.scoring.passes import OnPass, Replay
from expertcut.scoring.router_bias import ApplyAt, Tilts, tilted

logger = logging.getLogger(__name__)


class CachedScorer:
    """Log p of a quiz's choices under any biases; each result is cached, also in a folder if given.

    The first run records the unedited model and keeps up to `kept_bytes` of layer outputs; later
    ones start at the first biased block, with the same bits as a whole run.
    """

    def __init__(
        self, engine: Engine, quiz: Quiz, kept_bytes: int = 2 << 30, folder: Path | None = None
    ) -> None:
        self.engine, self.quiz, self.folder = engine, quiz, folder
        self.chunks = list(engine.encode_all(quiz))
        # Prompts truncated on the left; None without `--truncate`.
        self.n_cut = sum(c.n_cut for c in self.chunks) if quiz.truncate else None
        blocks, model = engine.moe.blocks, engine.moe.model
        self.replay = Replay(model, blocks, sum(map(self._n_tokens, self.chunks)), kept_bytes)
        self.known: dict[tuple[object, ...], Array] = {}
        self.is_recorded = False  # by this process
        self.unedited = self._stored(()) or self._first_run()
        self.records = QuestionOutcomes(
            blocks=model_info(engine.moe).blocks,
            subject_N=np.array([q.subject for q in quiz]),
            hash_N=np.array([q.overlap_hash for q in quiz]),
            answer_N=np.array([q.answer for q in quiz]),
            selection_of=self._selection,
            line_N=np.array([q.hash_line for q in quiz]),
            **self.unedited,
        )

    def ask(self, shifts: tuple[RouterEdit, ...], apply_at: ApplyAt = "all") -> Array:
        """Log p (N, C), −∞ where a question has fewer choices."""
        if not shifts:
            return self.records.logprob_NC
        name = (*sorted((s.layer, s.expert, float(s.bias)) for s in shifts), apply_at)
        blocks = self.engine.moe.blocks
        biases = {s.layer: torch.zeros(blocks[s.layer].n_experts) for s in shifts}
        for shift in shifts:
            biases[shift.layer][shift.expert] += shift.bias
        return self.scored(name, min(biases), tilted(blocks, Tilts(biases, apply_at=apply_at)))

    def scored(
        self, name: tuple[object, ...], layer: int, change: AbstractContextManager[OnPass]
    ) -> Array:
        """Log p (N, C) with a change from this MoE block on; entered only if no result is cached.

        `name` says all that the result depends on, besides the model and the questions.
        """
        if name not in self.known:
            arrays = self._stored(name) or {"logprob_NC": self.changed(layer, change)}
            self._store((), self.unedited)
            self._store(name, arrays)
            self.known[name] = arrays["logprob_NC"]
        return self.known[name]

    @cached_property
    def _identity(self) -> str:
        """Everything that a result depends on, besides the biases."""
        settings = engine_settings(self.engine, "answer", self.quiz.truncate)
        prompts = [(chunk.prompts, chunk.choice_ids) for chunk in self.chunks]
        parts = (self.engine.moe.source.fingerprint, settings.model_dump_json(), __version__)
        return hashlib.sha256(f"{parts} {prompts}".encode()).hexdigest()

    def _file(self, name: tuple[object, ...]) -> Path | None:
        """The file of a result, called by the hash of all that it depends on."""
        if self.folder is None:
            return None
        digest = hashlib.sha256(f"{self._identity} {name}".encode()).hexdigest()
        return self.folder / f"{digest}.safetensors"

    def _stored(self, name: tuple[object, ...]) -> Arrays | None:
        return decided(self.engine.moe, partial(self._load, name))

    def _load(self, name: tuple[object, ...]) -> Arrays | None:
        file = self._file(name)
        if file is None or not file.exists():
            return None
        arrays = chunk_or_fault(file, file.stem)
        if isinstance(arrays, str):
            logger.warning("%s is damaged (%s): scoring it again", file, arrays)
            file.unlink()
            return None
        return arrays

    def _store(self, name: tuple[object, ...], arrays: Arrays) -> None:
        file = self._file(name)
        if file is not None and is_writer(self.engine.moe) and not file.exists():
            write_chunk(file, arrays, file.stem)

    def _n_tokens(self, chunk: Encoded) -> int:
        n_all = sum(map(len, chunk.prompts))
        is_shared = self.engine.mode(chunk) == "packed"
        return n_all - (len(chunk) - 1) * chunk.shared_prefix() if is_shared else n_all

    def _first_run(self) -> Arrays:
        """Scores the unedited model, and keeps the layer outputs where later runs start."""
        blocks = self.engine.moe.blocks
        scores, recorders = [], []
        self.is_recorded = True
        with self.replay.recording():
            for chunk in self.chunks:
                recorder = Recorder(blocks, len(chunk), "answer")
                with recorder.listening():
                    scores.append(self.engine.score(chunk, recorder.begin))
                recorders.append(recorder.arrays())
        logprob_NC: Array = stack_scores(scores).numpy()
        if not self._replays_exactly(logprob_NC):
            logger.warning("replay does not reproduce the same bits: every run starts at layer 0")
            self.replay.starts, self.replay.outputs = (), {}
        return {
            "logprob_NC": logprob_NC,
            "alpha_NLE": np.concatenate([arrays["alpha_NLE"] for arrays in recorders]),
            "chosen_NLK": np.concatenate([arrays["chosen_NLK"] for arrays in recorders]),
        }

    def _selection(self, layer: int) -> Array | None:
        bias_E = self.engine.moe.blocks[layer].selection_bias()
        return None if bias_E is None else np.asarray(bias_E.detach().double().cpu())

    def changed(self, layer: int, change: AbstractContextManager[OnPass]) -> Array:
        """Log p (N, C) with a change of this MoE block, and of later ones."""
        if not self.is_recorded:
            self._first_run()
        with self.replay.starting_at(layer), change as begin:
            scores = [self.engine.score(chunk, begin) for chunk in self.chunks]
        return np.asarray(stack_scores(scores).numpy())

    def _replays_exactly(self, logprob_NC: Array) -> bool:
        """Whether the first subject has the same bits from every kept layer."""
        first = logprob_NC[: len(self.chunks[0])]
        for layer, number in self.replay.decoder_of.items():
            if number in self.replay.starts:
                with self.replay.starting_at(layer):
                    again = self.engine.score(self.chunks[0]).numpy()
                if not np.array_equal(again, first[:, : again.shape[1]]):
                    return False
        return True


@dataclass(frozen=True)
class TuningResult:
    """The choice on the tuning questions, and its cross-fit if requested.

    `settled` has router rows, `curve` and `chosen` the experts' numbers before earlier cuts.
    `base_accuracy` and `accuracy_at` are over the tuning questions, so the latter is optimistic.
    """

    tuning: Quiz
    settled: Settled
    curve: tuple[Point, ...]
    chosen: tuple[tuple[int, int, float], ...]
    base_accuracy: float
    accuracy_at: dict[ApplyAt, float]
    proof: CrossFitResult | None


def decide(
    profile: Profile,
    procedure: Procedure,
    settings: ReweightSettings,
    load_as: LoadOptions,
    report: Callable[[int, int], None],
    folder: Path | None = None,
) -> TuningResult:
    """Chooses experts and strengths on the tuning questions; the folder keeps all scored tilts."""
    tuning = as_quiz(questions_for(profile, is_fitting=True).tuning)
    engine = engine_as_profiled(profile, profiled_source(profile), load_as)
    rescorer = CachedScorer(engine, tuning, folder=folder)
    records = rescorer.records
    ask = partial(rescorer.ask, apply_at=settings.apply_at or "all")
    procedure.check(records)
    numbers = expert_ids(profile)
    proof = None

    def report_scored(done: int, total: int) -> None:
        if rescorer.is_recorded:  # what an earlier process scored says nothing of the pace
            report(done, total)

    if settings.prove:
        outcome = cross_fit(records, procedure, ask, settings.draws, settings.seed, report_scored)
        settled = outcome.settled
        proof = cross_fit_result(
            outcome,
            router_edits.procedure_name(profile, settings, procedure),
            quiz=tuning.id,
            split=tuning.split,
            seed=settings.seed,
            numbers=numbers,
        )
    else:
        steps = count()

        def ask_and_report(shifts: tuple[RouterEdit, ...]) -> Array:
            report_scored(next(steps), 0)  # the search may end at any step
            return ask(shifts)

        settled = procedure.settle(records, procedure.pick(records), ask_and_report)
    return TuningResult(
        tuning=tuning,
        settled=settled,
        curve=tuple(
            point.model_copy(update={"biases": numbered(point.biases, records.blocks, numbers)})
            for point in settled.curve
        ),
        chosen=numbered(tuple(s[:3] for s in settled.shifts), records.blocks, numbers),
        base_accuracy=float(records.is_correct_N.mean()),
        accuracy_at={
            at: float(right(rescorer.ask(settled.shifts, at), records.answer_N).mean())
            for at in get_args(ApplyAt)
        },
        proof=proof,
    )


@dataclass(frozen=True)
class Reweighting:
    """The plan and its router edits; no draft without any. `extra_files` is the proof, if any."""

    draft: EditPlan | None
    tilts: list[RouterEdit] = field(default_factory=list)
    scalings: list[RouterEdit] = field(default_factory=list)
    extra_files: Mapping[str, bytes] = field(default_factory=dict)


def by_hand(profile: Profile, settings: ReweightSettings) -> Reweighting:
    """Experts and strengths as named."""
    biases = router_edits.tilts(profile, settings.boost or [], settings.suppress or [])
    factors = router_edits.scalings(profile, settings.scale or [])
    draft = router_edits.reweight_draft(
        profile, biases, settings.layout, factors, settings.apply_at
    )
    return Reweighting(draft, biases, factors)


_MOST_FITTED = 8  # biases of a layer that share one direction of its gate rows


def balanced(
    profile: Profile, settings: ReweightSettings, trace: Trace, report: Callable[[int, int], None]
) -> tuple[Reweighting, PlanBalance]:
    """Biases that even out the loads of a trace; no draft where all are even enough.

    `profile` is that of the trace. Raises ProfileError: a trace without logits; ContractError: the
    layout cannot hold the biases.
    """
    model, target = profile.info.model, settings.balance
    assert target is not None, "checked"
    if not trace.info.settings.logits:
        raise ProfileError(f"{trace.path} keeps no router logits: trace again with --logits")
    if any(block.places is not None for block in model.blocks):
        raise ContractError(f"{model.id} has a routing rule: balance the model that it was made of")
    if all(block.is_hashed for block in model.blocks):
        raise ContractError(f"{model.id} routes by tables of token ids: no bias acts on them")
    source = profiled_source(profile)
    WRITERS[settings.layout].check(source, is_cutting=False)
    selection = [stored_selection(model, layer) for layer in range(len(model.blocks))]
    _check_logit_biases(source, model, selection, settings.layout)
    halves, numbers, layers = trace.halves(), expert_ids(profile), []
    if not all(halves):
        raise ProfileError(f"{trace.path} has one sequence, and others must judge: trace more")
    for layer, block in enumerate(model.blocks):
        report(layer, len(model.blocks))
        if not block.is_hashed:
            gone = numbers.constant.get(block.name, frozenset())
            own = balance_layer(
                halves, layer, block, target, selection_E=selection[layer], constant=gone
            )
            layers.append(own)
    found = PlanBalance(target=target, blocks={own.block: own.loads for own in layers})
    draft = router_edits.balance_draft(profile, layers, found, settings.layout)
    return Reweighting(draft), found


def _check_logit_biases(
    source: Source, model: ModelInfo, selection: Sequence[Array | None], layout: Layout
) -> None:
    """Refuses biases on logits that a gate's rows would have to carry for many experts."""
    blocks = blocks_of(source.headers, [block.name for block in model.blocks])
    for block, selection_E in zip(model.blocks, selection, strict=True):
        has_place = blocks[block.name].logit_bias or block.is_hashed
        is_fitted = selection_E is None and LAYOUTS[layout].fits_biases and not has_place
        if is_fitted and block.experts > _MOST_FITTED:
            raise ContractError(
                f"{block.name} has no selection bias, and layout stock comes close to biases of "
                f"{_MOST_FITTED} experts a layer at most, not of {block.experts}: take --layout "
                "exact"
            )


def prepared(profile: Profile, settings: ReweightSettings) -> Procedure:
    """The procedure; invalid settings are refused before a model runs."""
    router_edits.check_place(settings.layout, settings.apply_at, is_biased=True)
    WRITERS[settings.layout].check(profiled_source(profile), is_cutting=False)
    return router_edits.procedure_of(profile, settings)


def chosen(
    profile: Profile, settings: ReweightSettings, procedure: Procedure, tuned: TuningResult | None
) -> Reweighting:
    """The tuned edit, or without one the choice on the profile's own questions."""
    if tuned is None:
        records = QuestionOutcomes.of(profile, profiled_quiz(profile))
        procedure.check(records)
        settled = Settled(procedure.untuned(records, procedure.pick(records)))
    else:
        settled = tuned.settled
    extra_files = {PROOF_FILE: tuned.proof.json_bytes()} if tuned and tuned.proof else {}
    if not settled.shifts:
        return Reweighting(None, extra_files=extra_files)
    blocks = profile.info.model.blocks
    biases = [
        shift._replace(block=blocks[shift.layer].name, origin=procedure.origin(shift))
        for shift in settled.shifts
    ]
    draft = replace(
        router_edits.reweight_draft(profile, biases, settings.layout, (), settings.apply_at),
        criterion=settings.criterion,
        is_tuned=tuned is not None,
        tuning=tuned.curve if tuned else (),
        used=procedure.chooser.looked_at(profile),
    )
    return Reweighting(draft, biases, extra_files=extra_files)
