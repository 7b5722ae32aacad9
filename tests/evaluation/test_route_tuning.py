"""`route --tune` and `--oracle` in a loaded model: what is chosen, resumed and compared."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits.route_settings import RouteSettings
from expertcut.errors import SettingsError
from expertcut.evaluation.holding import HoldingResult
from expertcut.evaluation.results import Scoring
from expertcut.evaluation.route_results import ORACLE_FILE, load_oracle
from expertcut.evaluation.route_sweep import RouteSweepRun, _digest
from expertcut.evaluation.route_tuning import (
    RuleScorer,
    figures_of,
    score_oracle,
    shares_for,
    tune,
)
from expertcut.models.load import LoadOptions
from expertcut.models.routing_rule import RoutingRule
from expertcut.profiling.measure import MeasureOptions
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine
from expertcut.scoring.rerouting import Rerouting
from tests.conftest import profiled


@pytest.fixture(scope="module")
def profile(profile_of: Callable[..., Profile]) -> Profile:
    return profile_of("olmoe")


@pytest.fixture
def n_scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each chunk that is scored."""
    scored, score = list[int](), Engine.score

    def counted(self: Engine, *args: object, **kwargs: object) -> object:
        scored.append(1)
        return score(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "score", counted)
    return scored


def asking(quiz: Quiz) -> Scoring:
    return Scoring(quiz, None, LoadOptions(), MeasureOptions())


def test_tuning_goes_down_to_what_holds_and_resumes(
    profile: Profile, tmp_path: Path, n_scored: list[int]
) -> None:
    settings = RouteSettings.read(rule="skip", tune=True, prove=True, draws=2)
    loose = tune(profile, settings, 1.0, LoadOptions(), lambda _done, _all: None, tmp_path)
    top_k = profile.info.model.blocks[0].top_k
    assert settings.candidates(4) == (3.5, 3.0, 2.5, 2.0, 1.5, 1.0)
    assert settings.updated(most="2").candidates(4) == (2.0, 1.5, 1.0)
    assert loose.chosen is not None and loose.chosen.experts == 1.0, "all holds within 100 points"
    assert tuple(loose.tried) == settings.candidates(top_k)
    assert loose.routing is not None and all(at > 0.5 for at in loose.routing.thresholds)
    proof = loose.proof
    assert isinstance(proof, HoldingResult) and proof.verdict == "holds"
    assert proof.random is not None and (proof.random.draws, len(proof.folds)) == (2, 5)
    assert proof.random.distinct == 2, "each draw leaves out others"
    assert HoldingResult.model_validate_json(proof.json_bytes()) == proof
    done = len(n_scored)
    again = tune(profile, settings, 1.0, LoadOptions(), lambda _done, _all: None, tmp_path)
    assert again.proof == proof and again.tried == loose.tried
    assert 0 < len(n_scored) - done < done / 3, "only the pass that calibrates runs again"
    strict = tune(
        profile, settings, 0.001, LoadOptions(), lambda _done, _all: None, tmp_path / "strict"
    )
    assert strict.chosen is None and strict.routing is None
    assert strict.proof is not None and strict.proof.verdict == "no evidence"
    assert strict.proof.random is None, "nothing was chosen, so nothing is drawn"


def test_rules_that_differ_in_their_fit_alone_share_no_result() -> None:
    """And rules without one keep the name of earlier versions."""
    names: list[object] = []
    scorer: Any = SimpleNamespace(
        engine=SimpleNamespace(moe=SimpleNamespace(blocks=())),
        scored=lambda name, *_: names.append(name),
    )
    plain = Rerouting(RoutingRule(rule="fitted"), {0: 0.1, 1: 0.2})
    fits = [{0: ((slope, 0.1),), 1: ((0.3, 0.1),)} for slope in (0.5, 0.6)]
    routings = [plain, *(replace(plain, fit_by_layer=fit) for fit in fits)]
    for routing in routings:
        RuleScorer(scorer, cast("Any", None))._scored(routing)
    assert names[0] == (plain.rule.model_dump_json(), (0, 0.1), (1, 0.2))
    assert len({*names}) == len({*map(_digest, routings)}) == 3


