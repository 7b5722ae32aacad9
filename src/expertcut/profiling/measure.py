"""Profiling: runs a quiz through a model, chunk by chunk, into a resumable folder."""

import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import transformers
from torch import Tensor

from expertcut import __version__
from expertcut.data import Question, Quiz, Truncate, prompt, shuffle_choices
from expertcut.data.sources import is_held_out, is_one_set
from expertcut.errors import QuizError
from expertcut.files import recall, remember
from expertcut.models import hooks
from expertcut.models.checkpoint_dir import absolute_id, read_config
from expertcut.models.devices import trim
from expertcut.models.load import LoadOptions, MoeModel, Source, load
from expertcut.models.moe_block import MoeBlock
from expertcut.profiling import schema
from expertcut.profiling.findings import PERTURBED, Kind
from expertcut.profiling.recorder import Recorder, check_finite
from expertcut.profiling.storage import CUT, Arrays
from expertcut.profiling.text_recorder import ROUTES
from expertcut.profiling.workers import Progress, SharedFolder, Tally, Work, chunks_of_work, n_chars
from expertcut.scoring.engine import CHECKED_QUESTIONS, Engine
from expertcut.scoring.layer_major import PROBE, HiddenStates, run_layers
from expertcut.scoring.packing import Pass
from expertcut.scoring.passes import OnPass, PassObserver, ignore
from expertcut.scoring.rerouting import ExpertCounts

T = TypeVar("T")
logger = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = 2048
HALVED = "halved_passes"  # in a chunk whose passes were split for lack of memory


@dataclass(frozen=True)
class MeasureOptions:
    """How to measure; None means the recorded value of a resumed run, else the default."""

    stats: schema.Stats | None = None
    batch_tokens: int | None = None
    threads: int | None = None
    waits: bool = True  # ends when all chunks exist, else when none is left for this process
    counts_experts: bool = False  # chunks then hold the experts that tokens use: `UsedExperts`


class ChunkedRun:
    """A model and what it reads, in chunks of a profile's folder; `run` measures missing ones."""

    moe: MoeModel
    engine: Engine
    info: schema.MeasuredInfo
    waits: bool

    def work(self) -> dict[str, Work]:
        """Chunks by file name."""
        raise NotImplementedError

    def run(self, folder: Path, on_pass: OnPass = ignore) -> Iterator[Progress]:
        """Measures the missing chunks, yields after each; `on_pass` precedes each forward pass."""
        work = self.work()
        tally = Tally(work)
        longest_first = sorted(work, key=lambda name: -work[name].cost)
        with SharedFolder(folder, self.info, self.moe.group).opened() as shared:
            tally.was_there = {name for name in work if shared.is_done(name)}
            if self.moe.layers is not None:
                with shared.taking(longest_first) as mine:
                    yield from self._run_layers(shared, tally, mine, on_pass)
            for name, is_to_measure in shared.deal(longest_first, is_waiting=self.waits):
                if name in tally.done:
                    continue
                if not is_to_measure:
                    yield tally.note_done(name)
                elif self.moe.layers is not None:  # another process gave it up
                    yield from self._run_layers(shared, tally, [name], on_pass)
                else:
                    arrays, tally.tokens_by_mine[name] = self.measure(work[name], on_pass)
                    shared.write(name, arrays)
                    trim()  # else a long run keeps more and more
            if len(tally.done) == len(work):
                shared.finish(time.monotonic() - tally.started, tally.mine, tally.others)

    def _run_layers(
        self, shared: SharedFolder, tally: Tally, names: Sequence[str], on_pass: OnPass
    ) -> Iterator[Progress]:
        """Measures chunks layer by layer."""
        tokens: dict[str, int] = {}

        def measure(name: str) -> Arrays:
            self.moe = self.engine.moe  # its blocks were probed again
            arrays, tokens[name] = self.measure(tally.work[name], on_pass)
            return arrays

        folder = self.moe.hidden_states and self.moe.hidden_states / self.info.short_hash
        of = {**shared.hashes, PROBE: self.info.short_hash}
        for name, arrays in run_layers(self.engine, names, measure, HiddenStates(folder, of)):
            shared.write(name, {k: a for k, a in arrays.items() if not k.startswith(ROUTES)})
            tally.tokens_by_mine[name] = tokens[name]
            yield tally.note_done(name)

    def measure(self, work: Work, on_pass: OnPass) -> tuple[Arrays, int]:
        """The arrays of a chunk, and the number of tokens that were run."""
        raise NotImplementedError


