"""Prints what healing wins back on the bundled model: base, cut and healed, on all of split test.

    python -m benchmarks.heal_table                        every cell that has no result yet
    python -m benchmarks.heal_table --cell reap-50 --threads 2      one of them
    python -m benchmarks.heal_table --show                 only the table

A cell is one cut: `keep-active`, or a criterion and the share that stays in per cent. Each is cut
by `prune`, healed by `heal` with its defaults (`--steps` changes one), all as processes, and scored
with the base in one evaluation; then the healed one against the cut one. Results lie in
`benchmarks/runs/heal/`, one JSON file a cell: finished cells are not run again. Healing that takes
longer than `--minutes` is marked.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import RUNS, machine, timed
from benchmarks.fold import BUNDLED
from expertcut.reporting.tables import Cell, Column, Table, as_markdown

CRITERIA, SHARES = ("reap", "activations", "random"), (75, 50, 25)
STOCK = ("keep-active", *(f"{by}-{share}" for share in SHARES for by in CRITERIA))
CELLS = (*STOCK, "keep-active-exact")
QUIZ = ("--quiz", BUNDLED / "quiz")
SHOTS = 5


class Bench:
    """Where things lie, and how commands are run."""

    def __init__(self, place: Path, threads: int, steps: int | None) -> None:
        self.place, self.threads, self.steps = place, threads, steps
        place.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, *words: object) -> float:
        """Runs a command of expertcut to its end; gives the seconds that it took."""
        command = [sys.executable, "-m", "expertcut", *words]
        return timed(command, self.threads, self.place / f"{name}.log").elapsed_s

    @property
    def profile(self) -> Path:
        """Of split val, made where it is missing; on one thread, as in recipes/quickstart.yaml."""
        folder = self.place / "profile"
        words = ("--split", "val", "--shots", SHOTS, "--threads", 1, "--out", folder)
        self.run("profile", "profile", BUNDLED, *QUIZ, *words)
        return folder

    def cell(self, name: str) -> dict[str, Any]:
        """One cut, healed and scored."""
        cut, healed = self.place / name, self.place / f"{name}-healed"
        for folder in (cut, healed):
            shutil.rmtree(folder, ignore_errors=True)
        where = ("--profile", self.profile, "--out", cut, "--no-verify", "--force")
        self.run(f"{name}-cut", "prune", *_cut(name), *where)
        steps = () if self.steps is None else ("--steps", self.steps)
        own = ("--threads", self.threads, "--no-verify", "--trust-remote-code", "--out", healed)
        heal_s = self.run(f"{name}-heal", "heal", cut, *QUIZ, "--shots", SHOTS, *steps, *own)
        to_base = self.score(name, BUNDLED, cut, healed)
        to_cut = self.score(f"{name}-pair", cut, healed)
        record = json.loads((healed / "healing.json").read_text())
        for folder in (cut, healed):
            shutil.rmtree(folder)
        return {
            "cell": name,
            "heal_s": heal_s,
            "steps": record["steps"],
            "threads": self.threads,
            "asked": record["asked"],
            "to_base": to_base,
            "to_cut": to_cut,
            "machine": machine(),
        }

    def score(self, name: str, *models: Path) -> dict[str, Any]:
        """An evaluation on all of split test."""
        out = self.place / f"{name}-results.json"
        words = ("--split", "test", "--shots", SHOTS, "--threads", 1, "--out", out)
        self.run(f"{name}-eval", "eval", *models, *QUIZ, *words, "--trust-remote-code")
        found: dict[str, Any] = json.loads(out.read_text())
        shutil.rmtree(out.with_suffix(".chunks"), ignore_errors=True)
        return found


def _cut(name: str) -> tuple[object, ...]:
    layout = ("--layout", "exact" if name.endswith("exact") else "stock")
    if name.startswith("keep-active"):
        return ("--keep-active", *layout)
    by, share = name.split("-")
    return ("--keep-fraction", int(share) / 100, "--by", by, *layout)


def table(cells: list[dict[str, Any]], minutes: float) -> Table:
    """A row per cell; intervals are of paired differences on the same questions."""
    columns = (
        *(Column("cut by"), Column("layout"), Column("base", ".2%"), Column("cut", ".2%")),
        *(Column("healed", ".2%"), Column("lost by the cut"), Column("healed − base")),
        *(Column("healed − cut"), Column("won back", ".0%"), Column("steps"), Column("minutes")),
    )
    return Table("Cut and healed, on split test", columns, [_row(cell, minutes) for cell in cells])


def _row(cell: dict[str, Any], minutes: float) -> list[Cell]:
    base, cut, healed = (model["accuracy"] for model in cell["to_base"]["models"])
    of_cut, of_healed = cell["to_base"]["comparisons"]
    (won,) = cell["to_cut"]["comparisons"]
    name, layout = cell["cell"].removesuffix("-exact"), "stock"
    if cell["cell"].endswith("-exact"):
        layout = "exact"
    is_lost = of_cut["ci95"][1] < 0  # else there is nothing that a share could be of
    share = (healed - cut) / (base - cut) if is_lost else None
    took = cell["heal_s"] / 60
    time = f"{took:.1f}" + (" (too long)" if took > minutes else "")
    deltas = [_points(found) for found in (of_cut, of_healed, won)]
    return [name, layout, base, cut, healed, *deltas, share, cell["steps"], time]


def _points(found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    text = f"{found['delta'] * 100:+.2f} ({low * 100:+.2f} … {high * 100:+.2f})"
    return text.replace("-", "−")


def main() -> None:
    """Reads the command line, runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--place", type=Path, default=RUNS / "heal")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int, help="of healing; its default without")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--show", action="store_true")
    asked = parser.parse_args()
    bench = Bench(asked.place, asked.threads, asked.steps)
    for name in [] if asked.show else asked.cell:
        file = asked.place / f"{name}.json"
        if not file.is_file():
            file.write_text(json.dumps(bench.cell(name), indent=1) + "\n")
            print(f"{name} is done", file=sys.stderr, flush=True)
    files = [asked.place / f"{name}.json" for name in CELLS]
    found = [json.loads(file.read_text()) for file in files if file.is_file()]
    print(as_markdown(table(found, asked.minutes)))


if __name__ == "__main__":
    main()
