"""What tells an expert's record from chance, and a firm gate from a fragile one."""

import csv
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, chi2, hypergeom

from expertcut.cli import main
from expertcut.edits.plan import PLAN_FILE
from expertcut.errors import SettingsError
from expertcut.profiling import significance as tests_module
from expertcut.profiling.findings import (
    THRESHOLDS,
    Findings,
    find,
    findings_json,
    margin,
    margin_json,
    profile_json,
)
from expertcut.profiling.measure import model_info
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.significance import (
    MIN_VARIANCE,
    SubjectCounts,
    count_by_subject,
    difference,
    null_moments,
    shuffles,
    significance,
)
from expertcut.profiling.storage import Profile
from expertcut.reporting.profile_tables import (
    experts_csv,
    margins_table,
    subject_tables,
    subjects_csv,
    suspects_table,
)
from expertcut.reporting.tables import as_csv
from expertcut.reporting.views import find_shown
from tests.conftest import open_model
from tests.support.hand_made import block, profile_info, random_profile, write_profile

Array = np.ndarray[Any, Any]
close = pytest.approx
SIZES = {"birds": 300, "clocks": 3, "trees": 41, "moths": 90, "ferns": 1}
BLOCKS = [block(0, 6, 3), block(1, 11, 3)]


@pytest.fixture
def found(tmp_path: Path) -> Findings:
    """Two blocks of unequal size, five subjects, one of them a single question."""
    return find(random_profile(tmp_path / "p", profile_info(BLOCKS, SIZES)), permutations=200)


class Case:
    """One expert of a profile: its questions, subject by subject, in plain lists."""

    def __init__(self, profile: Profile, layer: int, expert: int) -> None:
        is_correct = profile.answers.is_correct_N.tolist()
        chosen = profile.array("chosen_NLK")[:, layer].tolist()
        alpha = profile.array("alpha_NLE")[:, layer, expert].tolist()
        self.alpha = [a for a, its in zip(alpha, chosen, strict=True) if expert in its]
        self.right = [r for r, its in zip(is_correct, chosen, strict=True) if expert in its]
        self.strata: list[tuple[list[bool], list[bool]]] = []
        subjects = profile.subjects()
        for name in dict.fromkeys(subjects):
            rows = [i for i, subject in enumerate(subjects) if subject == name]
            with_it = [is_correct[i] for i in rows if expert in chosen[i]]
            without = [is_correct[i] for i in rows if expert not in chosen[i]]
            self.strata.append((with_it, without))

    def difference(self) -> tuple[float | None, float | None]:
        """Mantel and Haenszel's difference, and Sato's standard error of it."""
        total = top = p = q = 0.0
        for with_it, without in self.strata:
            n1, n0, y1, y0 = len(with_it), len(without), sum(with_it), sum(without)
            n = n1 + n0
            total += n1 * n0 / n
            top += (y1 * n0 - y0 * n1) / n
            p += (n1**2 * y0 - n0**2 * y1 + n1 * n0 * (n0 - n1) / 2) / n**2
            q += (y1 * (n0 - y0) + y0 * (n1 - y1)) / (2 * n)
        if not total:
            return None, None
        return top / total, math.sqrt(top / total * p + q) / total

    def z(self) -> float | None:
        """By scipy's hypergeometric distribution, stratum by stratum."""
        top = variance = 0.0
        for with_it, without in self.strata:
            n, right = len(with_it) + len(without), sum(with_it) + sum(without)
            chance = {k: hypergeom.pmf(k, n, right, len(with_it)) for k in range(n + 1)}
            mean = sum(k * p for k, p in chance.items())
            top += sum(with_it) - mean
            variance += sum((k - mean) ** 2 * p for k, p in chance.items())
        return top / math.sqrt(variance) if variance >= 2.5 else None


# Each expert against its subjects


