"""Numbers at the edges: all right, all wrong, one question, E = K, K = 1, one layer, many experts.

Warnings are errors in every test here, so what is undefined must be so on purpose.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from expertcut.data import Selection, load_quiz
from expertcut.evaluation.results import load_results
from expertcut.models.load import LoadOptions, find_source
from expertcut.profiling.measure import MeasureOptions, measure
from expertcut.profiling.storage import Profile, load_profile
from tests.conftest import Commands, make_checkpoint

Checkpoints = Callable[..., Path]
SIZES = {"green_birds": 9, "old_clocks": 1, "tall_trees": 11}  # one subject of one question


@pytest.fixture(scope="module")
def predicted(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Profile:
    """What the tiny model answers to the quiz."""
    folder = tmp_path_factory.mktemp("predicted")
    quiz = load_quiz(Selection(str(quiz_folder), shots=0))
    options = MeasureOptions("none", threads=1)
    run = measure(find_source(str(checkpoint("olmoe"))), quiz, None, LoadOptions(), options)
    assert list(run.run(folder))
    return load_profile(folder)


def answered_quiz(predicted: Profile, quiz_folder: Path, folder: Path, offset: int) -> Path:
    """The quiz with the model's own answers for the right ones, or others than these."""
    quiz = load_quiz(Selection(str(quiz_folder), shots=0))
    chosen_N = predicted.array("choice_logprob_NC").argmax(axis=1)
    folder.mkdir()
    lines: dict[str, list[str]] = {"test": [], "val": []}
    for question, chosen in zip(quiz, chosen_N.tolist(), strict=True):
        record = {"question": question.text, "choices": question.choices}
        record |= {"answer": (chosen + offset) % 4, "subject": question.subject}
        if question.row < SIZES[question.subject]:
            lines["val"].append(json.dumps(record))
        record["question"] = f" {question.text}?"  # else none of them could be held out
        lines["test"].append(json.dumps(record))
    for split, rows in lines.items():
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


def numbers(value: object) -> Iterator[float]:
    """Every number of a JSON text, which must have no NaN."""
    if isinstance(value, dict):
        for part in value.values():
            yield from numbers(part)
    elif isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, float | int):
        yield float(value)


