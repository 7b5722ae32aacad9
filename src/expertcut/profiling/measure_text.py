"""Profiling on texts: rows through a model, chunk by chunk, into a resumable folder."""

import platform
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import transformers

from expertcut import __version__
from expertcut.data.corpus import CHUNK_TOKENS, Corpus, Row, chunk_rows, rows_hash
from expertcut.errors import TextError
from expertcut.files import recall, remember
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import MoeModel, Source
from expertcut.profiling import schema
from expertcut.profiling.measure import (
    DEFAULT_BATCH_TOKENS,
    HALVED,
    ChunkedRun,
    MeasureOptions,
    PassCounter,
    decided,
    engine_settings,
    model_info,
)
from expertcut.profiling.recorder import check_finite
from expertcut.profiling.storage import DOCUMENT, Arrays
from expertcut.profiling.text_recorder import TextRecorder
from expertcut.profiling.workers import Work
from expertcut.scoring.engine import CHECKED_QUESTIONS, Engine
from expertcut.scoring.next_tokens import losses, predict
from expertcut.scoring.packing import EncodedRows, encode_rows
from expertcut.scoring.passes import OnPass, PassObserver
from expertcut.stats import Array

_CHECKED_TOKENS = 512  # of each row that the packing check reads


class TextMeasurement(ChunkedRun):
    """One corpus and one model with fixed settings; `rows` are by source."""

    info: schema.TextProfileInfo

    def __init__(
        self,
        moe: MoeModel,
        corpus: Corpus,
        options: MeasureOptions,
        *,
        has_loss: bool = True,
        rows: Mapping[str, Sequence[Row]] | None = None,
        judged: schema.JudgedInfo | None = None,
    ) -> None:
        self.moe, self.corpus, self.waits = moe, corpus, options.waits
        self.engine = Engine(moe, options.batch_tokens or DEFAULT_BATCH_TOKENS)
        self.rows = corpus.rows if rows is None else rows
        most, context = max(len(r.ids) for own in self.rows.values() for r in own), None
        if not self.engine.grows:
            context = self.engine.context
        if context is not None and most > context:
            raise TextError(
                f"rows of {most:,} tokens do not fit into the context of {moe.source.id}: give "
                f"--max-tokens {context}, which is its length"
            )
        self._check_once()
        self.chunk_tokens = CHUNK_TOKENS if judged is None else judged.chunk_tokens
        self.info = schema.TextProfileInfo(
            model=model_info(moe),
            text=text_info(corpus, self.rows, self.chunk_tokens, has_loss=has_loss, judged=judged),
            settings=engine_settings(self.engine, options.stats or "all", None),
        )

    def _check_once(self) -> None:
        """Checks the engine, unless an earlier run found all the same right with these rows."""
        engine, moe = self.engine, self.moe
        rows = [row for own in self.rows.values() for row in own]
        rows = [row for row in rows if len(row.ids) > 1] or rows  # one token has no next one
        few = encode_rows([_checked(row) for row in rows[:CHECKED_QUESTIONS]])
        settings = engine_settings(engine, "all", None)
        versions = (__version__, transformers.__version__, platform.node(), str(moe.device))
        what = "checked text" if moe.layers is None else "checked text on stand-ins"
        key = (what, moe.source.fingerprint, settings, versions, few.prompts)
        # The fingerprint does not cover code that comes with a checkpoint.
        if "auto_map" not in read_config(moe.source.path) and decided(moe, partial(recall, key)):
            return
        engine.check(few, partial(losses, engine))
        if settings == engine_settings(engine, "all", None):
            remember(key, "agrees")

    @cached_property
    def _document_numbers(self) -> dict[str, dict[int, int]]:
        """The place of each document in its source, by its identity."""
        return {
            name: {d: n for n, d in enumerate(dict.fromkeys(id(row.document) for row in rows))}
            for name, rows in self.rows.items()
        }

    def document_numbers(self, source: str, rows: Sequence[Row]) -> Array:
        """The place in its source of the document of each row."""
        numbers = self._document_numbers[source]
        return np.array([numbers[id(row.document)] for row in rows], dtype=np.int32)

    def work(self) -> dict[str, Work]:
        """Chunks of rows by file name."""
        most = self.chunk_tokens
        chunks = {name: iter(chunk_rows(rows, most)) for name, rows in self.rows.items()}
        work = {}
        for file, source, _ in self.info.chunks():
            rows = next(chunks[source])
            work[file] = Work(source, rows, sum(len(row.ids) for row in rows))
        return work

    def measure(self, work: Work, on_pass: OnPass) -> tuple[Arrays, int]:
        """The arrays of a chunk of rows, and the number of tokens that were run."""
        own = [row for row in work.questions if isinstance(row, Row)]
        rows, stats = encode_rows(own), self.info.settings.stats
        chooses = [not row.document.is_held_out for row in own]
        has_loss = self.info.text.has_loss
        recorder = TextRecorder(self.moe.blocks, rows, chooses, stats, has_loss=has_loss)
        recorder.layerwise = self.engine.layer
        counter = PassCounter(work.subject, on_pass, recorder)
        observer = PassObserver(counter.begin, counter.undo)
        with recorder.listening(), torch.inference_mode():
            self.read(rows, observer, recorder)
        arrays = recorder.arrays()
        arrays[DOCUMENT] = self.document_numbers(work.subject, own)
        check_finite(self.moe, work.subject, arrays)
        if counter.n_halved:
            arrays[HALVED] = np.array([counter.n_halved], dtype=np.uint16)
        return arrays, counter.n_tokens

    def read(self, rows: EncodedRows, observer: PassObserver, recorder: TextRecorder) -> None:
        """Runs the model over the rows."""
        if not self.info.text.has_loss:
            for _ in self.engine.hidden_states(rows, observer):
                pass
            return
        for _, found in predict(self.engine, rows, observer):
            recorder.add(found)


def _checked(row: Row) -> Row:
    """The beginning of a row with all of its next tokens, also those that do not count."""
    ids = row.ids[:_CHECKED_TOKENS]
    return Row(row.document, ids, np.append(ids[1:], -1).astype(np.int32), np.ones(len(ids), bool))


def text_info(
    corpus: Corpus,
    rows: Mapping[str, Sequence[Row]],
    chunk_tokens: int,
    *,
    has_loss: bool,
    judged: schema.JudgedInfo | None = None,
) -> schema.TextInfo:
    """The entry of the texts in a profile."""
    selection = corpus.selection
    sources = {
        source.name: schema.TextSourceInfo(
            spec=source.spec,
            revision=source.revision,
            weight=source.weight,
            documents=len(source.documents),
            tokens=source.n_tokens,
            chunks=tuple(map(len, chunk_rows(rows[source.name], chunk_tokens))),
            content_hash=rows_hash(rows[source.name]),
        )
        for source in corpus.sources
    }
    return schema.TextInfo(
        sources=sources,
        max_tokens=selection.max_tokens,
        tokens=selection.tokens,
        seed=selection.seed,
        assistant_only=selection.assistant_only,
        has_loss=has_loss,
        judged=judged,
    )


def default_folder(info: schema.TextProfileInfo, source: Source) -> Path:
    """`profiles/<model>-<sources>-<8 hex of the settings>`."""
    names = "+".join(info.text.sources)[:80]
    return Path("profiles", f"{source.name}-{names}-{info.called(source.id).short_hash}")
