"""`sweep`: a cell answers as the checkpoint of its plan; nothing finished is lost."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from expertcut.checkpoints.build import BuildOptions, build
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits.criteria import CRITERIA, read_criteria
from expertcut.edits.edit_settings import CutSettings, read_fractions
from expertcut.edits.selection import choose
from expertcut.errors import OutputError, PlanError, ProfileError, SettingsError
from expertcut.evaluation.evaluate import results, score
from expertcut.evaluation.results import Scored, Scoring
from expertcut.evaluation.search_results import Grid, load_sweep
from expertcut.evaluation.sweep_run import SweepRun
from expertcut.models.load import LoadOptions, find_source
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.statistics import Answers
from expertcut.profiling.storage import Profile, load_profile
from expertcut.scoring.engine import ask
from expertcut.scoring.packing import Pass
from expertcut.scoring.passes import ignore
from tests.conftest import Commands, open_model

GRID = Grid(("activations", "random"), (0.75, 0.5))
STOCK = CutSettings()
FORMS = [
    ("olmoe", STOCK),
    ("olmoe", CutSettings(fold="off")),
    ("olmoe", CutSettings(layout="exact")),
    ("olmoe", CutSettings(layout="exact", removed="mean")),
    ("deepseek_v3", STOCK),
]


@pytest.fixture(scope="module")
def asked(quiz_folder: Path) -> Quiz:
    return load_quiz(Selection(str(quiz_folder), shots=1, limit=3))


def asking(quiz: Quiz, **options: bool) -> Scoring:
    return Scoring(quiz, None, LoadOptions(), MeasureOptions(**options))


def swept(
    profile: Profile, quiz: Quiz, folder: Path, way: CutSettings = STOCK, grid: Grid = GRID
) -> int:
    """Runs what is missing; how many forward passes that took."""
    passes: list[Pass] = []
    sweeping = SweepRun(profile, grid, way, asking(quiz))
    for step in sweeping.steps(folder):
        list(step.run(passes.append))
    return len(passes)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those with times."""
    files = (f for f in folder.rglob("*") if f.is_file() and f.name != "run.json")
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def cell_answers(folder: Path, slug: str) -> Answers:
    (found,) = (folder / "cells").glob(f"{slug}-????????")
    return load_profile(found).answers


# The law


@pytest.mark.parametrize(("family", "way"), FORMS, ids=lambda value: str(value)[:60])
def test_a_cell_equals_eval_of_the_written_checkpoint(
    profile_of: Callable[[str], Profile],
    asked: Quiz,
    tmp_path: Path,
    family: str,
    way: CutSettings,
) -> None:
    profile = profile_of(family)
    grid = Grid(("activations",), (0.5,))
    swept(profile, asked, tmp_path / "sweep", way, grid)
    (cell,) = load_sweep(tmp_path / "sweep").cells
    chosen = choose(profile, way.updated(keep_fraction=0.5))
    out, as_loaded = tmp_path / "cut", BuildOptions(LoadOptions(), is_verified=False)
    build(profile, chosen.draft, out, as_loaded)
    scoring = Scoring(asked, None, LoadOptions(), MeasureOptions("none"))
    models = (profile.info.model.id, str(out))
    scored = [list(score(find_source(m), scoring, tmp_path / "c", ignore))[-1] for m in models]
    base, written = (s for s in scored if isinstance(s, Scored))
    found = cell_answers(tmp_path / "sweep", chosen.draft.slug)
    finite_NC = np.isfinite(found.logprob_NC)
    assert np.abs(found.logprob_NC - written.answers.logprob_NC)[finite_NC].max() <= 1e-4
    if way.layout == "exact" and way.removed == "zero":
        assert np.array_equal(found.logprob_NC, written.answers.logprob_NC)
    assert np.array_equal(found.logprob_NC.argmax(1), written.answers.logprob_NC.argmax(1))
    moved_NC = np.abs(found.logprob_NC - base.answers.logprob_NC)[finite_NC]
    assert moved_NC.max() > 0.01, "the cut did nothing"
    evaluated = results(scoring, [base, written])
    _, its = evaluated.models
    for name in ("accuracy", "ci95", "parameters", "active_parameters", "bytes"):
        assert getattr(cell, name) == getattr(its, name), name
    change = evaluated.comparisons[0].model_dump()
    assert {k: change[k] for k in cell.change.model_dump()} == cell.change.model_dump()
    assert cell.keep == {name: edit.keep for name, edit in chosen.draft.edits.items()}


