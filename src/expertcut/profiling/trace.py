"""A routing trace: the experts that every token was routed to, in the order of the tokens."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from expertcut.documents import Record
from expertcut.errors import ProfileError
from expertcut.profiling import schema
from expertcut.profiling.schema import MeasuredInfo, ProfileInfo, Settings, TextProfileInfo
from expertcut.profiling.storage import DOCUMENT, Arrays, MeasuredFolder
from expertcut.stats import Array

TRACE_FILE = "trace.json"
SHARED = -1  # in sequence_T: the tokens that all sequences of the chunk begin with
KEPT = ("weights_TLK", "logits_TLE")  # only if they were asked for
MAX_LOGIT_TOKENS = 1 << 16


@dataclass(frozen=True)
class Sequence:
    """One prompt or document, token by token.

    `experts_TLK` are ids, −1 where a place is empty; `token_T` token ids. The first `n_shared`
    tokens are the shots, which all sequences of its subject begin with. Gate weights and router
    logits are there if they were traced; K and E are those of the largest block.
    """

    experts_TLK: Array
    token_T: Array
    n_shared: int = 0
    weights_TLK: Array | None = None
    logits_TLE: Array | None = None

    def __len__(self) -> int:
        return len(self.token_T)


class TracedSettings(Settings):
    """Everything else that the bytes of a chunk depend on; a trace keeps no statistics."""

    stats: Literal["none"] = Field("none", exclude=True)
    weights: bool
    logits: bool


class TraceInfos(MeasuredInfo):
    """What every `trace.json` has; `n_tokens` are those in its chunks: shots may count once."""

    noun: ClassVar = "trace"

    @classmethod
    def kinds(cls) -> tuple[type[MeasuredInfo], ...]:
        """Of a quiz, of texts, or of given routes."""
        return QuizTraceInfo, TextTraceInfo, RoutesTraceInfo


class TracedQuiz(schema.QuizInfo):
    """The questions of a trace; `tokens` is the bound that they were taken up to."""

    tokens: int = Field(ge=1)


class QuizTraceInfo(TraceInfos, ProfileInfo):
    """`trace.json` of a quiz."""

    quiz: TracedQuiz
    settings: TracedSettings
    n_tokens: int = Field(ge=1)
    chunk_questions: int = Field(ge=1, le=schema.CHUNK_QUESTIONS)

    @property
    def questions_of_chunk(self) -> int:
        """The most questions of a chunk."""
        return self.chunk_questions


class TextTraceInfo(TraceInfos, TextProfileInfo):
    """`trace.json` of texts."""

    settings: TracedSettings
    n_tokens: int = Field(ge=1)


class RoutesInfo(Record):
    """Routes that a serving engine returned; `chunks` are the sequences of each chunk."""

    id: str
    chunks: tuple[int, ...] = Field(min_length=1)
    content_hash: str


class RoutesSettings(Record):
    """What is kept of given routes: the experts alone."""

    weights: Literal[False] = False
    logits: Literal[False] = False


class RoutesTraceInfo(TraceInfos):
    """`trace.json` of given routes."""

    reads: ClassVar = "routes"
    routes: RoutesInfo
    settings: RoutesSettings
    n_tokens: int = Field(ge=1)

    @property
    def quiz(self) -> RoutesInfo:
        """What was read in place of a quiz."""
        return self.routes

    @property
    def text(self) -> None:
        """The texts; there are none."""
        return

    @property
    def content(self) -> str:
        """How much of what it reads, with a hash."""
        return f"{self.n_tokens} tokens of {self.routes.id} ({self.routes.content_hash[:8]})"

    def chunk_hash(self, chunk: str, subject: str) -> str:
        """The hash in a chunk: all that its bytes depend on, and no path."""
        lines = (chunk, self.routes.content_hash, self.model.identity, str(self.routes.chunks))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def chunks(self) -> Iterator[tuple[str, str, int]]:
        """(file name, source, number of sequences) of every chunk, in order."""
        for k, n in enumerate(self.routes.chunks):
            yield f"routes-{k}.safetensors", "routes", n


TraceInfo = QuizTraceInfo | TextTraceInfo | RoutesTraceInfo
Blocks = tuple[schema.BlockInfo, ...]


def id_type(blocks: Blocks) -> type[np.unsignedinteger[Any]]:
    """The smallest type of expert ids; its largest value marks an empty place, if there are any."""
    n_ids = max(block.experts for block in blocks) + has_empty_places(blocks)
    return np.uint8 if n_ids <= 1 << 8 else np.uint16


def has_empty_places(blocks: Blocks) -> bool:
    """Whether a routing rule leaves places empty, or blocks differ in their number."""
    return any(b.places is not None for b in blocks) or len({b.n_places for b in blocks}) > 1


class Trace(MeasuredFolder):
    """A trace folder; chunks are read and validated one at a time."""

    info: TraceInfo

    @property
    def n_experts_L(self) -> Array:
        """Experts of each block."""
        return np.array([block.experts for block in self.info.model.blocks])

    @property
    def block_names(self) -> tuple[str, ...]:
        """The name of each block."""
        return tuple(block.name for block in self.info.model.blocks)

    @property
    def n_sequences(self) -> int:
        """Questions, or rows of texts."""
        return sum(n for _, _, n in self.info.chunks())

    @property
    def size_bytes(self) -> int:
        """Bytes of its chunks on disk."""
        return sum(file.stat().st_size for file in (self.path / "chunks").glob("*.safetensors"))

    def sequences(self) -> Iterator[Sequence]:
        """Every question with its shots, or every row of texts; one chunk is in memory at a time.

        Raises ProfileError: a chunk is missing or damaged.
        """
        for sequence, _ in self._numbered():
            yield sequence

    @cached_property
    def _halves(self) -> tuple[list[Sequence], list[Sequence]]:
        halves: tuple[list[Sequence], list[Sequence]] = ([], [])
        for sequence, number in self._numbered():
            halves[number % 2].append(sequence)
        return halves

    def halves(self) -> tuple[list[Sequence], list[Sequence]]:
        """Every other question, or the sequences of every other document."""
        return self._halves

    def _numbered(self) -> Iterator[tuple[Sequence, int]]:
        """Every sequence with the number of its question or document."""
        n_before = n_tokens = 0
        for arrays in self.read_chunks():
            n_tokens += len(arrays["token_T"])
            found = _sequences(arrays, self.info.model.blocks)
            numbers = arrays.get(DOCUMENT, np.arange(n_before, n_before + len(found)))
            n_before += len(found)
            yield from zip(found, numbers.tolist(), strict=True)
        if n_tokens != self.info.n_tokens:
            raise ProfileError(
                f"{self.path} has {n_tokens:,} tokens, and its {TRACE_FILE} says "
                f"{self.info.n_tokens:,}: trace again into another --out"
            )

    def _faults(self, arrays: Arrays, n: int) -> Iterator[str]:
        return arrays_faults(arrays, self.info, n)


def load_trace(path: Path) -> Trace:
    """Loads a trace, its chunks later; ProfileError without a valid trace.json."""
    return Trace(path, TraceInfos.load_from(path))


def _sequences(arrays: Arrays, blocks: Blocks) -> list[Sequence]:
    """The whole sequences of a chunk."""
    parts = {name: arrays[name] for name in ("experts_TLK", "token_T", *KEPT) if name in arrays}
    parts["experts_TLK"] = experts_TLK = parts["experts_TLK"].astype(np.int16)
    if has_empty_places(blocks):
        experts_TLK[arrays["experts_TLK"] == np.iinfo(id_type(blocks)).max] = -1
    sequence_T = arrays["sequence_T"]
    starts = np.searchsorted(sequence_T, np.arange(int(sequence_T[-1]) + 2)).tolist()
    shots = {name: part[: starts[0]] for name, part in parts.items()}
    whole = [
        {name: np.concatenate([shots[name], part[a:b]]) for name, part in parts.items()}
        for a, b in pairwise(starts)
    ]
    n_shared = 0 if DOCUMENT in arrays else _n_shared([own["token_T"] for own in whole])
    return [Sequence(**own, n_shared=n_shared) for own in whole]


def _n_shared(prompts: list[Array]) -> int:
    """Tokens that all prompts begin with, before the last token of the shortest; 0 of one."""
    most = min(map(len, prompts)) - 1 if len(prompts) > 1 else 0
    first_T = prompts[0][:most]
    is_other_T = np.any([prompt[:most] != first_T for prompt in prompts], axis=0)
    return int(is_other_T.argmax()) if is_other_T.any() else most


def arrays_faults(arrays: Arrays, info: TraceInfo, n: int) -> Iterator[str]:
    """The errors in the arrays of a chunk of n sequences; read one only if there is none before."""
    blocks, settings = info.model.blocks, info.settings
    n_tokens, n_places = arrays.get("token_T", np.zeros(0)).size, schema.most_places(blocks)
    shape_TLK = (n_tokens, len(blocks), n_places)
    of_sequences = "row_N" if isinstance(info, QuizTraceInfo) else DOCUMENT
    needed = {"token_T": (n_tokens,), "sequence_T": (n_tokens,), "experts_TLK": shape_TLK}
    types: dict[str, Any] = {"experts_TLK": id_type(blocks)}
    types |= dict.fromkeys(("token_T", "sequence_T", of_sequences), np.int32)
    needed[of_sequences] = (n,)
    if settings.weights:
        needed["weights_TLK"] = shape_TLK
    if settings.logits:
        needed["logits_TLE"] = (n_tokens, len(blocks), max(block.experts for block in blocks))
    for name, shape in needed.items():
        if name not in arrays:
            yield f"it has no {name}"
        elif arrays[name].shape != shape:
            yield f"{name} has shape {list(arrays[name].shape)}, not {list(shape)}"
        elif arrays[name].dtype != types.get(name, np.float16):
            yield f"{name} has type {arrays[name].dtype}"
    step_T = np.diff(arrays["sequence_T"], prepend=SHARED)
    if (
        not n_tokens
        or (step_T < 0).any()
        or (step_T > 1).any()
        or arrays["sequence_T"][-1] != n - 1
    ):
        yield f"sequence_T does not number {n} sequences"
    if (arrays["token_T"] < 0).any() or (arrays[of_sequences] < 0).any():
        yield f"token_T or {of_sequences} has a negative number"
    yield from _wrong_experts(arrays["experts_TLK"], blocks)
    for name in KEPT:
        if name in arrays and not np.isfinite(arrays[name]).all():
            yield f"{name} holds a value that is not finite"


def _wrong_experts(experts_TLK: Array, blocks: Blocks) -> Iterator[str]:
    empty = np.iinfo(experts_TLK.dtype).max
    for layer, block in enumerate(blocks):
        own_TK = experts_TLK[:, layer, : block.n_places]
        is_wrong_TK = own_TK >= block.experts
        if block.places is not None:  # which leaves places empty
            is_wrong_TK &= own_TK != empty
        if is_wrong_TK.any() or (experts_TLK[:, layer, block.n_places :] != empty).any():
            yield f"experts_TLK names experts that are not in {block.name}"
