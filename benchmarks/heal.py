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
import ctypes
import gc
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
from typing import IO, TYPE_CHECKING

from benchmarks.common import ENVIRONMENT, parser, random_olmoe, report
from expertcut.reporting.tables import Cell

if TYPE_CHECKING:
    from expertcut.moe.loading import MoeModel

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
class Asked:
    """What is trained on, and how; `rounds` steps after `warm_up` ones that are not counted."""

    quiz: str
    shots: int
    max_tokens: int
    batch: int
    rank: int
    rounds: int
    warm_up: int
    threads: int

    @property
    def steps(self) -> int:
        """All of them."""
        return self.rounds + self.warm_up


@dataclass(frozen=True)
class Trained:
    """One model's run."""

    parameters: int
    trained: int
    peak_mb: float
    above_mb: float
    elapsed_s: tuple[float, ...]


def main() -> None:
    """Reads the command line; trains one model in turns if told to, else compares all."""
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), Asked(**json.loads(sys.argv[3])))
        return
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
    from expertcut.interventions.prune import Keep, Way, choose
    from expertcut.moe.loading import LoadOptions, find_source
    from expertcut.profiling.measure import MeasureOptions, measure
    from expertcut.profiling.store import load_profile
    from expertcut.quiz import Selection, load_quiz

    questions = load_quiz(Selection(asked.quiz, "val", 0, limit=PROFILED))
    source, options = find_source(str(base)), MeasureOptions(threads=asked.threads)
    for _ in measure(source, questions, PROFILED, LoadOptions(), options).run(place / "profile"):
        pass
    profile = load_profile(place / "profile")
    for fraction in FRACTIONS:
        chosen = choose(profile, Keep(fraction=fraction), Way())
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
    command = [sys.executable, "-m", "benchmarks.heal", "--worker", str(folder)]
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


def worker(folder: Path, asked: Asked) -> None:
    """Trains as `heal` does, each step when a line comes in; says each by a line, and the last."""
    from expertcut.healing.asking import Data, Healing, Training, Weighted
    from expertcut.healing.data.sources import read_data
    from expertcut.healing.training.adapters import Lora, adapted
    from expertcut.healing.training.fit import fit
    from expertcut.healing.training.objectives import OBJECTIVES

    moe = loaded(folder)
    data = Data((Weighted(asked.quiz),), shots=asked.shots, max_tokens=asked.max_tokens)
    how = Training(asked.steps, batch=asked.batch, check_every=asked.steps)
    read = read_data(Healing(data, training=how), moe.tokenizer, asked.max_tokens)
    n_parameters = sum(parameter.numel() for parameter in moe.model.parameters())
    loaded_mb = forgotten_peak_mb()
    model = adapted(moe, Lora(asked.rank, asked.rank, ("attention", "experts")))
    peak_mb: list[float] = []

    def next_step(done: int, total: int) -> None:
        peak_mb.append(memory_mb("VmHWM"))
        tell_and_wait("done")

    with tempfile.TemporaryDirectory() as place:
        tell_and_wait("ready")
        fit(moe, model, read, how, (OBJECTIVES["lm"], None), (Path(place), next_step))
    print(
        json.dumps(
            {
                "parameters": n_parameters,
                "trained": model.get_nb_trainable_parameters()[0],
                "peak_mb": peak_mb[-1],
                "above_mb": peak_mb[-1] - loaded_mb,
            }
        ),
        flush=True,
    )


def loaded(folder: Path) -> "MoeModel":
    """As every stage loads it."""
    from expertcut.moe.loading import LoadOptions, find_source, load

    return load(find_source(str(folder)), LoadOptions())


def tell_and_wait(word: str) -> None:
    """Between steps: the others have their turn."""
    print(word, flush=True)
    if not sys.stdin.readline():
        raise SystemExit("nobody is there to say go")


def forgotten_peak_mb() -> float:
    """What is resident now; from here on the peak is a new one. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mb("VmRSS")


def memory_mb(key: str) -> float:
    """A line of this process's status."""
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index(f"{key}:") + 1]) / 1000


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
