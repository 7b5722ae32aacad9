"""The stage behind `eval --text`: losses on held-out texts, and divergence from the base.

D are documents, N rows of a chunk, M scored positions, K the likeliest tokens that are kept.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertcut.data import ngrams
from expertcut.data.corpus import (
    Corpus,
    Row,
    TextSelection,
    by_document,
    load_corpus,
    rows_to_judge,
)
from expertcut.data.questions import hashes_in
from expertcut.edits.plan import lineage, load_hashes
from expertcut.errors import SettingsError, TextError
from expertcut.evaluation.results import (
    JudgedSource,
    JudgedTexts,
    Part,
    TextComparison,
    TextResult,
    profile_hash,
)
from expertcut.models.hooks import registered
from expertcut.models.load import LoadOptions, MoeModel, Source, load
from expertcut.profiling.measure import HALVED, MeasureOptions, PassCounter, UsedExperts
from expertcut.profiling.measure_text import TextMeasurement
from expertcut.profiling.schema import JudgedInfo, TextProfileInfo
from expertcut.profiling.storage import Arrays, read_chunk
from expertcut.profiling.workers import Work
from expertcut.scoring.engine import context_length
from expertcut.scoring.next_tokens import ROW_SUMS, Predictions, RowSums, predict
from expertcut.scoring.packing import encode_rows
from expertcut.scoring.passes import OnPass, PassObserver
from expertcut.stats import Array, document_ci95

logger = logging.getLogger(__name__)

MAX_DROPPED_SHARE = 0.05
_NAMED = 3  # dropped documents in a message
_CHUNK_BYTES = 8 << 20  # of the base's predictions
_MOST_CHUNK_TOKENS = 1 << 14


@dataclass(frozen=True)
class TextScoring:
    """The texts, how many of the base's likeliest tokens are kept, and how models are run."""

    selection: TextSelection
    top_k: int
    load_as: LoadOptions
    options: MeasureOptions


@dataclass(frozen=True)
class BaseRun:
    """The finished chunks of the base, with what it predicts."""

    folder: Path
    info: TextProfileInfo

    def chunk(self, file: str, source: str) -> Arrays:
        """The arrays of a chunk."""
        return read_chunk(self.folder / "chunks" / file, self.info.chunk_hash(file, source))


