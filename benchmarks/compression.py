"""Accuracy against bytes: cuts, compressed experts and both, at the bytes of the same cuts.

    OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=1000 python -m benchmarks.compression --place DIR

All of it through the command line: `profile` on val, `sweep` for the cuts, then `compress --sweep`
with the sizes of the cuts' files: one option an expert or a layer, layers weighed by answers, PMQ's
score, and the controls (the same options shuffled, one option for all). A cut to 75 and to 50 % of
the experts is also compressed to the same sizes. Errors are measured once and reused (`--from`).
Models:

bundled: as it is.
outliers: the bundled one with outliers in half of its experts: some columns of down are 32 times as
    large and the rows of up that they meet 1/32, so that it answers the same, and rounding in
    groups ruins the other columns of these experts.
low_rank: half of the experts are of rank 8; the menu with `lowrank` beside that of widths alone.

`--text` judges by the perplexity of a file of texts instead of the quiz. Writes compression.json in
DIR, and a figure for each model.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import machine
from benchmarks.planting import BUNDLED, QUIZ, bundled_weights, copied
from expertcut.edits.compression import COMPRESSION_FILE
from expertcut.reporting.plots import draw_lines, series_of
from expertcut.reporting.tables import Column, Table, as_markdown

FRACTIONS = (0.5, 0.375, 0.25, 0.1875, 0.125)
GROUP_SIZE = 64  # divides the bundled model's widths, 128 and 64
WIDTHS = "1,2,3,4,8"
OUTLIER, N_OUTLIERS = 32.0, 2  # a power of 2: exact in bfloat16; columns of 64
RANK = 8
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where things are made, and by what they are judged."""

    place: Path
    limit: int | None
    shots: int
    text: Path | None

    def run(self, *words: object) -> None:
        """One command, its output shown."""
        told = [str(word) for word in words]
        print("\n$ expertcut", " ".join(told), flush=True)
        command = [sys.executable, "-m", "expertcut", *told, "--threads", "1"]
        subprocess.run([*command, "--trust-remote-code"], check=True)

    def profile(self, model: Path) -> Path:
        """A profile of val."""
        out = self.place / f"{model.name}-val"
        limit = () if self.limit is None else ("--limit", self.limit)
        asked = ("--quiz", QUIZ, "--split", "val", "--shots", self.shots, *limit)
        if not out.exists():
            self.run("profile", model, *asked, "--out", out)
        return out

    @property
    def judge(self) -> tuple[object, ...]:
        """The options that name what judges."""
        if self.text is not None:
            return ("--text", self.text)
        limit = () if self.limit is None else ("--limit", self.limit)
        return ("--quiz", QUIZ, "--split", "test", "--shots", self.shots, *limit)

    def cuts(self, profile: Path) -> tuple[Row, list[Row]]:
        """The unedited model, and cuts by REAP."""
        out = self.place / f"{profile.name}-cuts"
        fractions = ",".join(map(str, FRACTIONS))
        self.run(
            "sweep", fractions, "--by", "reap", "--profile", profile, *self.judge, "--out", out
        )
        base, *found = [
            row for row in table(out / "sweep.csv") if row.get("source") in (None, "all")
        ]
        return base, found

    def compressed(
        self, profile: Path, name: str, sizes: Sequence[int], *options: object
    ) -> list[Row]:
        """A sweep over sizes; its errors are measured where no earlier one has them."""
        out = self.place / f"{profile.name}-{name}"
        asked = ("--profile", profile, "--sweep", ",".join(map(str, sizes)), *options)
        asked += () if "--from" in options else ("--group-size", GROUP_SIZE)
        self.run("compress", *asked, *self.judge, "--out", out)
        return table(out / "compress_sweep.csv")[1:]

    def menu(self, profile: Path, options: str, sizes: Sequence[int], name: str) -> dict[str, Any]:
        """One option an expert, a layer, by PMQ, and controls."""
        first = f"{name}per expert"
        asked = ("--options", options)
        found = {first: self.compressed(profile, slug(first), sizes, *asked)}
        errors = self.place / f"{profile.name}-{slug(first)}" / "cells" / COMPRESSION_FILE
        others: dict[str, tuple[object, ...]] = {"a layer": ("--grain", "layer")}
        others["by PMQ"] = ("--by", "pmq")
        others["shuffled"] = ("--by", "random")
        others["one for all"] = ("--by", "uniform")
        if "lowrank" in options:
            del others["by PMQ"]
        for other, words in others.items():
            key = f"{name}{other}"
            words = (*words, *asked, "--from", errors)
            found[key] = self.compressed(profile, slug(key), sizes, *words)
        return found


def slug(name: str) -> str:
    """A folder's name."""
    return name.replace(" ", "-").replace(",", "")


def table(file: Path) -> list[Row]:
    """A CSV with its numbers as numbers."""

    def value(text: str) -> object:
        try:
            return float(text)
        except ValueError:
            return text or None

    with file.open(encoding="utf-8", newline="") as opened:
        return [{key: value(v) for key, v in row.items()} for row in csv.DictReader(opened)]