def test_every_number_of_every_expert_agrees_with_a_plain_loop(found: Findings):
    n_defined = n_undefined = 0
    for layer in findings_json(found)["layers"]:
        for row in layer["expert"]:
            case = Case(found.profile, layer["layer"], row["expert"])
            assert (row["difference"], row["difference_se"]) == close(case.difference())
            z = case.z()
            assert row["z"] == (None if z is None else close(z))
            assert row["p"] == (None if z is None else close(chi2.sf(z * z, 1)))
            n_defined += z is not None
            n_undefined += z is None
            if not case.right:
                assert row["accuracy_ci95"] is row["weighted_accuracy_ci95"] is None
                assert row["difference"] is None
                continue
            wilson = binomtest(sum(case.right), len(case.right)).proportion_ci(method="wilson")
            assert row["accuracy_ci95"] == close([wilson.low, wilson.high], abs=1e-12)
            n = sum(case.alpha) ** 2 / sum(a * a for a in case.alpha)
            assert 1 <= n < len(case.alpha) or len(case.alpha) == 1
            theta, z2 = row["weighted_accuracy"], 1.959963984540054**2
            middle = (theta + z2 / (2 * n)) / (1 + z2 / n)
            half = math.sqrt(z2 * (theta * (1 - theta) / n + z2 / (4 * n * n))) / (1 + z2 / n)
            assert row["weighted_accuracy_ci95"] == close([middle - half, middle + half])
    assert n_defined == findings_json(found)["tests"] == 13
    assert n_undefined == 4  # two idle experts a layer


def test_the_json_keeps_every_number_of_the_paper(found: Findings):
    paper = profile_json(found.profile)
    shown = json.loads(json.dumps(findings_json(found), allow_nan=False))
    for key in ("questions", "accuracy", "near_ties"):
        assert shown[key] == paper[key]
    for layer, expected in zip(shown["layers"], paper["layers"], strict=True):
        experts = expected.pop("expert")
        assert layer.items() >= expected.items()
        for row, its in zip(layer["expert"], experts, strict=True):
            assert row.items() > its.items()
    assert set(shown) - set(paper) == {
        *("tests", "permutations", "seed", "p_family", "suspects"),
        *("perturbations", "subjects"),
    }


# Men admitted and rejected, women admitted and rejected; R's UCBAdmissions.
BERKELEY = {
    "A": (512, 313, 89, 19),
    "B": (353, 207, 17, 8),
    "C": (120, 205, 202, 391),
    "D": (138, 279, 131, 244),
    "E": (53, 138, 94, 299),
    "F": (22, 351, 24, 317),
}


def tabulated(tables: dict[str, tuple[int, int, int, int]]) -> tuple[SubjectCounts, Array, Array]:
    """Strata of (right, wrong) with the expert and (right, wrong) without, spelled out."""
    subjects, right, active = [], [], []
    for name, cells in tables.items():
        for cell, is_right, is_active in zip(cells, (1, 0, 1, 0), (1, 1, 0, 0), strict=True):
            subjects += [name] * cell
            right += [is_right] * cell
            active += [is_active] * cell
    is_correct_N, is_activated_NX = np.array(right, bool), np.array(active, bool)[:, None]
    return count_by_subject(subjects, is_correct_N, is_activated_NX), is_correct_N, is_activated_NX


def test_the_berkeley_admissions_give_what_r_gives():
    # mantelhaen.test(UCBAdmissions): X² = 1.4269 with continuity correction, p = 0.2323.
    counts, is_correct_N, is_activated_NX = tabulated(BERKELEY)
    (expected,), (variance,) = null_moments(counts)
    distance = abs(counts.activated_right_SX.sum() - expected)
    corrected = (distance - 0.5) ** 2 / variance
    assert corrected == close(1.4269, abs=5e-5)
    assert chi2.sf(corrected, 1) == close(0.2323, abs=5e-5)
    found = significance(counts, is_correct_N, is_activated_NX, permutations=20)
    assert found.z_X[0] ** 2 == close(distance**2 / variance)
    assert found.z_X[0] < 0


