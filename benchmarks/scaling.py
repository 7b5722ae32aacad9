"""How cost grows: with processes, questions, experts and the shared prefix.

    python -m benchmarks.scaling --quiz DATA/mmlu --tokenizer DATA/olmoe [--parts processes ...]

Processes: one and two `expertcut profile` with one thread each, into one folder. The others run in
this process, each size twice in turns; what is compared is seconds per counted operation
(benchmarks/work.py), which must stay within 20 %. Questions are synthetic where their number or the
length of their prefix is what varies, else those of MMLU.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import parser, random_olmoe, report, timed
from benchmarks.limits import chunks, seconds, shape_of
from benchmarks.work import Work, total
from expertcut.data import Question, Quiz, Selection, load_quiz
from expertcut.models.load import LoadOptions, MoeModel, find_source, load
from expertcut.profiling.measure import Measurement, MeasureOptions

EXPERTS = (16, 64, 256)
PREFIXES = (0, 500, 2500)
TIMES = (1, 2, 4)
PARTS = ("processes", "questions", "experts", "prefix")
Row = list[object]


def processes(model: Path, args: argparse.Namespace, place: Path) -> Iterator[Row]:
    """Seconds from the first chunk's beginning to the last one's end, by `run.json`."""
    one: float | None = None
    for number, n_processes in enumerate((1, 2) * args.rounds):
        folder = place / f"processes{number}"
        command = [
            *(sys.executable, "-m", "expertcut", "profile", model, "--quiz", args.quiz.resolve()),
            *("--shots", 5, "--threads", 1, "--out", folder),
            *("--limit", args.limit),
        ]
        started = time.perf_counter()
        others = [
            subprocess.Popen(
                [str(w) for w in command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
            for _ in range(n_processes - 1)
        ]
        timed(command, 1, place / "log")
        for other in others:
            other.wait()
        elapsed_s = time.perf_counter() - started
        run_s = json.loads((folder / "run.json").read_text())["elapsed_s"]
        one = run_s if n_processes == 1 else one
        assert one is not None
        yield ["processes", n_processes, None, elapsed_s, run_s, None, one / run_s]


def costs(part: str, sized: dict[int, tuple[MoeModel, Quiz]], rounds: int) -> Iterator[Row]:
    """Seconds and seconds per operation, the best of the rounds, against the first size."""
    found: dict[int, list[float]] = {size: [] for size in sized}
    works: dict[int, Work] = {}
    measurements = {}
    for size, (moe, quiz) in sized.items():
        shape = shape_of(moe.model.config)
        works[size] = total(shape, chunks(moe, quiz), keeps_all=False)
        measurements[size] = Measurement(moe, quiz, None, MeasureOptions(stats="answer"))
    for _ in range(rounds + 1):
        for size, measurement in measurements.items():
            found[size].append(seconds(measurement))
    best = {size: min(times[1:]) for size, times in found.items()}
    per = {size: best[size] / works[size].total for size in sized}
    middle = sorted(per.values())[len(per) // 2]
    for size, work in works.items():
        yield [
            part,
            size,
            work.tokens,
            best[size],
            best[size],
            1e12 * per[size],
            per[size] / middle,
        ]


def synthetic(n_questions: int, n_prefix: int, tokenizer: object, seed: int = 0) -> Quiz:
    """Questions of one subject like MMLU's in length, behind shots of about that many tokens."""
    chance = random.Random(seed)
    words = [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "cell",
        "force",
        "market",
        "water",
        "number",
        "king",
        "river",
        "light",
        "field",
    ]

    def question(row: int, n_words: int) -> Question:
        choices = tuple(" ".join(chance.choices(words, k=4)) for _ in range(4))
        text = f"{row}: " + " ".join(chance.choices(words, k=n_words)) + "?"
        return Question("made_up", text, choices, chance.randrange(4), row)

    shots: list[Question] = []
    while sum(len(tokenizer(q.text)["input_ids"]) + 36 for q in shots) < n_prefix:  # type: ignore[operator]
        shots.append(question(len(shots), 60))
    asked = tuple(question(row, chance.randint(15, 60)) for row in range(n_questions))
    few = load_quiz(Selection(str(Path("checkpoints/quickstart/quiz")), shots=0, limit=1))
    return replace(few, questions={"made_up": asked}, shots_by_subject={"made_up": tuple(shots)})


def measured(model: Path, args: argparse.Namespace, place: Path) -> Iterator[Row]:
    """The parts that were asked for."""
    if "processes" in args.parts:
        yield from processes(model, args, place)
    torch.set_num_threads(args.threads)
    moe = load(find_source(str(model)), LoadOptions())
    if "questions" in args.parts:
        sized = {n: (moe, synthetic(args.questions * n, 500, moe.tokenizer)) for n in TIMES}
        yield from costs(f"questions × {args.questions}", sized, args.rounds)
    if "prefix" in args.parts:
        sized = {n: (moe, synthetic(args.questions, n, moe.tokenizer)) for n in PREFIXES}
        yield from costs("prefix tokens", sized, args.rounds)
    if "experts" in args.parts:
        quiz = synthetic(args.questions, 500, moe.tokenizer)
        sized = {}
        for n in EXPERTS:
            source = random_olmoe(place / f"experts{n}", args.tokenizer, num_experts=n)
            sized[n] = (load(find_source(str(source)), LoadOptions()), quiz)
        yield from costs("experts", sized, args.rounds)


def main() -> None:
    """Reads the command line, measures, reports."""
    options = parser(__doc__, "scaling")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options.add_argument("--limit", type=int, default=10, help="questions a subject for processes")
    options.add_argument("--questions", type=int, default=64, help="synthetic ones, at size 1")
    options.add_argument("--rounds", type=int, default=2)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = random_olmoe(Path(folder) / "olmoe", args.tokenizer)
        rows = []
        for row in measured(model, args, Path(folder)):
            print(*row, file=sys.stderr, flush=True)
            rows.append(row)
    columns = {"part": "", "size": ",d", "distinct tokens": ",d", "seconds": ".2f"}
    columns |= {"measuring s": ".2f", "s / Tflop": ".2f", "× one process, or ÷ the median": ".2f"}
    report(args.out, f"{args.threads} threads", columns, rows)


if __name__ == "__main__":
    main()
