"""`reweight` with experts chosen by score or contrast, strengths by search, and a proof."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from expertcut.cli import main
from expertcut.cli.progress import Bars
from expertcut.commands import reweight
from expertcut.commands.reweight import ReweightSettings
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits.edit_settings import read_layers
from expertcut.edits.plan import load_hashes, load_plan
from expertcut.edits.reweight_select import TOKEN_SCORES, read_contrast
from expertcut.edits.router_edits import RouterEdit
from expertcut.errors import SettingsError
from expertcut.evaluation.cross_fit import load_cross_fit
from expertcut.evaluation.reweight_search import CachedScorer
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine
from expertcut.scoring.router_bias import ApplyAt
from tests.conftest import COUNTS, open_model, profiled, write_quiz

Run = Callable[..., str]


@pytest.fixture(scope="module")
def profile(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Of split val, so that its own questions are the tuning questions."""
    return of_val(25, checkpoint("olmoe"), tmp_path_factory.mktemp("deciding"))


@pytest.fixture(scope="module")
def larger(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Of so many questions that a search finds something."""
    return of_val(60, checkpoint("olmoe"), tmp_path_factory.mktemp("larger"))


def of_val(n: int, model: Path, folder: Path) -> Profile:
    return profiled(model, write_quiz(folder / "birds", {**COUNTS, "val": n}), folder / "profile")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """A command line in an empty folder; what it printed."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["expertcut", *map(str, arguments)])
        try:
            main()
        except SystemExit as stopped:
            assert (stopped.code or 0) == status
        else:
            assert status == 0
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return command


def test_the_best_by_a_score_is_boosted_by_its_strength(profile: Profile, run: Run) -> None:
    asked = ("--boost-best", 1, "--by", "accuracy", "--strength", 0.5, "--min-appearances", 0.1)
    out = run("reweight", "--profile", profile.path, *asked, "--plan-only", "--out", "plan")
    plan = load_plan(Path("plan"))
    biases = {(n, e): b for n, edit in plan.blocks.items() for e, b in edit.bias.items()}
    assert list(biases.values()) == [0.5]
    assert plan.criterion == "accuracy" and plan.tuning == ()
    ((block, expert),) = biases
    layers = profile.layers
    common = [x.accuracy_E[x.appearances_E >= 0.1].max() for x in layers]
    assert next(x for x in layers if x.block == block).accuracy_E[expert] == max(common)
    assert "is boosted by +0.5000 on its logit (given)" in out


def test_a_search_keeps_its_curve_in_the_plan_and_show_draws_it(
    larger: Profile, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, seen = ("--boost-best", 1, "--suppress-worst", 1, "--tune"), []
    monkeypatch.setattr(Bars, "advance", lambda _, *step: seen.append(step))
    out = run("reweight", "--profile", larger.path, *asked, "--out", "tuned")
    plan = load_plan(Path("tuned"))
    steps = [step for step in seen if step[0] == "tuning"]
    assert steps == [("tuning", i, 0, "steps") for i in range(len(plan.tuning) - 1)]
    best = max(plan.tuning, key=lambda point: point.accuracy)
    assert plan.tuning[0].strength == 0 and best.accuracy > plan.tuning[0].accuracy
    named = {(b[0], b[1]): b[2] for b in best.biases}
    blocks = [block.name for block in larger.info.model.blocks]
    kept = {
        (blocks.index(n), e): b for n, edit in plan.blocks.items() for e, b in edit.bias.items()
    }
    assert kept == pytest.approx(named)
    words = " ".join(out.split())
    assert "found by a search" in words and "at the answer position alone" in words
    assert plan.chosen_on.split == "val" and plan.proof.held_out_split
    quiz = load_quiz(Selection(larger.info.quiz.id, split="val", shots=1))
    assert load_hashes(Path("tuned"), plan) == {q.hash_line for q in quiz}
    assert "Strength (logits) against accuracy" in run("show", "tuned")
    shown = json.loads(run("show", "tuned", "--format", "json"))
    assert len(shown["tuning"]) == len(plan.tuning)


def test_a_proof_is_printed_written_and_shown(profile: Profile, run: Run) -> None:
    asked = ("--boost-best", 1, "--strength", 2, "--prove", "--plan-only", "--seed", 3)
    asked = (*asked, "--force-write")
    out = run("reweight", "--profile", profile.path, *asked, "--out", "proof-1")
    proof = load_cross_fit(Path("proof-1"))
    assert proof.random.draws == 99 and proof.seed == 3 and len(proof.folds) == 5
    assert sum(fold.questions for fold in proof.folds) == proof.questions
    assert proof.sentence in " ".join(out.split()) and "\nverdict   " in out
    assert "cross-fitted" in out and "chosen and scored on the same questions" in out
    assert "cross-fitted" in run("show", "proof-1")
    assert json.loads(Path("proof-1/proof.json").read_text())["verdict"] == proof.verdict
    again = run("reweight", "--profile", profile.path, *asked, "--out", "proof-2")
    assert Path("proof-2/proof.json").read_bytes() == Path("proof-1/proof.json").read_bytes()
    assert again.replace("proof-2", "proof-1") == out


def test_where_nothing_gains_there_is_no_checkpoint_but_the_proof(
    profile: Profile, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertcut.edits.router_edits.STRENGTHS", (1e-9,))
    asked = ("reweight", "--profile", profile.path, "--boost", "1:1", "--tune")
    out = run(*asked, "--out", "none")
    assert out.splitlines()[-1] == "written   no checkpoint, for no expert was chosen"
    assert not Path("none").exists()
    out = run(*asked, "--prove", "--out", "proof")
    assert "No tilt that was tried beats the unedited model" in out
    assert [f.name for f in Path("proof").iterdir()] == ["proof.json"]
    assert {path.name for path in Path().iterdir()} == {"proof"}  # nothing to go on from
    assert load_cross_fit(Path("proof")).verdict == "no evidence"
    assert "cross-fitted" in run("show", "proof")
    assert "cross-fitted" in run("show", "proof/proof.json")


def test_what_is_not_shown_to_help_is_written_only_if_forced(profile: Profile, run: Run) -> None:
    asked = ("reweight", "--profile", profile.path, "--boost", "1:1=0.0001", "--prove")
    lines = run(*asked, "--out", "proof").splitlines()
    assert load_cross_fit(Path("proof")).verdict == "no evidence"
    assert [f.name for f in Path("proof").iterdir()] == ["proof.json"]
    words = " ".join(lines[-3:])
    assert "no checkpoint, for this is not shown to help: --force --force-write writes it" in words
    assert "from what stays in .proof.tuning; the proof is in proof" in " ".join(words.split())
    assert len([*Path(".proof.tuning").iterdir()]) > 1
    assert words.endswith("next      expertcut show proof")
    run(*asked, "--out", "forced", "--force-write", "--plan-only")
    assert Path("forced/proof.json").read_bytes() == Path("proof/proof.json").read_bytes()
    before = Path("forced/plan.json").read_bytes()
    assert "; forced stays as it was" in run(*asked, "--out", "forced", "--force")
    assert Path("forced/plan.json").read_bytes() == before


def test_contrasts_are_of_right_and_wrong_and_of_subjects(profile: Profile, run: Run) -> None:
    fingerprint = profile.info.model.fingerprint
    right = read_contrast((f"{profile.path}@right", f"{profile.path}@wrong"), fingerprint)
    n_right = int(profile.answers.is_correct_N.sum())
    assert (len(right.wanted), len(right.unwanted)) == (
        n_right,
        len(profile.answers.answer_N) - n_right,
    )
    first, *_ = profile.info.quiz.subjects
    one = read_contrast((f"{profile.path}@{first}", str(profile.path)), fingerprint)
    assert set(one.wanted.subject_N) == {first} and len(one.unwanted) == n_right + len(
        right.unwanted
    )
    pair = (f"{profile.path}@right", f"{profile.path}@wrong")
    asked = ("--contrast", *pair, "--suppress-worst", 1, "--strength", 1, "--plan-only")
    run("reweight", "--profile", profile.path, *asked, "--out", "plan")
    plan = load_plan(Path("plan"))
    assert plan.criterion == "contrast"
    ((name, expert),) = [(n, e) for n, edit in plan.blocks.items() for e in edit.bias]
    layer = next(x for x in profile.layers if x.block == name)
    is_right_N = profile.answers.is_correct_N
    rate = layer.is_activated_NE[is_right_N].mean(0) - layer.is_activated_NE[~is_right_N].mean(0)
    assert rate[expert] == min(rate) < 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--by", "foo", "--boost-best", 1), "--by foo is not a score: take one of difference"),
        (("--by", "accuracy"), "rank experts for --boost-best N"),
        (("--tune",), "say which experts to tilt"),
        (("--boost", "1:1=2", "--tune"), "--tune searches for the strength"),
        (("--boost", "1:1", "--scale", "1:2=2", "--tune"), "--scale takes its factor by hand"),
        (("--boost-best", 1, "--strength", -1), "--strength -1 must be a number of logits above 0"),
        (("--boost-best", 1, "--min-appearances", 2), "must be a share from 0 to 1"),
        (("--boost-best", 1, "--layers", "0-x"), "is not a layer: write them as 0,3,8-15"),
        (("--boost-best", 1, "--layers", "9"), "the model has MoE layers 0 to 1"),
        (("--boost-best", 1, "--prove", "--seed", -1), "--seed"),
        (("--boost-best", 1, "--prove", "--draws", 10**30), "--random-draws"),
        (("--boost-best", 1, "--layers", "9" * 5000), "is not a layer"),
        (("--boost-best", 1, "--layers", "0-999999999999"), "is not a layer"),
        (("--boost-best", 99), "99 experts are to be tilted, but only"),
        (("--boost-best", 1, "--tune", "--layout", "exact", "--apply-at", "answer"), "gate.bias"),
        (("--boost-best", 1, "--contrast", "x", "y"), "no profile in x"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    options: tuple[object, ...], words: str, profile: Profile, run: Run, tmp_path: Path
) -> None:
    said = run("reweight", "--profile", profile.path, *options, status=2)
    assert words in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_parts_of_a_contrast_that_are_not_there_are_refused(profile: Profile) -> None:
    fingerprint = profile.info.model.fingerprint
    with pytest.raises(SettingsError, match="'fish' is not a subject of that profile"):
        read_contrast((f"{profile.path}@fish", str(profile.path)), fingerprint)
    with pytest.raises(SettingsError, match="is a profile of another model"):
        read_contrast((str(profile.path), str(profile.path)), "0" * 64)


def test_layers_are_numbers_and_ranges() -> None:
    assert read_layers(None) == ()
    assert read_layers("0,3,8-10, 3") == (0, 3, 8, 9, 10)
    for bad in ("", "a", "1-", "-1", "1,,2", "9-8"):
        with pytest.raises(SettingsError, match="is not a layer"):
            read_layers(bad)


def test_the_exact_layout_carries_what_was_found(larger: Profile, run: Run) -> None:
    asked = ("--boost-best", 1, "--suppress-worst", 1, "--tune", "--layout", "exact")
    run("reweight", "--profile", larger.path, *asked, "--out", "exact", "--no-verify")
    assert load_plan(Path("exact")).layout == "exact"
    assert any(edit.bias for edit in load_plan(Path("exact")).blocks.values())


def test_the_questions_of_a_contrast_count_as_used(
    profile: Profile, run: Run, tmp_path: Path
) -> None:
    quiz = load_quiz(Selection(profile.info.quiz.id, split="test", shots=1))
    moe = open_model(Path(profile.info.model.id))
    list(Measurement(moe, quiz, None, MeasureOptions("answer")).run(tmp_path / "other"))
    asked = ("--contrast", "other@right", "other@wrong", "--boost-best", 1, "--strength", 1)
    run("reweight", "--profile", profile.path, *asked, "--plan-only", "--out", "plan")
    used = load_hashes(Path("plan"), load_plan(Path("plan")))
    assert {q.hash_line for q in quiz} <= used
    val = load_quiz(Selection(profile.info.quiz.id, split="val", shots=1))
    assert used == {q.hash_line for q in (*quiz, *val)}


@pytest.mark.parametrize("by", sorted(TOKEN_SCORES))
def test_sums_over_tokens_rank_experts_too(by: str, profile: Profile, run: Run) -> None:
    asked = ("--boost-best", 1, "--by", by, "--strength", 1, "--min-appearances", 0)
    run("reweight", "--profile", profile.path, *asked, "--plan-only", "--out", by)
    ((name, expert),) = [(n, e) for n, x in load_plan(Path(by)).blocks.items() for e in x.bias]
    total, per = TOKEN_SCORES[by]
    score_LE = profile.token_sum(total)
    assert score_LE is not None
    if per is not None:
        score_LE = score_LE / profile.token_sum(per)
    layer = [block.name for block in profile.info.model.blocks].index(name)
    assert score_LE[layer, expert] == np.nanmax(score_LE)


def test_without_sums_over_tokens_nothing_is_ranked_by_them(
    checkpoint: Callable[..., Path], quiz_folder: Path, tmp_path: Path, run: Run
) -> None:
    quiz = load_quiz(Selection(str(quiz_folder), split="val", shots=1))
    moe = open_model(checkpoint("olmoe"))
    list(Measurement(moe, quiz, None, MeasureOptions("answer")).run(tmp_path / "p"))
    said = run("reweight", "--profile", "p", "--boost-best", 1, "--by", "tokens", status=2)
    assert "holds no all-token statistics" in said


class Killed(BaseException):
    """In place of a SIGKILL."""


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Counts the tilts that are scored from now on; the run is killed within number `last`."""
    changed = CachedScorer.changed

    def count(last: int) -> list[int]:
        done: list[int] = []

        def counted(scorer: CachedScorer, layer: int, change: Any) -> Any:
            result = changed(scorer, layer, change)
            if len(done) == last:
                raise Killed
            done.append(layer)
            return result

        monkeypatch.setattr(CachedScorer, "changed", counted)
        return done

    return count


def test_a_cross_fit_that_was_killed_goes_on_to_the_same_bytes(
    checkpoint: Callable[..., Path],
    scored: Callable[[int], list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiz = write_quiz(tmp_path / "quiz", {"dev": 1, "val": 10})
    asking = load_quiz(Selection(str(quiz), split="val", shots=0))
    measured = Measurement(open_model(checkpoint("olmoe")), asking, None, MeasureOptions("answer"))
    list(measured.run(tmp_path / "p"))
    asked = ReweightSettings(
        profile=tmp_path / "p", by="accuracy", boost_best=1, tune=True, prove=True, verify=False
    ).model_copy(update={"draws": 1})

    def made(out: str) -> dict[str, bytes]:
        reweight.run(asked.updated(out=tmp_path / out))
        return {f.name: f.read_bytes() for f in (tmp_path / out).iterdir()}

    done = scored(10**6)
    whole, total = made("whole"), len(done)
    assert total > 20 and "proof.json" in whole
    kept, working = 0, tmp_path / ".out.tuning"
    for last in (0, total // 2):  # in the first tilt, in the middle of the random draws
        done = scored(last)
        with pytest.raises(Killed):
            made("out")
        kept += len(done)
        assert len(list(working.glob("*"))) == (kept + 1 if kept else 0)  # the unedited model too
    done = scored(10**6)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("expertcut.checkpoints.build.atomic_dir", Mock(side_effect=Killed))
        made("out")
    assert kept + len(done) == total
    done = scored(0)  # no tilt is left
    assert made("out") == whole and not done
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(".out.tuning", ".whole.tuning", "out", "p", "quiz", "whole")  # for --force-write
    ]


def test_what_is_kept_is_used_only_for_the_same_question(
    profile: Profile,
    scored: Callable[[int], list[int]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    moe = open_model(Path(profile.info.model.id))
    few, many = (
        load_quiz(Selection(profile.info.quiz.id, split="val", shots=1, limit=n)) for n in (4, 5)
    )
    edit = (RouterEdit(1, 2, 0.1),)
    done = scored(10**6)

    def ask(
        n_scored: int, quiz: Quiz = few, tokens: int = 2048, at: ApplyAt = "all", bias: float = 0.1
    ) -> np.ndarray:
        before = len(done)
        scorer = CachedScorer(Engine(moe, tokens), quiz, folder=tmp_path)
        found = scorer.ask((edit[0]._replace(bias=bias),), at)
        assert len(done) - before == n_scored
        return found

    first = ask(1)
    assert np.array_equal(ask(0), first)
    for other in ({"quiz": many}, {"tokens": 64}, {"at": "answer"}, {"bias": 0.1 + 1e-12}):
        ask(1, **other)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    assert np.array_equal(ask(1), first)
    assert caplog.text.count("scoring it again") == 2  # of it and of the unedited model