def test_who_is_asked_hard_questions_is_no_suspect():
    # Worse by 24 points over all, as good as the others in each subject.
    tables = {"easy": (18, 2, 162, 18), "hard": (54, 126, 6, 14)}
    counts, is_correct_N, is_activated_NX = tabulated(tables)
    with_it = is_correct_N[is_activated_NX[:, 0]].mean()
    without = is_correct_N[~is_activated_NX[:, 0]].mean()
    assert with_it == close(0.36) and without == close(0.84)
    found = significance(counts, is_correct_N, is_activated_NX, permutations=200)
    assert found.difference_X[0] == close(0)
    assert found.z_X[0] == close(0)
    assert found.p_family_X[0] > 0.5


@pytest.mark.parametrize("each", [2, 5, 60])
def test_the_standard_error_holds_for_subjects_of_any_size(each: int):
    rng, n_runs, n_subjects = np.random.default_rng(each), 150, 240 // each
    names = np.repeat([f"subject {s}" for s in range(n_subjects)], each)
    skill_N = np.repeat(rng.uniform(0.3, 0.9, n_subjects), each)
    found = []
    for _ in range(n_runs):
        is_activated_NX = rng.random((len(names), 1)) < 0.4
        counts = count_by_subject(names.tolist(), rng.random(len(names)) < skill_N, is_activated_NX)
        found.append([float(value[0]) for value in difference(counts)])
    difference_B, se_B = np.array(found).T
    assert np.sqrt((se_B**2).mean()) == close(difference_B.std(), rel=0.2)
    assert 0.91 <= (np.abs(difference_B) < 1.96 * se_B).mean() <= 0.99


def test_suspects_are_ranked_by_z_not_by_difference():
    # Expert 0: −26 points on 12 questions; 1: −20 points on 200; 2 is better than the others.
    is_correct_N = np.tile([True, False], 200)
    is_activated_NX = np.zeros((400, 3), dtype=bool)
    is_activated_NX[[*range(0, 6, 2), *range(1, 19, 2)], 0] = True
    is_activated_NX[[*range(0, 160, 2), *range(1, 241, 2)], 1] = True
    is_activated_NX[:, 2] = ~is_activated_NX[:, 1]
    counts = count_by_subject(["birds"] * 400, is_correct_N, is_activated_NX)
    found = significance(counts, is_correct_N, is_activated_NX, permutations=100)
    assert found.difference_X[0] < found.difference_X[1] < 0 < found.difference_X[2]
    assert found.suspects == [1, 0]


def test_an_expert_with_too_little_to_compare_is_not_tested():
    # One stratum of n, half of them right, 8 with the expert: variance 8 (n − 8) / (4 (n − 1)).
    is_tested = []
    for n in (10, 12, 14, 200):
        is_correct_N = np.arange(n) % 2 == 0
        is_activated_NX = (np.arange(n) < 8)[:, None]
        counts = count_by_subject(["birds"] * n, is_correct_N, is_activated_NX)
        variance = null_moments(counts)[1][0]
        assert variance == close(8 * (n - 8) / (4 * (n - 1)))
        assert variance < MIN_VARIANCE
        found = significance(counts, is_correct_N, is_activated_NX, permutations=20)
        is_tested.append(found.n_tests)
        assert found.p_family is None and found.suspects == []
        assert not np.isnan(found.difference_X[0]) and np.isnan(found.z_X[0])
        wide_NX = np.repeat(is_activated_NX, 2, axis=0)
        counts = count_by_subject(["b"] * 2 * n, is_correct_N.repeat(2), wide_NX)
        found = significance(counts, is_correct_N.repeat(2), wide_NX, permutations=20)
        is_tested.append(found.n_tests)
        assert found.n_tests == (null_moments(counts)[1][0] >= MIN_VARIANCE)
    assert set(is_tested) == {0, 1}


def test_adjusted_p_values_are_those_of_benjamini_and_hochberg(found: Findings):
    rows = [row for layer in findings_json(found)["layers"] for row in layer["expert"]]
    defined = sorted((row["p"], row["p_adjusted"]) for row in rows if row["p"] is not None)
    for rank, (_, adjusted) in enumerate(defined, 1):
        steps = [p * len(defined) / k for k, (p, _) in enumerate(defined, 1) if k >= rank]
        assert adjusted == close(min(1, *steps))
    assert all(row["p_adjusted"] is None for row in rows if row["p"] is None)
    assert any(p < adjusted < 1 for p, adjusted in defined)


