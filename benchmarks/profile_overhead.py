"""What statistics cost: plain scoring, answer-only and all-token statistics, in turns.

    python -m benchmarks.profile_overhead --quiz DATA/mmlu --tokenizer DATA/olmoe

A random OLMoE of 260M parameters, real text, five shots. Each round runs all three, each time
another first, into a new folder: reading, scoring and writing, but not loading. What is compared
is within a round, so that other work on the machine hits all alike; processor seconds feel it less.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import random_olmoe
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.models.load import LoadOptions, MoeModel, find_source, load
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.schema import Stats
from expertcut.reporting.tables import Column, Table, as_markdown

NAMES: dict[Stats, str] = {"none": "plain scoring", "answer": "answer only", "all": "all tokens"}
Times = list[tuple[float, float]]
SUBJECTS = ("abstract_algebra", "anatomy", "machine_learning", "world_religions")


def timed(moe: MoeModel, quiz: Quiz, limit: int, stats: Stats) -> tuple[float, float]:
    """Seconds and processor seconds of one run, once the model is loaded and checked."""
    measurement = Measurement(moe, quiz, limit, MeasureOptions(stats=stats))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter(), time.process_time()
        steps = list(measurement.run(Path(folder) / "profile"))
        took = time.perf_counter() - started[0], time.process_time() - started[1]
    assert steps[-1].measured == len(quiz)
    return took


def rounds(moe: MoeModel, quiz: Quiz, limit: int, n_rounds: int) -> dict[Stats, Times]:
    """What every run took; one round more is run first and not counted."""
    times: dict[Stats, Times] = {stats: [] for stats in NAMES}
    order = list(NAMES)
    for number in range(n_rounds + 1):
        for stats in order:
            took = timed(moe, quiz, limit, stats)
            if number:
                times[stats].append(took)
        order = [*order[1:], order[0]]
    return times


def rows(times: dict[Stats, Times]) -> list[list[object]]:
    """Medians, and medians and ranges of the quotients within each round."""
    found: list[list[object]] = []
    for stats, name in NAMES.items():
        row: list[object] = [name]
        for clock in (0, 1):
            own, plain = ([run[clock] for run in times[which]] for which in (stats, "none"))
            quotients = [a / b for a, b in zip(own, plain, strict=True)]
            row += [statistics.median(own), statistics.median(quotients)]
            row += [f"{min(quotients):.3f} … {max(quotients):.3f}"]
        found.append(row)
    return found


def main() -> None:
    """Reads the command line, runs the rounds, prints a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quiz", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--subjects", default=",".join(SUBJECTS))
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    subjects = tuple(args.subjects.split(","))
    quiz = load_quiz(Selection(args.quiz, shots=args.shots, subjects=subjects, limit=args.limit))
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        moe = load(find_source(str(random_olmoe(Path(folder), args.tokenizer))), LoadOptions())
        times = rounds(moe, quiz, args.limit, args.rounds)
    n_parameters = sum(p.numel() for p in moe.model.parameters())
    title = (
        f"{n_parameters:,} parameters, {len(quiz)} questions, {args.shots} shots, "
        f"{args.threads} threads, {args.rounds} rounds, load average {load_before:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after"
    )
    columns = ("seconds", "÷ plain", "range", "CPU s", "÷ plain", "range")
    specs = ("", *(".2f", ".3f", "") * 2)
    heads = ("statistics", *columns)
    print(as_markdown(Table(title, tuple(map(Column, heads, specs)), rows(times))))
    print(json.dumps({NAMES[stats]: runs for stats, runs in times.items()}))


if __name__ == "__main__":
    main()
