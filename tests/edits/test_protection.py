"""Experts that stay whatever their score, and what `prune` and `show --criteria` say of them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from expertcut.cli import main
from expertcut.data import Selection, load_quiz
from expertcut.data.sources import hash_lines
from expertcut.edits.criteria import CRITERIA, compare, ranked, scores
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.plan import load_hashes, load_plan
from expertcut.edits.selection import choose, expressions_of, protected, protection, super_experts
from expertcut.edits.splits import questions_for
from expertcut.errors import PlanError, ProfileError, SettingsError
from expertcut.profiling.storage import Profile
from expertcut.reporting.views import find_shown
from expertcut.stats import spearman
from tests.conftest import make_checkpoint, make_tokenizer, open_model, write_quiz
from tests.profiling.test_profile import profiled
from tests.support.hand_made import block, profile_info, random_chunk, write_profile

Run = Callable[..., str]
N_KEEP = 4


@pytest.fixture(scope="module")
def quiz_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quiz(tmp_path_factory.mktemp("quiz") / "few", {"dev": 1, "test": 4, "val": 4})


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, quiz_path: Path) -> tuple[Profile, int]:
    """A model whose least chosen expert of the first layer is a super expert, and which it is."""
    root = tmp_path_factory.mktemp("planted")
    quiz = load_quiz(Selection(str(quiz_path), shots=1))
    plain = make_checkpoint(root / "plain", "olmoe")
    layer = profiled(plain, quiz, root / "before").layers[0]
    tokens_E = layer.tokens_E
    assert tokens_E is not None
    order = ranked(layer.is_activated_NE.sum(axis=0), layer.alpha_mean_E)
    expert = next(e for e in reversed(order) if tokens_E[e])
    moe = open_model(plain)
    with torch.no_grad():
        moe.blocks[0].experts.down_proj[expert] *= 1000  # type: ignore[operator,index]
    moe.model.save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    profile = profiled(root / "model", quiz, root / "profile", threads=1)
    return profile, expert


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["expertcut", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        found = capsys.readouterr()
        return found.out if stopped.value.code == 0 else found.err

    return command


def test_a_planted_super_expert_is_found_and_protected(planted: tuple[Profile, int]):
    profile, expert = planted
    assert super_experts(profile) == [(expert,), ()]
    first = profile.info.model.blocks[0].name
    plain = choose(profile, CutSettings(keep=N_KEEP))
    kept = choose(profile, CutSettings(keep=N_KEEP, protect=["super"]))
    assert expert not in plain.draft.edits[first].keep
    assert expert in kept.draft.edits[first].keep
    assert kept.spared == {first: (expert,), profile.info.model.blocks[1].name: ()}
    assert {len(edit.keep) for edit in kept.draft.edits.values()} == {N_KEEP}
    # The best of the others stay: only the last of those that stayed before makes room.
    assert len(set(plain.draft.edits[first].keep) - set(kept.draft.edits[first].keep)) == 1


def test_prune_protects_it_unasked_and_says_so(
    planted: tuple[Profile, int], run: Run, tmp_path: Path
):
    profile, expert = planted
    command = ("prune", "--profile", profile.path, "--plan-only", "--keep", N_KEEP)
    said = " ".join(run(*command, "--out", tmp_path / "super").split())
    assert f"stay only because they are protected: 0:{expert} traffic" in said
    blocks = list(load_plan(tmp_path / "super").blocks.values())
    assert expert in blocks[0].keep
    said = run(*command, "--protect", "none", "--out", tmp_path / "none")
    assert "protected" not in said
    assert expert not in next(iter(load_plan(tmp_path / "none").blocks.values())).keep
    idle = next(e for e in range(8) if e not in blocks[1].keep)
    said = run(*command, "--protect", f"1:{idle}", "--out", tmp_path / "both", "--wide")
    assert f"stay only because they are protected: {expert}." in said
    assert f"stay only because they are protected: {idle}." in said
    assert f"are protected: 0:{expert}, 1:{idle} traffic" in " ".join(said.split())
    said = run(*command, "--by", "output_norm", "--out", tmp_path / "norm")
    assert "protected" not in said  # it would have stayed


def test_super_experts_are_those_above_both_thresholds_in_the_first_three_quarters(tmp_path: Path):
    blocks = [block(layer, 300) for layer in range(4)]
    chunks = [random_chunk(seed, 3, blocks) for seed in range(2)]
    rng = np.random.default_rng(0)
    for chunk in chunks:
        for part in ("prefix", "question"):
            chunk[f"{part}_largest_LE"] = rng.uniform(0, 1, (4, 300)).astype(np.float32)
    for layer, expert, value in ((0, 7, 50), (1, 2, 4.9), (1, 9, 5.1), (2, 5, 30), (3, 8, 40)):
        chunks[layer % 2]["prefix_largest_LE"][layer, expert] = value
    profile = write_profile(tmp_path / "p", profile_info(blocks, {"a": 3, "b": 3}), chunks)
    # 1:2 is above the percentile and below a tenth of the largest, layer 3 is the last quarter.
    assert super_experts(profile) == [(7,), (9,), (5,), ()]
    for chunk in chunks:  # now most of one per cent is large, and the percentile decides
        chunk["question_largest_LE"][0, :12] = np.arange(60, 72)
    profile = write_profile(tmp_path / "q", profile_info(blocks, {"a": 3, "b": 3}), chunks)
    assert super_experts(profile)[0] == (6, 7, 8, 9, 10, 11)
    assert super_experts(profile)[1:] == [(), (), ()]


def test_protected_experts_come_first_and_the_rest_stays_in_order():
    assert protected([3, 1, 2, 0], {0, 1}) == [1, 0, 3, 2]
    assert protected([3, 1, 2, 0], ()) == [3, 1, 2, 0]


def test_what_is_asked_adds_to_super_unless_none_is_asked():
    assert expressions_of([], is_super=True) == ("super",)
    assert expressions_of([], is_super=False) == ()
    assert expressions_of(["3:12"], is_super=True) == ("super", "3:12")
    assert expressions_of(["none", "3:12"], is_super=True) == ("3:12",)
    with pytest.raises(SettingsError, match="contradict each other"):
        expressions_of(["none", "super"], is_super=True)


def test_keep_active_keeps_what_is_protected_besides(planted: tuple[Profile, int]):
    profile, expert = planted
    first, second = (b.name for b in profile.info.model.blocks)
    plain = choose(profile, CutSettings(keep_active=True, layout="exact"))
    assert expert not in plain.draft.edits[first].keep  # no answer position chose it
    kept = choose(profile, CutSettings(keep_active=True, layout="exact", protect=["super"]))
    assert set(kept.draft.edits[first].keep) == {*plain.draft.edits[first].keep, expert}
    assert kept.draft.edits[second] == plain.draft.edits[second]
    assert kept.spared == {first: (expert,), second: ()}


def test_what_cannot_be_protected_is_refused(planted: tuple[Profile, int], tmp_path: Path):
    profile, _ = planted
    for text, error, words in (
        ("12", SettingsError, "--protect 12 names no expert: write super, none or L:E"),
        ("fish", SettingsError, "names no expert"),
        ("2:0", PlanError, "no layer 2: the model has MoE layers 0 to 1"),
        ("1:8", PlanError, "no expert 8 in layer 1: it has experts 0 to 7"),
    ):
        with pytest.raises(error, match=words):
            protection(profile, [text])
    three = ("0:1", "0:2", "0:3")
    with pytest.raises(PlanError, match="keeps 2 experts, too few for the 3 that --protect names"):
        choose(profile, CutSettings(keep=2, protect=three))
    first = next(iter(choose(profile, CutSettings(keep=3, protect=three)).draft.edits.values()))
    assert first.keep == (1, 2, 3)
    # Named ones go before super experts.
    way = CutSettings(protect=["super", *three])
    first = next(iter(choose(profile, way.updated(keep=3)).draft.edits.values()))
    assert first.keep == (1, 2, 3)
    bare = random_chunk(0, 3, [block(0)])
    bare = {name: array for name, array in bare.items() if not name.endswith("_LE")}
    answers = write_profile(tmp_path / "p", profile_info([block(0)], {"a": 3}), [bare])
    with pytest.raises(ProfileError, match="take --protect none"):
        super_experts(answers)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--keep", 4, "--by", "reap", "--positions", "answer"], "reap looks at all tokens alone"),
        (["--keep", 4, "--by", "weighted_accuracy", "--positions", "all"], "a profile of texts"),
        (["--keep", 4, "--by", "random", "--positions", "answer"], "random looks at no positions"),
        (["--keep-active", "--by", "reap"], "--by reap ranks what --keep N keeps"),
        (["--keep", 4, "--protect", "9:1"], "no layer 9"),
        (["--keep", 4, "--protect", "super", "--protect", "none"], "contradict each other"),
        (["--keep", 4, "--by", "random", "--seed", "-1"], "--seed"),
    ],
)
def test_prune_refuses_what_makes_no_sense(
    planted: tuple[Profile, int], run: Run, tmp_path: Path, options: list[object], words: str
):
    out = tmp_path / "out"
    said = run("prune", "--profile", planted[0].path, "--plan-only", "--out", out, *options)
    assert said.startswith("expertcut: ") and said.count("\n") == 1
    assert words in said
    assert not out.exists()


@pytest.mark.parametrize("by", ["reap", "random", "aimer", "reconstruction"])
def test_prune_by_a_criterion_keeps_its_best(
    planted: tuple[Profile, int], run: Run, tmp_path: Path, by: str
):
    from expertcut.scoring.engine import Engine

    profile, _ = planted
    command = ("prune", "--profile", profile.path, "--plan-only", "--keep", N_KEEP)
    run(*command, "--by", by, "--seed", 3, "--protect", "none", "--out", tmp_path / "plan")
    plan = load_plan(tmp_path / "plan")
    assert plan.criterion == ("random-3" if by == "random" else by)
    engine = Engine(open_model(Path(profile.info.model.id)), 200)
    found = scores(profile, by, "all", engine, seed=3)
    for layer, score_E, edit in zip(profile.layers, found, plan.blocks.values(), strict=True):
        assert edit.keep == tuple(sorted(ranked(score_E, layer.alpha_mean_E)[:N_KEEP]))
    torch.set_num_threads(1)


def test_a_calibrated_criterion_counts_its_questions_as_used(
    planted: tuple[Profile, int], run: Run, tmp_path: Path
):
    profile, _ = planted
    command = ("prune", "--profile", profile.path, "--plan-only", "--keep", N_KEEP)
    run(*command, "--by", "reconstruction", "--out", tmp_path / "plan")
    plan = load_plan(tmp_path / "plan")
    questions = questions_for(profile, is_fitting=True)
    assert (plan.chosen_on.split, plan.chosen_on.fitted_split) == ("test", "val")
    used = load_hashes(tmp_path / "plan", plan)
    assert used == hash_lines(questions.tuning) | hash_lines(questions.profiled)
    assert not used & hash_lines(questions.held_out) - hash_lines(questions.profiled)
    torch.set_num_threads(1)


def test_answer_only_profiles_protect_none_and_say_so(
    planted: tuple[Profile, int], run: Run, tmp_path: Path, quiz_path: Path
):
    quiz = load_quiz(Selection(str(quiz_path), shots=1))
    path = Path(planted[0].info.model.id)
    answers = profiled(path, quiz, tmp_path / "answers", stats="answer", threads=1)
    command = ("prune", "--profile", answers.path, "--plan-only", "--keep", N_KEEP)
    assert "none is protected" in run(*command, "--out", tmp_path / "plan")
    assert "none is protected" not in run(*command, "--protect", "none", "--out", tmp_path / "b")
    assert "take --protect none" in run(*command, "--protect", "super", "--out", tmp_path / "c")


# show --criteria


def test_show_criteria_ranks_experts_and_says_how_far_criteria_agree(
    planted: tuple[Profile, int], run: Run
):
    profile, expert = planted
    shown = json.loads(run("show", profile.path, "--criteria", "--format", "json"))
    names = {
        *(by for by, own in CRITERIA.items() if own.needs == "profile"),
        "activations_all",
        "gate_mass_all",
    }
    assert set(shown["criteria"]) == names
    assert shown["left_out"] == {"aimer": "asks the model", "reconstruction": "asks the model"}
    assert [layer["super_experts"] for layer in shown["layers"]] == [[expert], []]
    for layer, statistics in zip(shown["layers"], profile.layers, strict=True):
        for name in names:
            score_E = _scores(layer, name)
            by, positions = (name.removesuffix("_all"), "all" if "_all" in name else "answer")
            wanted_E = scores(profile, by, positions)[layer["layer"]]  # type: ignore[arg-type]
            assert score_E.tolist() == wanted_E.tolist()
            order = ranked(score_E, statistics.alpha_mean_E)
            best_first = sorted(layer["expert"], key=lambda row, name=name: row["ranks"][name])  # type: ignore[misc]
            assert [row["expert"] for row in best_first] == order
    assert len(shown["spearman"]) == len(names) * (len(names) - 1) // 2
    for pair in shown["spearman"]:
        for layer, value in zip(shown["layers"], pair["layers"], strict=True):
            a_E, b_E = (_scores(layer, name) for name in pair["criteria"])
            assert value == pytest.approx(spearmanr(a_E, b_E).statistic)
        assert pair["mean"] == pytest.approx(np.mean(pair["layers"]))
    assert not all(pair["mean"] > 0.99 for pair in shown["spearman"])


def _scores(layer: dict[str, Any], name: str) -> Any:
    """Of the layer's experts, −∞ where there is none."""
    found = [row["scores"][name] for row in layer["expert"]]
    return np.array([-np.inf if score is None else score for score in found])