def test_the_family_wise_p_counts_permutations_whose_largest_z_is_as_large(
    found: Findings, monkeypatch: pytest.MonkeyPatch
):
    profile, draws = found.profile, 60
    is_correct_N = profile.answers.is_correct_N
    is_activated_NX = np.concatenate([layer.is_activated_NE for layer in found.layers], axis=1)
    counts = found.counts
    tested = significance(counts, is_correct_N, is_activated_NX, draws, seed=7)
    largest = []
    for row_N in shuffles(counts, is_correct_N, draws, seed=7) > 0:
        its = count_by_subject(profile.subjects(), row_N, is_activated_NX)
        assert its.right_S.tolist() == counts.right_S.tolist()
        expected_X, variance_X = null_moments(its)
        ok = variance_X >= MIN_VARIANCE
        z_X = (its.activated_right_SX.sum(0) - expected_X)[ok] / np.sqrt(variance_X[ok])
        largest.append(np.abs(z_X).max())
    for z, p in zip(tested.z_X, tested.p_family_X, strict=True):
        if np.isnan(z):
            assert np.isnan(p)
        else:
            assert p == close((1 + sum(top >= abs(z) for top in largest)) / (1 + draws))
    assert tested.p_family == np.nanmin(tested.p_family_X)
    assert len(set(tested.p_family_X.tolist())) > 5
    # However many experts share a product, and again with the same seed.
    monkeypatch.setattr(tests_module, "_WIDTH", 4)
    again = significance(counts, is_correct_N, is_activated_NX, draws, seed=7)
    assert again.p_family_X.tolist() == close(tested.p_family_X.tolist(), nan_ok=True)
    other = significance(counts, is_correct_N, is_activated_NX, draws, seed=8)
    assert other.p_family_X.tolist() != close(tested.p_family_X.tolist(), nan_ok=True)


def test_permutations_move_answers_within_their_subjects_alone(found: Findings):
    is_correct_N = found.profile.answers.is_correct_N
    shuffled_BN = shuffles(found.counts, is_correct_N, 30, seed=0)
    assert len({row.tobytes() for row in shuffled_BN}) == 30
    for row in found.counts.rows:
        assert set(shuffled_BN[:, row].sum(1)) == {is_correct_N[row].sum()}
    # Every question of a large subject is right about as often as the subject.
    birds = shuffles(found.counts, is_correct_N, 2000, seed=0)[:, found.counts.rows[0]]
    assert np.abs(birds.mean(0) - is_correct_N[found.counts.rows[0]].mean()).max() < 0.06


def test_chance_raises_an_alarm_no_more_often_than_it_says(found: Findings):
    # At 5 % at most 18 of 200, which a true 5 % stays below in 99 % of runs.
    is_activated_NX = np.concatenate([layer.is_activated_NE for layer in found.layers], axis=1)
    is_correct_N = found.profile.answers.is_correct_N
    p_family, n_unadjusted = [], 0
    for row_N in shuffles(found.counts, is_correct_N, 200, seed=123) > 0:
        counts = count_by_subject(found.profile.subjects(), row_N, is_activated_NX)
        tested = significance(counts, row_N, is_activated_NX, seed=0)
        assert tested.p_family is not None and tested.permutations == 2000
        p_family.append(tested.p_family)
        n_unadjusted += bool(np.nanmin(tested.p_X) < 0.05)
    assert sum(p < 0.05 for p in p_family) <= 18
    assert n_unadjusted > 50  # what thirteen tests find without the adjustment
    assert 0.35 < np.median(p_family) < 0.65  # and it is no smaller than it must be


# Subjects


