"""`route --sweep`: a cell is the model under its rule; thresholds give the mean they are asked."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits.calibrate import collect_routing
from expertcut.edits.route_settings import RouteSetting, RouteSettings
from expertcut.edits.route_thresholds import GateSample, sample_gates
from expertcut.errors import SettingsError
from expertcut.evaluation.results import Scoring
from expertcut.evaluation.route_results import RouteSweep, load_route_sweep
from expertcut.evaluation.route_sweep import RouteSweepRun
from expertcut.models import hooks
from expertcut.models.hooks import Routing
from expertcut.models.load import LoadOptions
from expertcut.models.modeling_routed import RULE_FUNCTIONS, Options
from expertcut.models.routing_rule import RoutingRule
from expertcut.profiling.measure import MeasureOptions
from expertcut.profiling.storage import Profile, load_profile
from expertcut.reporting.page_sections import search_sections
from expertcut.reporting.route_tables import sweep_csv
from expertcut.reporting.views import find_shown, gather
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.rerouting import rerouted, tokens_of
from tests.conftest import open_model


@pytest.fixture(scope="module")
def profile(profile_of: Callable[..., Profile]) -> Profile:
    return profile_of("olmoe")


@pytest.fixture(scope="module")
def quiz(quiz_folder: Path) -> Quiz:
    return load_quiz(Selection(str(quiz_folder), shots=1, limit=3))


def settings(**given: object) -> RouteSettings:
    return RouteSettings.read(**{"sweep": True, "draws": 0, **given})


def swept(profile: Profile, quiz: Quiz, folder: Path, **given: object) -> RouteSweepRun:
    scoring = Scoring(quiz, None, LoadOptions(), MeasureOptions())
    run = RouteSweepRun(profile, settings(**given), scoring)
    for step in run.steps(folder):
        list(step.run(lambda _step: None))
    return run


def answers(folder: Path, slug: str) -> np.ndarray:
    (found,) = (folder / "cells").glob(f"{slug}*")
    return load_profile(found).answers.logprob_NC


def test_rules_that_keep_every_expert_change_no_bit(
    profile: Profile, quiz: Quiz, tmp_path: Path
) -> None:
    top_k = profile.info.model.blocks[0].top_k
    skipping = swept(profile, quiz, tmp_path / "skip", rule="skip", at="0,0.9").sweep
    swept(profile, quiz, tmp_path / "best", rule="top-k", at=str(top_k))
    base = answers(tmp_path / "skip", "base")
    assert np.array_equal(base, answers(tmp_path / "skip", "skip-0-"))
    assert np.array_equal(base, answers(tmp_path / "best", f"top-k-{top_k}-"))
    assert not np.array_equal(base, answers(tmp_path / "skip", "skip-0.9-")), "a guard"
    assert skipping.base_experts == top_k == skipping.cells[0].experts_per_token
    assert 1 <= skipping.cells[1].experts_per_token < top_k


def test_a_cell_is_the_model_under_its_rule_and_counts_the_experts_that_run(
    profile: Profile, quiz: Quiz, tmp_path: Path
) -> None:
    run = swept(profile, quiz, tmp_path, rule="skip", at="0.8")
    (cell,) = run.sweep.of_quiz
    routing = run.rules.rerouting(cell.setting)
    blocks, engine = run.engine.moe.blocks, run.judge.engine
    used, seen = [], []

    def see(found: Routing) -> None:
        used.append(int((found.experts_TK < blocks[found.layer].n_experts).sum()))
        seen.append(len(found.experts_TK))

    engine.is_trusted = False  # each prompt alone: nothing is shared, no token is a pad
    with rerouted(blocks, routing) as begin, hooks.observe_routers(blocks, see):
        logprob_NC = ask(engine, quiz, begin).numpy()
    assert np.allclose(answers(tmp_path, "skip"), logprob_NC, atol=1e-4)
    assert cell.experts_per_token == pytest.approx(sum(used) / sum(seen), abs=1e-3)
    assert cell.experts_per_token == pytest.approx(np.mean(cell.experts_by_layer))
    least, most = (f([*cell.experts_by_subject.values()]) for f in (min, max))
    assert 1 <= least <= most <= blocks[0].top_k
    assert cell.active_parameters < run.sweep.base.active_parameters
    assert cell.difficulty.rho is not None and load_route_sweep(tmp_path) == run.sweep


# Chosen by α, by α and a bias in groups or without, or by α that is scaled afterwards.
BIASED = ("glm4_moe", "deepseek_v3", "minimax_m2", "lfm2_moe")
GROUPED = ("glm4_moe", "deepseek_v3")


@pytest.mark.parametrize("most", [None, 3, 6])
@pytest.mark.parametrize("family", ["olmoe", *BIASED])
def test_calibrated_thresholds_keep_the_mean_they_are_asked(
    checkpoint: Callable[..., Path], quiz: Quiz, family: str, most: int | None
) -> None:
    """On the tokens that calibrate them, by whatever score a family chooses its experts."""
    groups = {"topk_group": 2} if family in GROUPED else {}
    moe = open_model(checkpoint(family, num_experts_per_tok=4, **groups))
    engine, outputs = Engine(moe, 400), dict[int, list[Routing]]()
    fit = ((0.6, 0.1, 0.0, 0.0), (0.4, 0.1, 0.1, 0.0), (0.2, 0.0, 0.1, 0.1))
    fits = {block.layer: fit for block in moe.blocks}
    rules = ["skip", "top-p", "entropy", "null", "fitted"]
    collect_routing(engine, quiz, set(fits), lambda r, _: outputs.setdefault(r.layer, []).append(r))
    samples = sample_gates(engine, quiz, rules, most, fits)
    for rule, own in samples.items():
        for mean in (1.5, 2.25, 2.75, 4.5)[: 4 if own.n_most > 4 else 3]:
            for block in moe.blocks:
                at, used, n = own.thresholds(mean)[block.layer], 0, 0
                for found in outputs[block.layer]:
                    given = tokens_of(block, found, torch.tensor(fit, dtype=torch.float64))
                    _, experts_TM = RULE_FUNCTIONS[rule](given, at, Options(most=most))
                    used += int((experts_TM < block.n_experts).sum())
                    n += len(experts_TM)
                _, tied = own.scores_by_layer[block.layer].unique(return_counts=True)
                most_off = 2 + int(tied.max())  # equal tokens have equal scores
                assert used == pytest.approx(mean * n, abs=most_off), (rule, mean, block.name)


@pytest.mark.parametrize(
    ("rule", "scores", "by_mean"),
    [("skip", [1.0, 1.0, 0.3, 0.0], {1: 1, 2: 0}), ("top-p", [0.5, 0.0, -1e-7], {2: 1})],
)
def test_calibrated_thresholds_are_ones_that_the_rule_takes(
    rule: str, scores: list[float], by_mean: dict[float, float]
) -> None:
    """Even where the gate weights of a token are equal or 0."""
    sample = GateSample(rule, {0: torch.tensor(scores)}, 1)
    for mean, at in by_mean.items():
        assert sample.thresholds(mean) == {0: at}


def test_odp_calibrates_what_the_tokens_that_keep_all_experts_leave() -> None:
    scores = {
        0: torch.rand(900, generator=torch.Generator().manual_seed(0)).sort(descending=True)[0]
    }
    skip, odp = (GateSample(rule, scores, 3) for rule in ("skip", "odp"))
    for mean in (1.2, 2.0, 3.5):
        assert odp.thresholds(mean) == skip.thresholds((mean - 0.02 * 4) / 0.98)
        assert odp.thresholds(mean) != skip.thresholds(mean)


def test_a_shared_threshold_keeps_the_mean_over_all_layers() -> None:
    drawn = torch.Generator().manual_seed(0)
    scores = {layer: torch.rand(900, generator=drawn) ** (layer + 1) for layer in range(3)}
    scores = {layer: own.sort(descending=True)[0] for layer, own in scores.items()}
    sample = GateSample("skip", scores, 3)
    apart, shared = (sample.thresholds(2.0, is_shared=both) for both in (False, True))
    assert len({*shared.values()}) == 1 and len({*apart.values()}) == 3
    used = [float((own >= shared[layer]).float().mean()) for layer, own in scores.items()]
    assert sum(used) / 3 == pytest.approx(1 / 3, abs=1e-3) and max(used) > 1.2 * min(used)


def test_a_shared_threshold_is_asked_by_its_option(
    profile: Profile, quiz: Quiz, tmp_path: Path
) -> None:
    whole = swept(profile, quiz, tmp_path, rule="skip", experts="1.5", shared=True).sweep
    own = [cell for cell in whole.cells if cell.setting.rule == "skip"]
    assert own and all(len({*cell.thresholds}) == 1 for cell in own)
    assert own[0].setting.label.startswith("to 1.5 shared")


def test_a_sweep_goes_on_where_it_ended_and_refuses_another(
    profile: Profile, quiz: Quiz, tmp_path: Path
) -> None:
    whole = swept(profile, quiz, tmp_path, rule="skip", experts="1.5,1").sweep
    few = RouteSweep.model_validate(whole.model_dump() | {"cells": whole.cells[:1]})
    few.save(tmp_path / "route.json")
    assert swept(profile, quiz, tmp_path, rule="skip", experts="1.5,1").sweep == whole
    for path in (tmp_path, tmp_path / "route.json"):
        (table,) = find_shown(path).tables()
        assert [row[0] for row in table.texts()[1:]] == ["skip to 1.5", "skip to 1"]
    gathered = gather(tmp_path)
    (section,) = search_sections(gathered)
    assert section.title.startswith("Routing rules") and not gathered.profiles
    with pytest.raises(Exception, match="another sweep of routing rules: its settings"):
        swept(profile, quiz, tmp_path, rule="skip", experts="1.5")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rule": "skip", "at": "2"}, "--at 2 is not a threshold"),
        ({"rule": "skip", "at": "0.5", "experts": "2"}, "leave one of them out"),
        ({"rule": "skip", "at": "0.5", "shared": True}, "--shared calibrates one threshold"),
        ({"rule": "top-k", "experts": "1.5"}, "must be a whole number"),
        ({"rule": "skip", "tune": True}, "different things"),
        ({"sweep": False, "rule": "skip", "at": "0.1,0.2"}, "one threshold"),
        ({"sweep": False, "rule": "skip", "layout": "stock"}, "no place for a threshold"),
        ({"sweep": False, "prove": True}, "add --tune"),
        ({"sweep": False, "matched": 5}, "controls of a sweep"),
        ({"sweep": False, "tune": True, "draws": 3}, "controls of --sweep, --oracle and --cross"),
        ({"rule": "contrast", "at": "2"}, "--at is no setting of contrast: give --weak rank:R"),
        ({"rule": "contrast", "experts": "2"}, "--experts is no setting of contrast"),
        ({"rule": "skip,grouped", "experts": "2"}, "grouped has none"),
        ({"rule": "skip", "level": "prompt"}, "of --rule random"),
        ({"sweep": False, "oracle": True, "rule": "skip", "draws": 0}, "give at least 1"),
        ({"rule": "contrast", "weak": "top-1"}, "'top-1' is not a weak run: write rank:2"),
        ({"rule": "top-k", "at": "3", "most": "2"}, "takes more experts than --most 2 allows"),
        (
            {
                "sweep": False,
                "rule": "top-k",
                "at": "1",
                "layout": "stock",
                "weights": "renormalised",
            },
            "no place for --weights renormalised",
        ),
        ({"rule": "skip", "beta": 0.3}, "--beta sets --rule contrast"),
        ({"sweep": False, "tune": True, "rule": "contrast"}, "score it with --sweep"),
        ({"sweep": False, "oracle": True, "rule": "contrast"}, "score it with --sweep"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given: dict[str, object], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        settings(**given).check()


def test_contrast_is_a_cell_whose_tokens_run_twice(
    profile: Profile, quiz: Quiz, tmp_path: Path
) -> None:
    top_k = profile.info.model.blocks[0].top_k
    run = swept(profile, quiz, tmp_path / "two", rule="contrast,skip", weak="rank:5", matched=1)
    assert not any(cell.setting.is_matched for cell in run.sweep.cells if cell.setting.beta)
    cell = next(cell for cell in run.sweep.of_quiz if cell.setting.rule == "contrast")
    assert (cell.setting.at, cell.setting.beta, cell.setting.label) == (5, 0.5, "0.5 rank 5")
    assert cell.experts_per_token == top_k + 1, "of both runs"
    assert all(own == pytest.approx(top_k + 1) for own in cell.experts_by_subject.values())
    table = sweep_csv(run.sweep)
    place = [column.name for column in table.columns].index("beta")
    betas = {row[0]: row[place] for row in table.rows}
    assert betas["contrast"] == 0.5 and betas["skip"] is None, "of contrast alone"
    base = answers(tmp_path / "two", "base")
    found = answers(tmp_path / "two", "contrast-0.5-rank-5-")
    assert np.isfinite(found).all() and not np.allclose(base, found, atol=0.1)
    swept(profile, quiz, tmp_path / "none", rule="contrast", beta=0)
    assert np.array_equal(base, answers(tmp_path / "none", "contrast-0-rank-2-"))
    for folder in (tmp_path / "two", tmp_path / "none"):
        load_route_sweep(folder)
    assert '"beta"' not in RouteSetting(rule="skip", at=0.5).model_dump_json()


@pytest.mark.parametrize(
    ("top_k", "given", "told"),
    [
        (2, {"rule": "skip", "experts": "3"}, "skip only leaves out, take at most 2"),
        (2, {"rule": "skip", "experts": "3", "most": "all"}, "skip only leaves out"),
        (2, {"rule": "skip,top-p", "experts": "2.5"}, "skip only leaves out"),
        (2, {"rule": "top-p", "experts": "3"}, "add --most N"),
        (4, {"rule": "top-p", "experts": "3", "most": "2"}, "above 2, the most"),
        (1, {"rule": "skip"}, "the model lets a token use 1 expert"),
        (4, {"rule": "fitted", "most": "1"}, "--most lets a token use 1 expert"),
        (4, {"rule": "odp", "experts": "1,2"}, "1 is below 1.06: --rule odp keeps all 4 experts"),
    ],
)
def test_means_that_a_rule_cannot_reach_are_refused_before_the_model_is_loaded(
    top_k: int, given: dict[str, object], told: str
) -> None:
    asked = settings(**given)
    asked.check()
    with pytest.raises(SettingsError, match=told):
        asked.choices(top_k)


@pytest.mark.parametrize(
    ("block", "given", "told"),
    [
        ({"groups": 4, "top_groups": 2}, {"most": "all"}, "in 4 groups and picks from 2"),
        ({"selection": "table"}, {"most": "3"}, "by a table of token ids"),
        ({"places": 2}, {}, "has a routing rule already"),
    ],
)
def test_gates_that_allow_no_rule_are_known_by_the_profile(
    profile: Profile, block: dict[str, object], given: dict[str, object], told: str
) -> None:
    model = profile.info.model
    asked = settings(rule="top-p", at="0.5", **given)
    asked.check_blocks(model)
    changed = tuple(own.model_copy(update=block) for own in model.blocks)
    with pytest.raises(SettingsError, match=told):
        asked.check_blocks(model.model_copy(update={"blocks": changed}))


def test_contrast_and_random_keep_their_own_settings_beside_other_rules() -> None:
    for given in ({"experts": "1.5,2"}, {"at": "0.3"}):
        asked = settings(rule="skip,contrast,random", **given)
        asked.check()
        found = asked.choices(2)
        assert [one for one in found if one.rule != "skip"] == [
            RouteSetting(rule="contrast", at=2, beta=0.5),
            RouteSetting(rule="random"),
        ]
        assert sum(one.rule == "skip" for one in found) == (2 if "experts" in given else 1)


def test_what_is_asked_of_a_rule_reaches_it() -> None:
    """Seeds and draws are controls of their own, as are levels, limits and weights."""
    control = RouteSetting(rule="random", draw=2)
    asked = settings(rule="random", seed=3, level="prompt", most="2", weights="renormalised")
    wanted = {"seed": 5, "level": "prompt", "most": 2, "weights": "renormalised"}
    assert asked.rule_of(control, 8) == RoutingRule(rule="random", **wanted)
    seeds = {settings(seed=seed).rule_of(control, 8).seed for seed in (0, 1, (1 << 32) - 1)}
    assert seeds == {2, 3, 1}, "of the last seed they start again"
    (skip,) = settings(rule="skip", at="0.5").choices(4)
    assert settings(most="all").rule_of(skip, 8) == RoutingRule(rule="skip", most=8)
    matched = skip.model_copy(update={"draw": 1})
    assert settings().rule_of(matched, 8) == RoutingRule(rule="skip", seed=1, shuffle=True)


def test_without_thresholds_a_sweep_spreads_over_what_most_allows() -> None:
    assert [one.experts for one in settings(rule="skip").choices(4)] == [3, 2, 1]
    assert [one.experts for one in settings(rule="skip", most="2").choices(4)] == [1.5, 1]
    assert [one.at for one in settings(rule="top-k", most="2").choices(4)] == [2, 1]
