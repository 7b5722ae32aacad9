"""A corpus: tokenized documents of weighted sources, cut into rows."""

import hashlib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from expertcut.data import questions
from expertcut.data.questions import Quiz
from expertcut.data.sources import HELD_OUT_SHARE, Weighted
from expertcut.data.texts import (
    Text,
    TextReader,
    content_hash,
    exists,
    find_blocks,
    hub_parts,
    hub_records,
    local_source,
    records_of,
)
from expertcut.errors import ProfileError, TextError
from expertcut.stats import Array

logger = logging.getLogger(__name__)

MAX_TOKENS = 2048
TEXT_SPLIT = "text"  # stands for a quiz's split
CHUNK_TOKENS = 1 << 16
_BATCH = 64  # documents tokenized at a time
_NAME_BYTES = 100  # of a source as part of a file's name
_ONE_IN = round(1 / HELD_OUT_SHARE)


@dataclass(frozen=True)
class Document:
    """One document: token ids (T,), and which tokens count, None for all of them.

    `said` is its text without a chat template; `n_bytes` are those of what its tokens spell.
    """

    where: str
    said: str
    ids: Array
    counts_T: Array | None
    n_bytes: int
    overlap_hash: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_counted(self) -> int:
        """Tokens that count."""
        return len(self) if self.counts_T is None else int(self.counts_T.sum())

    @property
    def content_hash(self) -> str:
        """16 hex digits over the text as it stands."""
        return content_hash(self.said)

    @property
    def hash_line(self) -> str:
        """Both hashes, as a line of `chosen_on.txt`."""
        return f"{self.content_hash} {self.overlap_hash}"

    @property
    def is_held_out(self) -> bool:
        """Whether it is in the fifth that is held out where nothing else can be."""
        return int(self.overlap_hash, 16) % _ONE_IN == 0


@dataclass(frozen=True)
class Row:
    """Tokens of one document that the model reads at once.

    `next_T` are the tokens to predict behind each, −1 where none is scored; `counts_T` are the
    tokens whose routing counts.
    """

    document: Document
    ids: Array
    next_T: Array
    counts_T: Array