def test_every_number_of_every_subject_agrees_with_a_profile_of_that_subject_alone(
    tmp_path: Path, found: Findings
):
    shown = findings_json(found)["subjects"]
    assert [s["subject"] for s in shown] == list(SIZES)
    chunks = dict(zip((n for n, _, _ in found.profile.info.chunks()), found.profile.chunks,
                      strict=True))  # fmt: skip
    for subject in shown:
        name = subject["subject"]
        info = profile_info(BLOCKS, {name: SIZES[name]})
        its = [chunks[file] for file, _, _ in info.chunks()]
        alone = profile_json(write_profile(tmp_path / name, info, its))
        assert subject["questions"] == alone["questions"] == SIZES[name]
        assert subject["accuracy"] == close(alone["accuracy"])
        for layer, expected in zip(subject["layers"], alone["layers"], strict=True):
            for key in ("layer", *(k for k in expected if k.startswith(("entropy_", "rank_")))):
                assert layer[key] == close(expected[key])
            rows = expected["expert"]
            assert layer["appearances"] == close([row["appearances"] for row in rows])
            assert layer["expert_accuracy"] == [
                None if row["accuracy"] is None else close(row["accuracy"]) for row in rows
            ]


# Margins


def drawn(seed: int, scoring: str, n: int = 40, **more: Any) -> tuple[BlockInfo, Array, Array]:
    """A block, logits (N, E) and the two experts chosen by them."""
    logits_NE = np.random.default_rng(seed).normal(0, 1.5, (n, 8))
    info = block(0, scoring=scoring, **{"selection_bias": False, **more})
    return info, logits_NE, np.argsort(-logits_NE, axis=1)[:, 1::-1]


def alpha_of(scoring: str, logits_NE: Array) -> Array:
    if scoring == "sigmoid":
        return 1 / (1 + np.exp(-logits_NE))
    return np.exp(logits_NE) / np.exp(logits_NE).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_margin_is_the_distance_of_rank_k_to_the_next(scoring: str):
    info, logits_NE, chosen_NK = drawn(0, scoring)
    alpha_NE = alpha_of(scoring, logits_NE).astype(np.float32)
    found = margin(info, alpha_NE, chosen_NK)
    assert found.undefined == ""
    for n in range(len(logits_NE)):
        alpha, logits = (sorted(a[n].tolist(), reverse=True) for a in (alpha_NE, logits_NE))
        assert found.probability_N[n] == close(alpha[1] - alpha[2])
        assert found.logit_N[n] == close(logits[1] - logits[2], abs=1e-5)
    shown = margin_json(found)
    for name, values_N in (("probability", found.probability_N), ("logit", found.logit_N)):
        ordered = sorted(values_N.tolist())
        its = shown[f"margin_{name}"]
        assert its["mean"] == close(sum(ordered) / 40)
        assert its["median"] == close((ordered[19] + ordered[20]) / 2)
        assert ordered[0] < its["q01"] < its["q05"] < its["q25"] < its["median"]
        assert its["median"] < its["q75"] < its["q95"] < its["q99"] < ordered[-1]
        assert its["std"] == close(np.std(ordered))
    assert shown["margin_undefined"] is None


def test_the_share_below_a_threshold_is_counted():
    info = block(0, 4, 1, selection_bias=False)
    last = np.array([0.5, 0.4, 0.35, 0.34])
    behind = np.array([0.0, 0.99e-4, 0.99e-3, 1.01e-2])
    alpha_NE = np.stack([last, last - behind, np.zeros(4), np.zeros(4)], axis=1)
    found = margin(info, alpha_NE, np.zeros((4, 1), dtype=np.int64))
    assert found.probability_N.tolist() == close(behind.tolist(), abs=1e-12)
    below = margin_json(found)["margin_below"]
    assert [item["probability"] for item in below] == list(THRESHOLDS) == [1e-4, 1e-3, 1e-2]
    assert [item["share"] for item in below] == [0.5, 0.75, 0.75]


UNDEFINED = {
    "bias": ({"selection_bias": True}, "a bias is added"),
    "unknown bias": ({"scoring": "sigmoid", "selection_bias": None}, "does not say whether a bias"),
    "groups": ({"groups": 4, "top_groups": 2}, "within the best groups"),
    "all": ({"experts": 2}, "every expert is always chosen"),
}


