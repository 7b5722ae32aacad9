"""The tokenizer of a checkpoint: loaded without its code, and such that a prompt can be read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expertcut.errors import ModelError
from expertcut.moe.loading.checks.refusals import refusals_of
from expertcut.moe.stored.objects import read_object

_MAX_BYTES = 500_000_000  # the largest known, with a quarter of a million tokens, has 33 MB
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_PROBE = "Answer: A"


def check_files(folder: Path) -> None:
    """That the files which transformers reads hold JSON objects.

    Raises:
        ModelError: one does not.
    """
    for name in _FILES:
        if (folder / name).exists():
            read_object(folder / name, _MAX_BYTES)


def check_vocabulary(folder: Path, tokenizer: Any, n_embeddings: int) -> None:
    """That it turns text into ids that the model has an embedding for.

    Raises:
        ModelError: it does not.
    """
    # Without tokenizer files AutoTokenizer makes one that turns every text into nothing.
    ids = token_ids(tokenizer, [_PROBE])[0]
    if not ids:
        raise ModelError(f"{folder} holds no tokenizer: add its tokenizer.json")
    _check_end(folder, tokenizer, ids)
    if tokenizer.vocab_size > n_embeddings:
        raise ModelError(
            f"{folder / 'tokenizer.json'}: its tokenizer has {tokenizer.vocab_size} tokens but "
            f"the embedding of the weights {n_embeddings}: they belong to different models"
        )
    check_ids(folder, ids, n_embeddings)


def _check_end(folder: Path, tokenizer: Any, ids: list[int]) -> None:
    """That nothing is appended to a text: after an end of text no answer follows."""
    with refusals_of("AutoTokenizer", folder / "tokenizer.json"):
        plain: list[int] = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    n_before = next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), len(ids))
    if appended := ids[n_before + len(plain) :]:
        named = ", ".join(map(str, tokenizer.convert_ids_to_tokens(appended)))
        raise ModelError(
            f"{folder / 'tokenizer.json'} appends {named} to every text, so a prompt would end "
            "before its answer: take that out of its post_processor, or say add_eos_token false "
            "in tokenizer_config.json"
        )


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, as the tokenizer gives them.

    Raises:
        ModelError: it fails at one.
    """
    with refusals_of("AutoTokenizer", file_of(tokenizer)):
        ids: list[list[int]] = tokenizer(list(texts))["input_ids"]
    return ids


def file_of(tokenizer: Any) -> Path:
    """Its main file, for naming it."""
    return Path(str(getattr(tokenizer, "name_or_path", ""))) / "tokenizer.json"


def check_ids(folder: Path, ids: Any, n_embeddings: int) -> None:
    """That each token of a prompt has an embedding.

    Raises:
        ModelError: one has none.
    """
    if (largest := max(ids, default=0)) >= n_embeddings:
        raise ModelError(
            f"{folder / 'tokenizer.json'} gives a prompt the token {largest}, but the weights have "
            f"embeddings for {n_embeddings}: they belong to different models"
        )