def test_show_criteria_prints_tables_and_a_row_per_expert(planted: tuple[Profile, int], run: Run):
    profile, _ = planted
    said = run("show", profile.path, "--criteria", "--format", "md")
    assert said.count("### ") == 4
    assert "| super |" in said and "aimer: asks the model" in said
    # Of these a terminal gets the first, a line for each criterion.
    shown = find_shown(profile.path, by_criteria=True)
    first, *others = [table.narrow(unless=False) for table in shown.tables()]
    found = json.loads(run("show", profile.path, "--criteria", "--format", "json"))
    assert [row[0] for row in first.rows] == found["criteria"]
    assert not any(table.columns for table in others)
    ranks = {row["ranks"]["reap"]: row["expert"] for row in found["layers"][1]["expert"]}
    (reap,) = (row for row in first.rows if row[0] == "reap")
    assert reap[3] == f"{ranks[1]}, {ranks[2]}, {ranks[3]}"
    near = max(
        (pair["mean"], other)
        for pair in found["spearman"]
        for other in pair["criteria"]
        if "reap" in pair["criteria"] and other != "reap"
    )
    assert reap[1] == f"{near[1]} {near[0]:+.2f}"
    lines = run("show", profile.path, "--criteria", "--format", "csv").splitlines()
    assert len(lines) == 1 + 2 * 8
    assert lines[0].startswith("layer,expert,activations_score,activations_rank,")


def test_criteria_of_what_is_no_profile_are_refused(
    planted: tuple[Profile, int], run: Run, tmp_path: Path
):
    profile, _ = planted
    command = ("prune", "--profile", profile.path, "--plan-only", "--keep", N_KEEP)
    run(*command, "--out", tmp_path / "plan")
    assert "--criteria: " in run("show", tmp_path / "plan", "--criteria")
    both = run("show", profile.path, "--criteria", "--subjects")
    assert both.startswith("expertcut: --subjects and --criteria")


def test_a_profile_without_sums_shows_what_it_can(tmp_path: Path):
    bare = random_chunk(0, 5, [block(0)])
    bare = {name: array for name, array in bare.items() if not name.endswith("_LE")}
    found = compare(write_profile(tmp_path / "p", profile_info([block(0)], {"a": 5}), [bare]))
    assert tuple(found.scores) == ("activations", "gate_mass", "weighted_accuracy")
    assert "--stats all" in found.left_out["reap"]
    assert "--stats all" in found.left_out["activations_all"]


def test_a_criterion_that_tells_nobody_apart_has_no_correlation():
    assert np.isnan(spearman(np.ones(4), np.arange(4)))
    assert spearman(np.arange(4), np.arange(4)) == pytest.approx(1)
