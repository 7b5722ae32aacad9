"""`python -m tests.hostile`: every case in a process of its own, and what it cost at most.

Texts choose the cases whose names begin so; `--here` stays in this process, which is quicker and
knows no memory; `--lines` prints each refusal; `--part 2/6` is the second sixth of them.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track

from tests.hostile.case import check_refusal
from tests.hostile.corpus import CASES
from tests.hostile.running import Ended, run, run_alone
from tests.hostile.world import make_world


def main() -> int:
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
                ended[name] = check_refusal(CASES[name], world, run if asked.here else run_alone)
            except AssertionError as error:
                failed[name] = str(error)
            if asked.lines and name in ended:
                print(f"{name} ({ended[name].seconds:.2f} s)\n    {ended[name].stderr.strip()}")
    _summarize(chosen, ended, failed)
    return 1 if failed else 0


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="*", help="only cases whose names begin so")
    parser.add_argument("--here", action="store_true", help="all in this process")
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
