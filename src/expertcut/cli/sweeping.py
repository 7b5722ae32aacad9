"""How `prune --sweep` asks one loaded model about every cut of a grid."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from expertcut.cli.options import Format, option
from expertcut.cli.output import print_tables, quiet
from expertcut.cli.running import is_first, watched

if TYPE_CHECKING:
    from expertcut.data import Quiz
    from expertcut.edits.ranking import Way
    from expertcut.evaluation.search_results import Grid, Sweep
    from expertcut.models.load import LoadOptions
    from expertcut.profiling.storage import Profile

SweepOption = Annotated[
    str | None,
    option("Score cuts that keep these shares, 0.75,0.5,0.25, and write no checkpoint."),
]
SweepQuiz = Annotated[str | None, option("What --sweep scores: a quiz; the profile's without.")]
SweepSplit = Annotated[str | None, option("Split that --sweep scores.  [default: test]")]
SweepShots = Annotated[int | None, option("Shots of --sweep; the profile's without.")]
SweepSubjects = Annotated[str | None, option("Subjects of --sweep; the profile's without.")]
SweepLimit = Annotated[
    int | None, option("Only the first so many questions of each subject in --sweep.")
]


@dataclass(frozen=True)
class Start:
    """What a cut or a sweep of cuts starts from."""

    profile: "Profile"
    way: "Way"
    load_as: "LoadOptions"
    out: Path | None


@dataclass(frozen=True)
class Scored:
    """The options that say what is scored, None where they are not given."""

    quiz: str | None
    split: str | None
    shots: int | None
    subjects: str | None
    limit: int | None

    def read(self, profile: "Profile") -> "Quiz":
        """The quiz: as profiled where nothing else is said, but its split test.

        Where a fifth of a quiz is held out and nothing else is asked for, it is that fifth.
        """
        from expertcut.data import Selection, load_quiz
        from expertcut.edits.splits import held_out_quiz
        from expertcut.profiling.storage import ProfilePart

        if isinstance(profile, ProfilePart) and all(v is None for v in vars(self).values()):
            return held_out_quiz(profile)
        info = profile.info.quiz
        is_same = self.quiz in (None, info.id)
        subjects = tuple(info.subjects) if is_same else ()
        if self.subjects is not None:
            subjects = tuple(name.strip() for name in self.subjects.split(","))
        shots = info.shots if self.shots is None else self.shots
        revision = info.revision if is_same else None
        asked = (self.quiz or info.id, self.split or "test", shots, subjects)
        return load_quiz(Selection(*asked, self.limit, revision, profile.truncate))


def run_sweep(grid: "Grid", scored: Scored, start: Start) -> None:
    """Every cell that is missing, then the table and the figure."""
    from expertcut.evaluation.sweep import Asking, Sweeping

    quiet()
    quiz = scored.read(start.profile)
    asking = Asking(quiz, scored.limit, start.load_as, is_first())
    folder = start.out or Path("sweeps") / start.profile.path.resolve().name
    sweeping = Sweeping(start.profile, grid, start.way, asking)
    for step in sweeping.steps(folder):
        watched(step.run, step.name, len(quiz), folder)
    if is_first():
        _save(sweeping.found, folder)


def _save(found: "Sweep", folder: Path) -> None:
    from expertcut.files import write_atomically
    from expertcut.reporting.eval_tables import (
        sweep_csv,
        sweep_figure,
        sweep_sentences,
        sweep_table,
    )
    from expertcut.reporting.tables import as_csv

    files = {"sweep.csv": as_csv(sweep_csv(found)).encode(), **sweep_figure(found)}
    for name, content in files.items():
        write_atomically(folder / name, content)
    print_tables([sweep_table(found)], Format.table)
    for sentence in sweep_sentences(found):
        print(sentence)
    print(f"written to {folder}")
