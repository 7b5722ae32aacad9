"""`expertcut merge` from the command line: what it prints, writes and refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from expertcut.checkpoints import shards
from expertcut.data.sources import hash_lines
from expertcut.edits.plan import load_hashes, load_plan
from expertcut.edits.splits import questions_for
from expertcut.profiling.storage import load_profile
from tests.conftest import Commands, make_checkpoint
from tests.support.merged_models import measured


@pytest.fixture(scope="module")
def profiled(quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("merging")
    return measured(
        make_checkpoint(root / "model", "olmoe"), quiz_folder, root / "p", threads=1
    ).path


def test_a_merge_is_proved_shown_and_evaluated(
    profiled: Path, tmp_path: Path, quiz_folder: Path, expertcut: Commands
) -> None:
    printed = expertcut(f"merge --profile {profiled} --keep 4 --by m_smoe --out cut --wide")
    assert "8 of 16 experts joined another" in printed
    for words in ("the unedited base", "under the unedited router", "router rows"):
        assert words in printed
    assert "joined by" in (shown := expertcut("show cut")) and "←" in shown
    assert json.loads(expertcut("show cut --format json"))["removal"] == "merge"
    model = load_profile(profiled).info.model.id
    expertcut(
        f"eval {model} cut --quiz {quiz_folder} --split test --shots 1 --limit 2 --threads 1 "
        "--out r.json"
    )
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["models"][1]["parameters"] < results["models"][0]["parameters"]
    # val was looked at by the profile and by calibration, test by neither
    assert results["models"][1]["chosen_on"]["overlap"] == 0
    looked_at = load_hashes(tmp_path / "cut", load_plan(tmp_path / "cut"))
    questions = questions_for(load_profile(profiled), is_fitting=True)
    assert looked_at == hash_lines(questions.profiled) | hash_lines(questions.tuning)
    assert not looked_at & hash_lines(questions.held_out)


def test_the_plan_alone_and_the_checkpoint_have_the_same_groups(
    profiled: Path, tmp_path: Path, expertcut: Commands
) -> None:
    expertcut(f"merge --profile {profiled} --keep 5 --plan-only")
    expertcut(f"merge --profile {profiled} --keep 5 --no-verify")
    (plan,) = (tmp_path / "plans").iterdir()
    (cut,) = (tmp_path / "checkpoints").iterdir()
    assert plan.name == cut.name == "model-merge-5-m_smoe"
    assert load_plan(plan).blocks == load_plan(cut).blocks
    assert {f.name for f in plan.iterdir()} == {"plan.json", "chosen_on.txt"}
    refusal = expertcut(f"merge --profile {profiled} --keep 5 --no-verify", status=2)
    assert "--force" in refusal and refusal.count("\n") == 1
    expertcut(f"merge --profile {profiled} --keep 6 --no-verify --force --out {cut}")
    assert len(next(iter(load_plan(cut).blocks.values())).keep) == 6


def test_the_ways_of_making_a_row_and_of_averaging_name_what_they_make(
    profiled: Path, tmp_path: Path, expertcut: Commands
) -> None:
    weights = set()
    for options in ("", "--no-align", "--router mean", "--router dominant"):
        expertcut(f"merge --profile {profiled} --keep 4 --no-verify {options}")
    for folder in sorted((tmp_path / "checkpoints").iterdir()):
        weights.add((folder / "model.safetensors").read_bytes())
    assert len(weights) == 4


def test_keeping_every_expert_gives_the_base_model_again(
    profiled: Path, tmp_path: Path, expertcut: Commands
) -> None:
    printed = expertcut(f"merge --profile {profiled} --keep 8 --out same")
    assert "No expert joined another" in printed
    base = Path(load_profile(profiled).info.model.id)
    same = (tmp_path / "same" / "model.safetensors").read_bytes()
    assert same[-1000:] == (base / "model.safetensors").read_bytes()[-1000:]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "Missing option '--keep'"),
        ("--keep 1", "routes each token to 2 of 8 experts: keep 2 to 8"),
        ("--keep 9", "keep 2 to 8"),
        ("--keep 4 --by magic", "magic"),
        ("--keep 4 --router best", "best"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_a_model_is_loaded(
    profiled: Path, tmp_path: Path, expertcut: Commands, monkeypatch: Any, options: str, words: str
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("expertcut.checkpoints.build.engine_as_profiled", load)
    refusal = expertcut(f"merge --profile {profiled} {options} --out cut", status=2)
    assert words in refusal and refusal.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_counts_and_room_and_all_token_statistics_are_needed(
    profiled: Path,
    quiz_folder: Path,
    tmp_path: Path,
    expertcut: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = load_profile(profiled).info.model.id
    answers = measured(Path(base), quiz_folder, tmp_path / "answers", stats="answer", threads=1)
    refusal = expertcut(f"merge --profile {answers.path} --keep 4 --out cut", status=2)
    assert "--stats all" in refusal
    grouped = measured(
        make_checkpoint(tmp_path / "grouped", "deepseek_v3"),
        quiz_folder,
        tmp_path / "pg",
        threads=1,
    )
    refusal = expertcut(f"merge --profile {grouped.path} --keep 5 --out cut", status=2)
    assert "multiple of 2" in refusal
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage)
    refusal = expertcut(f"merge --profile {profiled} --keep 4 --out cut", status=2)
    assert "1,000 are free" in refusal
    assert not (tmp_path / "cut").exists()


def test_a_checkpoint_of_layout_exact_is_not_merged(
    profiled: Path, quiz_folder: Path, tmp_path: Path, expertcut: Commands
) -> None:
    expertcut(f"prune --profile {profiled} --keep 6 --layout exact --no-verify --out exact")
    measured(tmp_path / "exact", quiz_folder, tmp_path / "pe", threads=1)
    refusal = expertcut("merge --profile pe --keep 4 --out cut", status=2)
    assert "layout exact" in refusal and not (tmp_path / "cut").exists()
