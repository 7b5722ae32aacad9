"""Tokens per second under routing rules beside the base, in turns on one model.

    python -m benchmarks.routing --quiz DATA/mmlu --tokenizer DATA/olmoe

A random OLMoE of 261M parameters in float32 (8 of 64 experts a token) reads the same packed rows of
real text in one process: as it is, and under rules with thresholds that are calibrated to the same
mean number of experts, layer by layer. The settings take turns; a ratio is the median over the
rounds of the base's time by the setting's. Only hidden states are computed, no logits. The gates of
a random model are flat, so the thresholds say nothing about others; the experts run are counted.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import parser, random_olmoe, report, text_rows
from expertcut.data.corpus import TextSelection, load_corpus
from expertcut.edits.route_thresholds import sample_gates
from expertcut.models.load import LoadOptions, find_source, load
from expertcut.models.routing_rule import RoutingRule
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import Encoded, Pass
from expertcut.scoring.rerouting import ExpertCounts, Rerouting, rerouted_engine

BATCH_TOKENS = 2048
CALIBRATED = ("skip", "top-p")


def run(engine: Engine, chunks: list[Encoded], routing: Rerouting | None) -> tuple[float, float]:
    """Seconds for all rows, and the mean number of experts of a token."""
    if routing is not None:
        with rerouted_engine(engine, routing) as begin:
            return _clocked(engine, chunks, begin)
    return _clocked(engine, chunks, lambda _step: None)


def _clocked(engine: Engine, chunks: list[Encoded], begin: Any) -> tuple[float, float]:
    elapsed_s, used, n_tokens = 0.0, 0.0, 0
    for chunk in chunks:
        counts = ExpertCounts(engine.moe.blocks, len(chunk))

        def on_pass(step: Pass, counts: ExpertCounts = counts) -> None:
            begin(step)
            counts.begin(step)

        with counts.listening():
            started = time.perf_counter()
            engine.run(chunk, on_pass)
            elapsed_s += time.perf_counter() - started
        n = int(counts.tokens_N.sum())
        used, n_tokens = used + n * counts.per_token, n_tokens + n
    return elapsed_s, used / n_tokens


def main() -> None:
    """Reads the command line, measures, reports."""
    options = parser(__doc__, "routing")
    options.add_argument("--rows", type=int, default=16, help="of 512 tokens")
    options.add_argument("--experts", type=int, nargs="+", default=[4, 2])
    options.add_argument("--rounds", type=int, default=5)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        source = find_source(str(random_olmoe(place / "olmoe", args.tokenizer)))
        rows = text_rows(args.quiz, args.tokenizer, [512] * args.rows)
        lines = "".join(json.dumps({"text": row["text"]}) + "\n" for row in rows)
        (place / "rows.jsonl").write_text(lines, encoding="utf-8")
        moe = load(source, LoadOptions())
        engine = Engine(moe, BATCH_TOKENS)
        corpus = load_corpus(TextSelection((str(place / "rows.jsonl"),)), moe.tokenizer)
        chunks = list(engine.encode_all(corpus))
        samples = sample_gates(engine, corpus, CALIBRATED, None)
        layers = [block.layer for block in moe.blocks]
        settings: dict[str, Rerouting | None] = {"(base)": None}
        for n in args.experts:
            top_k = Rerouting(RoutingRule(rule="top-k"), dict.fromkeys(layers, float(n)))
            settings[f"top-k {n}"] = top_k
            for rule in CALIBRATED:
                at_by_layer = samples[rule].thresholds(n)
                settings[f"{rule} to {n}"] = Rerouting(RoutingRule(rule=rule), at_by_layer)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
        for number in range(args.rounds + 1):  # the first one warms up
            for name, routing in settings.items():
                took = run(engine, chunks, routing)
                if number:
                    found[name].append(took)
    n_tokens = sum(sum(map(len, chunk.prompts)) for chunk in chunks)
    made: list[list[object]] = []
    for name, own in found.items():
        times = [elapsed_s for elapsed_s, _ in own]
        ratios = [base[0] / s for base, s in zip(found["(base)"], times, strict=True)]
        pace = n_tokens / statistics.median(times)
        made.append([name, own[0][1], pace, statistics.median(ratios), min(ratios), max(ratios)])
    columns = {"setting": "", "experts a token": ".2f", "tokens/s": ",.0f"}
    columns |= {"× base": ".2f", "least": ".2f", "most": ".2f"}
    report(args.out, f"{n_tokens:,} tokens, {args.rounds} rounds", columns, made)


if __name__ == "__main__":
    main()
