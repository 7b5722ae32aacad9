"""`expertcut dispatch`: what it reads, writes, shows and refuses."""

import csv
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace as Fake
from typing import Any

import numpy as np
import pytest

from expertcut.checkpoints.shared_experts import expert_pieces, union_bytes
from expertcut.data import Selection, load_quiz
from expertcut.data.questions import Question
from expertcut.edits.plan import load_plan
from expertcut.evaluation.dispatch_results import (
    DispatchRequest,
    DispatchResult,
    dispatch,
    load_dispatch,
)
from expertcut.evaluation.evaluate import save_answers
from expertcut.evaluation.predictions import load_predictions, read_categories
from expertcut.models.load import Source
from expertcut.profiling.statistics import Answers
from expertcut.profiling.storage import load_profile
from expertcut.reporting.dispatch_tables import verdict_sentence
from tests.conftest import SUBJECTS, Commands, write_quiz

COUNTS = {"dev": 2, "val": 2, "test": 30}
GREEN, OLD, _ = SUBJECTS
Knows = Callable[[Question], bool]


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quiz(tmp_path_factory.mktemp("quiz") / "birds", COUNTS)


def write_results(file: Path, quiz: Path, models: dict[str, Knows], **chosen: Any) -> Path:
    """Results and predictions as `eval` writes them, of models that know what they are said to."""
    asked = load_quiz(Selection(str(quiz), **{"split": "test", "shots": 0} | chosen))
    scored: list[Any] = []
    for size, (path, knows) in enumerate(models.items(), start=1):
        rng = np.random.default_rng(size)
        answer_N = np.array([q.answer for q in asked])
        said_N = np.array([q.answer if knows(q) else (q.answer + 1) % 4 for q in asked])
        logprob_NC = (rng.normal(-9, 1, (len(said_N), 4))).astype(np.float32)
        logprob_NC[np.arange(len(said_N)), said_N] = -1
        source = Fake(id=path, name=path, revision=None, fingerprint=path * 8)
        has = {"parameters": size, "active_parameters": size, "size_bytes": size * 1000}
        answers = Answers(logprob_NC, answer_N, said_N == answer_N)
        result = Fake(source=source, answers=answers, size=Fake(**has))
        scored.append(Fake(**vars(result), chosen_on=None, healed_from=None))
    scoring: Any = Fake(quiz=asked, limit=chosen.get("limit"))
    save_answers(scoring, scored, file).save(file)
    return file


def planted(file: Path, quiz: Path, **chosen: Any) -> Path:
    """One model knows green birds, another old clocks, a third, the largest, half of all."""
    models: dict[str, Knows] = {
        "green": lambda q: q.subject == GREEN,
        "old": lambda q: q.subject == OLD,
        "half": lambda q: q.row % 2 == 0,
    }
    return write_results(file, quiz, models, **chosen)


def wide_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if len(line) > 80]