def with_outliers(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Half of the experts answer the same by matrices that are hard to round."""
    dice, found = torch.Generator().manual_seed(seed), dict(tensors)
    for down in half_of(tensors, dice):
        up = down.replace("down_proj", "up_proj")
        columns = torch.randperm(found[down].shape[1], generator=dice)[:N_OUTLIERS]
        found[down], found[up] = found[down].clone(), found[up].clone()
        found[down][:, columns] *= OUTLIER
        found[up][columns] /= OUTLIER
    return found


def with_low_rank(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Half of the experts have matrices of rank 8."""
    dice, found = torch.Generator().manual_seed(seed), dict(tensors)
    for down in half_of(tensors, dice):
        for part in ("gate", "up", "down"):
            name = down.replace("down", part)
            u, s, v = torch.linalg.svd(found[name].double(), full_matrices=False)
            found[name] = ((u[:, :RANK] * s[:RANK]) @ v[:RANK]).to(found[name].dtype)
    return found


def half_of(tensors: dict[str, Tensor], dice: torch.Generator) -> Iterator[str]:
    """The down matrices of a random half of all experts."""
    names = sorted(name for name in tensors if "experts" in name and "down_proj" in name)
    for place in torch.randperm(len(names), generator=dice)[: len(names) // 2].tolist():
        yield names[place]


PLANTED: dict[str, Callable[[dict[str, Tensor], int], dict[str, Tensor]]] = {
    "outliers": with_outliers,
    "low_rank": with_low_rank,
}


def curves(bench: Bench, name: str, *, is_brief: bool) -> tuple[Row, dict[str, list[Row]]]:
    """The base of a model, and every series."""
    model = BUNDLED
    if name in PLANTED:
        model = bench.place / name
        if not model.exists():
            copied(PLANTED[name](bundled_weights(), 0), model)
    profile = bench.profile(model)
    base, cuts = bench.cuts(profile)
    sizes = [int(row["bytes"]) for row in cuts]
    found = {"cut": cuts}
    if name == "low_rank":
        found |= bench.menu(profile, f"{WIDTHS},lowrank:0.125,lowrank:0.25", sizes, "lowrank, ")
        found["widths, per expert"] = bench.compressed(
            profile, "widths", sizes, "--options", WIDTHS
        )
    else:
        found |= bench.menu(profile, WIDTHS, sizes, "")
        weighed = ("--options", WIDTHS, "--weigh", "answers")
        found["weighed by answers"] = bench.compressed(profile, "weighed", sizes, *weighed)
    for fraction in () if is_brief else (0.75, 0.5):
        cut = bench.place / f"{name}-{fraction}"
        if not cut.exists():
            asked = ("--profile", profile, "--by", "reap", "--keep-fraction", fraction)
            bench.run("prune", *asked, "--no-verify", "--out", cut)
        own = [size for size in sizes if size < (cut / "model.safetensors").stat().st_size]
        asked = ("--options", WIDTHS)
        found[f"cut to {fraction:.0%}, then per expert"] = bench.compressed(
            bench.profile(cut), "both", own, *asked
        )
    return base, found


def score(row: Row) -> float:
    """Percent of right answers, or perplexity."""
    if row.get("accuracy") is not None:
        return 100 * float(row["accuracy"])
    return float(row["perplexity"])


def report(bench: Bench, name: str, base: Row, found: dict[str, list[Row]]) -> None:
    """Prints a table, draws a figure."""
    is_text = bench.text is not None
    heads = ("series", "MB", "bits", "perplexity" if is_text else "accuracy (%)", "log p right")
    rows = [["unedited", base["bytes"] / 1e6, None, score(base), base.get("right_logprob")]]
    for series, own in found.items():
        for row in own:
            figures = [row["bytes"] / 1e6, row.get("bits"), score(row), row.get("right_logprob")]
            rows.append([series, *figures])
    columns = tuple(
        Column(head, form)
        for head, form in zip(heads, ("", ".2f", ".2f", ".2f", ".4f"), strict=True)
    )
    print(as_markdown(Table(name, columns, rows)), flush=True)
    lines = []
    for series, own in found.items():
        values = [score(row) for row in own]
        if is_text:
            values = [math.log(value) for value in values]
        sizes = tuple(row["bytes"] / 1e6 for row in own)
        lines.append(series_of(series, values, [(None, None)] * len(own), sizes))
    label = "loss (nats)" if is_text else "accuracy (%)"
    for file, data in draw_lines(f"compression_{name}", lines, None, ("MB", label)).items():
        (bench.place / file).write_bytes(data)


def main() -> None:
    """Reads the command line, runs every model, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--place", type=Path, required=True, help="a folder; resumed if it is there"
    )
    models = ("bundled", *PLANTED)
    parser.add_argument("--models", nargs="+", choices=models, default=list(models))
    parser.add_argument("--limit", type=int, help="questions of each subject; all without")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--text", type=Path, help="judge by these texts")
    parser.add_argument("--brief", action="store_true", help="without cut and compressed")
    args = parser.parse_args()
    args.place.mkdir(parents=True, exist_ok=True)
    bench, written = Bench(args.place, args.limit, args.shots, args.text), {}
    for name in args.models:
        base, found = curves(bench, name, is_brief=args.brief)
        report(bench, name, base, found)
        written[name] = {"base": base, **found}
    content = {"machine": machine(), "options": vars(args), "models": written}
    (args.place / "compression.json").write_text(json.dumps(content, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
