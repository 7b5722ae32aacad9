"""Asked again, slightly otherwise: what is stored, and what `show` says of it, by plain loops."""

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
from expertcut.data import Quiz, Selection, load_quiz, shuffle_choices
from expertcut.errors import ProfileError
from expertcut.models.load import LoadOptions
from expertcut.profiling.findings import (
    correlation,
    find,
    findings_json,
    perturbed_profiles,
    unshuffled,
)
from expertcut.profiling.measure import Measurement, MeasureOptions, perturb
from expertcut.profiling.storage import Profile, load_profile
from expertcut.scoring.engine import Engine, ask
from tests.conftest import open_model

Checkpoints = Callable[..., Path]


@pytest.fixture
def quiz(quiz_folder: Path) -> Quiz:
    return load_quiz(Selection(str(quiz_folder), split="test", shots=1))


def test_shuffled_questions_are_the_same_in_another_order(quiz: Quiz) -> None:
    shuffled = shuffle_choices(quiz)
    orders = set()
    for before, after in zip(quiz, shuffled, strict=True):
        assert after.choices != before.choices
        assert tuple(before.choices[i] for i in after.order) == after.choices
        assert after.choices[after.answer] == before.choices[before.answer]
        assert (after.text, after.row, after.subject) == (before.text, before.row, before.subject)
        orders.add(after.order)
    assert len(orders) > 5
    assert shuffle_choices(quiz) == shuffled
    assert shuffled.shots_by_subject == quiz.shots_by_subject


@pytest.fixture
def perturbed(checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path) -> Profile:
    """A profile that was asked again in both ways."""
    moe = open_model(checkpoint("olmoe", num_experts=16))
    measurement = Measurement(moe, quiz, None, MeasureOptions("answer"))
    list(measurement.run(tmp_path / "p"))
    for kind in ("shuffle-choices", "bf16"):
        list(perturb(measurement, kind, tmp_path / "p", LoadOptions()))  # type: ignore[arg-type]
    return load_profile(tmp_path / "p")


def test_shuffled_answers_are_told_in_the_original_order(perturbed: Profile, quiz: Quiz) -> None:
    shuffled = shuffle_choices(quiz)
    moe = open_model(Path(perturbed.info.model.id))
    asked_NC = ask(Engine(moe, 2048), shuffled).tolist()
    found_NC = unshuffled(perturbed_profiles(perturbed)["shuffle-choices"]).tolist()
    for question, asked_C, found_C in zip(shuffled, asked_NC, found_NC, strict=True):
        for place, original in enumerate(question.order):
            assert found_C[original] == pytest.approx(asked_C[place], abs=1e-6)


@pytest.mark.parametrize("kind", ["shuffle-choices", "bf16"])
def test_show_says_what_moved(perturbed: Profile, kind: str) -> None:
    found = findings_json(find(perturbed, permutations=10))
    (said,) = [p for p in found["perturbations"] if p["kind"] == kind]
    other = perturbed_profiles(perturbed)[kind]  # type: ignore[index]
    before_NC, after_NC = perturbed.answers.logprob_NC.tolist(), unshuffled(other).tolist()
    flips = [int(np.argmax(a) != np.argmax(b)) for a, b in zip(before_NC, after_NC, strict=True)]
    moved = [
        [abs(a - b) for a, b in zip(*pair, strict=True)]
        for pair in zip(before_NC, after_NC, strict=True)
    ]
    assert said["questions"] == 33
    assert said["flipped"] == pytest.approx(sum(flips) / 33)
    assert said["max_abs_logprob_diff"] == pytest.approx(max(map(max, moved)))
    assert said["mean_abs_logprob_diff"] == pytest.approx(np.mean(moved), rel=1e-5)
    assert said["accuracy"] == pytest.approx(float(other.answers.is_correct_N.mean()))
    assert said["max_abs_logprob_diff"] > 0
    chosen, again = perturbed.array("chosen_NLK").tolist(), other.array("chosen_NLK").tolist()
    for layer, row in enumerate(said["layers"]):
        changed = [int(set(a[layer]) != set(b[layer])) for a, b in zip(chosen, again, strict=True)]
        assert row["changed"] == pytest.approx(sum(changed) / 33)
        margin_N = find(perturbed, permutations=10).margins[layer].probability_N
        if 0 < sum(changed) < 33:
            wanted = spearmanr(margin_N, changed).statistic
            assert row["margin_changed_correlation"] == pytest.approx(wanted)
    if kind == "shuffle-choices":
        assert said["changed"] > 0


def test_a_correlation_with_what_never_moves_is_undefined() -> None:
    margin_N = np.array([0.1, 0.2, 0.3])
    assert correlation(margin_N, np.array([False, False, False])) is None
    assert correlation(None, np.array([1.0, 2.0, 3.0])) is None
    assert correlation(margin_N, np.array([3.0, 2.0, 1.0])) == pytest.approx(-1.0)


def test_a_profile_asked_otherwise_is_not_compared(perturbed: Profile) -> None:
    moe = open_model(Path(perturbed.info.model.id))
    fewer = load_quiz(Selection(perturbed.info.quiz.id, split="test", shots=1, limit=2))
    place = perturbed.path / "other"
    measurement = Measurement(moe, fewer, 2, MeasureOptions("answer"))
    list(measurement.run(place))
    list(perturb(measurement, "bf16", place, LoadOptions()))
    (place / "perturbed" / "bf16").rename(perturbed.path / "kept")
    (perturbed.path / "perturbed" / "bf16").rename(perturbed.path / "old")
    (perturbed.path / "kept").rename(perturbed.path / "perturbed" / "bf16")
    with pytest.raises(ProfileError, match="asked other questions"):
        find(load_profile(perturbed.path), permutations=10)


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", ["expertcut", *line.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    torch.set_num_threads(1)
    return stopped.value.code or 0


def test_the_command_asks_again_and_show_prints_it(
    checkpoint: Checkpoints,
    quiz_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "p"
    line = f"profile {checkpoint('olmoe')} --quiz {quiz_folder} --shots 0 --threads 1 --out {out}"
    assert run(line, monkeypatch) == 0
    before = {f.name: f.read_bytes() for f in (out / "chunks").iterdir()}
    assert run(f"{line} --perturb shuffle-choices --perturb bf16", monkeypatch) == 0
    assert {f.name: f.read_bytes() for f in (out / "chunks").iterdir()} == before
    capsys.readouterr()
    assert run(f"show {out} --tables", monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "Perturbations" in printed and "shuffle-choices" in printed and "bf16" in printed
    assert run(f"show {out} --format json", monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert [p["kind"] for p in found["perturbations"]] == ["shuffle-choices", "bf16"]
    half = line.replace(str(out), str(tmp_path / "half")) + " --dtype bfloat16 --perturb bf16"
    assert run(half, monkeypatch) == 2
    assert "--perturb bf16 changes nothing" in capsys.readouterr().err
    assert not (tmp_path / "half").exists()
