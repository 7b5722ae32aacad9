"""Choosing, searching and cross-fitting on made-up records, where the truth is known."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from expertcut.edits.reweight_select import SCORES, Chooser, Contrast, SelectedExpert, places
from expertcut.edits.router_edits import STRENGTHS, Procedure, RouterEdit, firsts
from expertcut.errors import PlanError, QuizError
from expertcut.evaluation.cross_fit import (
    FOLDS,
    CrossFit,
    RandomBaseline,
    cross_fit,
    cross_fit_result,
    deal,
    draw,
    load_cross_fit,
)
from tests.support.worlds import EXPERTS, LAYERS, TOP_K, World, softmax, world

HARM = {(1, 3): -12.0}
SUPPRESS = Procedure(chooser=Chooser(suppress_worst=1), is_tuned=True)


def judged(made: World, procedure: Procedure, draws: int = 99) -> CrossFit:
    return cross_fit(made.records, procedure, made.ask, draws)


def test_folds_keep_repeats_together_and_spread_every_subject() -> None:
    subjects = [f"s{i % 3}" for i in range(90)]
    hashes = [f"h{i if i % 10 else 0}" for i in range(90)]  # nine repeats of one question
    fold_N = deal(subjects, hashes, seed=0)
    assert len({f for f, h in zip(fold_N, hashes, strict=True) if h == "h0"}) == 1
    unlike = {h: f for h, f in zip(hashes, fold_N, strict=True)}
    assert max(Counter(unlike.values()).values()) - min(Counter(unlike.values()).values()) <= 1
    assert {(s, f) for s, f in zip(subjects, fold_N, strict=True)} == {
        (f"s{s}", f) for s in range(3) for f in range(FOLDS)
    }
    assert not np.array_equal(fold_N, deal(subjects, hashes, seed=1))


def test_a_harmful_expert_is_the_worst_by_difference() -> None:
    made = world(0, 1500, HARM)
    assert Chooser(suppress_worst=1).choose(made.records) == (SelectedExpert(1, 3, -1),)
    both = Chooser(boost_best=2, suppress_worst=2).choose(made.records)
    assert [pick.sign for pick in both] == [1, 1, -1, -1]
    assert len({(pick.layer, pick.expert) for pick in both}) == 4
    only = Chooser(suppress_worst=3, layers=(0,)).choose(made.records)
    assert {pick.layer for pick in only} == {0}


@pytest.mark.parametrize("by", sorted(SCORES))
def test_every_score_ranks_what_it_names(by: str) -> None:
    made = world(1, 300)
    score_X = Chooser(by=by).scores(made.records)
    assert score_X.shape == (LAYERS * EXPERTS,)
    first = Chooser(boost_best=1, by=by).choose(made.records)[0]
    at = places(made.records.blocks).index((first.layer, first.expert))
    assert score_X[at] == np.nanmax(score_X)
    assert np.nanmax(score_X) > np.nanmin(score_X)


def test_experts_that_appear_seldom_are_no_candidates() -> None:
    made = world(2, 300)
    strict = Chooser(boost_best=4, min_appearances=0.25)
    n_ranked = int((~np.isnan(strict.scores(made.records))).sum())
    assert 0 < n_ranked < LAYERS * EXPERTS
    with pytest.raises(PlanError, match=f"only {n_ranked} appear in at least 25.0%"):
        replace(strict, boost_best=40).check(made.records)
    with pytest.raises(PlanError, match="--layers 7: the model has MoE layers 0 to 1"):
        Chooser(boost_best=1, layers=(7,)).check(made.records)


def test_a_contrast_finds_the_expert_that_one_side_uses() -> None:
    made = world(3, 400)
    chosen_N = (made.records.chosen_NLK[:, 0] == 5).any(axis=1)
    sides = [made.records.part(np.flatnonzero(which)[::2]) for which in (chosen_N, ~chosen_N)]
    contrast = Contrast(*sides)
    chooser = Chooser(boost_best=1, contrast=contrast)
    assert chooser.choose(made.records) == (SelectedExpert(0, 5, 1),)
    against = Chooser(suppress_worst=1, contrast=Contrast(*reversed(sides)))
    assert against.choose(made.records) == (SelectedExpert(0, 5, -1),)
    left_out = frozenset(sides[0].hash_N.tolist()[:-1])
    assert not np.array_equal(contrast.scores(), contrast.scores(left_out))


def test_a_search_finds_the_strength_and_keeps_its_curve() -> None:
    made = world(4, 1500, HARM)
    picks = SUPPRESS.pick(made.records)
    settled = SUPPRESS.settle(made.records, picks, made.ask)
    assert settled.shifts[0][:2] == (1, 3) and settled.shifts[0].bias < -1
    base, best = settled.curve[0], max(settled.curve, key=lambda point: point.accuracy)
    assert base.strength == 0 and base.biases == ()
    assert best.accuracy > base.accuracy + 0.02
    assert best.biases == (settled.shifts[0][:3],)
    assert best.ci95[0] < best.accuracy < best.ci95[1]


def test_a_search_stops_where_it_hurts_and_keeps_nothing_that_does_not_gain() -> None:
    made = world(5, 1500, {(0, 2): 12.0})
    procedure = Procedure(named=((SelectedExpert(0, 2, -1), None),), is_tuned=True)
    settled = procedure.settle(made.records, procedure.pick(made.records), made.ask)
    assert settled.shifts == ()
    assert len(settled.curve) < 1 + len(STRENGTHS)


def test_a_search_brings_an_expert_back_that_only_a_strong_tilt_admits() -> None:
    made = starved_by(15.0)
    procedure = Procedure(named=((SelectedExpert(0, 2, 1), None),), is_tuned=True)
    settled = procedure.settle(made.records, procedure.pick(made.records), made.ask)
    assert settled.shifts[0].bias > STRENGTHS[-1] * 2**0.5
    weak = next(point for point in settled.curve if point.strength == STRENGTHS[0])
    assert weak.accuracy == settled.curve[0].accuracy  # a weak boost does nothing yet


def test_a_search_that_gains_nothing_does_not_go_beyond_eight() -> None:
    made = world(13, 600)
    for sign in (+1, -1):
        procedure = Procedure(named=((SelectedExpert(0, 3, sign), None),), is_tuned=True)
        settled = procedure.settle(made.records, procedure.pick(made.records), made.ask)
        assert max(point.strength for point in settled.curve) <= STRENGTHS[-1] * 2**0.5


def starved_by(shift: float) -> World:
    """A useful expert whose logit lies so far below where it should."""
    made = world(13, 600, {(0, 2): 12.0})
    down = replace(made, logits_NLE=made.logits_NLE.copy())
    down.logits_NLE[:, 0, 2] -= shift
    alpha_NLE = softmax(down.logits_NLE)
    chosen_NLK = np.argsort(-alpha_NLE, axis=2, kind="stable")[:, :, :TOP_K]
    kept = {"alpha_NLE": alpha_NLE, "chosen_NLK": chosen_NLK, "logprob_NC": down.ask(())}
    return replace(down, records=replace(made.records, **kept))


def test_counts_double_up_to_all_experts() -> None:
    picks = [SelectedExpert(0, e, +1) for e in range(5)] + [SelectedExpert(1, 0, -1)]
    counts = [len(few) for few in firsts(picks, n_named=0)]
    assert counts == [2, 3, 5, 6]


def test_without_a_search_strengths_are_given_or_gaps() -> None:
    made = world(6, 300)
    often = Chooser(boost_best=1, by="appearances").choose(made.records)[0]
    seldom = Chooser(suppress_worst=1, by="appearances").choose(made.records)[0]
    boost = seldom._replace(sign=1)
    named = Procedure(named=((boost, None), (often._replace(sign=-1), 0.5)))
    gap, given = named.untuned(made.records, named.pick(made.records))
    assert gap.bias > 0 and given == RouterEdit(often.layer, often.expert, -0.5)
    named.check(made.records)
    with pytest.raises(PlanError, match="left out on average already"):
        Procedure(named=((seldom._replace(sign=-1), None),)).check(made.records)


def test_a_harmful_expert_is_found_suppressed_and_proved() -> None:
    found = judged(world(7, 1500, HARM), SUPPRESS)
    result = cross_fit_result(found, "suppress-worst 1", quiz="made up", split="val", seed=0)
    assert result.verdict == "helps"
    assert result.cross_fitted.ci95[0] > 0
    assert all(fold.biases[0][:2] == (1, 3) for fold in result.folds)
    assert result.random.p < 0.05 and result.random.distinct > 19
    assert abs(result.random.delta_mean) < result.cross_fitted.delta / 2


def test_choosing_and_scoring_on_the_same_questions_flatters() -> None:
    procedure = Procedure(chooser=Chooser(boost_best=2, suppress_worst=2), is_tuned=True)
    made = [world(seed, 200, {(0, e): 0.5 for e in range(8)}) for seed in range(12)]
    found = [judged(each, procedure, draws=1) for each in made]
    fair = np.mean([each.cross_fitted.delta for each in found])
    flattered = np.mean([each.same_questions.delta for each in found])
    assert flattered > fair + 0.005


def test_a_fold_is_not_looked_at_by_what_is_scored_on_it() -> None:
    made = world(8, 300, HARM)
    procedure = replace(SUPPRESS, chooser=Chooser(suppress_worst=1))
    before = judged(made, procedure, draws=1)
    fold_N = deal(made.records.subject_N.tolist(), made.records.hash_N.tolist(), seed=0)
    answer_N = np.where(fold_N == 0, (made.records.answer_N + 1) % 4, made.records.answer_N)
    after = judged(replace(made, records=replace(made.records, answer_N=answer_N)), procedure, 1)
    assert before.folds[0].biases == after.folds[0].biases


def test_random_experts_are_others_that_appear_as_often() -> None:
    made = world(9, 400)
    picks = Chooser(boost_best=1, suppress_worst=1).choose(made.records)
    rng = np.random.default_rng(0)
    for _ in range(30):
        drawn = draw(Chooser(), made.records, picks, rng)
        assert [(pick, other.sign) for pick, other in drawn.items()] == [
            (picks[0], 1),
            (picks[1], -1),
        ]
        taken = {(pick.layer, pick.expert) for pick in (*picks, *drawn.values())}
        assert len(taken) == 4


def test_a_random_expert_gets_the_bias_of_the_one_whose_place_it_takes() -> None:
    made = world(9, 400)
    often = Chooser(boost_best=2, by="appearances").choose(made.records)
    # The first is left out on average already, so it is not suppressed; the second is boosted.
    picks = (often[0]._replace(sign=-1), often[1])
    procedure = Procedure(named=tuple((pick, None) for pick in picks))
    asked: list[tuple[RouterEdit, ...]] = []

    def ask(shifts: tuple[RouterEdit, ...]) -> np.ndarray:
        asked.append(shifts)
        return made.ask(shifts)

    (own,) = cross_fit(made.records, procedure, ask, draws=1, seed=0).settled.shifts
    assert (own.layer, own.expert) == (picks[1].layer, picks[1].expert) and own.bias > 0
    other = draw(Chooser(), made.records, picks, np.random.default_rng(0))[picks[1]]
    assert asked[-1] == (RouterEdit(other.layer, other.expert, own.bias),)


def test_few_distinct_draws_cannot_show_much() -> None:
    many, few = RandomBaseline(np.zeros(99), distinct=60), RandomBaseline(np.zeros(99), distinct=7)
    assert many.p(0.5) == pytest.approx(1 / 61) and few.p(0.5) == pytest.approx(1 / 8)
    assert RandomBaseline(np.zeros(99), distinct=99).p(0.5) == pytest.approx(0.01)
    assert many.p(-0.1) == 1


def test_fewer_questions_than_folds_are_refused() -> None:
    made = world(10, 4)
    with pytest.raises(QuizError, match="4 tuning questions cannot be split into 5 folds"):
        judged(made, SUPPRESS)


def test_a_proof_is_read_as_it_was_written(tmp_path) -> None:
    found = judged(world(11, 100), SUPPRESS, draws=9)
    result = cross_fit_result(found, "suppress-worst 1", quiz="made up", split="val", seed=0)
    (tmp_path / "proof.json").write_bytes(result.json_bytes())
    assert load_cross_fit(tmp_path) == result
    (tmp_path / "proof.json").write_text('{"format": 2}')
    with pytest.raises(PlanError, match="is not a valid proof"):
        load_cross_fit(tmp_path)
    with pytest.raises(PlanError, match="cannot be read"):
        load_cross_fit(tmp_path / "nowhere")


@pytest.mark.slow  # as test_planted_tilts.py does with a model
def test_shuffled_labels_give_no_evidence() -> None:
    """Nothing was chosen that helps, whatever the search found."""
    made = world(12, 300)
    procedure = Procedure(chooser=Chooser(boost_best=1, suppress_worst=1), is_tuned=True)
    known: dict[tuple[RouterEdit, ...], np.ndarray] = {}

    def ask(shifts: tuple[RouterEdit, ...]) -> np.ndarray:
        if shifts not in known:
            known[shifts] = made.ask(shifts)
        return known[shifts]

    rng = np.random.default_rng(0)
    verdicts = Counter()
    for seed in range(30):
        answer_N = rng.permutation(made.records.answer_N)
        shuffled = replace(made.records, answer_N=answer_N)
        outcome = cross_fit(shuffled, procedure, ask, draws=24, seed=seed)
        result = cross_fit_result(outcome, "-", quiz="made up", split="val", seed=seed)
        verdicts[result.verdict] += 1
    assert verdicts["no evidence"] >= 27, verdicts
