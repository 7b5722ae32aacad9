"""The largest resident memory of `expertcut heal` where the vocabulary is large.

    python -m benchmarks.heal_memory --quiz DATA/mmlu --tokenizer DATA/olmoe

A random OLMoE of 39M parameters with the real tokenizer (50,304 tokens), cut to 75 % of its
experts, is healed by the command with its defaults (distill, 5 shots, 16 rows a step), and with as
many rows at once as asked for. Nothing of the result is judged.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.common import parser, random_olmoe, report, timed
from benchmarks.heal import cuts
from benchmarks.heal_worker import Asked
from expertcut.reporting.tables import Cell

SIZES = {
    **{"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4},
    **{"num_experts": 16, "num_experts_per_tok": 4},
}
COLUMNS = {"--micro-batch": "", "peak MB": ",.0f", "CPU s": ".0f", "s": ".0f"}


def main() -> None:
    """Reads the command line, heals the model each way, prints the table."""
    options = parser(__doc__, "heal_memory")
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--micro-batch", nargs="+", default=["default", "1"])
    args = options.parse_args()
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory() as place:
        base = random_olmoe(Path(place) / "random", args.tokenizer, **SIZES)
        asked = Asked(str(args.quiz), 5, 2048, 16, 16, args.steps, 0, args.threads)
        cut = next(cuts(base, asked, Path(place) / "cuts"))
        for rows_at_once in args.micro_batch:
            out = Path(place) / f"healed-{rows_at_once}"
            command = [sys.executable, "-m", "expertcut", "heal", cut, "--quiz", args.quiz]
            command += ["--steps", args.steps, "--threads", args.threads, "--no-verify"]
            command += ["--out", out]
            command += [] if rows_at_once == "default" else ["--micro-batch", rows_at_once]
            took = timed(command, args.threads, Path(place) / "log")
            rows.append([rows_at_once, took.peak_mb, took.cpu_s, took.elapsed_s])
    title = f"heal of a 39M model, vocabulary 50,304, {args.steps} steps, {args.threads} threads"
    report(args.out, title, COLUMNS, rows, arguments=vars(args))


if __name__ == "__main__":
    main()
