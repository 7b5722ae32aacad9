"""What starting costs: processor time of `eval` and `profile` before their first scored chunk.

    python -m benchmarks.startup --quiz DATA/mmlu --tokenizer DATA/olmoe

A random OLMoE of 261M parameters, real text, five shots, 20 questions of each of four subjects. A
run is a process of its own that ends where the first forward pass of a chunk would begin: imports,
reading, loading, tokenising, hashing and the checks are over then. User and system time of the
whole process. "first" runs know nothing of the model; "later" ones find what the first remembered.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ENVIRONMENT, parser, random_olmoe, report
from benchmarks.profile_overhead import SUBJECTS

CODE = """
import os, time
from expertcut.cli import main, progress
def see(line, step):
    print("STARTED", time.process_time(), flush=True)
    os._exit(0)
progress.Line.see = see
main()
"""


def started(words: list[str], folder: Path, cache: Path, threads: int) -> float:
    """Processor seconds of a command up to its first pass over a chunk."""
    settings = {"EXPERTCUT_CACHE": str(cache), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("STARTED")]
    assert found, done.stderr
    return float(found[0].split()[1])


def main() -> None:
    """Reads the command line, runs each command in turn, reports."""
    options = parser(__doc__, "startup")
    options.add_argument("--shots", type=int, default=5)
    options.add_argument("--limit", type=int, default=20)
    options.add_argument("--rounds", type=int, default=5)
    args = options.parse_args()
    given = ["--quiz", str(args.quiz.resolve()), "--shots", str(args.shots)]
    given += ["--limit", str(args.limit), "--subjects", ",".join(SUBJECTS)]
    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        model = random_olmoe(Path(place, "model"), args.tokenizer)
        time.sleep(11)  # a younger file is hashed each time
        for number in range(args.rounds):
            for command in ("eval", "profile"):
                for run in ("first", "later"):
                    folder = Path(place, f"{command}-{run}-{number}")
                    folder.mkdir()
                    cache = Path(place, f"cache-{command}-{number}")
                    took = started([command, str(model), *given], folder, cache, args.threads)
                    times.setdefault((command, run), []).append(took)
    rows = [
        [*key, min(took), sorted(took)[len(took) // 2], max(took)] for key, took in times.items()
    ]
    title = f"Start, {args.shots} shots, {args.threads} threads, {args.rounds} rounds"
    columns = {"command": "", "run": "", "least CPU s": ".2f", "median": ".2f", "most": ".2f"}
    report(args.out, title, columns, rows, times={" ".join(k): v for k, v in times.items()})


if __name__ == "__main__":
    main()