def test_a_sweep_leaves_the_model_as_it_was(
    profile_of: Callable[[str], Profile], asked: Quiz, tmp_path: Path
) -> None:
    sweeping = SweepRun(profile_of("olmoe"), GRID, STOCK, asking(asked))
    before = ask(sweeping.engine, asked)
    for step in sweeping.steps(tmp_path / "sweep"):
        list(step.run(ignore))
    assert bool((ask(sweeping.engine, asked) == before).all())
    assert any(cell.median_abs_logprob_diff > 0.01 for cell in sweeping.sweep.cells)


def test_a_global_budget_is_swept_too(
    profile_of: Callable[[str], Profile], asked: Quiz, tmp_path: Path
) -> None:
    grid = Grid(("activations",), (0.5,))
    settings = CutSettings(layout="exact", budget="global", min_keep=3)
    swept(profile_of("olmoe"), asked, tmp_path / "sweep", settings, grid)
    (cell,) = load_sweep(tmp_path / "sweep").cells
    kept = [len(experts) for experts in cell.keep.values()]
    assert sum(kept) == 8 and min(kept) >= 3
    assert all(len(experts) <= 5 for experts in cell.keep.values())


# What is finished is kept


class Stop(Exception):
    """In place of a kill."""


def stopping_after(n: int) -> Callable[[Pass], None]:
    passes: Iterator[int] = iter(range(n))

    def see(_step: Pass) -> None:
        if next(passes, None) is None:
            raise Stop

    return see