@dataclass(frozen=True)
class TextSource:
    """The documents of one source, by the name that it has in a profile."""

    name: str
    spec: str
    revision: str | None
    weight: float
    documents: tuple[Document, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return sum(document.n_counted for document in self.documents)


@dataclass(frozen=True)
class TextSelection:
    """Which texts to read: specs (`NAME=W`), and how they become rows.

    `tokens` stops after that many, taken in a random order of `seed`; None reads all. Fewer are
    warned of unless `is_bound`. `revisions` pin data sets of the Hub by spec.
    """

    specs: tuple[str, ...]
    max_tokens: int = MAX_TOKENS
    tokens: int | None = None
    seed: int = 0
    assistant_only: bool = False
    revisions: Mapping[str, str | None] | None = None
    is_bound: bool = False


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents by source."""

    selection: TextSelection
    sources: tuple[TextSource, ...]

    def __len__(self) -> int:
        return sum(len(source.documents) for source in self.sources)

    def __iter__(self) -> Iterator[Document]:
        for source in self.sources:
            yield from source.documents

    @property
    def id(self) -> str:
        """The names of the sources."""
        return ", ".join(Path(source.spec).name for source in self.sources)

    @property
    def split(self) -> str:
        """`TEXT_SPLIT`."""
        return TEXT_SPLIT

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return sum(source.n_tokens for source in self.sources)

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """Rows to calibrate on, by source: consecutive pieces of at most `max_tokens`."""
        most = self.selection.max_tokens
        return {s.name: [r for d in s.documents for r in rows_of(d, most)] for s in self.sources}

    def only(self, documents: Collection[int]) -> "Corpus":
        """The corpus of the documents with these positions in it."""
        kept, begin, sources = set(documents), 0, []
        for source in self.sources:
            own = tuple(d for at, d in enumerate(source.documents, begin) if at in kept)
            begin += len(source.documents)
            sources += [replace(source, documents=own)] if own else []
        return Corpus(self.selection, tuple(sources))

    def part(self, *, is_held_out: bool) -> "Corpus":
        """The fifth by hash that is held out, or the others."""
        return self.only([i for i, d in enumerate(self) if d.is_held_out == is_held_out])

    def without(self, known: Collection[str]) -> "Corpus":
        """The corpus without documents one of whose hashes is known."""
        return self.only(
            [
                i
                for i, d in enumerate(self)
                if d.content_hash not in known and d.overlap_hash not in known
            ]
        )

    def first(self, n_rows: int) -> "Corpus":
        """Documents in turn of each source, as few as give this many rows or 65,536 tokens."""
        most, turns, begin = self.selection.max_tokens, [], 0
        for source in self.sources:
            turns.append(range(begin, begin + len(source.documents)))
            begin += len(source.documents)
        documents, kept, n, n_tokens = list(self), [], 0, 0
        for place in range(max(map(len, turns), default=0)):
            for own in (turn for turn in turns if place < len(turn)):
                if n < n_rows and n_tokens < CHUNK_TOKENS:
                    kept.append(own[place])
                    n += -(-len(documents[own[place]]) // most)
                    n_tokens += len(documents[own[place]])
        return self.only(kept)


CalibrationSet = Quiz | Corpus
"""What edits are chosen, fitted or judged on."""


def round_robin(data: CalibrationSet, n: int) -> CalibrationSet:
    """`n` questions in turn of each subject, or documents of `n` rows in turn of each source."""
    return data.first(n) if isinstance(data, Corpus) else questions.round_robin(data, n)


def without(data: CalibrationSet, lines: Iterable[str]) -> CalibrationSet:
    """The questions or documents none of whose hashes is given."""
    if isinstance(data, Corpus):
        return data.without(questions.hashes_in(lines))
    return questions.without(data, lines)


def as_quiz(data: CalibrationSet) -> Quiz:
    """The quiz; ProfileError for texts, which have no answers."""
    if isinstance(data, Quiz):
        return data
    raise ProfileError(f"{data.id} is text, which has no answers: profile a quiz for this")


def hash_lines(data: CalibrationSet) -> frozenset[str]:
    """Both hashes of every question or document, as lines of `chosen_on.txt`."""
    return frozenset(item.hash_line for item in data)


def rows_of(document: Document, max_tokens: int) -> Iterator[Row]:
    """A document as consecutive rows, without those of which no token counts.

    The last token of each has no next token.
    """
    counted_T = _counted(document)
    for begin in range(0, len(document), max_tokens):
        at = slice(begin, begin + max_tokens)
        ids, counts_T = document.ids[at], counted_T[at]
        if not counts_T.any():
            continue
        next_T = np.append(np.where(counts_T[1:], ids[1:], -1), -1).astype(np.int32)
        yield Row(document, ids, next_T, counts_T)


def judged_rows(document: Document, max_tokens: int, prefix: int | None) -> Iterator[Row]:
    """A document as rows that score each of its tokens once, as lm-evaluation-harness rolls.

    `prefix`, unless None, stands before the first token, which else is context alone. A further
    row begins with the token before it; the last one is filled up with earlier tokens as context.
    """
    ids, counts_T = document.ids, _counted(document)
    if prefix is not None:
        ids, counts_T = np.insert(ids, 0, prefix), np.insert(counts_T, 0, False)
    done = 1  # tokens before this one are scored, or context
    while done < len(ids):
        last = min(done + max_tokens, len(ids)) - 1
        begin = max(0, last - max_tokens)
        next_T = np.where(counts_T[begin + 1 : last + 1], ids[begin + 1 : last + 1], -1)
        next_T[: done - 1 - begin] = -1
        row = ids[begin:last]
        yield Row(document, row, next_T.astype(np.int32), np.ones(len(row), bool))
        done = last + 1


def _counted(document: Document) -> Array:
    is_whole = document.counts_T is None
    return np.ones(len(document), bool) if is_whole else np.asarray(document.counts_T)


def rows_to_judge(corpus: Corpus, tokenizer: Any) -> tuple[dict[str, list[Row]], int | None]:
    """Rows that score each token once, by source, and what stands before each document."""
    prefix, rows = prefix_token(tokenizer), {}
    for source in corpus.sources:
        own = [
            row
            for document in source.documents
            for row in judged_rows(
                document,
                corpus.selection.max_tokens,
                None if prefix is None or document.ids[0] == prefix else prefix,
            )
        ]
        if not any((row.next_T >= 0).any() for row in own):
            raise TextError(f"{source.spec} holds no token that another one precedes")
        rows[source.name] = own
    return rows, prefix


def by_document(
    corpus: Corpus, rows: Mapping[str, Sequence[Row]], sums: Mapping[str, Mapping[str, Array]]
) -> dict[str, dict[str, Array]]:
    """Sums by row (N,) as sums by document (D,), with the bytes of each, by source and name."""
    found = {}
    for source in corpus.sources:
        numbers = {id(document): at for at, document in enumerate(source.documents)}
        at_N = [numbers[id(row.document)] for row in rows[source.name]]
        found[source.name] = {
            name.removesuffix("_N"): np.bincount(at_N, sum_N, len(numbers))
            for name, sum_N in sums[source.name].items()
        }
        found[source.name]["bytes"] = np.array([float(d.n_bytes) for d in source.documents])
    return found


def prefix_token(tokenizer: Any) -> int | None:
    """What lm-evaluation-harness puts before the first token: BOS, else EOS; None without both."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return int(bos) if bos is not None else None if eos is None else int(eos)


def chunk_rows(rows: Sequence[Row], most: int = CHUNK_TOKENS) -> list[Sequence[Row]]:
    """Consecutive rows of at most so many tokens, or one longer row."""
    chunks: list[list[Row]] = []
    size = 0
    for row in rows:
        if not chunks or size + len(row.ids) > most:
            chunks.append([])
            size = 0
        chunks[-1].append(row)
        size += len(row.ids)
    return list(chunks)


def rows_hash(rows: Iterable[Row]) -> str:
    """SHA-256 over all that the bytes of chunks depend on: tokens, masks, documents, their part."""
    digest, document = hashlib.sha256(), None
    for row in rows:
        digest.update(b"goes on" if row.document is document else b"begins")
        document = row.document
        digest.update(np.ascontiguousarray(row.ids, np.int32).tobytes())
        digest.update(row.next_T.tobytes() + row.counts_T.tobytes())
        digest.update(b"held out" if row.document.is_held_out else b"chooses")
    return digest.hexdigest()


def load_corpus(selection: TextSelection, tokenizer: Any) -> Corpus:
    """Reads and tokenizes the selected texts.

    With `tokens`, or with weights, the source that lags its share most gives the next document;
    without `tokens` this ends where one source does. Raises TextError: nothing to read, or a fault
    in a file.
    """
    named = [Weighted(s) if exists(Path(s)) else Weighted.read(s) for s in selection.specs]
    readers = [_Reader(weighted, selection, tokenizer) for weighted in named]
    specs = [reader.spec for reader in readers]  # by the place of a file, however it was named
    if twice := [spec for spec in specs if specs.count(spec) > 1]:
        raise TextError(f"{twice[0]} is given twice: give it once, with a weight")
    taken = _take(readers, selection)
    names = _names([weighted.name for weighted in named])
    sources = []
    for name, reader, documents in zip(names, readers, taken, strict=True):
        if not documents:
            raise TextError(f"{reader.spec} holds no text that is not empty")
        if reader.n_empty:
            logger.warning("%s: %d empty documents are left out", reader.spec, reader.n_empty)
        sources.append(
            TextSource(name, reader.spec, reader.revision, reader.weight, tuple(documents))
        )
    return Corpus(selection, tuple(sources))


def _take(readers: Sequence["_Reader"], selection: TextSelection) -> list[list[Document]]:
    budget = selection.tokens
    has_weights = len({reader.weight for reader in readers}) > 1
    if budget is None and not has_weights:
        return [list(reader.documents) for reader in readers]
    taken: list[list[Document]] = [[] for _ in readers]
    sizes, left = [0] * len(readers), {*range(len(readers))}
    while left and (budget is None or sum(sizes) < budget):
        turn = min(left, key=lambda i: (sizes[i] / readers[i].weight, i))
        document = next(readers[turn].documents, None)
        if document is None:
            if budget is None:
                break
            left.remove(turn)
            continue
        if budget is not None:
            document = _first_tokens(readers[turn], document, budget - sum(sizes))
        taken[turn].append(document)
        sizes[turn] += document.n_counted
    if selection.is_bound and not left:
        return taken
    if budget is not None and sum(sizes) < budget:
        logger.warning(
            "the texts hold %s tokens, fewer than the %s of --tokens: all are used",
            *(f"{sum(sizes):,}", f"{budget:,}"),
        )
    elif len(left) < len(readers):
        done = ", ".join(r.spec for i, r in enumerate(readers) if i not in left)
        logger.warning("%s ended before its share of --tokens was reached", done)
    return taken


def _first_tokens(reader: "_Reader", document: Document, most: int) -> Document:
    """The document, cut behind this many tokens that count."""
    passed_T = _counted(document).cumsum() > most
    if not passed_T.any():
        return document
    at = slice(int(passed_T.argmax()))
    counts_T = None if document.counts_T is None else document.counts_T[at]
    n_bytes = reader.n_bytes(document.ids[at], counts_T)
    return replace(document, ids=document.ids[at], counts_T=counts_T, n_bytes=n_bytes)


class _Reader:
    """The documents of one source, tokenized as they are asked for."""

    def __init__(self, weighted: Weighted, selection: TextSelection, tokenizer: Any) -> None:
        self.spec, self.weight = weighted.name, weighted.weight
        self.tokenizer, self.assistant_only = tokenizer, selection.assistant_only
        self.n_empty, self.revision = 0, None
        seed = None if selection.tokens is None else selection.seed
        path, field = local_source(self.spec)
        records: Iterator[tuple[str, Any]]
        if path is not None:
            self.spec = str(path.resolve()) + (f":{field}" if field else "")
            records = records_of(find_blocks(path), seed)
        else:
            pinned = (selection.revisions or {}).get(self.spec)
            self.revision, records = hub_records(self.spec, pinned, seed)
            field = hub_parts(self.spec)[3]
        reader = TextReader(tokenizer, field, marks_assistant=self.assistant_only)
        self.texts = (reader.read(where, record) for where, record in records)
        self.documents = self._documents()

    def _documents(self) -> Iterator[Document]:
        while batch := list(islice(self.texts, _BATCH)):
            texts = [text for text in batch if text is not None]
            self.n_empty += len(batch) - len(texts)
            yield from filter(None, map(self._document, texts, token_ids(self.tokenizer, texts)))

    def _document(self, text: Text, ids: Sequence[int]) -> Document | None:
        counts_T = self._assistant(text, ids) if self.assistant_only else None
        if not len(ids) or (counts_T is not None and not counts_T.any()):
            self.n_empty += 1
            return None
        ids_T = np.array(ids, np.int32)
        n_bytes = len(text.read.encode()) if counts_T is None else self.n_bytes(ids_T, counts_T)
        return Document(text.where, text.said, ids_T, counts_T, n_bytes, text.overlap_hash)

    def n_bytes(self, ids_T: Array, counts_T: Array | None) -> int:
        """Bytes of the text of those tokens that count."""
        own = ids_T if counts_T is None else ids_T[counts_T]
        return len(self.tokenizer.decode(own.tolist()).encode())

    def _assistant(self, text: Text, ids: Sequence[int]) -> Array:
        if text.is_assistant is not None:
            return np.array(text.is_assistant, bool)
        found = self.tokenizer(text.read, return_offsets_mapping=True, verbose=False)
        begins = np.array([end for _, end in found["offset_mapping"]])
        assert len(begins) == len(ids) and text.completion is not None
        return np.asarray(begins > text.completion)


def token_ids(tokenizer: Any, texts: Sequence[Text]) -> list[Sequence[int]]:
    """Token ids of each text; special tokens are added to those without a chat template."""
    ids: dict[int, Sequence[int]] = {
        at: text.ids for at, text in enumerate(texts) if text.ids is not None
    }
    for is_chat in (False, True):
        own = [at for at, text in enumerate(texts) if text.is_chat == is_chat and at not in ids]
        if own:
            read = [texts[at].read for at in own]
            found = tokenizer(read, add_special_tokens=not is_chat, verbose=False)["input_ids"]
            ids |= dict(zip(own, found, strict=True))
    return [ids[at] for at in range(len(texts))]


def _names(specs: Sequence[str]) -> list[str]:
    """A name for each source: the last part of its path, numbered where two have one name."""
    names: list[str] = []
    for spec in specs:
        stem = Path(spec.partition(":")[0] or spec).name.partition(".")[0] or "text"
        while len(quote(stem)) > _NAME_BYTES:
            stem = stem[:-1]
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names
