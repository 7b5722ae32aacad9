"""What a user can mend: exit status 2, one line that says what is wrong, and nothing written."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from expertcut.cli import main
from expertcut.data import Selection, load_quiz
from expertcut.models.load import LoadOptions, find_source, load
from expertcut.profiling.measure import MeasureOptions, measure
from expertcut.profiling.storage import Profile, load_profile
from tests.conftest import make_checkpoint, write_quiz
from tests.support.hand_made import gap

Refused = Callable[..., str]
Change = Callable[[Path], object]

ROW = "Which one?,amber,birch,cloud,delta,A\n"
RECORD = {"question": "Which one?", "choices": ["amber", "birch"], "answer": 0}
CHUNK = "chunks/old_clocks-0.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
CHANGES = (["prune", "--keep", "4"], ["reweight", "--boost", "1=1"])
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "olmoe", "olmoe")


@pytest.fixture(scope="module")
def profile(model: Path, quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A finished one, test split, one shot."""
    folder = tmp_path_factory.mktemp("profile") / "finished"
    questions = load_quiz(Selection(str(quiz_folder), shots=1))
    options = MeasureOptions(threads=1)
    for _ in measure(find_source(str(model)), questions, None, LoadOptions(), options).run(folder):
        pass
    return load_profile(folder)


@pytest.fixture
def profile_copy(profile: Profile, tmp_path: Path) -> Path:
    return Path(shutil.copytree(profile.path, tmp_path / "copy"))


@pytest.fixture
def asked_again(model: Path, quiz_folder: Path) -> list[str]:
    """The command that made `profile`, all but its --out."""
    return ["profile", str(model), "--quiz", str(quiz_folder), "--shots", "1"]