@pytest.mark.parametrize(("changes", "why"), UNDEFINED.values(), ids=UNDEFINED)
def test_a_margin_that_alpha_cannot_tell_is_null_and_says_why(changes: dict[str, Any], why: str):
    info, logits_NE, chosen_NK = drawn(0, "softmax")
    assert margin(info, alpha_of("softmax", logits_NE), chosen_NK).undefined == ""
    other = info.model_copy(update=changes)
    n = other.experts
    found = margin(other, alpha_of("softmax", logits_NE[:, :n]), np.minimum(chosen_NK, n - 1))
    shown = margin_json(found)
    assert why in shown.pop("margin_undefined")
    assert shown == dict.fromkeys(("margin_probability", "margin_logit", "margin_below"))


def test_experts_that_do_not_have_the_largest_alpha_were_chosen_by_something_else():
    info, logits_NE, chosen_NK = drawn(0, "softmax", selection_bias=None)
    alpha_NE = alpha_of("softmax", logits_NE)
    assert margin(info, alpha_NE, chosen_NK).undefined == ""
    lowest_N = alpha_NE[7].argmin()
    other_NK = chosen_NK.copy()
    other_NK[7, 1] = lowest_N
    assert "do not have the largest α" in margin(info, alpha_NE, other_NK).undefined


def test_an_order_that_rounding_turned_around_is_a_margin_of_nothing():
    info, logits_NE, chosen_NK = drawn(0, "softmax")
    alpha_NE = alpha_of("softmax", logits_NE)
    third = np.argsort(-alpha_NE[7])[2]
    last = chosen_NK[7][alpha_NE[7, chosen_NK[7]].argmin()]
    alpha_NE[7, third] = alpha_NE[7, last] * 1.003  # less than one step of bfloat16
    found = margin(info, alpha_NE, chosen_NK)
    assert (found.undefined, found.probability_N[7], found.logit_N[7]) == ("", 0, 0)


def test_where_alpha_was_rounded_to_nothing_the_logit_is_unknown_and_the_rest_is_not():
    info, logits_NE, chosen_NK = drawn(0, "softmax")
    alpha_NE = alpha_of("softmax", logits_NE)
    alpha_NE[3] = 0
    alpha_NE[3, chosen_NK[3]] = 0.5
    shown = json.loads(json.dumps(margin_json(margin(info, alpha_NE, chosen_NK)), allow_nan=False))
    assert shown["margin_logit"]["mean"] is None
    assert shown["margin_logit"]["median"] > 0
    assert shown["margin_probability"]["mean"] > 0


@pytest.mark.parametrize(
    ("family", "expected"), [("olmoe", False), ("gpt_oss", False), ("deepseek_v3", True)]
)
def test_a_profile_says_whether_a_bias_joins_in_choosing(
    checkpoint: Callable[..., Path], family: str, expected: bool
):
    blocks = model_info(open_model(checkpoint(family))).blocks
    assert {b.selection_bias for b in blocks} == {expected}


# What people read


def test_suspects_are_the_worst_ten_with_their_numbers(found: Findings):
    shown = findings_json(found)["suspects"]
    assert [row["z"] for row in shown] == sorted(row["z"] for row in shown)
    assert len(shown) > 2 and shown[-1]["z"] < 0
    table = suspects_table(found)
    for row, cells in zip(shown[:10], table.texts(), strict=True):
        low, high = row["accuracy_ci95"]
        assert [cell.replace("−", "-") for cell in cells] == [
            *(str(row["layer"]), str(row["expert"])),
            *(f"{row['appearances']:.1%}", f"{row['accuracy']:.1%}", f"{low:.1%} … {high:.1%}"),
            *(f"{100 * row['difference']:+.1f}", f"{100 * row['difference_se']:.1f}"),
            *(f"{row['z']:+.2f}", f"{row['p']:.2g}"),
            *(f"{row['p_adjusted']:.2g}", f"{row['p_family']:.2g}"),
        ]
    assert "13 of 17 experts could be tested" in table.note
    assert "200 permutations" in table.note


