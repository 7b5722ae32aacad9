"""Profiles a whole quiz with a random model of OLMoE's form: what a question and a token cost.

    python -m benchmarks.full_quiz --quiz DATA/mmlu --tokenizer DATA/olmoe [--model small]

Everything but the weights is real: the text, the tokenizer, five shots. Beside the whole quiz some
questions of each subject run first (`--limit 18`: about 1,000 of MMLU), for a token must cost the
same in both. The model is the 261M one that the other benchmarks have, or a small one of 2 layers.
"""

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import parser, random_olmoe, report
from benchmarks.limits import chunks
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.models.load import LoadOptions, find_source, load
from expertcut.profiling.findings import profile_json
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.schema import Stats
from expertcut.profiling.storage import load_profile
from expertcut.scoring.packing import Encoded

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.1,
}
MODELS: dict[str, dict[str, int | float]] = {"261M": {}, "small": SMALL}


def distinct_tokens(encoded: Encoded) -> int:
    """Tokens that are run for a chunk: the shared prefix once."""
    n_prefix = encoded.shared_prefix()
    return n_prefix + sum(len(ids) - n_prefix for ids in encoded.prompts)


def measured(measurement: Measurement, quiz: Quiz, folder: Path) -> list[object]:
    """Questions, tokens, seconds, cost and size of one run; every question must be answered."""
    stats: Stats = measurement.info.settings.stats
    n_tokens = sum(map(distinct_tokens, chunks(measurement.moe, quiz)))
    started = time.perf_counter()
    steps = list(measurement.run(folder))
    elapsed_s = time.perf_counter() - started
    assert profile_json(load_profile(folder))["questions"] == steps[-1].done == len(quiz)
    size_mb = sum(file.stat().st_size for file in (folder / "chunks").iterdir()) / 1e6
    costs = [len(quiz) / elapsed_s, 1e6 * elapsed_s / n_tokens]
    return [stats, len(quiz), n_tokens, elapsed_s, *costs, size_mb]


def main() -> None:
    """Reads the command line, profiles, reports."""
    options = parser(__doc__, "full_quiz")
    options.add_argument("--model", choices=MODELS, default="261M")
    options.add_argument("--shots", type=int, default=5)
    options.add_argument("--limit", type=int, nargs="*", default=[18], help="smaller runs before")
    options.add_argument(
        "--stats", nargs="+", default=["answer"], choices=("none", "answer", "all")
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        source = random_olmoe(Path(place) / "m", args.tokenizer, **MODELS[args.model])
        moe = load(find_source(str(source)), LoadOptions())
        for stats in args.stats:
            for limit in (*args.limit, None):
                quiz = load_quiz(Selection(str(args.quiz), shots=args.shots, limit=limit))
                measurement = Measurement(moe, quiz, limit, MeasureOptions(stats=stats))
                rows.append(measured(measurement, quiz, Path(place) / f"{stats}{limit}"))
                print(*rows[-1], flush=True)
    columns = {"statistics": "", "questions": ",d", "distinct tokens": ",d", "seconds": ".0f"}
    columns |= {"questions/s": ".1f", "µs a token": ".1f", "MB of chunks": ".1f"}
    report(args.out, f"{args.model}, {args.shots} shots, {args.threads} threads", columns, rows)


if __name__ == "__main__":
    main()
