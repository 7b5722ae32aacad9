"""Peak memory of `profile --text` and `eval --text`, in processes of their own, by tokens.

    python -m benchmarks.text_memory [--tokens 10k 1M] [--model checkpoints/quickstart]

Texts are drawn from the model's bundled ones. `eval` compares the model with itself.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from expertcut.commands import read_amount

QUICKSTART = Path(__file__).resolve().parents[1] / "checkpoints" / "quickstart"
_PEAK = (
    "import resource, sys; from expertcut.cli import main; sys.argv[0] = 'expertcut'\n"
    "try: main()\n"
    "except SystemExit as stopped: assert not stopped.code, stopped.code\n"
    "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
)


def texts(file: Path, n_tokens: int) -> Path:
    """Shuffled documents of the bundled texts, about as many tokens as asked, and some more."""
    lines = [
        json.loads(line)["text"].split(". ")
        for path in sorted((QUICKSTART / "text").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    chance, size = Random(0), 0
    with file.open("w") as stream:
        while size < 1.2 * n_tokens:
            parts = [chance.choice(chance.choice(lines)) for _ in range(60)]
            stream.write(json.dumps({"text": ". ".join(parts)}) + "\n")
            size += 7 * len(parts)
    return file


def peak_mib(folder: Path, *words: str) -> tuple[float, float]:
    """Largest resident memory of a command (MiB), and its seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *words],
        cwd=folder, capture_output=True, text=True, env={**os.environ}, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return int(done.stderr.split()[-1]) / unit, time.monotonic() - began


def main() -> None:
    """Prints a line for each command and number of tokens, and the ratio of the peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", nargs=2, default=["10k", "1M"])
    parser.add_argument("--model", default=str(QUICKSTART))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for command in (["profile"], ["eval", options.model]):
            peaks = []
            for amount in options.tokens:
                file = texts(folder / f"{amount}.jsonl", read_amount(amount))
                out = folder / f"{command[0]}-{amount}"
                words = [*command, options.model, "--text", str(file), "--tokens", amount]
                mib, seconds = peak_mib(folder, *words, "--out", f"{out}.json")
                peaks.append(mib)
                print(f"{command[0]:<8} {amount:>5} tokens: {mib:8,.0f} MiB, {seconds:,.0f} s")
            print(f"{command[0]:<8} ratio of the peaks: {peaks[1] / peaks[0]:.2f}")


if __name__ == "__main__":
    main()