def test_margins_stand_in_a_table_with_what_is_undefined(tmp_path: Path):
    blocks = [block(0), block(1, scoring="sigmoid"), block(2, scoring="sigmoid")]
    found = find(random_profile(tmp_path / "p", profile_info(blocks, {"birds": 30})))
    table = margins_table(found)
    first, *others = table.texts()
    shown = findings_json(found)["layers"][0]
    p, logit = shown["margin_probability"], shown["margin_logit"]
    assert first[0] == "0"
    assert first[1:5] == [f"{p[name]:.2e}" for name in ("mean", "q05", "median", "q95")]
    assert first[5:9] == [f"{logit[name]:.3f}" for name in ("mean", "q05", "median", "q95")]
    assert first[9:] == [f"{item['share']:.1%}" for item in shown["margin_below"]]
    assert [row[1:] for row in others] == [["–"] * 11] * 2
    assert "None in layers 1, 2: the profile does not say" in table.note


def test_show_adds_them_to_the_paper_and_subjects_when_asked(found: Findings):
    path = found.profile.path
    short = [table.title.split(":")[0] for table in find_shown(path).tables()]
    assert short[-2:] == ["Suspects", "Gate margins at the answer position"]
    long = [table.title.split(":")[0] for table in find_shown(path, by_subject=True).tables()]
    assert long == [*short, "Subjects", "Subjects"]
    assert {"suspects", "subjects", "tests"} < set(find_shown(path).json())
    assert find_shown(path).flat().title == "experts"
    assert find_shown(path, by_subject=True).flat().title == "subjects"


def test_subjects_of_something_else_are_refused(tmp_path: Path):
    (tmp_path / PLAN_FILE).write_text("{}")
    with pytest.raises(SettingsError, match=f"--subjects: {tmp_path} is not a profile"):
        find_shown(tmp_path, by_subject=True)


def test_the_command_prints_subjects_when_asked(
    found: Findings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    printed = []
    for options in ([], ["--subjects"]):
        command = ["expertcut", "show", str(found.profile.path), "--format", "md", *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0
        printed.append(capsys.readouterr().out)
    short, long = printed
    assert long.startswith(short) and "### Suspects" in short and "### Gate margins" in short
    assert "### Subjects" in long and "### Subjects" not in short


def test_subject_tables_hold_the_numbers(found: Findings):
    shown = findings_json(found)["subjects"]
    routing, experts = subject_tables(found)
    assert len(routing.rows) == len(SIZES) * 2
    layer = shown[2]["layers"][1]
    row = routing.texts()[5]
    assert row[:4] == ["trees", "41", f"{shown[2]['accuracy']:.1%}", "1"]
    assert row[4] == f"{layer['entropy_top_mean']:.4f}"
    assert row[7] == f"{layer['entropy_all_std']:.4f}"
    assert row[8] == " ".join(f"{p:.3f}" for p in layer["rank_probability_mean"])
    expected = [
        [s["subject"], its["layer"], e, share, its["expert_accuracy"][e]]
        for s in shown
        for its in s["layers"]
        for e, share in enumerate(its["appearances"])
        if share >= 0.01
    ]
    assert experts.rows == expected
    assert 20 < len(expected) < len(SIZES) * 17


def test_the_csv_has_every_number_of_the_json(found: Findings):
    shown = findings_json(found)
    rows = list(csv.DictReader(io.StringIO(as_csv(experts_csv(found)))))
    experts = [e for layer in shown["layers"] for e in layer["expert"]]
    for row, expert in zip(rows, experts, strict=True):
        for name in ("difference", "difference_se", "z", "p", "p_adjusted", "p_family"):
            assert row[name] == ("" if expert[name] is None else str(expert[name]))
        for name in ("accuracy_ci95", "weighted_accuracy_ci95"):
            ends = expert[name] or ("", "")
            assert (row[f"{name}_low"], row[f"{name}_high"]) == tuple(map(str, ends))
    rows = list(csv.DictReader(io.StringIO(as_csv(subjects_csv(found)))))
    assert len(rows) == len(SIZES) * 17
    moth = next(r for r in rows if (r["subject"], r["layer"], r["expert"]) == ("moths", "1", "3"))
    layer = shown["subjects"][3]["layers"][1]
    assert moth["questions"] == "90"
    assert moth["appearances"] == str(layer["appearances"][3])
    assert moth["accuracy"] == str(layer["expert_accuracy"][3])
