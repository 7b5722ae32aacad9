"""Routing rules where the second expert of a token alone knows the answer.

Each truth is also tried with a rule that does nothing, and must fail then.
"""

from pathlib import Path

import numpy as np
import pytest

from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits.route_settings import RouteSettings
from expertcut.evaluation.results import Scoring
from expertcut.evaluation.route_results import RouteCell, RouteSweep
from expertcut.evaluation.route_sweep import RouteSweepRun
from expertcut.evaluation.route_tuning import RouteTuning, tune
from expertcut.models.load import LoadOptions
from expertcut.models.modeling_routed import RULE_FUNCTIONS, Chosen, Options, Tokens
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import Profile, load_profile
from expertcut.reporting.route_tables import sweep_facts, sweep_figure, sweep_table
from tests.conftest import open_model
from tests.support.planted_subjects import (
    KNOWN,
    PLAIN,
    RATIO,
    SPECIALIST,
    plant_subjects,
    write_subjects,
)

WEAK, STRONG = 0.02, 0.6  # second gate weight in the other subjects, of the first; it knows nothing
N_VAL, N_TEST = 120, 8  # questions of a subject: four folds can show that a point is not lost


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_subjects(
        tmp_path_factory.mktemp("planted") / "quiz", {"val": N_VAL, "test": N_TEST}
    )


@pytest.fixture(scope="module")
def profiles(quiz: Path) -> dict[float, Profile]:
    """By the second gate weight in the other subjects."""
    found, asked = {}, load_quiz(Selection(str(quiz), "val", 0))
    for ratio in (WEAK, STRONG):
        model = plant_subjects(quiz.parent / f"model-{ratio}", ratio)
        folder = quiz.parent / f"val-{ratio}"
        list(Measurement(open_model(model), asked, None, MeasureOptions()).run(folder))
        found[ratio] = load_profile(folder)
    return found


@pytest.fixture
def asked(quiz: Path) -> Quiz:
    return load_quiz(Selection(str(quiz), "test", 0))


def swept(
    profile: Profile, asked: Quiz, folder: Path, rule: str, at: str, matched: int = 0
) -> RouteSweep:
    settings = RouteSettings.read(rule=rule, at=at, sweep=True, draws=0, matched=matched)
    run = RouteSweepRun(profile, settings, Scoring(asked, None, LoadOptions(), MeasureOptions()))
    for step in run.steps(folder):
        list(step.run(lambda _step: None))
    return run.sweep


def tuned(profile: Profile, folder: Path) -> RouteTuning:
    settings = RouteSettings.read(rule="skip", tune=True, prove=True, draws=1)
    return tune(profile, settings, 0.01, LoadOptions(), lambda _done, _all: None, folder)


def nothing(tokens: Tokens, _at: float, _options: Options) -> Chosen:
    """A rule that leaves every token as it is."""
    return tokens.weights_TK, tokens.experts_TK


def harmed(cell: RouteCell) -> set[str]:
    """The subjects that are no longer answered; all are by the model as it is."""
    return {subject for subject, accuracy in cell.accuracy_by_subject.items() if accuracy < 1}


def used_most(cell: RouteCell, n: int) -> set[str]:
    """The n subjects that use most experts; none where the next uses as many."""
    by_subject = cell.experts_by_subject
    ranked = sorted(by_subject, key=lambda subject: -by_subject[subject])
    is_tied = by_subject[ranked[n - 1]] - by_subject[ranked[n]] < 0.1
    return set() if is_tied else set(ranked[:n])


def test_the_planted_case_is_one(profiles: dict[float, Profile]) -> None:
    for ratio, profile in profiles.items():
        assert profile.answers.is_correct_N.all()
        weight_NK, chosen_NK = profile.array("weight_NLK")[:, 0], profile.array("chosen_NLK")[:, 0]
        is_known_N = np.isin(profile.subjects(), KNOWN)
        assert np.array_equal(chosen_NK[:, 1] == SPECIALIST, is_known_N) and is_known_N.any()
        expected_N = np.where(is_known_N, RATIO, ratio)
        assert np.allclose(weight_NK[:, 1] / weight_NK[:, 0], expected_N, rtol=0.02)