def test_a_search_without_fewer_experts_is_refused() -> None:
    skip = RouteSettings.read(rule="skip", tune=True)
    with pytest.raises(SettingsError, match="than the 1"):
        skip.candidates(1)
    for settings in (skip.updated(most="1"), RouteSettings.read(rule="top-p", most="1", tune=True)):
        with pytest.raises(SettingsError, match=r"1 expert, so --rule .* has no threshold"):
            settings.candidates(4)
    assert RouteSettings.read(rule="null", most="1", tune=True).candidates(4) == (1.0,)
    with pytest.raises(SettingsError, match="1 expert"):
        RouteSettings.read(rule="top-p", most="1", oracle=True).choices(4)


def test_an_oracle_counts_the_flips_of_settings_and_variants(
    profile: Profile,
    quiz_folder: Path,
    tmp_path: Path,
    n_scored: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variants, dropped = list[tuple[float, int]](), RuleScorer.dropped

    def noted(self: RuleScorer, share: float, seed: int) -> Any:
        variants.append((share, seed))
        return dropped(self, share, seed)

    monkeypatch.setattr(RuleScorer, "dropped", noted)
    quiz = load_quiz(Selection(str(quiz_folder), shots=1, limit=5))
    settings = RouteSettings.read(rule="skip,top-k", oracle=True, at="1", draws=3)
    steps: list[int] = []
    found = score_oracle(
        profile, settings, asking(quiz), lambda done, _all: steps.append(done), tmp_path
    )
    one, other = found.settings
    assert one.flips == other.flips > 0, "one expert a token, by either rule"
    assert one.change == other.change and one.noise_flips > 0
    assert found.gain >= max(0.0, one.change.delta)
    assert found.accuracy == pytest.approx(found.base_accuracy + found.gain)
    assert found.excess == pytest.approx(found.gain - found.noise_gain)
    assert steps == list(range(1, 2 + 7 + 3 * 2 + 1))
    drawn = variants[7:]  # behind those that find the shares
    assert len({seed for _, seed in drawn}) == len(drawn) == 3 * 2, "each variant is one of its own"
    found.save(tmp_path / ORACLE_FILE)
    assert load_oracle(tmp_path) == found
    done = len(n_scored)
    assert (
        score_oracle(profile, settings, asking(quiz), lambda _done, _all: None, tmp_path) == found
    )
    assert len(n_scored) == done


def test_shares_flip_as_many_answers_as_they_stand_for() -> None:
    flips_G = np.array([2, 4, 8, 8, 20, 30, 50])
    shares = shares_for(np.array([0, 4, 14, 50, 90]), flips_G)
    assert shares == pytest.approx((0, 0.05, 0.25, 1, 1))


def test_a_reader_is_told_the_entropy_of_each_gate_and_the_margin() -> None:
    alpha_NLE = np.array([[[1, 0, 0, 0], [1, 1, 1, 1]], [[1, 1, 0, 0], [0.2, 0.2, 0, 0]]])
    logprob_NC = np.log([[0.1, 0.7, 0.2], [0.45, 0.1, 0.45]])
    records: Any = SimpleNamespace(alpha_NLE=alpha_NLE, logprob_NC=logprob_NC)
    expected = [[0, np.log(4), np.log(0.7 / 0.2)], [np.log(2), np.log(2), 0]]
    assert figures_of(records) == pytest.approx(np.array(expected))


def test_random_experts_equal_the_router_where_all_experts_are_copies(
    checkpoint: Callable[..., Path], quiz_folder: Path, tmp_path: Path
) -> None:
    """And differ where they are not."""
    copies = tmp_path / "copies"
    shutil.copytree(checkpoint("olmoe"), copies)
    (file,) = copies.glob("*.safetensors")
    tensors = load_file(file)
    for name in tensors:
        before, _, after = name.partition(".experts.")
        if after:
            tensors[name] = tensors[f"{before}.experts.0.{after.partition('.')[2]}"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    quiz = load_quiz(Selection(str(quiz_folder), shots=1, limit=3))
    moved = []
    for name, model in (("copies", copies), ("own", checkpoint("olmoe"))):
        profile = profiled(model, quiz_folder, tmp_path / f"{name}-val")
        settings = RouteSettings.read(rule="random", sweep=True, draws=2)
        run = RouteSweepRun(profile, settings, asking(quiz))
        for step in run.steps(tmp_path / f"{name}-sweep"):
            list(step.run(lambda _step: None))
        moved.append([cell.max_abs_logprob_diff for cell in run.sweep.controls])
    assert max(moved[0]) < 1e-4 and min(moved[1]) > 1e-2