def test_a_dispatch_is_written_shown_and_reported(
    quiz: Path, tmp_path: Path, expertcut: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    planted(tmp_path / "results.json", quiz)
    printed = expertcut("dispatch results.json")
    found = load_dispatch(tmp_path)
    assert (found.verdict, found.questions, found.dropped) == ("helps", 90, 0)
    assert found.cross_fitted.accuracy == pytest.approx(75 / 90) and found.best_single == 0.5
    assert found.single == found.otherwise == "half" and found.oracle == found.cross_fitted.accuracy
    assert [next(iter(c.models)) for c in found.categories.values()] == ["green", "old", "half"]
    assert found.held_bytes == 6000 and found.union_bytes is None
    rows = list(csv.DictReader((tmp_path / "routes.csv").read_text().splitlines()))
    assert [(r["category"], r["model"], float(r["weight"])) for r in rows] == [
        (GREEN, "green", 1.0),
        (OLD, "old", 1.0),
        (SUBJECTS[2], "half", 1.0),
        ("", "half", 1.0),
    ]
    for word in ("Choosing helps here: +33.3 points", "by subject", "83.33%", "luck"):
        assert word in printed
    for said in (expertcut("show dispatch.json"), expertcut("show .")):
        assert said.split("verdict")[1] in printed and said.split("\n")[0] == "Dispatch by subject"
    assert not wide_lines(printed)
    assert json.loads(expertcut("show dispatch.json --format json")) == found.model_dump(
        mode="json"
    )
    assert "cross_fitted,0.83" in expertcut("show dispatch.json --format csv")
    expertcut("report .")
    page = (tmp_path / "report.html").read_text()
    assert "Dispatch: " in page and "Choosing helps here" in page
    before = (tmp_path / "dispatch.json").read_bytes()
    expertcut("dispatch results.json")
    assert (tmp_path / "dispatch.json").read_bytes() == before


def test_a_budget_holds_the_best_set(quiz: Path, tmp_path: Path, expertcut: Commands) -> None:
    planted(tmp_path / "results.json", quiz)
    expertcut("dispatch results.json --max-bytes 4000 --out four.dispatch.json")
    found = load_dispatch(tmp_path / "four.dispatch.json")
    assert [model.path for model in found.models if model.is_held] == ["green", "half"]
    assert found.held_bytes == 4000 and found.single == "half"
    assert (tmp_path / "four.routes.csv").is_file()
    # The unaffordable model of everything is neither the oracle nor the bar.
    expertcut("dispatch results.json --max-bytes 3kB --out three.dispatch.json")
    three = load_dispatch(tmp_path / "three.dispatch.json")
    assert three.held_bytes == 3000
    expertcut("dispatch results.json --max-bytes 2999 --out two.dispatch.json")
    two = load_dispatch(tmp_path / "two.dispatch.json")
    assert two.held_bytes in (1000, 2000) and two.single in ("green", "old")
    assert two.oracle == pytest.approx(60 / 90)
    refused = expertcut("dispatch results.json --max-bytes 999", status=2)
    assert "holds no model: the smallest, green, has 1,000 bytes" in refused


def test_results_are_matched_by_questions_not_by_rows(
    quiz: Path, tmp_path: Path, expertcut: Commands
) -> None:
    planted(tmp_path / "a.json", quiz)
    late: dict[str, Knows] = {"late": lambda q: q.subject == SUBJECTS[2]}
    write_results(tmp_path / "b.json", quiz, late, subjects=(SUBJECTS[2],), limit=20)
    expertcut("dispatch a.json b.json")
    found = load_dispatch(tmp_path)
    assert [(m.path, m.answered) for m in found.models][2:] == [("half", 90), ("late", 20)]
    assert found.questions == 90
    # On the ten that it did not answer, the next best does.
    assert found.cross_fitted.accuracy == pytest.approx((30 + 30 + 20 + 5) / 90)
    again = expertcut("dispatch a.json a.json --out twice.dispatch.json")
    assert load_dispatch(tmp_path / "twice.dispatch.json").questions == 90 and "helps" in again


def skills_csv(file: Path, rows: Iterable[tuple[str, str]]) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("question", "skill"), *rows])
    return file


def test_skills_of_a_file_may_be_several_or_none(
    quiz: Path, tmp_path: Path, expertcut: Commands
) -> None:
    asked = [*load_quiz(Selection(str(quiz), "test", 0))]
    small = write_results(
        tmp_path / "results.json",
        quiz,
        {"even": lambda q: q.row % 2 == 0, "odd": lambda q: q.row % 2 == 1 or q.row < 3},
    )
    rows = [(q.text, f"row {q.row % 2}") for q in asked if q.subject != OLD]
    rows += [(q.content_hash, "all") for q in asked if q.subject == GREEN]
    skills_csv(tmp_path / "skills.csv", rows)
    expertcut("dispatch", small, "--by", "skills.csv")
    found = load_dispatch(tmp_path)
    assert {name: c.questions for name, c in found.categories.items()} == {
        **{"all": 30, "row 0": 30, "row 1": 30},
    }
    assert [*found.categories["row 0"].models] == ["even"]
    assert [*found.categories["row 1"].models] == ["odd"]
    assert found.single == found.otherwise == "odd"
    # Without a skill the best single model answers; with one, the better of its parity.
    assert found.cross_fitted.accuracy == pytest.approx((60 + 17) / 90)
    skills_csv(tmp_path / "skills.csv", [*rows, ("what is that?", "x"), ("and that?", "x")])
    refused = expertcut("dispatch results.json --by skills.csv", status=2)
    assert "names 2 questions that nobody answered, first 'what is that?'" in refused
    skills_csv(tmp_path / "skills.csv", [("what is that?", "x")])
    refused = expertcut("dispatch results.json --by skills.csv", status=2)
    assert "names 1 question that nobody answered" in refused
    skills_csv(tmp_path / "skills.csv", [])
    refused = expertcut("dispatch results.json --by skills.csv", status=2)
    assert "names no question" in refused
    (tmp_path / "skills.csv").write_text("text,skill\n")
    refused = expertcut("dispatch results.json --by skills.csv", status=2)
    assert "the columns question and skill" in refused


