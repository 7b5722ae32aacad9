"""SIGKILL at random moments: `python -m tests.soak.kills --moments 100 --seed 0`.

After every kill what stands under a final name must be whole; the same command, run again, must
end with the bytes of an undisturbed run and must not touch what was finished. Up to three kills
come one after another before a run may end.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.commands import (
    Command,
    chance_of,
    commands,
    comparable,
    files,
    finished,
    partial,
    run,
    searches,
    start,
    timed,
    until,
)

MOST_IN_A_ROW = 3


@dataclass
class Tally:
    """What became of one command's runs; `losses` are named."""

    command: str
    undisturbed_s: float
    kills: int = 0
    landed: int = 0
    landed_in_work: int = 0  # with something already under a final name
    kept: int = 0
    longest_resumed_s: float = 0.0
    losses: list[str] = field(default_factory=list)

    def row(self) -> tuple[str, ...]:
        times = (f"{self.undisturbed_s:.2f}", f"{self.longest_resumed_s:.2f}")
        counts = (self.kills, self.landed, self.landed_in_work, self.kept, len(self.losses))
        return (self.command, *map(str, counts), *times)


HEADER = (
    *("command", "kills", "before the end", "with finished work", "files kept", "losses"),
    *("undisturbed s", "longest resumed s"),
)


def kill(command: Command, root: Path, moments: int, seed: int) -> Tally:
    """So many kills of one command that come before its end, or a few more."""
    chance = chance_of(seed, command.name)
    log, out = root / "log", root / "whole"
    timed(command.argv(out), log)  # the first run also pays for what the system then has read
    whole = comparable(files(out))
    shutil.rmtree(out)
    tally = Tally(command.name, timed(command.argv(out), log))
    assert comparable(files(out)) == whole, f"{command.name} is not reproducible"
    assert whole
    while tally.landed < moments:
        shutil.rmtree(out)
        for left in (*root.glob(".whole.*"), *root.glob("whole.healing")):
            shutil.rmtree(left)
        for _ in range(chance.randint(1, MOST_IN_A_ROW)):
            _kill_once(command, out, log, chance.uniform(0, tally.undisturbed_s), tally, whole)
        _finish(command, out, log, tally, whole)
    return tally


def _kill_once(
    command: Command, out: Path, log: Path, moment_s: float, tally: Tally, whole: dict[str, bytes]
) -> None:
    before = finished(out, files(out))
    landed = until(start(command.argv(out), log), moment_s)
    found = files(out)
    tally.kills += 1
    tally.landed += landed
    tally.landed_in_work += landed and bool(found)
    tally.losses += [f"{name} is not whole" for name in partial(found, whole)]
    _count_kept(before, finished(out, found), tally)


def _finish(command: Command, out: Path, log: Path, tally: Tally, whole: dict[str, bytes]) -> None:
    before = finished(out, files(out))
    began_s = time.perf_counter()
    status, said = run(command.argv(out), log)
    if status == 2 and "is not empty" in said:  # a checkpoint that was finished before the kill
        status = 0
    tally.longest_resumed_s = max(tally.longest_resumed_s, time.perf_counter() - began_s)
    if status != 0:
        tally.losses.append(f"the rerun ended with {status}: {said}")
    found = comparable(files(out))
    names = sorted(
        name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name)
    )
    tally.losses += [f"{name} differs after the rerun" for name in names]
    _count_kept(before, finished(out, files(out)), tally)


def _count_kept(before: dict[str, int], after: dict[str, int], tally: Tally) -> None:
    lost = [name for name, place in before.items() if after.get(name) != place]
    tally.kept += len(before) - len(lost)
    tally.losses += [f"{name} was finished and was made again" for name in lost]


def soak(moments: int, seed: int, only: str | None = None) -> Iterator[Tally]:
    """Kills spread evenly over the commands, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="expertcut-kills-") as folder:
        every = (*commands(Path(folder)), *searches(Path(folder)))
        wanted = [c for c in every if only in (None, c.name)]
        for i, command in enumerate(wanted):
            n = moments // len(wanted) + (i < moments % len(wanted))
            (root := Path(folder) / f"{i}").mkdir()
            if n:
                yield kill(command, root, n, seed)


def table(tallies: Sequence[Tally]) -> str:
    rows = [HEADER, ("---",) * len(HEADER), *(tally.row() for tally in tallies)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", help="one command: profile, prune, 'prune --sweep', heal, run, reweight or audit"
    )
    asked = parser.parse_args()
    began_s = time.monotonic()
    tallies = list(soak(asked.moments, asked.seed, asked.only))
    print(table(tallies))
    losses = [f"{tally.command}: {loss}" for tally in tallies for loss in tally.losses]
    print(f"seed {asked.seed}, {time.monotonic() - began_s:.0f} s, {len(losses)} losses")
    print(*losses, sep="\n")
    return 1 if losses else 0


if __name__ == "__main__":
    raise SystemExit(main())
