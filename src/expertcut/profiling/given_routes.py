"""Routes that a serving engine returned, as a trace or a profile: `routed_experts` in an .npz file.

vLLM and SGLang return them. A profile of routes counts the tokens of each expert, and its sequences
are documents like those of texts, so that a fifth can be held out and judged.
"""

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from expertcut.data.corpus import CHUNK_TOKENS, Corpus, Document, TextSelection, TextSource
from expertcut.data.texts import Text
from expertcut.errors import ProfileError, SettingsError
from expertcut.models.load import MoeModel
from expertcut.profiling.measure import (
    DEFAULT_BATCH_TOKENS,
    ChunkedRun,
    MeasureOptions,
    engine_settings,
    model_info,
)
from expertcut.profiling.measure_text import text_info
from expertcut.profiling.schema import MeasuredInfo, TextProfileInfo, layer_numbers
from expertcut.profiling.storage import DOCUMENT, IN_CALIBRATION, Arrays, TextProfile
from expertcut.profiling.trace import RoutesInfo, RoutesSettings, RoutesTraceInfo, id_type
from expertcut.profiling.workers import Work
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import cut_packs
from expertcut.scoring.passes import OnPass
from expertcut.stats import Array

EXPERTS, TOKENS, SEQUENCES = "routed_experts", "token_ids", "sequence_ids"
_MAX_BYTES = 1 << 33


@dataclass(frozen=True)
class GivenRoutes:
    """Expert ids (T, L, K), token ids and the number of each token's sequence, from 0.

    L are the MoE layers or, as vLLM counts, all decoder layers.
    """

    file: Path
    experts_TLK: Array
    token_T: Array
    sequence_T: Array

    @property
    def starts(self) -> list[int]:
        """Where each sequence starts, and the end of the last."""
        n_sequences = int(self.sequence_T[-1]) + 1
        starts: list[int] = np.searchsorted(self.sequence_T, np.arange(n_sequences + 1)).tolist()
        return starts

    @property
    def content_hash(self) -> str:
        """SHA-256 over ids, tokens and sequences."""
        digest = hashlib.sha256(str(self.experts_TLK.shape).encode())
        for array in (self.experts_TLK, self.token_T, self.sequence_T):
            digest.update(np.ascontiguousarray(array, dtype=np.int32).tobytes())
        return digest.hexdigest()


