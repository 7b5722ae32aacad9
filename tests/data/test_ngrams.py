"""Laws of runs of words: what is known by them, in any order, number and tokenizer."""

from pathlib import Path
from random import Random

import numpy as np
import pytest

from expertcut.data import ngrams
from expertcut.data.ngrams import MIN_SHARE, ngrams_of
from expertcut.errors import PlanError


def drawn(seed: int, n_words: int = 40) -> str:
    """A document of random words."""
    chance = Random(seed)
    return " ".join(f"w{chance.randrange(5000)}" for _ in range(n_words))


def test_a_document_with_one_changed_word_is_known_and_others_are_not() -> None:
    """Wherever the word is, and whatever the case, the punctuation and the white space."""
    documents = [drawn(seed) for seed in range(20)]
    known = ngrams_of(documents)
    for place in range(40):
        words = documents[place % 20].split()
        words[place] = "changed"
        assert known.share_in(",\n".join(words).upper()) >= MIN_SHARE
    assert not any(known.share_in(drawn(seed)) for seed in range(100, 120))
    assert ngrams_of(["Only three words"]).share_in("only three words!") == 1


def test_boilerplate_is_known_of_no_document() -> None:
    """A run that stands in more than 10 documents; one document repeated is one document."""
    head = drawn(0, 30)
    known = ngrams_of([f"{head} {drawn(seed)}" for seed in range(1, 12)])
    assert known.share_in(head) == 0
    assert known.share_in(drawn(1)) == 1
    assert ngrams_of([head] * 50).share_in(head) == 1


def test_many_runs_are_sampled_by_their_hash_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file for any order of the documents; each document is still known."""
    monkeypatch.setattr(ngrams, "MAX_HASHES", 1000)
    monkeypatch.setattr(ngrams, "_BATCH", 500)
    documents = [drawn(seed, 200) for seed in range(50)]
    known, other = ngrams_of(documents), ngrams_of(documents[::-1])
    assert 500 < len(known) <= 1000
    assert known.modulus == 16
    assert all(known.share_in(document) == 1 for document in documents)
    halves = ngrams_of(documents[:25]) | ngrams_of(documents[25:])
    assert np.array_equal(halves.hashes_G, known.hashes_G)
    for name, own in (("a", known), ("b", other)):
        (tmp_path / name).mkdir()
        ngrams.save(tmp_path / name, own)
    content = [(tmp_path / name / ngrams.NGRAMS_FILE).read_bytes() for name in "ab"]
    assert content[0] == content[1]
    again = ngrams.load(tmp_path / "a")
    assert again.modulus == 16
    assert np.array_equal(again.hashes_G, known.hashes_G)
    (tmp_path / "a" / ngrams.NGRAMS_FILE).write_bytes(content[0][:-8])
    with pytest.raises(PlanError, match="does not hold runs of words"):
        ngrams.load(tmp_path / "a")
