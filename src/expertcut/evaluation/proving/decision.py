"""The stage behind `reweight --tune` and `--prove`: one model load, all runs through it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from expertcut.checkpoints.build import engine_as_profiled, profiled_source
from expertcut.data import Quiz
from expertcut.edits.plan import ExpertIds, Point, expert_ids
from expertcut.edits.reweight_select import QuestionOutcomes, right
from expertcut.edits.reweight_tune import Procedure, Settled, Shift
from expertcut.edits.splits import questions_for
from expertcut.evaluation.proving.control import DRAWS
from expertcut.evaluation.proving.crossfit import judge
from expertcut.evaluation.proving.outcome import ProofResult, called, proof_result
from expertcut.interventions.reweighting.rescoring import Rescorer
from expertcut.models.load import LoadOptions
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.storage import Profile
from expertcut.scoring.router_bias import ApplyAt


@dataclass(frozen=True)
class Decision:
    """What was chosen on the tuning questions, and the proof where one was asked for.

    `settled` has router rows, `curve` and `chosen` call experts as before earlier cuts.
    `base_accuracy` and `accuracy_at` are over the tuning questions, so the latter flatter.
    """

    tuning: Quiz
    settled: Settled
    curve: tuple[Point, ...]
    chosen: tuple[tuple[int, int, float], ...]
    base_accuracy: float
    accuracy_at: dict[ApplyAt, float]
    proof: ProofResult | None
    runs: int


@dataclass(frozen=True)
class DecideOptions:
    """How to decide; `name` is that of the procedure, `draws` are the random control's."""

    load_as: LoadOptions
    name: str
    apply_at: ApplyAt = "all"
    is_proved: bool = False
    draws: int = DRAWS
    seed: int = 0


Report = Callable[[int, int], None]
"""Told how many parts are done, of how many."""


def decide(
    profile: Profile, procedure: Procedure, options: DecideOptions, report: Report
) -> Decision:
    """Chooses experts and strengths on the tuning questions of a profile.

    Raises:
        PlanError: fewer candidates than are to be tilted, or one without a strength.
        QuizError: too few questions for a proof.
    """
    tuning = questions_for(profile, is_fitting=True).tuning
    engine = engine_as_profiled(profile, profiled_source(profile), options.load_as)
    rescorer = Rescorer(engine, tuning)
    records, ask = rescorer.records, partial(rescorer.ask, apply_at=options.apply_at)
    procedure.check(records)
    numbers = expert_ids(profile)
    proof = None
    if options.is_proved:
        for step in judge(records, procedure, ask, options.draws, options.seed):
            report(step.done, step.total)
        assert step.judged is not None
        settled = step.judged.settled
        quiz = (tuning.id, tuning.split)
        proof = proof_result(step.judged, options.name, quiz, options.seed, numbers)
    else:
        settled = procedure.settle(records, procedure.pick(records), ask)
    return Decision(
        tuning=tuning,
        settled=settled,
        curve=tuple(_renumbered(point, records.blocks, numbers) for point in settled.curve),
        chosen=called(settled.shifts, records.blocks, numbers),
        base_accuracy=float(records.is_correct_N.mean()),
        accuracy_at=dict(_accuracy_at(rescorer, records, settled)),
        proof=proof,
        runs=rescorer.n_runs,
    )


def _renumbered(point: Point, blocks: Sequence[BlockInfo], numbers: ExpertIds) -> Point:
    shifts = tuple(Shift(*bias) for bias in point.biases)
    return point.model_copy(update={"biases": called(shifts, blocks, numbers)})


def _accuracy_at(
    rescorer: Rescorer, records: QuestionOutcomes, settled: Settled
) -> Iterator[tuple[ApplyAt, float]]:
    """What the tilt does where the answer is written alone, and everywhere."""
    places: tuple[ApplyAt, ...] = ("answer", "all")
    for place in places:
        logprob_NC = rescorer.ask(settled.shifts, place)
        yield place, float(right(logprob_NC, records.answer_N).mean())
