"""Prints what a merged expert's router row should be, and merging beside pruning to the same size.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.merging [--part rows accuracy] [--gates bundled …]

Rows: the bundled model, and one random model for each way in which families make gate weights of
logits, as in `fold.py`. Accuracy: the bundled model on the test split of its quiz.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from benchmarks.fold import BUNDLED, KINDS, random_model
from expertcut.checkpoints.build import BuildOptions, Built, build, choose_groups, merge
from expertcut.data import Selection, load_quiz
from expertcut.edits.edit_settings import CutSettings, MergeSettings
from expertcut.edits.merging import METHODS, RouterRow
from expertcut.edits.selection import choose
from expertcut.evaluation.evaluate import find_models, results, score
from expertcut.evaluation.results import Scored, Scoring
from expertcut.models.load import LoadOptions, find_source
from expertcut.profiling.measure import MeasureOptions, measure
from expertcut.profiling.storage import Profile, load_profile
from expertcut.reporting.eval_tables import results_table
from expertcut.reporting.tables import Cell, Column, Table, as_markdown

AS_IS, UNASKED = BuildOptions(LoadOptions()), BuildOptions(LoadOptions(), is_verified=False)
COUNTS = (24, 16)  # of 32


def profiled(model: Path, folder: Path, limit: int | None) -> Profile:
    """The model's profile of the bundled quiz, split val, 5 shots, one thread."""
    quiz = load_quiz(Selection(str(BUNDLED / "quiz"), "val", 5, limit=limit))
    source, options = find_source(str(model)), MeasureOptions(threads=1)
    list(measure(source, quiz, limit, LoadOptions(), options).run(folder))
    return load_profile(folder)


def merged(profile: Profile, settings: MergeSettings, folder: Path, options: BuildOptions) -> Built:
    """The checkpoint of the groups that these settings choose."""
    plan = choose_groups(profile, settings, folder, options.load_as)
    return merge(profile, settings, plan, folder, options)


def row_table(place: Path, gates: list[str], limit: int | None) -> Table:
    """One row per gate, method and kind of row; the reference is the unedited router's choices."""
    body: list[list[Cell]] = []
    models = {"bundled: softmax over all, cut to K": BUNDLED} if "bundled" in gates else {}
    for kind, (family, changes) in KINDS.items():
        if family in gates:
            model = random_model(place / f"random {family}", family, changes)
            models[f"random {family}: {kind}"] = model
    for number, (kind, model) in enumerate(models.items()):
        profile = profiled(model, place / f"p{number}", None if model == BUNDLED else limit)
        for n_keep in COUNTS:
            for by in METHODS:
                body += [[kind, n_keep, by, *cells] for cells in _rows(profile, n_keep, by, place)]
    columns = [Column("gate"), Column("kept of 32"), Column("by"), Column("router row")]
    for against in ("the unedited router", "the base"):
        columns += [Column(f"median |Δ log p| to {against}", ".4f"), Column("flipped of 256")]
    return Table("Rows of merged experts", tuple(columns), body)


def _rows(profile: Profile, n_keep: int, by: str, place: Path) -> Iterator[list[Cell]]:
    for router in get_args(RouterRow):
        settings = MergeSettings(keep=n_keep, by=by, router=router)
        built = merged(profile, settings, place / "cut", AS_IS)
        shutil.rmtree(place / "cut")
        assert built.proof is not None
        base, reference, _ = built.proof.held_out
        cells: list[Cell] = [router]
        for found in (reference, base):
            cells += [found.median_abs_logprob_diff, found.flipped]
        yield cells


def accuracy_table(place: Path) -> Table:
    """The bundled model cut and merged to the same counts, on its whole test split."""
    profile = profiled(BUNDLED, place / "profile", None)
    paths = [str(BUNDLED)]
    for n_keep in COUNTS:
        for positions in ("answer", "all"):
            pruning = choose(profile, CutSettings(keep=n_keep, positions=positions))
            paths.append(str(place / f"prune-{n_keep}-{positions}"))
            build(profile, pruning.draft, Path(paths[-1]), UNASKED)
        for by in METHODS:
            for aligns in (True, False):
                paths.append(str(place / f"{by}-{n_keep}-{'aligned' if aligns else 'as-is'}"))
                settings = MergeSettings(keep=n_keep, by=by, align=aligns)
                merged(profile, settings, Path(paths[-1]), UNASKED)
    quiz = load_quiz(Selection(str(BUNDLED / "quiz"), "test", 5))
    scoring = Scoring(quiz, None, LoadOptions(), MeasureOptions(threads=1))
    steps = [list(score(source, scoring, place / "scores")) for source in find_models(paths)]
    scored = [step for steps_of_one in steps for step in steps_of_one if isinstance(step, Scored)]
    return results_table(results(scoring, scored))


def main() -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", nargs="+", default=["rows", "accuracy"])
    gates = ["bundled", *(family for family, _ in KINDS.values())]
    parser.add_argument("--gates", nargs="+", default=gates, choices=gates)
    parser.add_argument("--limit", type=int, default=20, help="profiled questions of each subject")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "rows" in options.part:
            table = row_table(Path(folder), options.gates, options.limit)
            print(as_markdown(table), flush=True)
        if "accuracy" in options.part:
            print(as_markdown(accuracy_table(Path(folder))))


if __name__ == "__main__":
    main()
