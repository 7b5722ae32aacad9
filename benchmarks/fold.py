"""Prints what folding the inflation back buys over plain slicing, on several kinds of gates.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/fold.py [--keep-fractions 0.94 0.75] [--limit 40]

The bundled model, and one random model for each way in which families make gate weights of logits.
All read the bundled quiz; held-out questions are of its test split.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import get_args

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from expertcut.checkpoints.build import BuildOptions, build
from expertcut.data import Selection, load_quiz
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.plan import Fold
from expertcut.edits.selection import choose
from expertcut.models.load import LoadOptions, find_source
from expertcut.profiling.measure import MeasureOptions, measure
from expertcut.profiling.storage import Profile, load_profile
from expertcut.reporting.tables import Cell, Column, Table, as_markdown

BUNDLED = Path(__file__).parents[1] / "checkpoints" / "quickstart"
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.25,  # with 0.02 experts would not matter
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
# What the gate does, the family that stands for it, and what its config needs beside.
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "softmax over all, cut to K": ("olmoe", {"num_experts": 32}),
    "softmax over all, renormalised": (
        "qwen3_moe",
        {"num_experts": 32, "norm_topk_prob": True},
    ),
    "softmax over the K chosen": ("gpt_oss", {"num_local_experts": 32}),
    "sigmoid, renormalised, groups": (
        "deepseek_v3",
        {
            **LATENT,
            "head_dim": 8,
            "n_routed_experts": 32,
            "first_k_dense_replace": 0,
            "n_group": 2,
            "topk_group": 1,
            "v_head_dim": 16,
        },
    ),
}


def random_model(folder: Path, family: str, changes: dict[str, object]) -> Path:
    """A random model with the bundled tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, "vocab_size": len(tokenizer), **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def profiled(model: Path, folder: Path, limit: int) -> Profile:
    """The model's profile of the bundled quiz, split val, 5 shots."""
    quiz = load_quiz(Selection(str(BUNDLED / "quiz"), "val", 5, limit=limit))
    measurement = measure(
        find_source(str(model)), quiz, limit, LoadOptions(), MeasureOptions(threads=2)
    )
    list(measurement.run(folder))
    return load_profile(folder)


def rows(kind: str, model: Path, place: Path, options: argparse.Namespace) -> list[list[Cell]]:
    """One row per count that is kept, all folds side by side."""
    profile = profiled(model, place / "profile", options.limit)
    found: list[list[Cell]] = []
    for fraction in options.keep_fractions:
        row: list[Cell] = [kind, None]
        for fold in ("off", "answer", "all"):
            assert fold in get_args(Fold)
            way = CutSettings(positions="all", fold=fold)
            pruning = choose(profile, way.updated(keep_fraction=fraction))
            row[1] = len(next(iter(pruning.draft.edits.values())).keep)
            built = build(profile, pruning.draft, place / "cut", BuildOptions(LoadOptions()))
            assert built.proof is not None
            against_base = built.proof.held_out[0]
            row += [against_base.median_abs_logprob_diff, against_base.flipped]
            shutil.rmtree(place / "cut")
        found.append(row)
    return found


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--keep-fractions", type=float, nargs="+", default=[0.94, 0.75])
    parser.add_argument("--limit", type=int, default=40, help="profiled questions of each subject")
    options = parser.parse_args()
    columns = [Column("gate"), Column("kept of 32")]
    for name in ("plain slicing", "fold, answer positions", "fold, all tokens"):
        columns += [Column(f"{name}: median |Δ log p|", ".4f"), Column("flipped of 256")]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        body = rows("the bundled model: softmax over all, cut to K", BUNDLED, place / "b", options)
        for kind, (family, changes) in KINDS.items():
            model = random_model(place / family / "model", family, changes)
            body += rows(f"random {family}: {kind}", model, place / family, options)
    print(as_markdown(Table("Folding the inflation back", tuple(columns), body)))


if __name__ == "__main__":
    main()