def read_routes(file: Path) -> GivenRoutes:
    """Reads an untrusted .npz file; SettingsError if it holds no routes."""
    try:
        with zipfile.ZipFile(file) as parts:
            if sum(part.file_size for part in parts.infolist()) > _MAX_BYTES:
                raise SettingsError(f"--routes {file}: it holds more than {_MAX_BYTES >> 30} GiB")
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in (EXPERTS, TOKENS, SEQUENCES) if name in arrays}
    except OSError as error:
        raise SettingsError(f"--routes {file} cannot be read: {error.strerror or error}") from None
    except (ValueError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise SettingsError(f"--routes {file} is not an .npz file of numbers: {error}") from None
    if fault := next(_faults(found), ""):
        raise SettingsError(f"--routes {file}: {fault}")
    token_T = found[TOKENS].astype(np.int32)
    sequence_T = np.zeros(len(token_T), np.int32)
    if SEQUENCES in found:
        sequence_T[1:] = (np.diff(found[SEQUENCES]) != 0).cumsum()
    return GivenRoutes(file, found[EXPERTS], token_T, sequence_T)


def _faults(found: Arrays) -> Iterator[str]:
    """The errors of the arrays; read one only if there is none before."""
    for name, n_axes in ((EXPERTS, 3), (TOKENS, 1), (SEQUENCES, 1)):
        if name not in found:
            if name != SEQUENCES:
                yield f"it has no {name}: save {EXPERTS} (tokens, layers, K) and {TOKENS} (tokens,)"
        elif found[name].ndim != n_axes or not np.issubdtype(found[name].dtype, np.integer):
            has = f"shape {list(found[name].shape)} and type {found[name].dtype}"
            yield f"{name} has {has}, must be whole numbers with {n_axes} axes"
    n_tokens = len(found[EXPERTS])
    for name in (TOKENS, SEQUENCES):
        if name in found and len(found[name]) != n_tokens:
            yield (
                f"{len(found[name]):,} {name} for {n_tokens:,} tokens of {EXPERTS}: give one for "
                "each (the last token of an output was never routed: leave it out)"
            )
    if not found[EXPERTS].size:
        yield "it has no token"
    if found[TOKENS].min() < 0 or found[TOKENS].max() >= 1 << 31:
        yield f"{TOKENS} has a number that is not a token id"


class RoutesRun(ChunkedRun):
    """Given routes of a model, whose blocks say what they must look like, in chunks."""

    info: MeasuredInfo

    def __init__(self, moe: MoeModel, routes: GivenRoutes, *, waits: bool) -> None:
        self.moe, self.routes, self.waits = moe, routes, waits
        self.experts_TLK = _of_blocks(routes, moe)
        self.starts = routes.starts
        lengths = [end - start for start, end in pairwise(self.starts)]
        self.chunks = list(cut_packs(lengths, CHUNK_TOKENS))

    def work(self) -> dict[str, Work]:
        """Chunks of sequences by file name."""
        parts = zip(self.info.chunks(), self.chunks, strict=True)
        return {
            name: Work(source, own, self.starts[own[-1] + 1] - self.starts[own[0]])
            for (name, source, _), own in parts
        }


class RoutesTracing(RoutesRun):
    """A trace of given routes."""

    info: RoutesTraceInfo

    def __init__(self, moe: MoeModel, routes: GivenRoutes, *, waits: bool) -> None:
        super().__init__(moe, routes, waits=waits)
        self.info = RoutesTraceInfo(
            model=model_info(moe),
            routes=RoutesInfo(
                id=str(routes.file.resolve()),
                chunks=tuple(map(len, self.chunks)),
                content_hash=routes.content_hash,
            ),
            settings=RoutesSettings(),
            n_tokens=len(routes.token_T),
        )

    def measure(self, work: Work, on_pass: OnPass) -> tuple[Arrays, int]:
        """The arrays of a chunk of sequences; none was run."""
        numbers = np.array(work.questions, dtype=np.int32)
        at = slice(self.starts[numbers[0]], self.starts[numbers[-1] + 1])
        arrays = {
            "experts_TLK": self.experts_TLK[at],
            "token_T": self.routes.token_T[at],
            "sequence_T": self.routes.sequence_T[at] - numbers[0],
            DOCUMENT: numbers,
        }
        return arrays, 0


class RoutesProfiling(RoutesRun):
    """A profile of given routes: how many tokens chose each expert, and nothing else."""

    info: TextProfileInfo

    def __init__(self, moe: MoeModel, routes: GivenRoutes, options: MeasureOptions) -> None:
        super().__init__(moe, routes, waits=options.waits)
        n_embeddings = len(moe.model.get_input_embeddings().weight)
        if (largest := int(routes.token_T.max())) >= n_embeddings:
            raise SettingsError(
                f"--routes {routes.file}: token {largest}, and {moe.source.id} has embeddings for "
                f"{n_embeddings}: give the routes of this model"
            )
        self.corpus = _corpus(routes, moe.tokenizer)
        text = text_info(self.corpus, self.corpus.rows, CHUNK_TOKENS, has_loss=False)
        ((name, source),) = text.sources.items()
        known = {"content_hash": routes.content_hash, "chunks": tuple(map(len, self.chunks))}
        engine = Engine(moe, options.batch_tokens or DEFAULT_BATCH_TOKENS)
        self.info = TextProfileInfo(
            model=model_info(moe),
            text=text.model_copy(update={"sources": {name: source.model_copy(update=known)}}),
            settings=engine_settings(engine, "routes", None),
        )

    def measure(self, work: Work, on_pass: OnPass) -> tuple[Arrays, int]:
        """The arrays of a chunk of sequences; none was run."""
        numbers, starts = np.array(work.questions, dtype=np.int32), np.array(self.starts)
        at = slice(starts[numbers[0]], starts[numbers[-1] + 1])
        (source,) = self.corpus.sources
        chooses_N = np.array([not source.documents[n].is_held_out for n in numbers])
        tokens_N = np.diff(starts)[numbers]
        experts_TLK = self.experts_TLK[at]
        chosen_TLK = experts_TLK[np.repeat(chooses_N, tokens_N)]
        arrays: Arrays = {
            "tokens_N": tokens_N.astype(np.int64),
            DOCUMENT: numbers,
            IN_CALIBRATION: chooses_N.astype(np.uint8),
            "tokens_LE": self._counts(experts_TLK),
            "calibration_tokens_LE": self._counts(chosen_TLK),
        }
        return arrays, 0

    def _counts(self, experts_TLK: Array) -> Array:
        most = max(block.n_experts for block in self.moe.blocks)
        by_layer = np.moveaxis(experts_TLK, 1, 0).reshape(experts_TLK.shape[1], -1)
        return np.array([np.bincount(ids, minlength=most) for ids in by_layer], np.float64)


def _corpus(routes: GivenRoutes, tokenizer: Any) -> Corpus:
    """The sequences as documents, each one row."""
    documents = []
    for number, (begin, end) in enumerate(pairwise(routes.starts)):
        ids_T = routes.token_T[begin:end]
        said = tokenizer.decode(ids_T.tolist())
        text = Text(said, said, f"{routes.file}: sequence {number}")
        n_bytes = len(said.encode())
        documents.append(Document(text.where, said, ids_T, None, n_bytes, text.overlap_hash))
    spec, most = str(routes.file.resolve()), max(map(len, documents))
    source = TextSource(routes.file.stem, spec, None, 1.0, tuple(documents))
    return Corpus(TextSelection((spec,), max(most, 2)), (source,))


def routes_corpus(profile: TextProfile, tokenizer: Any) -> Corpus:
    """The sequences of a profile of routes, read again; ProfileError if they changed."""
    (source,) = profile.info.text.sources.values()
    try:
        routes = read_routes(Path(source.spec))
    except SettingsError as error:
        raise ProfileError(f"what {profile.path} was made on: {error}") from None
    if routes.content_hash != source.content_hash:
        raise ProfileError(
            f"{source.spec} no longer holds the routes that {profile.path} was made on: put them "
            "back, or profile again"
        )
    return _corpus(routes, tokenizer)


def _of_blocks(routes: GivenRoutes, moe: MoeModel) -> Array:
    """The ids (T, L, K) of the model's MoE blocks; SettingsError where they cannot be its own."""
    experts_TLK, blocks = routes.experts_TLK, moe.blocks
    _, n_layers, top_k = experts_TLK.shape
    where, of = f"--routes {routes.file}", f"{moe.source.id} has"
    if n_layers != len(blocks):
        n_decoders = moe.model.config.get_text_config(decoder=True).num_hidden_layers
        layers = layer_numbers([block.name for block in blocks])
        if n_layers != n_decoders or layers is None:
            raise SettingsError(
                f"{where}: {n_layers} layers, and {of} {len(blocks)} MoE blocks in {n_decoders} "
                "layers: give the routes of this model"
            )
        experts_TLK = experts_TLK[:, layers]
    for layer, block in enumerate(blocks):
        if top_k != block.n_places:
            raise SettingsError(
                f"{where}: {top_k} experts a token, and {of} {block.n_places} in {block.name}: "
                "give the routes of this model"
            )
        low, high = experts_TLK[:, layer].min(), experts_TLK[:, layer].max()
        if low < 0 or high >= block.n_experts:
            wrong = low if low < 0 else high
            raise SettingsError(
                f"{where}: expert {wrong} in layer {layer}, and {of} {block.n_experts} experts in "
                f"{block.name}: give the routes of this model"
            )
    return experts_TLK.astype(id_type(model_info(moe).blocks))
