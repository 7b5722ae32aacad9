"""`python -m tests.hostile`: every case in a process of its own, and what it cost at most.

Those processes are forks of one that has imported all, which makes them quick; `--how anew` starts
each as a user does, `--how here` stays in one process and so knows no memory. Texts choose the
cases whose names begin so; `--lines` prints each refusal; `--part 2/6` is the second sixth of them.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track

from tests.hostile.case import check_refusal
from tests.hostile.corpus import CASES
from tests.hostile.running import Ended, run, run_alone, run_forked
from tests.hostile.world import make_world

HOW = {"forked": run_forked, "anew": run_alone, "here": run}


def main() -> int:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else that library warns in every fork
    asked = _asked()
    part, n_parts = map(int, asked.part.split("/"))
    named = [name for name in CASES if name.startswith(tuple(asked.texts or [""]))]
    chosen = named[part - 1 :: n_parts]
    ended: dict[str, Ended] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        pristine = make_world(Path(folder) / "world")
        for number, name in enumerate(track(chosen, console=Console(stderr=True))):
            world = pristine.copy(Path(folder) / str(number))
            try:
                ended[name] = check_refusal(CASES[name], world, HOW[asked.how])
            except AssertionError as error:
                failed[name] = str(error)
            if asked.lines and name in ended:
                print(f"{name} ({ended[name].seconds:.2f} s)\n    {ended[name].stderr.strip()}")
    _summarize(chosen, ended, failed)
    return 1 if failed else 0


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="*", help="only cases whose names begin so")
    parser.add_argument("--how", choices=HOW, default="forked")
    parser.add_argument("--part", default="1/1", help="K/N: every Nth case, from the Kth")
    parser.add_argument("--lines", action="store_true", help="print each refusal")
    return parser.parse_args()


def _summarize(chosen: list[str], ended: dict[str, Ended], failed: dict[str, str]) -> None:
    print(f"cases tried        {len(chosen)}")
    print(f"not refused well   {len(failed)}")
    if ended:
        slowest = max(ended, key=lambda name: ended[name].seconds)
        largest = max(ended, key=lambda name: ended[name].memory)
        print(f"all together       {sum(end.seconds for end in ended.values()):.0f} s")
        print(f"slowest rejection  {ended[slowest].seconds:.1f} s ({slowest})")
        print(f"largest memory     {ended[largest].memory / 2**20:.0f} MiB ({largest})")
    for name, error in failed.items():
        print(f"{name}: {error}")


if __name__ == "__main__":
    sys.exit(main())
