"""What fine-tuning costs on a model and on what is left of it: time, memory, weights that learn.

    python -m benchmarks.heal --quiz DATA/mmlu --tokenizer DATA/olmoe

The same run of `heal` (LoRA, objective lm, the same rows in the same order) on a model and on its
cuts to 75, 50 and 25 % of the experts (layout stock), for the bundled model with its own quiz and
for a random OLMoE of 261M parameters with MMLU. Each of the four has a process of its own; they
take one step in turn, round by round, while the others wait, so that what is compared ran in the
same minute. Ratios are those of the same round, to the uncut model.

Memory is the resident set: its peak over all steps (VmHWM, set back after loading), and how far
that lies above what the loaded model held before adapters came.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from benchmarks.common import ENVIRONMENT, parser, random_olmoe, report
from benchmarks.heal_worker import Asked
from expertcut.reporting.tables import Cell

BUNDLED = Path(__file__).parents[1] / "checkpoints" / "quickstart"
FRACTIONS = (0.75, 0.5, 0.25)
PROFILED = 2  # questions of each subject that choose who stays: costs do not depend on the choice
COLUMNS = {
    "model": "",
    "experts kept": "",
    "parameters": ",d",
    "trained": ",d",
    "s a step": ".3f",
    "to the uncut model": ".2f",
    "least": ".2f",
    "most": ".2f",
    "peak MB": ",.0f",
    "above loaded MB": ",.0f",
}


@dataclass(frozen=True)
class Trained:
    """One model's run."""

    parameters: int
    trained: int
    peak_mb: float
    above_mb: float
    elapsed_s: tuple[float, ...]


def main() -> None:
    """Reads the command line, trains all models in turns and prints the table."""
    options = parser(__doc__, "heal")
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--warm-up", type=int, default=3)
    options.add_argument("--rank", type=int, default=16)
    args = options.parse_args()
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory() as place:
        for name in args.models:
            base, asked = MODELS[name](args, Path(place))
            folders = [base, *cuts(base, asked, Path(place) / f"{name}-cuts")]
            rows += table(name, taking_turns(folders, asked))
    title = f"The same fine-tuning, {args.threads} threads, {args.rounds} steps each"
    report(args.out, title, COLUMNS, rows, arguments=vars(args))


def bundled(args: argparse.Namespace, place: Path) -> tuple[Path, Asked]:
    """The quickstart model and its quiz, as `heal` takes them by itself."""
    how = (16, args.rank, args.rounds, args.warm_up, args.threads)
    return BUNDLED, Asked(str(BUNDLED / "quiz"), 5, 2048, *how)


def random_260m(args: argparse.Namespace, place: Path) -> tuple[Path, Asked]:
    """A random OLMoE and MMLU: rows without shots, cut to what a step of seconds can take."""
    base = random_olmoe(place / "random", args.tokenizer)
    how = (4, args.rank, args.rounds, args.warm_up, args.threads)
    return base, Asked(str(args.quiz), 0, 256, *how)


MODELS = {"bundled": bundled, "random_260m": random_260m}


def cuts(base: Path, asked: Asked, place: Path) -> Iterator[Path]:
    """What `prune` leaves of a model, one checkpoint for each fraction."""
    from expertcut.checkpoints.build import BuildOptions, build
    from expertcut.data import Selection, load_quiz
    from expertcut.edits.edit_settings import CutSettings
    from expertcut.edits.selection import choose
    from expertcut.models.load import LoadOptions, find_source
    from expertcut.profiling.measure import MeasureOptions, measure
    from expertcut.profiling.storage import load_profile

    questions = load_quiz(Selection(asked.quiz, "val", 0, limit=PROFILED))
    source, options = find_source(str(base)), MeasureOptions(threads=asked.threads)
    for _ in measure(source, questions, PROFILED, LoadOptions(), options).run(place / "profile"):
        pass
    profile = load_profile(place / "profile")
    for fraction in FRACTIONS:
        chosen = choose(profile, CutSettings(keep_fraction=fraction))
        folder = place / f"{fraction:.0%}"
        build(profile, chosen.draft, folder, BuildOptions(LoadOptions(), is_verified=False))
        yield folder


def taking_turns(folders: Sequence[Path], asked: Asked) -> list[Trained]:
    """Runs of all models, one step of each at a time."""
    with ExitStack() as closing:
        runs = [closing.enter_context(started(folder, asked)) for folder in folders]
        for step in range(asked.steps):
            # Each in its turn the first: whoever comes first may find another machine.
            for place in range(len(runs)):
                runs[(step + place) % len(runs)].step()
        return [run.ended(asked.warm_up) for run in runs]


class Run:
    """A process that trains one model, a step whenever it is told to."""

    def __init__(self, process: "subprocess.Popen[str]", log: IO[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process, self.log = process, log
        self.told, self.tells = process.stdin, process.stdout
        self.elapsed_s: list[float] = []
        self._said()  # it is loaded

    def step(self) -> None:
        """One step, from the word to its end."""
        started_s = time.perf_counter()
        print("go", file=self.told, flush=True)
        self._said()
        self.elapsed_s.append(time.perf_counter() - started_s)

    def ended(self, warm_up: int) -> Trained:
        """What it found."""
        print("go", file=self.told, flush=True)
        found = json.loads(self._said())
        return Trained(**found, elapsed_s=tuple(self.elapsed_s[warm_up:]))

    def _said(self) -> str:
        line = self.tells.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(f"{self.process.args} failed:\n{self.log.read()[-3000:]}")
        return line


@contextmanager
def started(folder: Path, asked: Asked) -> Iterator[Run]:
    """A process that has loaded a model and waits."""
    command = [sys.executable, "-m", "benchmarks.heal_worker", str(folder)]
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(asked.threads)}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [*command, json.dumps(asdict(asked))],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            yield Run(process, log)
        finally:
            process.kill()


def table(name: str, runs: Sequence[Trained]) -> list[list[Cell]]:
    """A row for each model, the uncut one first."""
    rows: list[list[Cell]] = []
    for kept, run in zip((1.0, *FRACTIONS), runs, strict=True):
        pairs = zip(run.elapsed_s, runs[0].elapsed_s, strict=True)
        ratios = [own_s / uncut_s for own_s, uncut_s in pairs]
        times = (statistics.median(run.elapsed_s), statistics.median(ratios))
        sizes = (run.parameters, run.trained)
        row = [name, f"{kept:.0%}", *sizes, *times, min(ratios), max(ratios)]
        rows.append([*row, run.peak_mb, run.above_mb])
    return rows


if __name__ == "__main__":
    main()