class PassRecorder(Protocol):
    """What records the passes of a chunk."""

    def begin(self, step: Pass) -> None:
        """Called before each pass."""

    def undo(self, step: Pass) -> None:
        """Called after a pass that ran out of memory."""


class UsedExperts(ExpertCounts):
    """Experts that the tokens of a chunk use, with their arrays on disk."""

    def begin(self, step: Pass) -> None:
        """Called before each pass."""
        self.before = [tensor.clone() for tensor in self._added()], self.prefix_tokens
        super().begin(step)

    def undo(self, _step: Pass) -> None:
        """Called after a pass that ran out of memory."""
        before, self.prefix_tokens = self.before
        for tensor, was in zip(self._added(), before, strict=True):
            tensor.copy_(was)

    def _added(self) -> list[Tensor]:
        return [self.used_NL, self.tokens_N, self.prefix_used_L]

    def arrays(self) -> Arrays:
        """By question and layer, and of the shared prefix, which runs once."""
        counts = {
            "used_NL": self.used_NL,
            "tokens_N": self.tokens_N,
            "prefix_used_L": self.prefix_used_L,
            "prefix_tokens": torch.tensor([self.prefix_tokens]),
        }
        return {name: tensor.numpy().astype(np.uint32) for name, tensor in counts.items()}


class PassCounter:
    """Counts the tokens of a chunk's passes, and those that ran out of memory."""

    def __init__(self, what: str, on_pass: OnPass, *recorders: PassRecorder) -> None:
        self.what, self.on_pass, self.recorders = what, on_pass, recorders
        self.n_tokens = self.n_halved = 0

    def begin(self, step: Pass) -> None:
        """Called before each pass."""
        self.n_tokens += step.n_tokens
        self.on_pass(step)
        for recorder in self.recorders:
            recorder.begin(step)

    def undo(self, step: Pass) -> None:
        """Called after a pass that ran out of memory."""
        self.n_tokens -= step.n_tokens
        self.n_halved += 1
        for recorder in self.recorders:
            recorder.undo(step)
        logger.warning(
            "%s: a pass of %d tokens ran out of memory and comes again in halves: the bytes of "
            "this chunk may differ from those of another run",
            *(self.what, step.n_tokens),
        )