def test_a_sweep_that_was_killed_comes_to_the_same_bytes(
    profile_of: Callable[[str], Profile], asked: Quiz, tmp_path: Path
) -> None:
    profile = profile_of("olmoe")
    n_passes = swept(profile, asked, tmp_path / "whole")
    assert swept(profile, asked, tmp_path / "whole") == 0, "it was all there"
    n_done = []
    for n in (2, n_passes // 3, n_passes // 3):
        see = stopping_after(n)
        sweeping = SweepRun(profile, GRID, STOCK, asking(asked))
        with pytest.raises(Stop):
            for step in sweeping.steps(tmp_path / "killed"):
                list(step.run(see))
        n_done.append(len(load_sweep(tmp_path / "killed").cells))
    assert n_done == sorted(n_done) and 0 < n_done[-1] < 4
    left = swept(profile, asked, tmp_path / "killed")
    assert 0 < left < n_passes / 2
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert load_sweep(tmp_path / "killed").is_complete


def test_what_another_process_did_is_not_done_again(
    profile_of: Callable[[str], Profile], asked: Quiz, tmp_path: Path
) -> None:
    profile = profile_of("olmoe")
    swept(profile, asked, tmp_path / "alone")
    second = SweepRun(profile, GRID, STOCK, asking(asked, waits=False))
    for step in second.steps(tmp_path / "both"):
        list(step.run(ignore))
    assert load_sweep(tmp_path / "both").cells == ()
    assert swept(profile, asked, tmp_path / "both") == 0
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")


def test_a_cell_that_is_gone_is_asked_again_and_others_are_not(
    profile_of: Callable[[str], Profile], asked: Quiz, tmp_path: Path
) -> None:
    profile, folder = profile_of("olmoe"), tmp_path / "sweep"
    n_passes = swept(profile, asked, folder)
    before = contents(folder)
    file = folder / "sweep.json"
    content = json.loads(file.read_text())
    gone = content["cells"].pop(1)
    file.write_text(json.dumps(content))
    for cell in (folder / "cells").glob(f"keep-4-{gone['by']}-*"):
        shutil.rmtree(cell)
    assert swept(profile, asked, folder) == n_passes // 5
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ((Grid(("activations",), (0.75, 0.5)), STOCK, 1), "its by was"),
        ((Grid(GRID.by, (0.75,)), STOCK, 1), "its fractions was"),
        ((GRID, CutSettings(layout="exact"), 1), "its layout was stock, now it is exact"),
        ((GRID, CutSettings(seed=1), 1), "its seed was 0, now it is 1"),
        ((GRID, STOCK, 0), "its scored differs"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(
    profile_of: Callable[[str], Profile],
    quiz_folder: Path,
    tmp_path: Path,
    other: tuple[Grid, CutSettings, int],
    told: str,
) -> None:
    profile = profile_of("olmoe")
    begun = SweepRun(profile, GRID, STOCK, asking(quiz(quiz_folder, 1)))
    next(begun.steps(tmp_path / "sweep"))
    before = contents(tmp_path / "sweep")
    assert before
    grid, way, shots = other
    now = SweepRun(profile, grid, way, asking(quiz(quiz_folder, shots)))
    with pytest.raises(OutputError, match=told):
        next(now.steps(tmp_path / "sweep"))
    assert contents(tmp_path / "sweep") == before


def quiz(folder: Path, shots: int) -> Quiz:
    return load_quiz(Selection(str(folder), shots=shots, limit=1))


@pytest.mark.parametrize("what", ["notes.txt", "sweep.json"])
def test_a_folder_of_something_else_is_refused(
    profile_of: Callable[[str], Profile], quiz_folder: Path, tmp_path: Path, what: str
) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / what).write_text("{}")
    scoring = asking(quiz(quiz_folder, 1))
    with pytest.raises(OutputError, match=r"holds no sweep|is not a valid sweep"):
        next(SweepRun(profile_of("olmoe"), GRID, STOCK, scoring).steps(tmp_path / "sweep"))


def test_what_a_profile_is_too_small_for_is_said_before_anything_is_written(
    profile_of: Callable[[str], Profile], asked: Quiz, tmp_path: Path
) -> None:
    moe = open_model(Path(profile_of("olmoe").info.model.id))
    list(Measurement(moe, asked, 3, MeasureOptions(stats="answer")).run(tmp_path / "small"))
    small, way = load_profile(tmp_path / "small"), CutSettings(positions="all")
    grid = Grid(("random", "activations"), (0.5,))
    sweeping = SweepRun(small, grid, way.updated(positions=None), asking(asked))
    assert next(sweeping.steps(tmp_path / "can"))
    sweeping = SweepRun(small, Grid(("activations",), (0.5,)), way, asking(asked))
    with pytest.raises(ProfileError, match="--stats all"):
        next(sweeping.steps(tmp_path / "cannot"))
    assert not (tmp_path / "cannot").exists()


# The command


def test_the_command_writes_a_table_a_figure_and_what_show_reads(
    profile_of: Callable[[str], Profile], expertcut: Commands
) -> None:
    profile = profile_of("olmoe")
    shared = ("0.75,0.5", "--profile", profile.path, "--by", "activations,random")
    out = expertcut("sweep", *shared)
    folder = Path("sweeps") / profile.path.name
    lines, words = out.splitlines(), " ".join(out.split())
    assert f"written   {folder}" in lines and "none of the questions scored here" in words
    assert words.count("best At 0.") == 2 and max(map(len, lines[:-1])) <= 80 and len(lines) <= 40
    assert lines[-1].startswith("next      expertcut prune --sparsity 0.")
    wider = expertcut("sweep", *shared, "--margin", 100)
    assert wider.count("│ holds") + wider.count("│ better") == 4 and "worse" not in wider
    assert (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in (folder / "sweep.svg").read_bytes()
    lines = (folder / "sweep.csv").read_text().splitlines()
    assert len(lines) == 1 + 1 + 4
    assert expertcut("show", folder, "--format", "csv").splitlines() == lines
    assert len(json.loads(expertcut("show", folder, "--format", "json"))["cells"]) == 4
    assert "| random 0.5 |" in expertcut("show", folder / "sweep.json", "--format", "md")
    assert "unedited" in expertcut("show", folder)
    before = contents(folder)
    assert expertcut("prune", "--sweep", *shared) == out  # its earlier spelling
    assert contents(folder) == before


def test_what_the_profile_asked_is_not_scored_without_a_word(
    profile_of: Callable[[str], Profile], expertcut: Commands
) -> None:
    profile = profile_of("olmoe")
    n = sum(subject.questions for subject in profile.info.quiz.subjects.values())
    asked = ("prune", "--profile", profile.path, "--sweep", "0.5", "--split", "val")
    out = expertcut(*asked, "--out", "here")
    assert f"{n} of the {n} val questions scored here were used to choose" in " ".join(out.split())
    assert load_sweep(Path("here")).chosen_on.overlap == n


def test_show_says_that_a_sweep_is_unfinished(
    profile_of: Callable[[str], Profile], asked: Quiz, expertcut: Commands
) -> None:
    sweeping = SweepRun(profile_of("olmoe"), GRID, STOCK, asking(asked))
    steps = sweeping.steps(Path("half"))
    next(steps)
    shown = " ".join(expertcut("show", "half").split())
    assert "0 of 4 cells: the same command does the rest" in shown
    assert "At 0.5 no cell is finished." in shown


def test_showing_a_sweep_needs_neither_torch_nor_matplotlib(
    profile_of: Callable[[str], Profile], asked: Quiz, tmp_path: Path
) -> None:
    sweeping = SweepRun(profile_of("olmoe"), GRID, STOCK, asking(asked))
    next(sweeping.steps(tmp_path / "half"))
    code = "import sys; from pathlib import Path\n"
    code += "from expertcut.reporting.views import find_shown\n"
    code += (
        "find_shown(Path(sys.argv[1])).tables(); print({'torch', 'matplotlib'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "half")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--sweep", "2"), "'2' must be a share"),
        (("--sweep", "half"), "'half' must be a share"),
        (("--sweep", "0.5,0.5"), "has 0.5 twice"),
        (("--sweep", ""), "must be a share"),
        (("--sweep", "0.1"), "keep 2 to 8"),
        (("--sweep", "0.5", "--by", "fame"), "'fame' is not a criterion"),
        (("--sweep", "0.5", "--by", "random,random"), "names random twice"),
        (("--sweep", "0.5", "--keep", "4"), "--keep does not go with --sweep"),
        (("--sweep", "0.5", "--plan-only"), "--plan-only does not go with --sweep"),
        (("--sweep", "0.5", "--boost", "3"), "--boost does not go with --sweep"),
        (("--sweep", "0.5", "--budget", "global"), "add --layout exact"),
        (("--sweep", "0.5", "--min-keep", "3"), "needs --budget global"),
        (("--sweep", "0.5", "--split", "nights"), "nights"),
        (("--sweep", "0.5", "--subjects", "dark_rooms"), "dark_rooms"),
        (("--keep", "4", "--split", "test"), "--split is for a MODEL that is profiled first"),
        (("--keep", "4", "--by", "fame"), "'fame' is not a criterion"),
        (("--keep", "4", "--by", "random,activations"), "names several criteria"),
        (("--max-bytes", "few"), "is not a size"),
        (("--max-bytes", "1kB"), "the smallest cut, --keep 2, has"),
        (("--max-bytes", "1GB", "--keep", "4"), "only one of them"),
        (("--keep", "4", "--budget", "global"), "add --layout exact"),
    ],
)
def test_what_cannot_be_swept_or_kept_is_refused_in_one_line(
    profile_of: Callable[[str], Profile], expertcut: Commands, options: tuple[str, ...], told: str
) -> None:
    out = expertcut(
        "prune", "--profile", profile_of("olmoe").path, *options, "--out", "o", status=2
    )
    assert told in out and out.count("\n") == 1 and "Traceback" not in out
    assert not Path("o").exists()