@pytest.fixture
def commands(asked_again: list[str], profile: Profile) -> dict[str, list[str]]:
    """Commands that would work, all but their --out, by name."""
    changes = {c[0]: [*c, "--profile", str(profile.path)] for c in CHANGES}
    return {"profile": asked_again, **changes}


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> Iterator[Refused]:
    """Runs a command line in `tmp_path`, checks that it was refused, and gives its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        before = contents(tmp_path)
        monkeypatch.setattr(sys, "argv", ["expertcut", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert contents(tmp_path) == before
        return one_line(stopped.value.code, capsys.readouterr().err)

    yield run
    torch.set_num_threads(1)


def one_line(status: object, stderr: str) -> str:
    assert status == 2, stderr
    assert stderr.startswith("expertcut: "), stderr
    assert stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    return stderr.strip()


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def edit_json(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edited_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def test_tensors_that_the_architecture_has_no_place_for_are_named(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "more"))
    edited_weights(lambda t: t.update({"model.extra.weight": torch.ones(2)}))(folder)
    load(find_source(str(folder)), LoadOptions())
    assert "no place for 1 tensors, first model.extra.weight: left out" in caplog.text


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "no/where", "n/o/where", "a file"])
@pytest.mark.parametrize("command", ["profile", "eval"])
def test_a_model_that_is_not_there_is_refused(
    command: str, name: str, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "a file").touch()
    assert f"no such model: {name} is " in refused(command, name)
    (tmp_path / "my.jsonl").touch()
    assert refused(command, "my.jsonl").endswith("no model: give it as --quiz my.jsonl")


@pytest.mark.parametrize(
    "name", ["nowhere", "./nowhere", "no/where", "n/o/where", "nowhere.jsonl", "empty"]
)
def test_a_quiz_that_is_not_there_is_refused(
    name: str, model: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "empty").mkdir()
    line = refused("profile", model, "--quiz", name)
    assert "no such quiz: " in line or "empty holds no quiz" in line
    assert name in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--subjects", "red_birds"], "no subject red_birds in split test: it has green_birds"),
        (["--split", "trian"], "no questions in split trian: it has dev, test, val, no trian/"),
        (["--shots", "6"], "6 shots asked but split dev of green_birds has 5"),
        (["--shots", "-1"], "--shots: must be greater than or equal to 0, not -1"),
        (["--limit", "0"], "--limit: must be greater than or equal to 1, not 0"),
    ],
)
def test_questions_that_the_quiz_does_not_have_are_refused(
    options: list[str], words: str, model: Path, quiz_folder: Path, refused: Refused
) -> None:
    assert words in refused("profile", model, "--quiz", quiz_folder, *options)


@pytest.mark.parametrize("name", ["birds", "birds.jsonl"])
def test_a_quiz_without_questions_is_refused(
    name: str, model: Path, tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / (name if name.endswith(".jsonl") else f"{name}/test/birds_test.csv")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    line = refused("profile", model, "--quiz", name, "--shots", "0")
    assert f"{name} has no questions in split test" in line


BAD_DATA_SETS: dict[str, tuple[dict[str, str], str]] = {
    "a broken card": ({"README.md": "---\nconfigs: [\n---\n"}, "while parsing"),
    "a card that names no file": (
        {"README.md": "---\nconfigs: [{config_name: a, data_files: nowhere*}]\n---\n"},
        "No (supported) data files found",
    ),
    "a script": ({"quiz.py": ""}, "scripts are no longer supported"),
}


@pytest.mark.parametrize("name", BAD_DATA_SETS)
def test_a_data_set_that_cannot_be_read_is_refused(
    name: str, model: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    files, words = BAD_DATA_SETS[name]
    (tmp_path / "quiz").mkdir()
    pq.write_table(pa.Table.from_pylist([RECORD]), tmp_path / "quiz" / "test-00000.parquet")
    for file, content in files.items():
        (tmp_path / "quiz" / file).write_text(content)
    line = refused("profile", model, "--quiz", "quiz", "--shots", "0")
    assert "no such quiz: quiz cannot be read: " in line
    assert words in line


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("8", "no expert 8 in layer 1: it has experts 0 to 7"),
        ("0:8", "no expert 8 in layer 0"),
        ("2:1", "no layer 2: the model has MoE layers 0 to 1"),
        ("x", "'x' is not an expert: write 12, 3:12 or 3:12=0.25"),
        ("", "'' is not an expert: write 12, 3:12 or 3:12=0.25"),
        ("-1", "'-1' is not an expert: write 12, 3:12 or 3:12=0.25"),
        ("1:", "'1:' is not an expert: write 12, 3:12 or 3:12=0.25"),
        ("1:2:3", "'1:2:3' is not an expert: write 12, 3:12 or 3:12=0.25"),
        ("1=", "'1=' is not an expert: write 12, 3:12 or 3:12=0.25"),
        ("1=much", "'1=much' is not an expert: write 12, 3:12 or 3:12=0.25"),
        ("1=nan", "'1=nan' is not an expert: write 12, 3:12 or 3:12=0.25"),
        ("1=.", "'.' is not a number"),
        ("1=0", "a bias of 0 cannot tilt anything"),
        ("1=1e999", "a bias of 1e999 cannot tilt anything"),
        ("1=-0.5", "use --suppress"),
    ],
)
def test_an_expert_that_is_not_there_or_not_named_is_refused(
    target: str, words: str, profile: Profile, refused: Refused
) -> None:
    assert words in refused("reweight", "--profile", profile.path, f"--boost={target}")


def test_a_tilt_that_has_no_target_or_two_strengths_is_refused(
    profile: Profile, refused: Refused
) -> None:
    command = ("reweight", "--profile", profile.path)
    assert "say which experts to tilt" in refused(*command)
    assert "named twice" in refused(*command, "--boost", "1=1", "--suppress", "1:1=1")


def test_a_strength_must_be_given_where_the_gap_is_closed_already(
    profile: Profile, refused: Refused
) -> None:
    gaps = [gap(profile, 1, expert) for expert in range(8)]
    let_in, left_out = gaps.index(min(gaps)), gaps.index(max(gaps))
    assert gaps[let_in] < 0 < gaps[left_out]
    command = ("reweight", "--profile", profile.path)
    line = refused(*command, "--boost", let_in)
    assert f"expert {let_in} of layer 1 is admitted on average already" in line
    assert f"give the strength, as in --boost 1:{let_in}=0.5" in line
    assert "is left out on average already" in refused(*command, "--suppress", left_out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "say how many experts to keep"),
        (["--keep-active", "--keep", "4"], "only one of them"),
        (["--keep", "4", "--keep-fraction", "0.5"], "only one of them"),
        (["--keep", "1"], "routes each token to 2 of 8 experts: keep 2 to 8"),
        (["--keep", "9"], "--keep 9 does not fit"),
        (["--keep", "-4"], "--keep: must be greater than or equal to 1, not -4"),
        (["--keep", "few"], "--keep"),
        (["--keep-fraction", "0.1"], "keep 2 to 8"),
        (["--keep-fraction", "1.5"], "must be above 0, at most 1"),
        (["--keep-fraction", "nan"], "--keep-fraction: must be a finite number"),
        (["--keep", "4", "--by", "weather"], "--by: 'weather' is no"),
        (["--keep", "4", "--positions", "some"], "'some'"),
        (["--keep", "4", "--layout", "sideways"], "'sideways'"),
        (["--keep", "4", "--threads", "3"], "the profile was made with 1"),
        (["--keep", "4", "--dtype", "int8"], "--dtype: 'int8' is not a dtype: take auto"),
        (["--keep", "4", "--device", "moon"], "--device moon is not to be had"),
    ],
)
def test_a_cut_that_cannot_be_made_is_refused(
    options: list[str], words: str, profile: Profile, refused: Refused
) -> None:
    assert words in refused("prune", "--profile", profile.path, *options)


def test_a_number_and_an_output_folder_are_checked_before_the_quiz_is_read(
    profile_copy: Path, refused: Refused
) -> None:
    edit_json(profile_copy / "profile.json", lambda p: p["quiz"].update(id="gone"))
    command = ("prune", "--profile", profile_copy, "--keep")
    assert "--keep 9 does not fit" in refused(*command, 9)
    assert "copy is not empty" in refused(*command, 4, "--out", profile_copy)
    assert "no such quiz: gone" in refused(*command, 4)


@pytest.mark.parametrize("command", CHANGES, ids=lambda command: command[0])
def test_a_change_without_a_profile_is_refused(
    command: list[str], profile_copy: Path, tmp_path: Path, refused: Refused
) -> None:
    assert "profiles/ holds no profile: run `expertcut profile`" in refused(*command)
    assert "no profile in nowhere" in refused(*command, "--profile", "nowhere")
    (tmp_path / "profiles").mkdir()
    unfinished = profile_copy.rename(tmp_path / "profiles" / "mine")
    (unfinished / CHUNK).unlink()
    assert "profiles/ holds 1 unfinished profile" in refused(*command)


@pytest.mark.parametrize("command", CHANGES, ids=lambda command: command[0])
def test_a_model_whose_weights_changed_since_it_was_profiled_is_refused(
    command: list[str], model: Path, profile_copy: Path, tmp_path: Path, refused: Refused
) -> None:
    changed = Path(shutil.copytree(model, tmp_path / "changed"))
    edit_json(profile_copy / "profile.json", lambda p: p["model"].update(id=str(changed)))
    edited_weights(lambda t: t[EXPERT].mul_(1.5))(changed)
    line = refused(*command, "--profile", profile_copy)
    assert "is a profile of another model" in line
    assert "profile it again" in line


@pytest.mark.parametrize("command", CHANGES, ids=lambda command: command[0])
def test_a_quiz_whose_questions_changed_since_it_was_profiled_is_refused(
    command: list[str], quiz_folder: Path, profile_copy: Path, tmp_path: Path, refused: Refused
) -> None:
    changed = Path(shutil.copytree(quiz_folder, tmp_path / "changed"))
    edit_json(profile_copy / "profile.json", lambda p: p["quiz"].update(id=str(changed)))
    with (changed / "test" / "tall_trees_test.csv").open("a") as file:
        file.write(ROW)
    line = refused(*command, "--profile", profile_copy)
    assert "no longer the quiz that" in line
    edit_json(profile_copy / "profile.json", lambda p: p["quiz"].update(id="changed/gone"))
    line = refused(*command, "--profile", profile_copy)
    assert line.startswith(f"expertcut: the quiz that {profile_copy} was made on: no such quiz: ch")
    assert "run this in" not in line
    (away := tmp_path / "away").mkdir()
    changed.rename(away / "mine")
    edit_json(profile_copy / "profile.json", lambda p: p["quiz"].update(id="mine"))
    line = refused(*command, "--profile", profile_copy.rename(away / "birds"))
    assert line.endswith(f": run this in {away}, where it is")


def test_a_profile_of_another_model_is_never_gone_on_with(
    asked_again: list[str], profile_copy: Path, tmp_path: Path, refused: Refused
) -> None:
    asked_again[1] = str(make_checkpoint(tmp_path / "other", "olmoe", seed=1))
    (profile_copy / CHUNK).unlink()  # something is left to do, so it could be mixed in
    assert "is a profile of another model" in refused(*asked_again, "--out", profile_copy)


@pytest.mark.parametrize("options", [["--shots", "2"], ["--split", "val"], ["--limit", "3"]])
def test_a_profile_of_other_questions_is_never_gone_on_with(
    options: list[str], asked_again: list[str], profile_copy: Path, refused: Refused
) -> None:
    asked = [*asked_again[:-2], *options] if "--shots" in options else [*asked_again, *options]
    assert "is a profile of another quiz" in refused(*asked, "--out", profile_copy)


def test_a_profile_of_another_quiz_is_told_apart_by_a_hash_over_all_subjects(
    asked_again: list[str], quiz_folder: Path, profile_copy: Path, tmp_path: Path, refused: Refused
) -> None:
    other = Path(shutil.copytree(quiz_folder, tmp_path / "elsewhere"))
    last = other / "test" / "tall_trees_test.csv"
    last.write_text(last.read_text().replace("amber", "ember"))
    asked_again[3] = str(other)
    line = refused(*asked_again, "--out", profile_copy)
    theirs, ours = (part.rsplit("(", 1)[1] for part in line.split(")")[:2])
    assert "is a profile of another quiz" in line
    assert theirs != ours


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        (["--batch-tokens", "100"], "batch_tokens 2048, now it is 100"),
        (["--threads", "2"], "threads 1, now it is 2"),
        (["--stats", "answer"], "stats all, now it is answer"),
        (["--dtype", "bfloat16"], "dtype float32, now it is bfloat16"),
    ],
)
def test_a_profile_begun_with_other_settings_is_never_gone_on_with(
    options: list[str],
    setting: str,
    asked_again: list[str],
    profile_copy: Path,
    refused: Refused,
) -> None:
    (profile_copy / CHUNK).unlink()
    line = refused(*asked_again, *options, "--out", profile_copy)
    assert f"was begun with {setting}: give the recorded value" in line


@pytest.mark.parametrize(
    "out",
    [
        ("full", "full is not empty"),
        ("full/a file", "a file is "),
        ("full/a file/new", "cannot be written"),
    ],
)
@pytest.mark.parametrize("command", ["profile", "prune", "reweight", "reweight --plan-only"])
def test_an_output_folder_that_is_taken_is_refused(
    command: str,
    out: tuple[str, str],
    commands: dict[str, list[str]],
    tmp_path: Path,
    refused: Refused,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a file").write_text("mine")
    name, *more = command.split()
    folder, words = out
    assert words in refused(*commands[name], *more, "--out", folder)


def test_results_that_cannot_be_written_are_refused_before_a_model_runs(
    model: Path, quiz_folder: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "a file").write_text("mine")
    command = ("eval", model, "--quiz", quiz_folder, "--shots", "0", "--limit", "1", "--out")
    assert "Is a directory" in refused(*command, "full")
    assert "cannot be written" in refused(*command, "a file/results.json")
    shutil.copytree(model, tmp_path / "mine")
    for name in ("model.safetensors", "config.json"):
        assert "so it is not overwritten" in refused(*command, f"mine/{name}")
        assert "so it is not overwritten" in refused(
            *command, "new.json", "--lm-eval-json", f"mine/{name}"
        )
    assert "name another" in refused(*command, "new.json", "--lm-eval-json", "./new.json")


def test_the_nearest_path_is_named_for_one_that_is_not_there(
    model: Path, profile: Profile, tmp_path: Path, refused: Refused
) -> None:
    for name in ("models/cut", "profiles/birds", "my/quiz"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "results.json").touch()
    prune = ("prune", "--keep", 4, "--profile")
    for line, nearest in {
        ("profile", "models/cit"): "models/cut",
        ("heal", "model/cut"): "models/cut",  # the folder above is misspelt
        (*prune, "profiles/bird"): "profiles/birds",
        ("prune", "--keep", 4, "--profile=profiles/bird"): "profiles/birds",
        ("profile", model, "--quiz", "my/quizz"): "my/quiz",
        ("show", "result.json"): "results.json",
    }.items():
        assert refused(*line).endswith(f"; did you mean {nearest}?")
    assert "did you mean" not in refused("show", "nowhere")
    (tmp_path / "results-reap").mkdir()  # nothing is missing here, though `reap` is near a name
    (tmp_path / "results-reap/x").touch()
    words = ("--by", "reap", "--out", "results-reap")
    assert "did you mean" not in refused("prune", "--profile", profile.path, "--keep", 4, *words)
    assert refused(*prune, profile.path, "--by", "my/quis").count("did you mean") <= 1
    assert "did you mean" not in refused("show", "models/x\0")


def test_show_refuses_a_place_where_nothing_of_its_kind_lies(model: Path, refused: Refused) -> None:
    assert "nothing to show in nowhere" in refused("show", "nowhere")
    (model / "my.jsonl").touch()
    for command in ("show", "report"):
        assert "my.jsonl is a file of questions (JSON" in refused(command, model / "my.jsonl")
    (model / "report.html").touch()
    assert "report.html is a page of report: open it in" in refused("show", model / "report.html")
    assert "nothing to show in " in refused("show", model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("show", "Missing argument"),
        ("eval", "Missing argument"),
        ("report one two", "unexpected extra argument"),
        ("show one two", "--overlap alone"),
        ("profile --wat", "No such option: --wat"),
        ("--wat", "No such option: --wat"),
        ("prof", "No such command 'prof'"),
        ("show there --format pdf", "'pdf'"),
        ("profile --shots few", "--shots"),
        ("profile --stats some", "'some'"),
        ("profile --threads 0", "--threads"),
        ("profile --batch-tokens 0", "--batch-tokens"),
        ("profile --threads 1000000000", "less than or equal to 4096"),  # torch ends the process
        (f"profile --batch-tokens {10**30}", "less than or equal to 1073741824"),
        (f"profile --out {'x' * 300}", "File name too long"),
        (f"prune --keep 4 --profile {'x' * 300}", "File name too long"),
        ("heal there --seed 4294967296", "less than or equal to 4294967295"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused(
    arguments: str, words: str, refused: Refused
) -> None:
    assert words in refused(*arguments.split())


def damaged_parquet(model: Path, folder: Path) -> list[str]:
    (folder / "quiz").mkdir()
    (folder / "quiz" / "test-00000-of-00001.parquet").write_bytes(b"nonsense")
    return ["profile", str(model), "--quiz", "quiz", "--shots", "0"]


def missing_tensor(model: Path, folder: Path) -> list[str]:
    edited_weights(lambda t: t.pop(Q_PROJ))(shutil.copytree(model, folder / "torn"))
    write_quiz(folder / "quiz")
    return ["profile", "torn", "--quiz", "quiz", "--shots", "0"]


# datasets logs what it cannot read, transformers reports what a checkpoint lacks.
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (damaged_parquet, "no such quiz: quiz cannot be read: Parquet magic bytes not found"),
        pytest.param(
            missing_tensor,
            f"torn/model.safetensors lacks 1 of the model's weights, first {Q_PROJ}",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_no_other_library_adds_its_own_lines(
    make: Callable[[Path, Path], list[str]], words: str, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    arguments = make(model, folder)
    before = contents(folder)
    done = subprocess.run(
        [sys.executable, "-m", "expertcut", *arguments],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert words in one_line(done.returncode, done.stderr)
    assert contents(folder) == before
