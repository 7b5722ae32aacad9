"""What a contract costs: the bundled model by itself, and by contracts/module_list.py, in turns.

    python -m benchmarks.contract_overhead --rounds 9

Each round profiles the bundled quiz both ways, each time the other first, into a new folder:
reading, scoring and writing, but not loading. What is compared is within a round; the bytes of
both profiles are compared too.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from expertcut.data import Quiz, Selection, load_quiz
from expertcut.models.contract_check import read_contract
from expertcut.models.load import LoadOptions, MoeModel, find_source, load
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import load_profile

ROOT = Path(__file__).parents[1]
MODEL, CONTRACT = ROOT / "checkpoints/quickstart", ROOT / "contracts/module_list.py"


def timed(moe: MoeModel, quiz: Quiz, folder: Path) -> tuple[float, float]:
    """Seconds and processor seconds of one profile."""
    measurement = Measurement(moe, quiz, None, MeasureOptions())
    started = time.perf_counter(), time.process_time()
    list(measurement.run(folder))
    return time.perf_counter() - started[0], time.process_time() - started[1]


def different(one: Path, other: Path) -> list[str]:
    """The arrays whose bytes differ."""
    chunks = zip(load_profile(one).chunks, load_profile(other).chunks, strict=True)
    return [n for a, b in chunks for n in a if a[n].tobytes() != b[n].tobytes()]


def main() -> None:
    """Prints the medians and ranges of the quotients."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--limit", type=int, help="questions of each subject")
    parser.add_argument("--stats", default="all", choices=("answer", "all"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    contract = read_contract(CONTRACT)
    ways = {
        "by itself": load(find_source(str(MODEL)), LoadOptions()),
        "by contract": load(
            find_source(str(MODEL), None, contract), LoadOptions(trust_remote_code=True)
        ),
    }
    quiz = load_quiz(Selection(str(MODEL / "quiz"), "test", 0, (), asked.limit))
    shares: list[tuple[float, float]] = []
    for number in range(asked.rounds + 1):
        names = [*ways] if number % 2 else [*ways][::-1]
        with tempfile.TemporaryDirectory() as root:
            took = {name: timed(ways[name], quiz, Path(root) / name) for name in names}
            if number == 0:  # not counted
                print("arrays that differ:", different(*(Path(root) / name for name in ways)))
                continue
        own, other = (took[name] for name in ways)
        shares.append((other[0] / own[0], other[1] / own[1]))
        print(number, {name: f"{s:.2f} s" for name, (s, _) in took.items()}, flush=True)
    for what, values in zip(
        ("seconds", "processor seconds"), zip(*shares, strict=True), strict=True
    ):
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{what}: {middle - 1:+.1%} ({low - 1:+.1%} … {high - 1:+.1%})")


if __name__ == "__main__":
    main()
