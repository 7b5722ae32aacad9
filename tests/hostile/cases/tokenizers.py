"""Tokenizers that are none, or cannot write the letters of the choices."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.case import Corpus
from tests.hostile.edits import (
    Change,
    audit,
    eval_cut,
    evaluate,
    in_cut,
    in_model,
    json_of,
    prune,
    run,
    tensors,
    text_of,
)

CASES = Corpus("tokenizer")
FILE, MAIN = r"olmoe/tokenizer\.json", "tokenizer.json"


def main(change: Callable[[dict[str, Any]], object]) -> Change:
    return json_of(MAIN, change)


def none(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def no_merges(content: dict[str, Any]) -> None:
    """' A' is two tokens."""
    content["model"]["merges"] = []


def without_letters(content: dict[str, Any]) -> None:
    """No letter is in the vocabulary, alone or behind a space."""
    model = content["model"]
    model["merges"] = []
    for letter in "ABCD":
        model["vocab"].pop(letter)
        model["vocab"].pop(f"Ġ{letter}")


def giant_ids(content: dict[str, Any]) -> None:
    """Every token has an id that no embedding reaches."""
    vocabulary = content["model"]["vocab"]
    for token in vocabulary:
        vocabulary[token] += 1_000_000


def template(special: dict[str, Any]) -> dict[str, Any]:
    """Every prompt begins with `<s>`, whatever that is."""
    piece = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [piece, text],
        "pair": [piece, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }


def starting_with(token: int) -> Change:
    """Every prompt begins with a token that the vocabulary does not know."""
    special = {"<s>": {"id": "<s>", "ids": [token], "tokens": ["<s>"]}}
    return main(lambda content: content.update(post_processor=template(special)))


def ending_with_eos(content: dict[str, Any]) -> None:
    """Every prompt ends with `<eos>`, as some tokenizers do for training."""
    token = next(t["id"] for t in content["added_tokens"] if t["content"] == "<eos>")
    text = {"Sequence": {"id": "A", "type_id": 0}}
    end = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [text, end],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}, end],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [token], "tokens": ["<eos>"]}},
    }


def normalizer(**fields: object) -> Change:
    return main(lambda content: content.update(normalizer=fields))


def nothing_left(content: dict[str, Any]) -> None:
    """The normalizer takes every character away."""
    pattern = {"Regex": "[\\s\\S]"}
    content["normalizer"] = {"type": "Replace", "pattern": pattern, "content": ""}


def many_added(content: dict[str, Any]) -> None:
    token = content["added_tokens"][0]
    content["added_tokens"] = [token | {"content": f"<{i}>", "id": 2**40 + i} for i in range(9)]


def words_only(content: dict[str, Any]) -> None:
    content["model"] = {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}
    content["pre_tokenizer"] = {"type": "Whitespace"}
    content["added_tokens"] = []


def unigram(content: dict[str, Any]) -> None:
    content["model"] = {"type": "Unigram", "unk_id": 99, "vocab": [["a", -1.0]]}


MAINS: dict[str, tuple[Change, str]] = {
    "none": (none, "holds no tokenizer: add its tokenizer.json"),
    "no JSON": (text_of(MAIN, "{"), "tokenizer.json cannot be read as JSON"),
    "nothing": (text_of(MAIN, ""), "tokenizer.json cannot be read as JSON"),
    "no UTF-8": (text_of(MAIN, b"\xff\xfe\x00"), "tokenizer.json cannot be read as JSON"),
    "a list": (text_of(MAIN, "[]"), "tokenizer.json holds a list"),
    "an empty object": (text_of(MAIN, "{}"), "tokenizer.json cannot be loaded"),
    "10,000 levels": (
        text_of(MAIN, '{"a":' + "[" * 10_000 + "]" * 10_000 + "}"),
        "tokenizer.json cannot be read as JSON",
    ),
    "2 GB": (lambda f: os.truncate(f / MAIN, 2_000_000_000), "2,000,000,000 bytes, more than"),
    "a pipe": (lambda f: ((f / MAIN).unlink(), os.mkfifo(f / MAIN)), "not a regular file"),
    "an unknown model": (main(lambda c: c["model"].update(type="Evil")), "cannot be loaded"),
    "no model": (main(lambda c: c.pop("model")), "cannot be loaded"),
    "a vocabulary that is a list": (
        main(lambda c: c["model"].update(vocab=["a"])),
        "cannot be loaded",
    ),
    "ids that are negative": (
        main(lambda c: c["model"]["vocab"].update(A=-1)),
        "cannot be loaded",
    ),
    "ids that are texts": (main(lambda c: c["model"]["vocab"].update(A="1")), "cannot be loaded"),
    "merges of what is not there": (
        main(lambda c: c["model"]["merges"].append(["\u2603", "\u2603"])),
        "cannot be loaded",
    ),
    "added tokens that are numbers": (
        main(lambda c: c.update(added_tokens=[1])),
        "cannot be loaded",
    ),
    "added tokens with ids of 2^40": (main(many_added), "cannot be loaded"),
    "a broken regular expression": (
        normalizer(type="Replace", pattern={"Regex": "("}, content=""),
        "cannot be loaded",
    ),
    "an unknown pre-tokenizer": (
        main(lambda c: c.update(pre_tokenizer={"type": "Evil"})),
        "cannot be loaded",
    ),
    "a unigram model whose unknown token is not there": (main(unigram), "cannot be loaded"),
    "a map of characters that panics": (
        normalizer(type="Precompiled", precompiled_charsmap="AAAA"),
        "cannot be loaded by AutoTokenizer: Precompiled",
    ),
    "pieces of no length, which panics": (
        main(lambda c: c.update(pre_tokenizer={"type": "FixedLength", "length": 0})),
        "cannot be loaded by AutoTokenizer: chunk size must be non-zero",
    ),
    "a template of what is not there, which panics": (
        main(lambda c: c.update(post_processor=template({}))),
        "cannot be loaded by AutoTokenizer: no entry found for key",
    ),
    "letters split in two": (main(no_merges), "does not write ' A' after 'Answer:' as one token"),
    "no letters": (main(without_letters), "does not write ' [AB]' after 'Answer:' as one token"),
    "letters made small": (
        normalizer(type="Lowercase"),
        "does not write ' A' after 'Answer:' as one token",
    ),
    "one word for all": (main(words_only), "does not write ' A'|' B' after 'Answer:'"),
    "an end of text behind every text": (
        main(ending_with_eos),
        "appends <eos> to every text, so a prompt would end before its answer",
    ),
    "no text at all": (main(nothing_left), "holds no tokenizer|cannot be loaded"),
    "ids beyond the embedding": (main(giant_ids), "embeddings for 290|cannot be loaded"),
    "a letter beyond the embedding": (
        main(lambda c: c["model"]["vocab"].update({"ĠC": 4_000_000_000})),
        "token 4000000000, .*for 290",
    ),
    "a first token beyond the embedding": (starting_with(10**9), "token 1000000000, .*for 290"),
    "more tokens than the embedding": (
        main(lambda c: c["model"]["vocab"].update({f"<{i}>": 284 + i for i in range(100)})),
        "384 tokens but the embedding of the weights 290",
    ),
}
for fault, (change, says) in MAINS.items():
    CASES.add(f"{fault} for a tokenizer", in_model(change), "olmoe", says)


def smaller_embedding(folder: Path) -> None:
    """Weights and config agree on 100 tokens, the tokenizer has more."""
    json_of("config.json", lambda content: content.update(vocab_size=100))(folder)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    tensors(lambda found: found.update({n: found[n][:100].clone() for n in names}))(folder)


CASES.add(
    "a tokenizer of another model", in_model(smaller_embedding), FILE, "284 tokens but the embed"
)
SPLIT = (
    (evaluate, None, ""),
    (run, "out", ""),
    (audit, None, " after profiling"),
    (prune, "nothing", " after profiling"),  # says first what would go
)
for command, keeps, when in SPLIT:
    CASES.add(
        f"letters split in two{when}, met by {command.__name__}",
        in_model(main(no_merges), command),
        FILE,
        "as one token",
        keeps=keeps,
    )
CASES.add(
    "letters split in two in an edited checkpoint",
    in_cut(main(no_merges), eval_cut),
    r"cut/tokenizer\.json",
    "as one token",
)
