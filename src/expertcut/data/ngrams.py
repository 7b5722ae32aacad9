"""Documents that were read before, known by their runs of 13 words.

As GPT-3's authors found test sets in their training data (arXiv:2005.14165, appendix C): words in
lower case without punctuation, whatever the tokenizer; runs that stand in more than 10 documents
are boilerplate (licences, system prompts) and known of none. A document is known by a third of its
runs, not by one: texts of one template share single runs by chance.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as tensor_bytes

from expertcut.data.questions import normalised
from expertcut.errors import PlanError
from expertcut.files import parse_json, write_atomically
from expertcut.stats import Array

if TYPE_CHECKING:
    from expertcut.data.corpus import Document

# In safetensors' format under another ending: engines load each *.safetensors as weights.
NGRAMS_FILE = "chosen_on.ngrams"
N_WORDS = 13
MAX_DOCUMENTS = 10
MIN_SHARE = 1 / 3
MAX_HASHES = 1 << 20
_MAX_BYTES = 8 * MAX_HASHES + (1 << 16)
_WORDS_KNOWN = 1 << 20  # word hashes in memory at once
_BATCH = 1 << 20  # hashes that are counted at once
# Chinese and Japanese write no spaces: there a character is a word.
_ALONE = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no word's bits are lost
_KEY = "expertcut"  # of the metadata: one key, several would be written in random order


@dataclass(frozen=True)
class NGrams:
    """Hashes (G,) uint64, ascending, of the runs of words of some documents.

    Beyond 2²⁰ runs only those whose hash is a multiple of `modulus`, a power of two.
    """

    hashes_G: Array
    modulus: int = 1

    def __len__(self) -> int:
        return len(self.hashes_G)

    def __or__(self, other: Self) -> "NGrams":
        """The runs of either."""
        return _sampled(np.union1d(self.hashes_G, other.hashes_G), max(self.modulus, other.modulus))

    def share_in(self, document: str) -> float:
        """Share of the document's runs that are among these; of those that sampling would keep."""
        own_G = _hashes(_words(document))
        own_G = own_G[own_G % np.uint64(self.modulus) == 0]
        if not len(self) or not len(own_G):
            return 0.0
        at_G = self.hashes_G.searchsorted(own_G).clip(max=len(self) - 1)
        return float((self.hashes_G[at_G] == own_G).mean())


NOTHING = NGrams(np.zeros(0, np.uint64))


def ngrams_of(documents: Iterable[str]) -> NGrams:
    """The runs of 13 words of documents that stand in at most 10 of them.

    A document of fewer words is one run. Repeated documents count once.
    """
    found_G, counts_G = NOTHING.hashes_G, np.zeros(0, np.int64)
    modulus = 1
    for hashes_G in _batches(documents):
        own_G = hashes_G[hashes_G % np.uint64(modulus) == 0]
        found_G, place_G = np.unique(np.concatenate([found_G, own_G]), return_inverse=True)
        ones_G = np.ones(len(own_G), np.int64)
        counts_G = np.bincount(place_G, np.concatenate([counts_G, ones_G])).astype(np.int64)
        while len(found_G) > MAX_HASHES:  # a function of the runs, not of their order
            modulus *= 2
            is_kept_G = found_G % np.uint64(modulus) == 0
            found_G, counts_G = found_G[is_kept_G], counts_G[is_kept_G]
    return NGrams(found_G[counts_G <= MAX_DOCUMENTS], modulus)


def overlapping(
    documents: Iterable["Document"], known_hashes: Collection[str], known_ngrams: NGrams
) -> list[int]:
    """Positions of the documents of which a hash, or a third of the runs of words, is known."""
    return [
        at
        for at, document in enumerate(documents)
        if document.content_hash in known_hashes
        or document.overlap_hash in known_hashes
        or known_ngrams.share_in(document.said) >= MIN_SHARE
    ]


def save(folder: Path, ngrams: NGrams) -> None:
    """Writes `chosen_on.ngrams` beside a plan, if there are any; equal runs give equal bytes."""
    if not len(ngrams):
        return
    described = f'{{"format":1,"words":{N_WORDS},"modulus":{ngrams.modulus}}}'
    content = tensor_bytes({"hashes_G": ngrams.hashes_G}, metadata={_KEY: described})
    write_atomically(folder / NGRAMS_FILE, content)


def load(folder: Path) -> NGrams:
    """The runs of the texts that a plan was chosen on; none if it read no texts.

    Raises PlanError: the file cannot be read.
    """
    file = folder / NGRAMS_FILE
    if not file.exists():
        return NOTHING
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES >> 10} KiB")
        with safe_open(file, framework="numpy") as opened:
            described = parse_json((opened.metadata() or {})[_KEY].encode())
            hashes_G = opened.get_tensor("hashes_G")
        modulus = described["modulus"]
        is_sorted = hashes_G.dtype == np.uint64 and hashes_G.ndim == 1
        if not is_sorted or (hashes_G[1:] <= hashes_G[:-1]).any():
            raise ValueError("its hashes are not ascending numbers")
        if described["words"] != N_WORDS or type(modulus) is not int or modulus < 1:
            raise ValueError("it is of another version")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise PlanError(f"{file} does not hold runs of words ({reason}): restore it") from None
    return NGrams(hashes_G, modulus)


def _batches(documents: Iterable[str]) -> Iterator[Array]:
    """Hashes of the runs, each once a document, many documents at a time."""
    kept: list[Array] = []
    seen: set[bytes] = set()
    size = 0
    for document in documents:
        words = _words(document)
        digest = hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()
        if digest in seen:
            continue
        seen.add(digest)
        kept.append(np.unique(_hashes(words)))
        size += len(kept[-1])
        if size > _BATCH:
            yield np.concatenate(kept)
            kept, size = [], 0
    if kept:
        yield np.concatenate(kept)


def _words(document: str) -> list[str]:
    return _WORD.findall(normalised(document).lower())


def _hashes(words: Sequence[str]) -> Array:
    """Hashes (G,) of the runs of 13 words, or of the only one if there are fewer words."""
    if not words:
        return np.zeros(0, np.uint64)
    word_W = np.array([_word_hash(word) for word in words], np.uint64)
    length = min(N_WORDS, len(word_W))
    hashes_G = np.zeros(len(word_W) - length + 1, np.uint64)
    for place in range(length):  # overflow is the remainder by 2⁶⁴
        hashes_G = hashes_G * np.uint64(_FACTOR) + word_W[place : place + len(hashes_G)]
    # The low bits of such sums depend on the low bits of the words alone, and sampling reads them.
    mixed_G = (hashes_G ^ (hashes_G >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return np.asarray(mixed_G ^ (mixed_G >> np.uint64(32)))


_known: dict[str, int] = {}


def _word_hash(word: str) -> int:
    found = _known.get(word)
    if found is None:
        if len(_known) >= _WORDS_KNOWN:
            _known.clear()
        digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
        found = _known[word] = int.from_bytes(digest, "little")
    return found


def _sampled(hashes_G: Array, modulus: int) -> NGrams:
    """As many of the hashes as may be kept."""
    while True:
        kept_G = hashes_G[hashes_G % np.uint64(modulus) == 0]
        if len(kept_G) <= MAX_HASHES:
            return NGrams(kept_G, modulus)
        modulus *= 2
