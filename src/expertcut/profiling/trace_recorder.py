"""Records a trace: the choices of every token of a chunk, and the chunks of a quiz or of texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertcut.data import Question, Quiz, prompt
from expertcut.data.corpus import CHUNK_TOKENS, Corpus, Row
from expertcut.data.questions import replace_questions
from expertcut.models import hooks
from expertcut.models.hooks import Scope
from expertcut.models.load import MoeModel, Source
from expertcut.models.moe_block import MoeBlock
from expertcut.models.validate import token_ids
from expertcut.profiling import schema
from expertcut.profiling.measure import (
    HALVED,
    Measurement,
    MeasureOptions,
    PassCounter,
    quiz_name,
)
from expertcut.profiling.measure_text import TextMeasurement, text_info
from expertcut.profiling.recorder import check_finite
from expertcut.profiling.storage import DOCUMENT, Arrays
from expertcut.profiling.trace import (
    KEPT,
    SHARED,
    Blocks,
    QuizTraceInfo,
    TextTraceInfo,
    TracedQuiz,
    TracedSettings,
    TraceInfo,
    has_empty_places,
    id_type,
)
from expertcut.profiling.workers import Work
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import Encoded, Pass, encode_rows
from expertcut.scoring.passes import OnPass, PassObserver

DEFAULT_TOKENS = 64_000
_CHUNK_BYTES = 1 << 29  # half of what a chunk may have


@dataclass(frozen=True)
class TraceOptions:
    """What a trace keeps besides the chosen experts, and the tokens that it ends at."""

    weights: bool = False
    logits: bool = False
    tokens: int = DEFAULT_TOKENS


class TraceRecorder:
    """The routing of a chunk, token by token: first its shared prefix, then prompt after prompt."""

    def __init__(
        self, blocks: Sequence[MoeBlock], encoded: Encoded, n_prefix: int, options: TraceOptions
    ) -> None:
        self.blocks = blocks
        tails = [ids[n_prefix:] for ids in encoded.prompts]
        ids = [*encoded.prompts[0][:n_prefix], *(token for tail in tails for token in tail)]
        counts = [n_prefix, *map(len, tails)]
        self.token_T = np.array(ids, dtype=np.int32)
        numbers = np.arange(SHARED, len(tails), dtype=np.int32)
        self.sequence_T = np.repeat(numbers, counts)
        self.ends = np.cumsum(counts).tolist()
        n_places, n_experts = max(b.n_places for b in blocks), max(b.n_experts for b in blocks)
        self.experts_TLK = torch.full((len(ids), len(blocks), n_places), -1, dtype=torch.int16)
        self.weights_TLK = self.logits_TLE = None
        if options.weights:
            self.weights_TLK = torch.zeros(self.experts_TLK.shape, dtype=torch.float16)
        if options.logits:
            shape = (len(ids), len(blocks), n_experts)
            self.logits_TLE = torch.zeros(shape, dtype=torch.float16)

    def listening(self) -> Scope:
        """Hooks the routers."""
        return hooks.observe_routers(self.blocks, self._route)

    def begin(self, step: Pass) -> None:
        """Called before each forward pass."""
        own = [torch.arange(self.ends[q], self.ends[q + 1]) for q in step.questions]
        self.at_M = torch.cat(own or [torch.arange(self.ends[0])])  # no question: the prefix
        self.valid_T = step.valid_T

    def undo(self, _step: Pass) -> None:
        """Called after a pass that ran out of memory; what comes again is written over."""

    def _route(self, routing: hooks.Routing) -> None:
        block = self.blocks[routing.layer]
        experts_TK = routing.experts_TK.cpu()
        experts_TK = experts_TK.masked_fill(experts_TK >= block.n_experts, -1)  # nobody
        self._keep(self.experts_TLK, routing.layer, experts_TK)
        if self.weights_TLK is not None:
            self._keep(self.weights_TLK, routing.layer, routing.weights_TK.cpu())
        if self.logits_TLE is not None:
            self._keep(self.logits_TLE, routing.layer, routing.logits_TE.cpu())

    def _keep(self, kept_TLX: Tensor, layer: int, found_TX: Tensor) -> None:
        own_MX = found_TX if self.valid_T is None else found_TX[self.valid_T]
        kept_TLX[self.at_M, layer, : own_MX.shape[1]] = own_MX.to(kept_TLX.dtype)

    def arrays(self, blocks: tuple[schema.BlockInfo, ...]) -> Arrays:
        """The arrays of the chunk by their names on disk."""
        experts_TLK, kind = self.experts_TLK.numpy().astype(np.int32), id_type(blocks)
        if has_empty_places(blocks):
            experts_TLK = np.where(experts_TLK < 0, np.iinfo(kind).max, experts_TLK)
        arrays = {"experts_TLK": experts_TLK.astype(kind), "token_T": self.token_T}
        arrays["sequence_T"] = self.sequence_T
        for name in KEPT:
            if (kept := getattr(self, name)) is not None:
                arrays[name] = kept.numpy()
        return arrays


class QuizTracing(Measurement):
    """A trace of one quiz: in turn of each subject, as many questions as its tokens allow."""

    info: QuizTraceInfo

    def __init__(
        self,
        moe: MoeModel,
        quiz: Quiz,
        limit: int | None,
        options: MeasureOptions,
        kept: TraceOptions,
    ) -> None:
        quiz, longest = _taken(moe, quiz, kept.tokens)
        super().__init__(moe, quiz, limit, replace(options, stats="none"))
        self.kept, self.engine.last_layer = kept, None  # all tokens count, in the last block too
        blocks = self.info.model.blocks
        of_chunk = _CHUNK_BYTES // (longest * _token_bytes(blocks, kept))
        info = QuizTraceInfo(
            model=self.info.model,
            quiz=TracedQuiz(**dict(self.info.quiz), tokens=kept.tokens),
            settings=_settings(self.info.settings, kept),
            n_tokens=1,
            chunk_questions=min(max(of_chunk, 1), schema.CHUNK_QUESTIONS),
        )
        self.info = info
        chunks = [self._encoded(work) for work in self.work().values()]
        n_tokens = sum(
            sum(map(len, own.prompts)) - (len(own) - 1) * _n_prefix(self.engine, own)
            for own in chunks
        )
        self.info = info.model_copy(update={"n_tokens": n_tokens})

    def _encoded(self, work: Work) -> Encoded:
        questions: Any = work.questions
        return self.engine.encode(self.quiz, work.subject, questions)

    def measure(self, work: Work, on_pass: OnPass) -> tuple[Arrays, int]:
        """The arrays of a chunk of questions, and the number of tokens that were run."""
        encoded = self._encoded(work)
        recorder = TraceRecorder(
            self.moe.blocks, encoded, _n_prefix(self.engine, encoded), self.kept
        )
        counter = PassCounter(work.subject, on_pass, recorder)
        with recorder.listening():
            self.engine.score(encoded, watch=PassObserver(counter.begin, counter.undo))
        arrays = _finished(self.moe, self.info, recorder, counter)
        rows = [q.row for q in work.questions if isinstance(q, Question)]
        return arrays | {"row_N": np.array(rows, dtype=np.int32)}, counter.n_tokens


class TextTracing(TextMeasurement):
    """A trace of texts, row by row."""

    info: TextTraceInfo

    def __init__(
        self, moe: MoeModel, corpus: Corpus, options: MeasureOptions, kept: TraceOptions
    ) -> None:
        super().__init__(moe, corpus, replace(options, stats="none"), has_loss=False)
        self.kept, blocks = kept, self.info.model.blocks
        of_chunk = _CHUNK_BYTES // _token_bytes(blocks, kept)
        self.chunk_tokens = min(max(of_chunk, 1), CHUNK_TOKENS)
        self.info = TextTraceInfo(
            model=self.info.model,
            text=text_info(corpus, self.rows, self.chunk_tokens, has_loss=False),
            settings=_settings(self.info.settings, kept),
            n_tokens=sum(len(row.ids) for own in self.rows.values() for row in own),
        )

    def measure(self, work: Work, on_pass: OnPass) -> tuple[Arrays, int]:
        """The arrays of a chunk of rows, and the number of tokens that were run."""
        own = [row for row in work.questions if isinstance(row, Row)]
        rows = encode_rows(own)
        recorder = TraceRecorder(self.moe.blocks, rows, 0, self.kept)
        counter = PassCounter(work.subject, on_pass, recorder)
        with recorder.listening(), torch.inference_mode():
            for _ in self.engine.hidden_states(rows, PassObserver(counter.begin, counter.undo)):
                pass
        arrays = _finished(self.moe, self.info, recorder, counter)
        return arrays | {DOCUMENT: self.document_numbers(work.subject, own)}, counter.n_tokens


def _finished(
    moe: MoeModel, info: TraceInfo, recorder: TraceRecorder, counter: PassCounter
) -> Arrays:
    arrays = recorder.arrays(info.model.blocks)
    check_finite(moe, counter.what, arrays)
    if counter.n_halved:
        arrays[HALVED] = np.array([counter.n_halved], dtype=np.uint16)
    return arrays


def _taken(moe: MoeModel, quiz: Quiz, most: int) -> tuple[Quiz, int]:
    """The first question of every subject, then the second, …, up to so many tokens.

    One at least; tokens that a prompt begins with as the one before it count once. Also the length
    of the longest prompt.
    """
    taken: list[Question] = []
    before: dict[str, tuple[int, ...]] = {}
    n_tokens = longest = 0
    for turn in zip_longest(*quiz.questions.values()):
        for question in filter(None, turn):
            subject = question.subject
            text = prompt(question, quiz.shots_by_subject[subject])
            ids = tuple(token_ids(moe.tokenizer, [text])[0])
            pair = Encoded((before.get(subject, ids[:1]), ids), ())
            n_tokens += len(ids) - (pair.shared_prefix() if subject in before else 0)
            if taken and n_tokens > most:
                return replace_questions(quiz, taken), longest
            taken.append(question)
            before[subject], longest = ids, max(longest, len(ids))
    return quiz, longest


def _n_prefix(engine: Engine, encoded: Encoded) -> int:
    """Tokens of a chunk that run once for all of its prompts."""
    return encoded.shared_prefix() if engine.mode(encoded) == "packed" else 0


def _token_bytes(blocks: Blocks, kept: TraceOptions) -> int:
    n_places, n_experts = schema.most_places(blocks), max(b.experts for b in blocks)
    of_block = (
        n_places * (id_type(blocks)().nbytes + 2 * kept.weights) + 2 * n_experts * kept.logits
    )
    return len(blocks) * of_block + 8


def _settings(settings: schema.Settings, kept: TraceOptions) -> TracedSettings:
    values = {**dict(settings), "stats": "none"}
    return TracedSettings(**values, weights=kept.weights, logits=kept.logits)


def default_folder(info: TraceInfo, source: Source) -> Path:
    """`traces/<model>-<quiz or sources>-<8 hex of the settings>`."""
    if isinstance(info, QuizTraceInfo):
        what = quiz_name(info.quiz)
    elif isinstance(info, TextTraceInfo):
        what = "+".join(info.text.sources)[:80]
    else:
        what = Path(info.routes.id).stem[:80]
    return Path("traces", f"{source.name}-{what}-{info.called(source.id).short_hash}")
