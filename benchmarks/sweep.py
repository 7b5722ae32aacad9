"""What a cell of a sweep costs, against writing, loading and scoring the checkpoint of its plan.

    python -m benchmarks.sweep --threads 1

The bundled model and its quiz: profiled on val, scored on test. Both ways run in one process and in
turns, cell by cell, so that no import is timed: a cell of `sweep` is carried out in the
model that is loaded already; else `prune --no-verify` writes, the checkpoint is loaded, and `eval`
scores it. Answers of both are compared.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import RUNS, machine
from expertcut.checkpoints.build import BuildOptions, build
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.selection import choose
from expertcut.evaluation.results import Scoring
from expertcut.evaluation.search_results import Grid
from expertcut.evaluation.sweep_run import SweepRun
from expertcut.models.load import LoadOptions, find_source, load
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import Profile, load_profile
from expertcut.reporting.tables import Cell, Column, Table, as_markdown
from expertcut.scoring.passes import ignore

BUNDLED = Path(__file__).parents[1] / "checkpoints" / "quickstart"
FRACTIONS = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Took:
    """Seconds of one cell by both ways, and how far their answers are apart."""

    layout: str
    fraction: float
    swept: float
    written: float
    loaded: float
    scored: float
    largest_difference: float

    @property
    def by_hand(self) -> float:
        """Writing, loading and scoring."""
        return self.written + self.loaded + self.scored


@dataclass(frozen=True)
class Bench:
    """What both ways start from."""

    profile: Profile
    quiz: Quiz
    place: Path

    def cells(self, layout: str) -> list[Took]:
        """Every cell of a layout, one way and then the other."""
        way, folder = CutSettings(layout=layout), self.place / "sweep"  # type: ignore[arg-type]
        shutil.rmtree(folder, ignore_errors=True)
        grid = Grid(("activations",), FRACTIONS)
        scoring = Scoring(self.quiz, None, LoadOptions(), MeasureOptions())
        sweeping = SweepRun(self.profile, grid, way, scoring)
        found = []
        started = time.perf_counter()
        # Ranking, comparing and saving come between two runs, so they are in these times.
        for n_before, step in enumerate(sweeping.steps(folder)):
            list(step.run(ignore))
            elapsed_s = time.perf_counter() - started
            if n_before:  # the first is the unedited model
                found.append(self._cell(way, grid.fractions[n_before - 1], elapsed_s))
            started = time.perf_counter()
        return found

    def _cell(self, way: CutSettings, fraction: float, swept_s: float) -> Took:
        chosen = choose(self.profile, way.updated(keep_fraction=fraction))
        out = self.place / "cut"
        shutil.rmtree(self.place / "scored", ignore_errors=True)
        times = [time.perf_counter()]
        options = BuildOptions(LoadOptions(), is_verified=False, is_forced=True)
        build(self.profile, chosen.draft, out, options)
        times.append(time.perf_counter())
        moe = load(find_source(str(out)), LoadOptions())
        times.append(time.perf_counter())
        settings = self.profile.info.settings
        measured = MeasureOptions("none", settings.batch_tokens, settings.threads)
        list(Measurement(moe, self.quiz, None, measured).run(self.place / "scored"))
        times.append(time.perf_counter())
        written_s, loaded_s, scored_s = np.diff(times).tolist()
        (cell,) = (self.place / "sweep" / "cells").glob(f"{chosen.draft.slug}-????????")
        a_NC, b_NC = (load_profile(p).answers.logprob_NC for p in (cell, self.place / "scored"))
        largest = float(np.abs(a_NC - b_NC).max())
        return Took(way.layout, fraction, swept_s, written_s, loaded_s, scored_s, largest)


def rows(found: list[Took]) -> list[list[Cell]]:
    """Medians over the rounds, cell by cell."""
    table: list[list[Cell]] = []
    for layout, fraction in dict.fromkeys((t.layout, t.fraction) for t in found):
        own = [t for t in found if (t.layout, t.fraction) == (layout, fraction)]
        names = ("swept", "written", "loaded", "scored", "by_hand")
        medians = [statistics.median(getattr(t, name) for t in own) for name in names]
        ratio = statistics.median(t.by_hand / t.swept for t in own)
        largest = max(t.largest_difference for t in own)
        table.append([layout, fraction, *medians, ratio, largest])
    return table


def main() -> None:
    """Reads the command line, runs both ways, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--limit", type=int, help="questions of each subject; all without")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RUNS / "sweep.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    splits = {
        split: load_quiz(Selection(str(BUNDLED / "quiz"), split, args.shots, limit=args.limit))
        for split in ("val", "test")
    }
    with tempfile.TemporaryDirectory() as place:
        profile = Path(place) / "profile"
        moe = load(find_source(str(BUNDLED)), LoadOptions())
        options = MeasureOptions(threads=args.threads)
        list(Measurement(moe, splits["val"], args.limit, options).run(profile))
        del moe
        bench = Bench(load_profile(profile), splits["test"], Path(place))
        found = [
            took
            for _ in range(args.rounds)
            for layout in ("stock", "exact")
            for took in bench.cells(layout)
        ]
    columns = (
        Column("layout"),
        Column("share", "g"),
        *(Column(f"{name} (s)", ".2f") for name in ("sweep", "write", "load", "score")),
        Column("write + load + score (s)", ".2f"),
        Column("ratio", ".2f"),
        Column("largest difference of log p", ".1e"),
    )
    title = f"{len(splits['test']):,} questions, {args.shots} shots, {args.rounds} rounds"
    print(as_markdown(Table(f"{title}, {machine()}", columns, rows(found))), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps([asdict(took) for took in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