@pytest.mark.parametrize("ratio", [WEAK, STRONG])
def test_skipping_costs_where_the_skipped_expert_knew_and_nowhere_else(
    profiles: dict[float, Profile],
    asked: Quiz,
    tmp_path: Path,
    ratio: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (cell,) = swept(profiles[ratio], asked, tmp_path / "skip", "skip", "0.5").of_quiz
    assert harmed(cell) == set(KNOWN) and not any(cell.accuracy_by_subject[s] for s in KNOWN)
    assert cell.change.lost == N_TEST * len(KNOWN) and not cell.change.gained
    monkeypatch.setitem(RULE_FUNCTIONS, "skip", nothing)
    (idle,) = swept(profiles[ratio], asked, tmp_path / "idle", "skip", "0.5").of_quiz
    assert not harmed(idle)


def test_tuning_holds_only_while_the_expert_stays(
    profiles: dict[float, Profile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays at 1.5 experts a token unless useless ones weigh more; at 1 it never does."""
    stays = tuned(profiles[WEAK], tmp_path / "stays")
    assert stays.proof is not None and stays.proof.verdict == "holds"
    assert stays.chosen is not None and stays.chosen.experts == 1.5
    assert stays.routing is not None and stays.routing.thresholds[0] < RATIO
    goes = tuned(profiles[STRONG], tmp_path / "goes")
    for change in (stays.tried[1.0], goes.tried[1.5]):
        assert change.delta == -len(KNOWN) / len((*KNOWN, *PLAIN))
    assert goes.proof is not None and goes.proof.verdict == "no evidence" and goes.chosen is None
    monkeypatch.setitem(RULE_FUNCTIONS, "skip", nothing)
    idle = tuned(profiles[STRONG], tmp_path / "idle")
    assert idle.proof is not None and idle.proof.verdict == "holds"
    assert idle.chosen is not None and idle.chosen.experts == 1


def test_top_p_uses_most_experts_where_the_second_knows(
    profiles: dict[float, Profile], asked: Quiz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has 3/4 of the probability there, and nearly all of it in the other subjects."""
    (cell,) = swept(profiles[WEAK], asked, tmp_path / "top-p", "top-p", "0.8").of_quiz
    assert used_most(cell, len(KNOWN)) == set(KNOWN) and not harmed(cell)
    monkeypatch.setitem(RULE_FUNCTIONS, "top-p", nothing)
    (idle,) = swept(profiles[WEAK], asked, tmp_path / "idle", "top-p", "0.8").of_quiz
    assert not used_most(idle, len(KNOWN))


def test_as_many_experts_left_out_at_random_cost_elsewhere_too(
    profiles: dict[float, Profile], asked: Quiz, tmp_path: Path
) -> None:
    sweep = swept(profiles[WEAK], asked, tmp_path, "skip", "0,0.5", matched=2)
    whole, half = sweep.of_quiz
    for cell in (whole, half):
        draws = sweep.matched(cell.setting)
        assert [draw.setting.draw for draw in draws] == [0, 1]
        for draw in draws:
            assert isinstance(draw, RouteCell) and draw.thresholds == cell.thresholds
            assert draw.experts_by_subject == cell.experts_by_subject
            if cell is whole:  # leaves none out, so there is nothing to draw
                assert draw.accuracy == 1
            else:
                assert harmed(draw) >= set(PLAIN), "the first expert is left out too"
                assert all(draw.accuracy_by_subject[subject] > 0 for subject in KNOWN)
    one, other = sweep.matched(half.setting)
    assert one.change != other.change
    names = [row[0] for row in sweep_table(sweep).texts()]
    assert names == ["(base)", "skip 0", "skip 0, 2 draws", "skip 0.5", "skip 0.5, 2 draws"]
    assert dict(sweep_facts(sweep))["left out"].endswith(
        "in 0 of 2 settings (p < 0.05 each, 2 draws); p cannot fall below 0.33"
    )
    more = sweep.model_copy(update={"cells": (*sweep.of_quiz, *renumbered(sweep, 20))})
    assert dict(sweep_facts(more))["left out"].endswith(
        "in 1 of 2 settings (p < 0.05 each, 20 draws)"
    )
    assert b"skip, random ones" in sweep_figure(sweep)["route.svg"]


def renumbered(sweep: RouteSweep, n: int) -> list[RouteCell]:
    """The first draw of each setting, n times."""
    firsts = [cell for cell in sweep.cells if cell.setting.draw == 0]
    return [
        cell.model_copy(update={"setting": cell.setting.model_copy(update={"draw": i})})
        for cell in firsts
        for i in range(n)
    ]