def judged_info(
    prefix: int | None, top: int, widest: int, base: BaseRun | None = None
) -> JudgedInfo:
    """How rows become chunks: as many tokens in one as predictions of `widest` tokens allow."""
    return JudgedInfo(
        prefix=prefix,
        top=top,
        chunk_tokens=min(_MOST_CHUNK_TOKENS, max(1, _CHUNK_BYTES // (8 * max(widest, 1)))),
        base=None if base is None else profile_hash(base.info.called("base")),
    )


class TextJudgement(TextMeasurement):
    """One model on the rows of all documents; with a `base` also beside its predictions."""

    def __init__(
        self,
        moe: MoeModel,
        corpus: Corpus,
        options: MeasureOptions,
        rows: Mapping[str, Sequence[Row]],
        judged: JudgedInfo,
        base: BaseRun | None = None,
    ) -> None:
        options = replace(options, stats="none")
        super().__init__(moe, corpus, options, rows=rows, judged=judged)
        self.top, self.base = judged.top, base
        self.counts_experts = options.counts_experts

    @property
    def n_rows(self) -> int:
        """Rows of all sources."""
        return sum(map(len, self.rows.values()))

    def work(self) -> dict[str, Work]:
        """Chunks of rows by file name, which tells `measure` the base's chunk."""
        work = super().work()
        self.files = {id(own): name for name, own in work.items()}
        return work

    def measure(self, work: Work, on_pass: OnPass) -> tuple[Arrays, int]:
        """Sums by row, and the base's predictions or what differs from them."""
        rows = encode_rows([row for row in work.questions if isinstance(row, Row)])
        recorder, base_of = RowSums(rows, self.top), None
        if self.base is not None:
            base_of = Predictions(self.base.chunk(self.files[id(work)], work.subject))
        used = [UsedExperts(self.moe.blocks, len(rows))] if self.counts_experts else []
        counter = PassCounter(work.subject, on_pass, recorder, *used)
        observer = PassObserver(counter.begin, counter.undo)
        with registered(own.listening() for own in used):
            for _, found in predict(self.engine, rows, observer, n_top=self.top, base_of=base_of):
                recorder.add(found)
        arrays = recorder.arrays()
        for own in used:
            arrays |= own.arrays()
        arrays["tokens_N"] = np.array([len(ids) for ids in rows.prompts])
        if counter.n_halved:
            arrays[HALVED] = np.array([counter.n_halved], dtype=np.uint16)
        return arrays, counter.n_tokens


@dataclass(frozen=True)
class Reading:
    """The documents as one tokenizer reads them, and the rows in which each is scored once."""

    corpus: Corpus
    rows: Mapping[str, Sequence[Row]]
    prefix: int | None
    key: object  # of the tokenizer and the length of the rows

    @property
    def digest(self) -> str:
        """SHA-256 over what the model reads and predicts."""
        digest = hashlib.sha256()
        for row in (row for rows in self.rows.values() for row in rows):
            digest.update(row.ids.tobytes() + row.next_T.tobytes())
        return digest.hexdigest()


@dataclass
class _Judged:
    """Sums by document (D,) of one model, by source and name, and its documents' contents."""

    source: Source
    sums: dict[str, dict[str, Array]]
    contents: dict[str, list[str]]
    is_compared: bool = False


def document_sums(
    run: BaseRun, corpus: Corpus, rows: Mapping[str, Sequence[Row]]
) -> dict[str, dict[str, Array]]:
    """Sums by document (D,) of a run whose chunks are all there, by source and name."""
    parts: dict[str, list[Arrays]] = {}
    for file, name_of_source, _ in run.info.chunks():
        chunk = run.chunk(file, name_of_source)
        kept = {name: chunk[name] for name in ROW_SUMS if name in chunk}
        parts.setdefault(name_of_source, []).append(kept)
    joined = {
        source: {name: np.concatenate([part[name] for part in own]) for name in own[0]}
        for source, own in parts.items()
    }
    return by_document(corpus, rows, joined)


@dataclass
class TextEvaluation:
    """Judges models one after the other on the same texts; the first is the base."""

    sources: Sequence[Source]
    scoring: TextScoring
    folder: Path
    reading: Reading | None = None  # of the newest model
    judged: list[_Judged] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)  # by source
    base: BaseRun | None = None
    base_reading: tuple[Corpus, str, int] | None = None  # of the base, its digest, its vocabulary

    def prepare(self, source: Source) -> tuple[TextJudgement, Path]:
        """Loads a model; what is to be measured, and the folder of its chunks."""
        if self.scoring.options.threads is not None:
            torch.set_num_threads(self.scoring.options.threads)
        moe = load(source, self.scoring.load_as)
        reading = self._read(moe)
        n_logits = int(moe.model.config.get_text_config().vocab_size)
        base, top = None, 0
        if self.base_reading is None:
            self.base_reading = reading.corpus, reading.digest, n_logits
            top = min(self.scoring.top_k, n_logits) if len(self.sources) > 1 else 0
        elif self.base_reading[1:] == (reading.digest, n_logits):
            base = self.base
        else:
            logger.warning(
                "%s reads other tokens than %s: bits per byte compares them, KL, agreement and "
                "acceptance do not",
                *(source.name, self.sources[0].name),
            )
        widest = self.scoring.top_k if len(self.sources) > 1 else 0
        judged = judged_info(reading.prefix, top, widest, base)
        measurement = TextJudgement(
            moe, reading.corpus, self.scoring.options, reading.rows, judged, base
        )
        info = measurement.info
        store = self.folder / f"{source.name}-text-{info.called(source.id).short_hash}"
        if self.base is None:
            self.base = BaseRun(store, info)
        return measurement, store

    def note(self, measurement: TextJudgement, store: Path) -> None:
        """Keeps the sums of a model whose chunks are all there."""
        corpus = measurement.corpus
        sums = document_sums(BaseRun(store, measurement.info), corpus, measurement.rows)
        contents = {s.name: [d.content_hash for d in s.documents] for s in corpus.sources}
        is_compared = measurement.base is not None
        self.judged.append(_Judged(measurement.moe.source, sums, contents, is_compared))

    def part(self) -> Part:
        """The results of all models."""
        assert self.base_reading is not None, "there is a base"
        corpus, _, vocabulary = self.base_reading
        base = self.judged[0]
        top_k = min(self.scoring.top_k, vocabulary) if len(self.sources) > 1 else None
        asked = judged_texts(corpus, top_k, vocabulary, self.dropped)
        models = [
            {name: text_result(sums) for name, sums in one.sums.items()} for one in self.judged
        ]
        comparisons = [
            {
                name: text_comparison(
                    base.sums[name],
                    sums,
                    is_same_rows=other.is_compared,
                    has_pairs=other.contents[name] == base.contents[name],
                )
                for name, sums in other.sums.items()
            }
            for other in self.judged[1:]
        ]
        return Part("text", models, comparisons, asked)

    def _read(self, moe: MoeModel) -> Reading:
        """The texts in this model's tokens, without those that had a part in any model's edit."""
        tokenizer, selection = moe.tokenizer, self.scoring.selection
        context = context_length(moe.model.config, tokenizer) or selection.max_tokens
        selection = replace(selection, max_tokens=min(selection.max_tokens, context))
        key = (_tokenizer_key(tokenizer), selection.max_tokens)
        if self.reading is not None and self.reading.key == key:
            return self.reading
        if self.reading is not None and selection.tokens is not None:
            raise SettingsError(
                f"--tokens {selection.tokens:,} counts tokens of one tokenizer, and "
                f"{moe.source.name} reads others than {self.sources[0].name}: leave it out"
            )
        known = [KnownTexts(source.name, *known_texts(source)) for source in self.sources]
        corpus, dropped = without_known(load_corpus(selection, tokenizer), known)
        self.dropped = dropped or self.dropped
        rows, prefix = rows_to_judge(corpus, tokenizer)
        self.reading = Reading(corpus, rows, prefix, key)
        return self.reading


def judged_texts(
    corpus: Corpus, top_k: int | None, vocabulary: int, dropped: Mapping[str, int]
) -> JudgedTexts:
    """The entry of the texts in results."""
    selection = corpus.selection
    return JudgedTexts(
        sources={
            source.name: JudgedSource(
                spec=source.spec if source.revision else Path(source.spec).name,
                revision=source.revision,
                documents=len(source.documents),
                dropped=dropped.get(source.name, 0),
                content_hash=_hash([d.content_hash for d in source.documents]),
            )
            for source in corpus.sources
        },
        max_tokens=selection.max_tokens,
        tokens=selection.tokens,
        seed=selection.seed,
        assistant_only=selection.assistant_only,
        top_k=top_k,
        vocabulary=vocabulary,
    )


@dataclass(frozen=True)
class KnownTexts:
    """What the texts of an edit are known by: hashes and runs of words; `name` is who read them."""

    name: str
    hashes: frozenset[str]
    runs: ngrams.NGrams


def without_known(corpus: Corpus, known: Sequence[KnownTexts]) -> tuple[Corpus, dict[str, int]]:
    """Drops documents that had a part in an edit, with their number by source.

    Raises TextError: more than 5 % of the documents had.
    """
    documents, gone = list(corpus), set[int]()
    for one in known:
        if not one.hashes and not len(one.runs):
            continue
        found = ngrams.overlapping(documents, one.hashes, one.runs)
        gone |= set(found)
        if found:
            places = ", ".join(documents[at].where for at in found[:_NAMED])
            text = f"{len(found):,} of {len(documents):,} documents, or most of their text, "
            text += f"had a part in {one.name}: {places}" + ", …" * (len(found) > _NAMED)
            if len(found) > MAX_DROPPED_SHARE * len(documents):
                raise TextError(f"{text}: at most 5 % may: judge on others")
            logger.warning("%s: left out", text)
    if not gone:
        return corpus, {}
    kept = corpus.only([at for at in range(len(documents)) if at not in gone])
    left = {source.name: len(source.documents) for source in kept.sources}
    return kept, {s.name: len(s.documents) - left.get(s.name, 0) for s in corpus.sources}


def known_texts(source: Source) -> tuple[frozenset[str], ngrams.NGrams]:
    """Hashes and runs of words of all that a checkpoint or one it was made from was edited on."""
    folder, hashes, runs = source.path, frozenset[str](), ngrams.NOTHING
    for plan, base in lineage(source.path):
        hashes |= hashes_in(load_hashes(folder, plan))
        runs |= ngrams.load(folder)
        folder = base or folder
    return hashes, runs


def _tokenizer_key(tokenizer: Any) -> object:
    """Equal for tokenizers that read every text alike; else no two are."""
    if not getattr(tokenizer, "is_fast", False):
        return object()
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, str(tokenizer.chat_template))
    text = json.dumps([tokenizer.backend_tokenizer.to_str(), special])
    return hashlib.sha256(text.encode()).hexdigest()