def finite(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    found = json.loads(text, parse_constant=refuse)
    assert all(map(math.isfinite, numbers(found)))
    return found


@pytest.mark.parametrize(("offset", "share"), [(0, 1.0), (1, 0.0)])
def test_all_right_and_all_wrong_are_numbers_in_every_table_file_and_page(
    predicted: Profile,
    quiz_folder: Path,
    tmp_path: Path,
    expertcut: Commands,
    offset: int,
    share: float,
) -> None:
    quiz = answered_quiz(predicted, quiz_folder, tmp_path / "q", offset)
    model = predicted.info.model.id
    asked = ("--quiz", quiz, "--shots", 0)
    said = expertcut("profile", model, *asked, "--split", "val", "--out", "p")
    assert said.startswith("quiz      21 ") and f"accuracy  {100 * share:.1f} % (" in said
    found = finite(expertcut("show", "p", "--format", "json"))
    experts = [e for layer in found["layers"] for e in layer["expert"]]
    used = [e for e in experts if e["appearances"]]
    assert {e["accuracy"] for e in used} == {share}
    assert {e["weighted_accuracy"] for e in used} == {share}
    assert all(0 <= low < high <= 1 for e in used for low, high in [e["accuracy_ci95"]])
    assert {e["z"] for e in experts} == {None}  # nothing differs, so nothing is tested
    assert found["suspects"] == [] and found["tests"] == 0
    assert [s["questions"] for s in found["subjects"]] == list(SIZES.values())
    for form in ("table", "csv", "md"):
        for more in ("--subjects", "--criteria"):
            assert "nan" not in expertcut("show", "p", "--format", form, more)
    expertcut("prune", "--profile", "p", "--keep", 4, "--out", "cut")
    expertcut("eval", model, "cut", *asked, "--split", "val", "--out", "r.json")
    finite((tmp_path / "r.json").read_text())
    base, _ = load_results(tmp_path / "r.json").models
    assert (base.accuracy, base.stderr) == (share, 0.0)
    assert base.ci95[0] < base.ci95[1] and share in base.ci95
    expertcut("report", ".")
    card = expertcut("publish", "cut", "me/cut", "--dry-run", "--results", "r.json")
    assert "nan" not in card + (tmp_path / "cut" / "README.md").read_text()
    assert f"{share:.2%}" in (tmp_path / "cut" / "README.md").read_text()


def test_a_model_that_changes_nothing_at_all_right_has_p_one_and_a_bound(
    predicted: Profile, quiz_folder: Path, tmp_path: Path, expertcut: Commands
) -> None:
    quiz = answered_quiz(predicted, quiz_folder, tmp_path / "q", 0)
    model = predicted.info.model.id
    expertcut("eval", model, model, "--quiz", quiz, "--shots", 0, "--out", "r.json")
    (same,) = load_results(tmp_path / "r.json").comparisons
    assert (same.delta, same.gained, same.lost) == (0.0, 0, 0)
    assert same.ci95[0] == -same.ci95[1] and 3 / 33 < same.ci95[1] < 4 / 33
    assert (same.mcnemar_p, same.smallest_effect) == (1.0, 3 / 33)


def test_an_expert_activated_once_has_the_accuracy_of_that_question(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path: Path, expertcut: Commands
) -> None:
    model = checkpoint("olmoe", num_experts=32)
    expertcut("profile", model, "--quiz", quiz_folder, "--shots", 0, "--out", "p")
    found = finite(expertcut("show", "p", "--format", "json"))
    profile = load_profile(tmp_path / "p")
    right_N = profile.array("choice_logprob_NC").argmax(axis=1) == profile.array("answer_N")
    chosen_NLK, n_seen = profile.array("chosen_NLK"), 0
    for layer in found["layers"]:
        for row in layer["expert"]:
            at_N = (chosen_NLK[:, layer["layer"]] == row["expert"]).any(axis=1)
            if at_N.sum() == 1:
                n_seen += 1
                assert row["appearances"] == pytest.approx(1 / 33)
                assert row["accuracy"] == row["weighted_accuracy"] == right_N[at_N][0]
                assert 0 <= row["accuracy_ci95"][0] < row["accuracy_ci95"][1] <= 1
                assert row["difference_se"] is None or row["difference_se"] >= 0
    assert n_seen > 1


EDGES: dict[str, tuple[dict[str, int], int]] = {  # what the model is, and how many may stay
    "all experts are chosen": ({"num_experts": 2}, 2),
    "one expert is chosen": ({"num_experts_per_tok": 1}, 2),
    "one expert of two in one layer": (
        {"num_hidden_layers": 1, "num_experts": 2, "num_experts_per_tok": 1},
        2,
    ),
}


@pytest.mark.parametrize(("changes", "keep"), EDGES.values(), ids=EDGES)
def test_edges_of_the_model_go_all_the_way(
    checkpoint: Checkpoints,
    quiz_folder: Path,
    tmp_path: Path,
    expertcut: Commands,
    changes: dict[str, int],
    keep: int,
) -> None:
    model = checkpoint("olmoe", **changes)
    asked = ("--quiz", quiz_folder, "--shots", 1)
    expertcut("profile", model, *asked, "--split", "val", "--out", "p")
    found = finite(expertcut("show", "p", "--format", "json"))
    for layer in found["layers"]:
        assert 0 <= layer["entropy_top_mean"] <= math.log(layer["top_k"]) + 1e-6
        assert sum(layer["rank_probability_mean"]) == pytest.approx(1)
        if layer["experts"] == layer["top_k"]:
            assert {e["appearances"] for e in layer["expert"]} == {1.0}
        if layer["top_k"] == 1:
            assert {e["contribution_pct"] for e in layer["expert"]} <= {None, 100.0}
    expertcut("prune", "--profile", "p", "--keep-active", "--out", "active")
    expertcut("prune", "--profile", "p", "--keep", keep, "--out", "kept")
    expertcut("reweight", "--profile", "p", "--boost", "0:0=0.5", "--out", "tilted")
    for command in ("prune", "merge"):  # a model of one expert could not be read again
        too_few = expertcut(command, "--profile", "p", "--keep", 1, "--out", "few", status=2)
        assert too_few.count("\n") == 1 and "keep 2 to " in too_few
    one = ("--keep", 1, "--layout", "exact", "--out", "one")  # there the router keeps its rows
    expertcut("prune", "--profile", "p", *one)
    made = ("active", "kept", "tilted", "one")
    expertcut("eval", model, *made, *asked, "--limit", 2, "--out", "r.json")
    finite((tmp_path / "r.json").read_text())
    results = load_results(tmp_path / "r.json")
    n_experts = changes.get("num_experts", 8)
    if n_experts == keep:  # nothing could go
        assert [c.max_abs_logprob_diff for c in results.comparisons[:2]] == [0.0, 0.0]
    else:
        assert results.comparisons[1].parameters_delta < 0
    finite(expertcut("show", "kept", "--format", "json"))


@pytest.mark.slow
def test_a_thousand_experts_are_measured_shown_cut_and_compared_in_bounded_time(
    tmp_path: Path, quiz_folder: Path, expertcut: Commands
) -> None:
    small = {"num_hidden_layers": 1, "intermediate_size": 4}
    model = make_checkpoint(tmp_path / "wide", "olmoe", num_experts=1024, **small)
    asked, started = ("--quiz", quiz_folder, "--shots", 1), time.perf_counter()
    expertcut("profile", model, *asked, "--split", "val", "--out", "p")
    found = finite(expertcut("show", "p", "--format", "json"))
    (layer,) = found["layers"]
    assert len(layer["expert"]) == 1024
    expertcut("prune", "--profile", "p", "--keep", 512, "--out", "cut")
    expertcut("eval", model, "cut", *asked, "--limit", 4, "--out", "r.json")
    assert time.perf_counter() - started < 60
    (change,) = load_results(tmp_path / "r.json").comparisons
    assert change.parameters_delta == -512 * (3 * 4 * 32 + 32)


def test_shots_that_a_quiz_does_not_have_are_refused(
    checkpoint: Checkpoints, tmp_path: Path, expertcut: Commands
) -> None:
    folder = tmp_path / "q"
    folder.mkdir()
    record = {"question": "Which?", "choices": ["a", "b"], "answer": 0, "subject": "s"}
    (folder / "test.jsonl").write_text(json.dumps(record))
    for empty in (False, True):  # there is no dev split, or one without questions
        if empty:
            (folder / "dev.jsonl").write_text("")
        asked = ("--quiz", folder, "--shots", 5, "--out", "p")
        line = expertcut("profile", checkpoint("olmoe"), *asked, status=2)
        assert "5 shots asked but split dev of s has 0: use --shots 0" in line
        assert line.count("\n") == 1 and not (tmp_path / "p").exists()
