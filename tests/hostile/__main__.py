"""`python -m tests.hostile`: every case in a process of its own, and what it cost at most."""

import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track

from tests.hostile.case import check_refusal
from tests.hostile.corpus import CASES
from tests.hostile.running import Ended, run_alone
from tests.hostile.world import make_world


def main() -> int:
    ended: dict[str, Ended] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        pristine = make_world(Path(folder) / "world")
        for number, name in enumerate(track(CASES, console=Console(stderr=True))):
            world = pristine.copy(Path(folder) / str(number))
            try:
                ended[name] = check_refusal(CASES[name], world, run_alone)
            except AssertionError as error:
                failed[name] = str(error)
    slowest = max(ended, key=lambda name: ended[name].seconds)
    largest = max(ended, key=lambda name: ended[name].memory)
    print(f"cases tried        {len(CASES)}")
    print(f"not refused well   {len(failed)}")
    print(f"slowest rejection  {ended[slowest].seconds:.1f} s ({slowest})")
    print(f"largest memory     {ended[largest].memory / 2**20:.0f} MiB ({largest})")
    for name, error in failed.items():
        print(f"{name}: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