def test_what_cannot_be_dispatched_is_refused(
    quiz: Path, tmp_path: Path, expertcut: Commands
) -> None:
    planted(tmp_path / "results.json", quiz)
    planted(tmp_path / "val.json", quiz, split="val")
    planted(tmp_path / "shots.json", quiz, shots=2)
    planted(tmp_path / "few.json", quiz, limit=4)
    other = write_quiz(tmp_path / "other", COUNTS, seed=1)
    planted(tmp_path / "gone.json", other)
    (tmp_path / "other" / "test" / f"{GREEN}_test.csv").write_text("changed?,a,b,c,d,A\n")
    for words, says in (
        ("no.json", "no.json is not there"),
        ("other", "other is a folder: name a results.json"),
        ("results.json --by no.csv", "--by no.csv is not there"),
        ("results.json val.json", "has no question in common with results.json"),
        ("results.json shots.json", r"asked green_birds with 2 shots"),
        ("few.json", "no category has 5 different questions"),
        ("gone.json", "is no longer the quiz of gone.json: the questions or shots of green_birds"),
        ("results.json --by skills", "must be subject, routing or a .csv file"),
        ("results.json --by routing", "add --profile"),
        ("results.json --profile p", "--profile is for --by routing"),
        ("results.json --layers 0", "--layers is for --by routing"),
        ("results.json --max-bytes many", "is not a size"),
        ("results.json --out d.json", "must end in dispatch.json"),
        ("results.json --quiz other", "is no longer the quiz of results.json"),
    ):
        assert says in expertcut(f"dispatch {words}", status=2), words
    assert not (tmp_path / "dispatch.json").exists()
    (tmp_path / "routes.csv").write_text("mine")
    assert "routes.csv is not of dispatch" in expertcut("dispatch results.json", status=2)
    assert (tmp_path / "routes.csv").read_text() == "mine"
    (tmp_path / "routes.csv").unlink()
    (tmp_path / "dispatch.json").write_text("mine")
    assert "is not a valid dispatch" in expertcut("dispatch results.json", status=2)
    predictions = tmp_path / "predictions.parquet"
    predictions.write_bytes((tmp_path / "few.predictions.parquet").read_bytes())
    (tmp_path / "dispatch.json").unlink()
    assert "does not hold the answers" in expertcut("dispatch results.json", status=2)
    predictions.write_bytes(b"PAR1")
    assert "predictions" in expertcut("dispatch results.json", status=2)
    predictions.unlink()
    assert "run `expertcut eval` again" in expertcut("dispatch results.json", status=2)


def test_a_document_that_contradicts_itself_is_refused(
    quiz: Path, tmp_path: Path, expertcut: Commands
) -> None:
    planted(tmp_path / "results.json", quiz)
    expertcut("dispatch results.json")
    whole = json.loads((tmp_path / "dispatch.json").read_text())
    for change, says in (
        ({"single": "nobody"}, "single names 'nobody'"),
        ({"models": [whole["models"][0]] * 2}, "two models have one path"),
        ({"categories": {"law": {"questions": 3, "models": {"x": 1.0}}}}, "names 'x'"),
        ({"oracle": 1.2}, "oracle"),
        ({"verdict": "good"}, "verdict"),
    ):
        (tmp_path / "dispatch.json").write_text(json.dumps(whole | change))
        assert says in expertcut("show dispatch.json", status=2)
    DispatchResult.model_validate_json(json.dumps(whole))