class Measurement(ChunkedRun):
    """One quiz and one model with fixed settings."""

    info: schema.ProfileInfo

    def __init__(self, moe: MoeModel, quiz: Quiz, limit: int | None, options: MeasureOptions):
        self.moe = moe
        self.quiz = quiz
        self.engine = Engine(moe, options.batch_tokens or DEFAULT_BATCH_TOKENS)
        self.engine.check_lengths(quiz)
        self._check_once(options.stats or "all")
        self.waits, self.counts_experts = options.waits, options.counts_experts
        if self.counts_experts:  # of all tokens, so the last block must run on all
            self.engine.last_layer = None
        self.is_one_set = False
        if options.stats in (None, "all"):
            with suppress(QuizError):  # `prune` refuses such a split
                self.is_one_set = is_one_set(quiz)
        self.info = schema.ProfileInfo(
            model=model_info(moe),
            quiz=schema.quiz_info(quiz, limit),
            settings=engine_settings(self.engine, options.stats or "all", quiz.truncate),
        )

    def _check_once(self, stats: schema.Stats) -> None:
        """Checks the engine, unless an earlier run found all the same right with these prompts."""
        moe, quiz = self.moe, self.quiz
        settings = engine_settings(self.engine, stats, quiz.truncate)
        few = [self.engine.encode(quiz, *questions) for questions in _checked(quiz)]
        versions = (__version__, transformers.__version__, platform.node(), str(moe.device))
        what = "checked" if moe.layers is None else "checked on stand-ins"
        key = (what, moe.source.fingerprint, settings, versions, few)
        # The fingerprint does not cover code that comes with a checkpoint.
        is_ours = moe.source.contract is None and "auto_map" not in read_config(moe.source.path)
        if is_ours and decided(moe, partial(recall, key)):
            return
        for encoded in few:
            self.engine.check(encoded)
        # Where the check changed the engine it warns, each time.
        if settings == engine_settings(self.engine, stats, quiz.truncate):
            remember(key, "agrees")

    def work(self) -> dict[str, Work]:
        """Chunks of questions by file name."""
        return chunks_of_work(self.info, self.quiz)

    def measure(self, work: Work, on_pass: OnPass) -> tuple[Arrays, int]:
        """The arrays of a chunk of questions, and the number of tokens that were run."""
        questions: Any = work.questions
        stats = self.info.settings.stats
        encoded = self.engine.encode(self.quiz, work.subject, questions)
        of_calibration = [not is_held_out(q) for q in questions] if self.is_one_set else None
        recorder = Recorder(self.moe.blocks, len(questions), stats, of_calibration)
        used = [UsedExperts(self.moe.blocks, len(questions))] if self.counts_experts else []
        counter = PassCounter(work.subject, on_pass, recorder, *used)
        observer = PassObserver(counter.begin, counter.undo, recorder.on_rows, stats == "all")
        with hooks.registered([recorder.listening(), *(own.listening() for own in used)]):
            logprob_NC = self.engine.score(encoded, watch=observer)
        arrays = recorder.arrays()
        for own in used:
            arrays |= own.arrays()
        check_finite(self.moe, work.subject, arrays)
        if counter.n_halved:
            arrays[HALVED] = np.array([counter.n_halved], dtype=np.uint16)
        if encoded.n_cut:
            arrays[CUT] = np.array(encoded.cut_N, dtype=np.int32)
        arrays["choice_logprob_NC"] = logprob_NC.numpy()
        arrays["answer_N"] = np.array([q.answer for q in questions], dtype=np.uint8)
        arrays["row_N"] = np.array([q.row for q in questions], dtype=np.int32)
        if any(q.order for q in questions):  # the original numbers of shuffled choices
            most = max(len(q.choices) for q in questions)
            orders = [[*q.order, *[schema.NO_CHOICE] * (most - len(q.order))] for q in questions]
            arrays["order_NC"] = np.array(orders, dtype=np.uint8)
        return arrays, counter.n_tokens


def decided(moe: MoeModel, work: Callable[[], T]) -> T:
    """What the work gives; of processes that hold one model, in the leader."""
    return work() if moe.group is None else moe.group.lead(work)


def is_writer(moe: MoeModel) -> bool:
    """Whether this process writes files; of processes that hold one model, the leader does."""
    return moe.group is None or moe.group.is_leader


def _checked(quiz: Quiz) -> Iterator[tuple[str, Sequence[Question]]]:
    """Questions to compare scoring modes on: four, and two of the longest prompts."""
    first = next(iter(quiz.questions))
    yield first, quiz.questions[first][:CHECKED_QUESTIONS]
    sizes = {
        subject: len(prompt(max(questions, key=n_chars), quiz.shots_by_subject[subject]))
        for subject, questions in quiz.questions.items()
    }
    longest = max(sizes, key=lambda subject: sizes[subject])
    if sizes[longest] > 2 * sizes[first]:  # some attention differs only for longer prompts
        by_size = sorted(quiz.questions[longest], key=n_chars)
        yield longest, [by_size[-1], *by_size[:-1][:1]]


