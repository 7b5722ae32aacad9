"""A model whose second expert alone knows some subjects, and a quiz of these and others.

A question begins with a mark of its kind and a mark of its answer. Expert `GENERAL` comes first
everywhere, and says the letter that is marked. In the subjects of `KNOWN` the one after it is
right: expert `SPECIALIST` says so, louder, with a third of the gate weight of the first. In other
subjects expert `OTHER` comes second, and is wrong.
"""

import csv
import math
from itertools import islice, product
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.conftest import make_checkpoint

GENERAL, OTHER, SPECIALIST = 0, 3, 5  # experts
KNOWN, PLAIN = ("carved", "sung"), ("bay", "field", "meadow", "mountain")  # subjects
LETTERS, MARKS = "ABCD", "1234#!"
RATIO = 1 / 3  # of the gate weights of the second and the first expert in subjects of `KNOWN`
KNOWN_AT, PLAIN_AT, SAID_AT = 4, 5, 6  # dimensions: of the last two marks, and of what is said


def plant_subjects(folder: Path, plain_ratio: float) -> Path:
    """An OLMoE with one layer; `plain_ratio` is the ratio of gate weights in other subjects.

    Attention is the mean over the tokens so far, of which marks alone count. The norm then gives
    both marks of a question the number 4.
    """
    make_checkpoint(folder, "olmoe", num_hidden_layers=1)
    weights = load_file(folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    embeddings, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embeddings[:, : SAID_AT + len(LETTERS)] = 0
    head.zero_()
    for at, mark in enumerate(MARKS):
        (token,) = tokenizer(mark).input_ids
        embeddings[token] = 0
        embeddings[token, at] = 1
    for at, letter in enumerate(LETTERS, SAID_AT):
        (token,) = tokenizer(f" {letter}").input_ids
        head[token, at] = 4
    layer = "model.layers.0"
    for part, gain in (("q", 0), ("k", 0), ("v", 1), ("o", 1000)):
        matrix = weights[f"{layer}.self_attn.{part}_proj.weight"].zero_()
        matrix[: len(MARKS), : len(MARKS)].fill_diagonal_(gain)
    router = weights[f"{layer}.mlp.gate.weight"].zero_()
    router[GENERAL, KNOWN_AT] = router[GENERAL, PLAIN_AT] = 2
    router[SPECIALIST, KNOWN_AT] = 2 + math.log(RATIO) / 4
    router[OTHER, PLAIN_AT] = 2 + math.log(plain_ratio) / 4
    for expert, reads, step, loudness in (
        (GENERAL, (KNOWN_AT, PLAIN_AT), 0, 2),
        (SPECIALIST, (KNOWN_AT,), 1, 16),
        (OTHER, (PLAIN_AT,), 2, 2),
    ):
        name = f"{layer}.mlp.experts.{expert}"
        parts = [weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down")]
        gate, up, down = (part.zero_() for part in parts)
        for i in range(len(LETTERS)):
            gate[i, list(reads)] = up[i, i] = 1
            down[SAID_AT + (i + step) % len(LETTERS), i] = loudness
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_subjects(folder: Path, counts: dict[str, int]) -> Path:
    """Questions of every subject, so many in each split; no two are alike, and lengths differ."""
    texts = map("".join, product("abcdefghij", repeat=4))
    for split, n_questions in counts.items():
        (folder / split).mkdir(parents=True)
        for subject in (*KNOWN, *PLAIN):
            is_known = subject in KNOWN
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                for i, text in enumerate(islice(texts, n_questions)):
                    marks = MARKS[KNOWN_AT if is_known else PLAIN_AT] + MARKS[i % len(LETTERS)]
                    right = LETTERS[(i + is_known) % len(LETTERS)]
                    csv.writer(file).writerow([f"{marks}{text}{'.' * (i % 8)}", *"wxyz", right])
    return folder