@pytest.fixture(scope="module")
def cuts(
    checkpoint: Callable[..., Path], quiz: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model, two cuts chosen on a few of its test questions, and their results."""
    import sys

    from expertcut.cli import main

    folder = tmp_path_factory.mktemp("cuts")
    model, of = checkpoint("olmoe"), ["--quiz", str(quiz), "--shots", "0", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (
            ["profile", model, *of, "--split", "test", "--limit", "3", "--out", "few"],
            ["profile", model, *of, "--split", "test", "--out", "all"],
            ["prune", "--profile", "few", "--keep", "5", "--no-verify", "--out", "five"],
            ["prune", "--profile", "few", "--keep", "3", "--no-verify", "--out", "three"],
            ["eval", model, "five", "three", *of],
        ):
            patch.setattr(sys, "argv", ["expertcut", *map(str, words)])
            with pytest.raises(SystemExit) as ending:
                main()
            assert not ending.value.code
    return folder


def test_questions_that_a_cut_was_chosen_on_are_dropped_for_all(
    cuts: Path, expertcut: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cuts)
    printed = expertcut("dispatch results.json")
    found = load_dispatch(cuts)
    assert (found.dropped, found.questions) == (9, 81)
    assert "9 questions that a model was chosen or healed on" in " ".join(printed.split())
    assert {model.answered for model in found.models} == {81}
    questions = cuts / "five" / "chosen_on.txt"
    content = questions.read_bytes()
    try:
        questions.unlink()
        assert "chosen_on.txt" in expertcut("dispatch results.json", status=2)
    finally:
        questions.write_bytes(content)


def test_experts_that_cuts_share_are_counted_once(cuts: Path, expertcut: Commands) -> None:
    folders = [Path(load_plan(cuts / "five").model.id), cuts / "five", cuts / "three"]
    base, five, three = (Source(str(folder), folder) for folder in folders)
    sizes = [sum(f.stat().st_size for f in s.weight_files) for s in (base, five, three)]
    (piece,) = {piece[-1] for piece in expert_pieces(base)}
    assert piece == 3 * 32 * 16 * 4 or piece * 16 < sizes[0]
    assert len(expert_pieces(base)) == 16 and expert_pieces(five) < expert_pieces(base)
    assert union_bytes([base, five, three]) == sum(sizes) - (10 + 6) * piece
    shared = expert_pieces(five) & expert_pieces(three)
    assert union_bytes([five, three]) == sizes[1] + sizes[2] - len(shared) * piece < sum(sizes[1:])
    assert union_bytes([base]) == sizes[0]


def test_dispatch_by_routing_is_judged_by_predicted_subjects(
    cuts: Path, quiz: Path, tmp_path: Path, expertcut: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    models: dict[str, Knows] = {s: lambda q, s=s: q.subject == s for s in SUBJECTS}  # type: ignore[misc]
    write_results(tmp_path / "results.json", quiz, models)
    printed = expertcut(f"dispatch results.json --by routing --profile {cuts / 'all'}")
    found, routing = load_dispatch(tmp_path), load_dispatch(tmp_path).by_routing
    assert routing is not None and routing.true_subjects is not None
    # Each model knows its subject alone, so the choice is right where the predicted one is.
    right = sum(routing.confusion[s].get(s, 0) for s in SUBJECTS) / 90
    assert 0.4 < right < 1 and routing.right == pytest.approx(right)
    assert found.cross_fitted == routing.score and found.cross_fitted.accuracy == routing.right
    assert routing.true_subjects.accuracy == 1
    assert (
        f"Choosing by routing helps here: +{100 * found.cross_fitted.change.delta:.1f}" in printed
    )
    assert "Subjects as predicted from routing" in printed and not wide_lines(printed)
    said = expertcut("show dispatch.json --format csv")
    assert f"cross_fitted,{right:.4f}" in said and "true_subjects,1.0" in said
    expertcut(f"dispatch results.json --by routing --layers 1 --profile {cuts / 'all'}")
    one = load_dispatch(tmp_path).by_routing
    assert one is not None and one.confusion != routing.confusion


def test_the_verdict_by_routing_is_that_of_predicted_subjects(quiz: Path, tmp_path: Path) -> None:
    file = planted(tmp_path / "results.json", quiz)
    predictions = load_predictions([file])
    categories = read_categories("routing", predictions)
    request: Any = {"results": (str(file),), "by": "routing", "way": "accuracy", "most": None}
    asked = DispatchRequest(**request, max_bytes=None, profile="p", seed=0)
    _, subject_N = np.unique(predictions.answered.subject_N, return_inverse=True)
    true, wrong = (
        dispatch(predictions, categories, asked, predicted_N)
        for predicted_N in (subject_N, np.array([1, 0, 2])[subject_N])
    )
    assert true.verdict == "helps" and wrong.verdict == "hurts"
    assert wrong.by_routing is not None and wrong.by_routing.true_subjects == true.cross_fitted
    assert verdict_sentence(wrong).startswith("Choosing by routing hurts here: −33.3 points")
    before = wrong.model_dump(mode="json")  # as written before the true subjects were kept apart
    del before["by_routing"]["true_subjects"]
    assert DispatchResult.model_validate_json(json.dumps(before)).cross_fitted == wrong.cross_fitted


def test_another_seed_deals_other_folds_and_keeps_the_routes(quiz: Path, tmp_path: Path) -> None:
    def knows(model: str) -> Knows:
        return lambda q: random.Random(f"{model} {q.subject} {q.row}").random() < 0.6

    file = write_results(tmp_path / "results.json", quiz, {name: knows(name) for name in "abcd"})
    predictions = load_predictions([file])
    categories = read_categories("subject", predictions)
    request: Any = {"results": (str(file),), "by": "subject", "way": "accuracy", "most": None}
    found = [
        dispatch(
            predictions,
            categories,
            DispatchRequest(**request, max_bytes=None, profile=None, seed=seed),
        )
        for seed in range(4)
    ]
    assert len({(one.best_single, one.cross_fitted.accuracy) for one in found}) > 1
    assert (
        len({one.model_dump_json(include={"categories", "single", "oracle"}) for one in found}) == 1
    )


def test_a_profile_with_one_expert_a_token_tells_the_subject_too(
    checkpoint: Callable[..., Path], quiz: Path, tmp_path: Path, expertcut: Commands
) -> None:
    model = checkpoint("olmoe", num_experts_per_tok=1)
    expertcut(f"profile {model} --quiz {quiz} --shots 0 --split test --threads 1 --out one")
    assert {block.top_k for block in load_profile(tmp_path / "one").info.model.blocks} == {1}
    planted(tmp_path / "results.json", quiz)
    expertcut("dispatch results.json --by routing --profile one")
    routing = load_dispatch(tmp_path).by_routing
    assert routing is not None and 0.4 < routing.right < 1


def test_a_profile_of_other_questions_or_layers_is_refused(
    cuts: Path, expertcut: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cuts)
    expertcut("dispatch results.json --by routing --profile all --layers 1")
    found = load_dispatch(cuts)
    assert found.by_routing is not None
    assert sum(n for told in found.by_routing.confusion.values() for n in told.values()) == 81
    assert found.union_bytes is not None and found.union_bytes <= found.held_bytes
    refused = expertcut("dispatch results.json --by routing --profile few", status=2)
    assert "did not ask 81 of the 81 questions" in refused
    refused = expertcut("dispatch results.json --by routing --profile all --layers 2", status=2)
    assert "has MoE layers 0 to 1" in refused


def test_a_model_with_easy_questions_alone_does_not_win(
    quiz: Path, tmp_path: Path, expertcut: Commands
) -> None:
    full: dict[str, Knows] = {"full": lambda q: q.row < 12 or q.row % 2 == 0}
    part: dict[str, Knows] = {"part": lambda q: q.row % 6 != 0}  # of the easy ones
    write_results(tmp_path / "full.json", quiz, full)
    write_results(tmp_path / "part.json", quiz, part, limit=12)
    printed = expertcut("dispatch full.json part.json")
    found = load_dispatch(tmp_path)
    by_path = {model.path: model for model in found.models}
    assert by_path["full"].accuracy == pytest.approx(0.7)
    assert by_path["part"].accuracy == pytest.approx(10 / 12)
    assert (by_path["part"].answered, found.questions) == (36, 90)
    assert found.single == found.otherwise == "full" and found.verdict == "no evidence"
    assert {path for c in found.categories.values() for path in c.models} == {"full"}
    assert "part answered 36 of 90 questions" in " ".join(printed.split())


def test_one_model_alone_is_nothing_to_choose(
    quiz: Path, tmp_path: Path, expertcut: Commands
) -> None:
    write_results(tmp_path / "results.json", quiz, {"one": lambda q: q.row % 2 == 0})
    assert "One model: there is nothing to choose" in expertcut("dispatch results.json")
    found = load_dispatch(tmp_path)
    assert found.verdict == "no evidence" and found.cross_fitted.change.gained == 0