def measure(
    source: Source, quiz: Quiz, limit: int | None, load_as: LoadOptions, options: MeasureOptions
) -> Measurement:
    """Loads the model and fixes the settings."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return Measurement(load(source, load_as), quiz, limit, options)


def resumed(
    folder: Path,
    load_as: LoadOptions,
    options: MeasureOptions,
    kind: type[schema.MeasuredInfo] = schema.ProfileInfo,
) -> tuple[LoadOptions, MeasureOptions]:
    """The options, with recorded values of an earlier run in the folder for those not given."""
    if not kind.file_in(folder).is_file():
        return load_as, options
    recorded = kind.load_from(folder).settings
    dtype = recorded.dtype if load_as.dtype == "auto" else load_as.dtype
    device_map = load_as.device_map or recorded.device_map
    is_left_open = load_as.device == "auto" and device_map is None
    device = recorded.device_type if is_left_open else load_as.device
    return (
        replace(load_as, dtype=dtype, device=device, device_map=device_map),
        replace(
            options,
            stats=options.stats or recorded.stats,
            batch_tokens=options.batch_tokens or recorded.batch_tokens,
            threads=options.threads or recorded.threads,
        ),
    )


def quiz_name(quiz: schema.QuizInfo) -> str:
    """The name of a quiz in that of a folder."""
    return Path(quiz.id).resolve().name.removesuffix(".jsonl").removesuffix(".csv")


def default_folder(info: schema.ProfileInfo, source: Source) -> Path:
    """`profiles/<model>-<quiz>-<split>-<shots>shot-<8 hex of the settings>`."""
    quiz, name = info.quiz, quiz_name(info.quiz)
    settings_hash = info.called(source.id).short_hash  # with the id as typed
    return Path("profiles", f"{source.name}-{name}-{quiz.split}-{quiz.shots}shot-{settings_hash}")


def model_info(moe: MoeModel) -> schema.ModelInfo:
    """The model's entry in a profile."""
    blocks = tuple(
        schema.BlockInfo(
            name=b.name,
            experts=b.n_experts,
            top_k=b.top_k,
            scoring=b.scoring,
            inflates=b.inflates,
            groups=b.n_groups,
            top_groups=b.top_groups,
            selection_bias=b.selection_bias() is not None,
            selection=None if b.selection == "score" else b.selection,
            places=b.most,
            declared=_declared_info(b),
        )
        for b in moe.blocks
    )
    source = moe.source
    contract = None
    if (own := source.contract) is not None:
        contract = schema.ContractInfo(path=str(own.path), sha256=own.sha256)
    model_id = absolute_id(source.id, source.revision)
    return schema.ModelInfo(
        id=model_id,
        revision=source.revision,
        fingerprint=source.fingerprint,
        blocks=blocks,
        contract=contract,
    )


def _declared_info(block: MoeBlock) -> schema.DeclaredInfo | None:
    if block.declared is None:
        return None
    own = block.declared.source
    return schema.DeclaredInfo(
        calls=own.calls,
        has_state=block.has_state,
        is_ranked=block.is_ranked,
        constants=dict(own.constants),
        names=own.names,
    )


def engine_settings(
    engine: Engine, stats: schema.Stats, truncate: Truncate | None
) -> schema.Settings:
    """Everything that the bytes of a chunk depend on, besides model and questions."""
    moe, on_cpu = engine.moe, engine.moe.device.type == "cpu"
    devices = set((getattr(moe.model, "hf_device_map", None) or {}).values())
    # Offloading to memory or disk changes no bytes on one CPU.
    is_spread = len(devices) > 1 and not on_cpu
    config = moe.model.config
    return schema.Settings(
        dtype=str(moe.dtype).removeprefix("torch."),
        device_type=moe.device.type,
        threads=torch.get_num_threads(),
        batch_tokens=engine.batch_tokens,
        stats=stats,
        way="shared" if engine.is_trusted else "single",
        experts_implementation=str(config._experts_implementation),
        attention="split" if engine.attention == "split" else str(config._attn_implementation),
        torch=torch.__version__,
        cpu_capability=torch.backends.cpu.get_cpu_capability() if on_cpu else None,
        device_map="auto" if is_spread else None,
        truncate=truncate,
        parallel=None if moe.group is None else moe.group.name,
    )


def perturb(
    measurement: Measurement,
    kind: Kind,
    folder: Path,
    load_as: LoadOptions,
    on_pass: OnPass = ignore,
) -> Iterator[Progress]:
    """Measures the missing chunks of a perturbation of the profile in `folder`."""
    settings, limit = measurement.info.settings, measurement.info.quiz.limit
    moe, quiz = measurement.moe, measurement.quiz
    options = MeasureOptions("answer", settings.batch_tokens, settings.threads, measurement.waits)
    if kind == "shuffle-choices":
        other = Measurement(moe, shuffle_choices(quiz), limit, options)
    else:
        other = measure(moe.source, quiz, limit, replace(load_as, dtype="bfloat16"), options)
    yield from other.run(folder / PERTURBED / kind, on_pass)