def test_max_bytes_keeps_what_fits(
    profile_of: Callable[[str], Profile], expertcut: Commands
) -> None:
    prune = ("prune", "--profile", profile_of("olmoe").path, "--no-verify")
    for n in (5, 6):
        expertcut(*prune, "--keep", n, "--out", n)
    five, six = (Path(f"{n}/model.safetensors").stat().st_size for n in (5, 6))
    out = expertcut(*prune, "--max-bytes", six - 1, "--out", "o")
    assert f"the weights will have {five:,} bytes, of at most {six - 1:,}" in out
    assert "5 of 8 experts stay in each of 2 layers" in out
    assert Path("o/model.safetensors").read_bytes() == Path("5/model.safetensors").read_bytes()


def test_grids_are_read_as_they_are_written() -> None:
    assert read_fractions("0.75, .5,1", "--sweep") == (0.75, 0.5, 1.0)
    assert read_criteria("all") == tuple(CRITERIA)
    assert read_criteria("random, activations") == ("random", "activations")
    for wrong in ("", ",", "0", "-1", "nan", "inf", "1.01"):
        with pytest.raises(SettingsError):
            read_fractions(wrong, "--sweep")


def test_a_grid_that_keeps_too_few_is_refused_before_anything_is_loaded(
    profile_of: Callable[[str], Profile],
) -> None:
    blocks = profile_of("deepseek_v3").info.model.blocks
    Grid(("random",), (0.5,)).check(blocks, STOCK)
    with pytest.raises(PlanError, match="keep 4 to 8"):
        Grid(("random",), (0.5, 0.25)).check(blocks, STOCK)
