"""What the laws of gates cost at loading: a probe held against them beside a bare one, in turns.

The families are tiny random models of the tests; `--tokenizer` adds the random OLMoE of 261M
parameters. Only the probe is timed, not reading the weights.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.conftest import FAMILIES, make_checkpoint

from benchmarks.common import RUNS, random_olmoe, report
from expertcut.models.find_blocks import find_blocks
from expertcut.models.load import LoadOptions, find_source, load

COLUMNS = {
    "model": "",
    "blocks": "",
    "bare probe, s": ".4f",
    "with the laws, s": ".4f",
    "laws a block, s": ".4f",
    "ratio, median of turns": ".1f",
}


def seconds(run: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def row(name: str, folder: Path, rounds: int) -> list[Any]:
    """One model: both probes in turns; the least of each, and the median of their ratios."""
    moe = load(find_source(str(folder)), LoadOptions())
    probe_1T = torch.arange(16)[None]

    @torch.inference_mode()
    def bare() -> None:
        moe.model(input_ids=probe_1T, use_cache=False)

    pairs = [
        (seconds(lambda: find_blocks(moe.model, probe_1T)), seconds(bare)) for _ in range(rounds)
    ]
    laws_s, bare_s = (min(found) for found in zip(*pairs, strict=True))
    ratio = statistics.median(laws / own for laws, own in pairs)
    n_blocks = len(moe.blocks)
    return [name, n_blocks, bare_s, laws_s, (laws_s - bare_s) / n_blocks, ratio]


def main() -> None:
    """Reads the command line, measures, reports."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokenizer", type=Path, help="a folder with OLMoE's")
    options.add_argument("--out", type=Path, default=RUNS / "laws.json")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for family in FAMILIES:
            rows.append(row(family, make_checkpoint(Path(place) / family, family), args.rounds))
        if args.tokenizer:
            folder = random_olmoe(Path(place) / "large", args.tokenizer)
            rows.append(row("OLMoE of 261M", folder, args.rounds))
    report(args.out, "What the laws of gates cost at loading", COLUMNS, rows)


if __name__ == "__main__":
    main()