def text_result(sums: Mapping[str, Array]) -> TextResult:
    """Perplexity and bits per byte of sums by document."""
    loss_D, scored_D, bytes_D = sums["loss"], sums["scored"], sums["bytes"]
    ci95, bits_D = document_ci95(loss_D, scored_D), loss_D / math.log(2)
    return TextResult(
        perplexity=_exp(loss_D.sum() / scored_D.sum()),
        ci95=ci95 and (_exp(ci95[0]), _exp(ci95[1])),
        bits_per_byte=float(bits_D.sum() / bytes_D.sum()),
        bits_per_byte_ci95=document_ci95(bits_D, bytes_D),
        tokens=int(scored_D.sum()),
        documents=len(loss_D),
    )


def text_comparison(
    base: Mapping[str, Array], other: Mapping[str, Array], *, is_same_rows: bool, has_pairs: bool
) -> TextComparison:
    """Sums by document of two models, compared; null where they read other tokens or documents."""
    found = dict.fromkeys(TextComparison.model_fields)
    if is_same_rows:
        scored_D = base["scored"]
        changes = {"kl": "kl", "top1_agreement": "agrees", "acceptance": "accepted"}
        for name, of_sum in changes.items():
            found[name] = float(other[of_sum].sum() / scored_D.sum())
            found[f"{name}_ci95"] = document_ci95(other[of_sum], scored_D)
        lost_D = other["loss"] - base["loss"]
        found["delta_loss"] = float(lost_D.sum() / scored_D.sum())
        found["ci95"] = document_ci95(lost_D, scored_D)
    if has_pairs:
        # Each model's own bytes: a chat template is part of what is read.
        own, first = (one["loss"].sum() / one["bytes"].sum() / math.log(2) for one in (other, base))
        found["delta_bits_per_byte"] = float(own - first)
        found["delta_bits_per_byte_ci95"] = _difference(base, other)
    return TextComparison(**found)


def _difference(
    base: Mapping[str, Array], other: Mapping[str, Array]
) -> tuple[float, float] | None:
    """The same of the difference in bits per byte, linearised where the bytes differ."""
    if (base["bytes"] == other["bytes"]).all():
        return document_ci95((other["loss"] - base["loss"]) / math.log(2), base["bytes"])
    ratios = [one["loss"].sum() / one["bytes"].sum() for one in (base, other)]
    shifts = [
        one["loss"] - ratio * one["bytes"] for one, ratio in zip((base, other), ratios, strict=True)
    ]
    scales = [one["bytes"].sum() for one in (base, other)]
    change_D = (shifts[1] / scales[1] - shifts[0] / scales[0]) * len(base["bytes"])
    ends = document_ci95(change_D, np.ones(len(change_D)))
    delta = ratios[1] - ratios[0]
    return ends and ((delta + ends[0]) / math.log(2), (delta + ends[1]) / math.log(2))


def _exp(nats: float) -> float:
    return float(math.exp(min(nats, 709.0)))  # JSON holds no infinity


def _hash(contents: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()
