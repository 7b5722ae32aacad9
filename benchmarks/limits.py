"""How near the packed forward comes to what the machine can multiply, and where the rest goes.

    python -m benchmarks.limits --quiz DATA/mmlu --tokenizer DATA/olmoe

Operations are counted from the model's sizes and the prompts (benchmarks/work.py), seconds are
measured. The machine's rate is that of bare matrix products of the model's own shapes, by the
faster of torch's two libraries, each shape weighted with its share of the operations. The parts are
clocked by hooks in a second run, so that clocks do not slow down the first.
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import SUBJECTS, parser, random_olmoe, report
from benchmarks.work import Shape, total
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.models import kernels
from expertcut.models.load import LoadOptions, MoeModel, find_source, load
from expertcut.profiling import measure
from expertcut.profiling.measure import DEFAULT_BATCH_TOKENS, Measurement, MeasureOptions
from expertcut.profiling.recorder import Recorder
from expertcut.scoring.packing import Encoded, encode


def shape_of(config: Any) -> Shape:
    """What operations are counted from."""
    return Shape(
        width=config.hidden_size,
        inner=config.intermediate_size,
        layers=config.num_hidden_layers,
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        words=config.vocab_size,
    )


def rate(n_rows: int, n_in: int, n_out: int) -> dict[str, float]:
    """Operations per second of one product by each library, the median of five goes."""
    x, weights = torch.randn(n_rows, n_in), [torch.randn(n_out, n_in) for _ in range(8)]
    operations = 2 * n_rows * n_in * n_out
    repeats = max(8, int(5e9 / operations))
    found: dict[str, float] = {}
    for name, multiply in {"MKL": F.linear, "oneDNN": kernels.linear}.items():
        goes = []
        for _ in range(5):
            started = time.perf_counter()
            for i in range(repeats):
                multiply(x, weights[i % 8])
            goes.append(operations * repeats / (time.perf_counter() - started))
        found[name] = statistics.median(goes)
    return found


def machine_rates(shape: Shape, batch_tokens: int) -> dict[str, dict[str, float]]:
    """By product of the model: the projections, the two halves of an expert."""
    per_expert = batch_tokens * shape.top_k // shape.experts
    with torch.inference_mode():
        return {
            "projections": rate(batch_tokens, shape.width, shape.width),
            "experts, up": rate(per_expert, shape.width, 2 * shape.inner),
            "experts, down": rate(per_expert, shape.inner, shape.width),
        }


class Clock:
    """Seconds by part; the innermost part that runs gets them."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.stack: list[str] = []
        self.since = time.perf_counter()

    def switch(self) -> None:
        """Books what passed to the part that ran."""
        now = time.perf_counter()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Everything inside is this part's."""
        self.switch()
        self.stack.append(name)
        try:
            yield
        finally:
            self.switch()
            self.stack.pop()

    def around(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, clocked."""

        def clocked(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return work(*args, **kwargs)

        return clocked


def put_clocks(moe: MoeModel, clock: Clock) -> None:
    """Clocks around the parts of one process that ends after this."""
    for module in moe.model.modules():
        name = type(module).__name__
        for part, ends in {
            "attention": "Attention",
            "router": "Router",
            "experts": "Experts",
        }.items():
            if name.endswith(ends):
                module.forward = clock.around(part, module.forward)
    moe.model.lm_head.forward = clock.around("vocabulary", moe.model.lm_head.forward)
    moe.model.forward = clock.around("norms and the rest of the model", moe.model.forward)
    measure.encode = clock.around("tokenising", measure.encode)
    for name in ("_route", "_expert", "_combined", "arrays", "begin", "on_rows"):
        setattr(Recorder, name, clock.around("statistics", getattr(Recorder, name)))


def seconds(measurement: Measurement, clock: Clock | None = None) -> float:
    """One run into a new folder; with a clock, writing is a part of its own."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        steps = measurement.run(Path(folder) / "p")
        while True:
            if clock is None:
                done = next(steps, None)
            else:
                with clock.part("packing, masks, disk"):
                    done = next(steps, None)
            if done is None:
                return time.perf_counter() - started


def chunks(moe: MoeModel, quiz: Quiz) -> list[Encoded]:
    """The chunks as token ids; a subject has at most 256 questions here."""
    return [
        encode(moe.tokenizer, questions[at : at + 256], quiz.shots_by_subject[subject])
        for subject, questions in quiz.questions.items()
        for at in range(0, len(questions), 256)
    ]


def main() -> None:
    """Reads the command line, measures, reports."""
    options = parser(__doc__, "limits")
    options.add_argument("--shots", type=int, nargs="+", default=[5, 0])
    options.add_argument("--limit", type=int)
    options.add_argument("--stats", choices=("none", "answer", "all"), default="answer")
    options.add_argument("--batch-tokens", type=int, default=DEFAULT_BATCH_TOKENS)
    options.add_argument("--rounds", type=int, default=2)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        moe = load(find_source(str(random_olmoe(Path(folder), args.tokenizer))), LoadOptions())
        rows, parts = measured(moe, args)
    columns = {"shots": "", "distinct tokens": ",d", "Gflop": ",.0f", "seconds": ".2f"}
    columns |= {"Gflop/s": ".0f", "machine: projections": ".0f", "experts, up": ".0f"}
    columns |= {"experts, down": ".0f", "% of the machine's": ".0f", "attention's share": ".2f"}
    title = f"statistics: {args.stats}, {args.threads} threads"
    report(args.out, title, columns, rows, parts=parts)
    for shots, shares in parts.items():
        print(f"{shots} shots, % of the time:", {n: round(s, 1) for n, s in shares.items()})


def measured(
    moe: MoeModel, args: argparse.Namespace
) -> tuple[list[list[Any]], dict[int, dict[str, float]]]:
    """One row per number of shots, and per cent of the time by part."""
    shape = shape_of(moe.model.config)
    asking = MeasureOptions(stats=args.stats, batch_tokens=args.batch_tokens)
    rows, parts, measurements = [], {}, {}
    for shots in args.shots:
        select = {"shots": shots, "subjects": SUBJECTS, "limit": args.limit}
        quiz = load_quiz(Selection(str(args.quiz), **select))
        measurements[shots] = Measurement(moe, quiz, args.limit, asking)
        work = total(shape, chunks(moe, quiz), keeps_all=args.stats == "all")
        goes = []
        for _ in range(args.rounds):  # side by side, for the machine is not always alike
            before = machine_rates(shape, args.batch_tokens)
            goes.append((seconds(measurements[shots]), before))
        elapsed_s, rates = min(goes, key=lambda go: go[0])
        row = [shots, work.tokens, work.total / 1e9, elapsed_s, work.total / 1e9 / elapsed_s]
        row += [max(r.values()) / 1e9 for r in rates.values()]
        share_pct = 100 * _bare_seconds(work, rates) / elapsed_s
        rows.append([*row, share_pct, work.attention / work.total])
    clock = Clock()
    put_clocks(moe, clock)
    for shots, measurement in measurements.items():
        clock.seconds.clear()
        whole = seconds(measurement, clock)
        parts[shots] = {name: 100 * s / whole for name, s in clock.seconds.most_common()}
    return rows, parts


def _bare_seconds(work: Any, rates: dict[str, dict[str, float]]) -> float:
    """What the counted operations would take as bare products at the machine's rates."""
    best = {name: max(found.values()) for name, found in rates.items()}
    experts = work.experts * (2 / 3 / best["experts, up"] + 1 / 3 / best["experts, down"])
    rest = (work.projections + work.attention + work.head) / best["projections"]
    return float(experts + rest)


if __name__ == "__main__":
    main()
