"""Profiles a whole quiz with a random model of OLMoE's form, and prints questions per second.

    python benchmarks/full_quiz.py --quiz DATA/mmlu --tokenizer DATA/olmoe [--layers 2]

Everything but the weights is real: the text, the tokenizer, five shots, all-token statistics.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

from expertcut.moe.loading import LoadOptions, find_source
from expertcut.profiling.measure import MeasureOptions, measure
from expertcut.profiling.statistics import as_json
from expertcut.profiling.store import load_profile
from expertcut.quiz import Selection, load_quiz
from expertcut.reporting.tables import Column, Table, as_markdown


def random_olmoe(folder: Path, tokenizer: Path, n_layers: int) -> Path:
    """Writes a small OLMoE with the real vocabulary."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_experts=64,
        num_experts_per_tok=8,
        vocab_size=50304,
        initializer_range=0.1,
        pad_token_id=1,
        eos_token_id=50279,
    )
    OlmoeForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def main() -> None:
    """Reads the command line, profiles, prints a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quiz", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--stats", nargs="+", default=["all"], choices=("none", "answer", "all"))
    args = parser.parse_args()
    quiz = load_quiz(Selection(args.quiz, shots=args.shots))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = find_source(str(random_olmoe(Path(folder) / "m", args.tokenizer, args.layers)))
        for stats in args.stats:
            measurement = measure(source, quiz, None, LoadOptions(), MeasureOptions(stats=stats))
            started = time.perf_counter()
            steps = list(measurement.run(Path(folder) / stats))
            elapsed_s = time.perf_counter() - started
            chunks = Path(folder, stats, "chunks").iterdir()
            size_mb = sum(file.stat().st_size for file in chunks) / 1e6
            rows.append([stats, steps[-1].done, elapsed_s, len(quiz) / elapsed_s, size_mb])
        shown = as_json(load_profile(Path(folder) / args.stats[-1]))
    columns = ("statistics", "questions", "seconds", "questions/s", "MB of chunks")
    specs = ("", ",d", ".0f", ".0f", ".1f")
    title = (
        f"{args.layers} layers × 64 experts, {args.shots} shots, {torch.get_num_threads()} threads"
    )
    print(as_markdown(Table(title, tuple(map(Column, columns, specs)), rows)))
    print(json.dumps({"rows": rows, "accuracy": shown["accuracy"]}))


if __name__ == "__main__":
    main()
