"""Accuracy, intervals and comparisons against other people's code, and `results.json`."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.metrics import mean_stderr, pooled_sample_stderr
from safetensors import safe_open
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, binomtest

from expertcut.checkpoints.size import size
from expertcut.data import Selection, load_quiz, prompt
from expertcut.edits.plan import BlockEdit, ChosenOn, PlanFile, PlanModel, hashes_sha256, save_plan
from expertcut.errors import ModelError, OutputError, PlanError
from expertcut.evaluation.evaluate import find_models, results, score
from expertcut.evaluation.results import Results, Scored, Scoring, load_results
from expertcut.models.load import LoadOptions, find_source
from expertcut.profiling.measure import MeasureOptions
from expertcut.profiling.workers import Progress
from expertcut.stats import (
    Comparison,
    accuracy,
    compare,
    mcnemar,
    paired_interval,
    pooled_stderr,
    smallest_effect,
    wilson_interval,
)
from tests.conftest import SUBJECTS, open_model

close = pytest.approx
Checkpoints = Callable[..., Path]


# One model


@pytest.mark.parametrize("n", [1, 2, 7, 57, 1531, 14_042])
def test_the_interval_is_wilsons(n: int):
    for n_correct in {0, 1, n // 3, n - 1, n}:
        expected = binomtest(n_correct, n).proportion_ci(0.95, method="wilson")
        assert wilson_interval(n_correct / n, n) == close((expected.low, expected.high), abs=1e-12)
        low, high = wilson_interval(n_correct / n, n)
        assert 0 <= low < high <= 1
        assert low - 1e-12 <= n_correct / n <= high + 1e-12


def test_wilsons_interval_takes_a_fractional_number():
    # Its ends are the p whose distance from the share is 1.96 of their own standard error.
    share, n = 0.3, 12.7
    for p in wilson_interval(share, n):
        assert abs(share - p) == close(1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-6)


def test_the_standard_error_is_the_harness_pooled_one():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(2, 60, rng.integers(1, 8)).tolist()
        answers = [(rng.random(n) < rng.random()).astype(float).tolist() for n in sizes]
        expected = pooled_sample_stderr([mean_stderr(a) for a in answers], sizes)
        found = pooled_stderr([(sum(a) / len(a), len(a)) for a in answers])
        assert found == close(float(expected), abs=1e-12)
    assert pooled_stderr([(0.5, 2), (1.0, 1)]) == close(math.sqrt(0.5 / (1 * 3)))


def test_with_one_question_a_subject_there_is_no_standard_error():
    found = accuracy(np.array([True, False]), ["birds", "clocks"])
    assert found.stderr is None
    assert accuracy(np.array([True, False]), ["birds", "birds"]).stderr == close(0.5)


def test_accuracy_is_micro_and_stands_for_every_subject():
    is_correct_N = np.array([True] * 9 + [False] * 1 + [True, False, False])
    found = accuracy(is_correct_N, ["birds"] * 10 + ["clocks"] * 3)
    assert found.accuracy == close(10 / 13)  # not the mean of 0.9 and 1/3
    assert found.by_subject == {"birds": (close(0.9), 10), "clocks": (close(1 / 3), 3)}
    assert found.n_questions == 13
    assert found.ci95 == close(tuple(binomtest(10, 13).proportion_ci(method="wilson")))


# Two models


def test_mcnemars_test_is_the_exact_binomial_one():
    for gained in range(12):
        for lost in range(12):
            if gained + lost:
                expected = binomtest(gained, gained + lost, 0.5).pvalue
                assert mcnemar(gained, lost) == close(expected, abs=1e-12)
                assert mcnemar(gained, lost) == mcnemar(lost, gained)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 6) == close(2 / 64)
    assert mcnemar(400, 500) == close(binomtest(400, 900).pvalue)


def naive_score_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Where the score test accepts, by a maximum of the likelihood that is looked for at each Δ."""

    def z(change: float) -> float:
        def cost(lost_rate: float) -> float:
            rates = (lost_rate + change, lost_rate, 1 - 2 * lost_rate - change)
            counts = (gained, lost, n - gained - lost)
            return -sum(k * math.log(p) for k, p in zip(counts, rates, strict=True) if k)

        ends = (max(0.0, -change) + 1e-12, (1 - change) / 2 - 1e-12)
        rate = minimize_scalar(cost, bounds=ends, method="bounded", options={"xatol": 1e-12}).x
        variance = n * (2 * rate + change - change**2)
        return (gained - lost - n * change) / math.sqrt(variance)

    middle, edge = (gained - lost) / n, 1 - 1e-9
    low, high = brentq(lambda d: z(d) - 1.959964, -edge, middle), edge
    return low, brentq(lambda d: z(d) + 1.959964, middle, high)


@pytest.mark.parametrize("counts", [(3, 7, 50), (12, 2, 50), (1, 0, 9), (40, 55, 300), (4, 4, 20)])
def test_the_interval_is_the_score_interval_found_by_search(counts: tuple[int, int, int]):
    assert paired_interval(*counts) == close(naive_score_interval(*counts), abs=1e-5)


def test_the_interval_is_the_published_one():
    # Airway hyper-responsiveness before and after transplantation: Fagerland, Lydersen and Laake
    # (2014), Statistics in Medicine 33:2850.
    assert paired_interval(1, 7, 21) == close((-0.517, -0.026), abs=5e-4)


def test_the_interval_holds_the_change_and_is_turned_round_with_the_models():
    for n in (1, 2, 5, 30):
        for gained in range(n + 1):
            for lost in range(n + 1 - gained):
                low, high = paired_interval(gained, lost, n)
                assert -1 <= low <= (gained - lost) / n <= high <= 1
                assert high - low > 3 / (n + 4)  # no change at all is no certainty either
                assert paired_interval(lost, gained, n) == (-high, -low)


def test_an_interval_does_not_know_of_subjects():
    base_N = np.array([False] * 3 + [True] * 27)
    found = compare(base_N, np.full(30, True))  # 30 questions, 3 gained: as many subjects or one
    assert found.ci95 == close((-0.0249, 0.2562), abs=1e-4)
    assert found.mcnemar_p == 0.25


def test_what_the_exact_test_rejects_lies_outside_the_interval():
    n_significant = n_open = 0
    counts = [(g, m - g, n) for n in (8, 40) for m in range(n + 1) for g in range(m + 1)]
    counts += [
        (k, m - k, 20_000) for m in (100, 1001, 9999) for k in (int(binom.ppf(0.025, m, 0.5)) - 1,)
    ]
    for gained, lost, n in counts:
        ci95, p = paired_interval(gained, lost, n), mcnemar(gained, lost)
        assert comparison(ci95, p).is_significant == (p < 0.05)
        n_significant += p < 0.05
        n_open += p >= 0.05 and not ci95[0] <= 0 <= ci95[1]
    assert n_significant > 100 and n_open > 10
    # An interval of an earlier version, of 14 questions.
    assert not comparison((0.01, 0.28), 0.62).is_significant


def comparison(ci95: tuple[float, float], p: float) -> Comparison:
    return Comparison(delta=0, ci95=ci95, gained=0, lost=0, mcnemar_p=p, smallest_effect=0)


SIZES = {
    **{str(n): [n] for n in (1, 2, 3, 5, 20, 300)},
    "1 to 300": [1, 2, 3, 5, 20, 300],
    "many of 1, one of 60": [1] * 60 + [60],
}


def covered(sizes: list[int], n_at_least: int, rate: float, shift: float = 0.0) -> float:
    """Share of 2,000 evaluations whose interval holds the true change, 0.

    Subjects of these sizes are repeated. Each has its own rate of changed answers around `rate`;
    a changed answer is gained or lost by the toss of a coin, which `shift` makes unfair in one half
    of the questions, and in the other half the other way round.
    """
    rng = np.random.default_rng(0)
    times = -(-n_at_least // sum(sizes))
    size_S = np.tile(sizes, times)
    rate_N = np.repeat(rate * rng.uniform(0.2, 1.8, len(size_S)), size_S)
    gain_N = 0.5 + shift * np.where(np.arange(len(rate_N)) % 2, 1, -1)
    draws = (2000, len(rate_N))
    is_changed_BN, is_gain_BN = rng.random(draws) < rate_N, rng.random(draws) < gain_N
    gained_B = (is_changed_BN & is_gain_BN).sum(axis=1)
    lost_B = is_changed_BN.sum(axis=1) - gained_B
    pairs, times_P = np.unique(np.stack([gained_B, lost_B], axis=1), axis=0, return_counts=True)
    ends = [paired_interval(int(g), int(c), len(rate_N)) for g, c in pairs]
    is_held_P = [low <= 0 <= high for low, high in ends]
    return float((times_P * is_held_P).sum() / 2000)


@pytest.mark.parametrize("each", SIZES)
def test_the_interval_holds_no_change_in_95_of_100_evaluations(each: str):
    assert 0.94 <= covered(SIZES[each], 300, 0.2) <= 0.96


def exactly_covered(n: int, rate: float) -> float:
    """The same without simulation, for one rate: over how many answers change, and which way."""
    share = 0.0
    for m in range(int(binom.ppf(1e-6, n, rate)), int(binom.ppf(1 - 1e-6, n, rate)) + 1):
        # 0 is left out where one way has few enough.
        fewest = next(k for k in range(m + 1) if paired_interval(m - k, k, n)[0] <= 0)
        held = 1.0 if fewest == 0 else 1 - 2 * float(binom.cdf(fewest - 1, m, 0.5))
        share += float(binom.pmf(m, n, rate)) * held
    return share


@pytest.mark.parametrize("n_changed", [1, 3, 6, 12, 24, 36])
def test_where_few_answers_change_the_interval_is_too_wide_and_never_too_narrow(n_changed: int):
    shares = [exactly_covered(n, n_changed / n) for n in (60, 120, 600)]
    assert min(shares) >= 0.944
    assert max(shares) <= {1: 1.0, 3: 0.98}.get(n_changed, 0.96)


def test_subjects_that_change_in_opposite_directions_are_covered_too():
    assert covered([2], 120, 0.2, shift=0.4) >= 0.94


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("n", [60, 120, 300, 1200])
@pytest.mark.parametrize("each", SIZES)
def test_the_interval_holds_no_change_whatever_the_size_of_subjects(each: str, n: int, rate: float):
    n_changed = rate * max(n, sum(SIZES[each]))
    # Of 2,000 draws a share of 95 % has a standard error of 0.5 %.
    assert 0.935 <= covered(SIZES[each], n, rate) <= (0.965 if n_changed >= 6 else 0.99)


def test_the_smallest_effect_is_2_8_standard_errors_of_the_change():
    for gained, lost, n in ((3, 7, 50), (10, 10, 1000), (0, 9, 14_042)):
        change_N = np.array([1] * gained + [-1] * lost + [0] * (n - gained - lost))
        expected = 2.8 * change_N.std() / math.sqrt(n)
        assert smallest_effect(gained, lost, n) == close(expected, rel=1e-6)
    assert smallest_effect(0, 0, 600) == 0.005  # rule of three
    assert smallest_effect(5, 0, 5) == 0.6  # every question gained: no spread, the same rule


def test_gained_and_lost_are_counted_question_by_question():
    base = [True, True, False, False, True, False]
    other = [True, False, True, True, False, True]
    found = compare(np.array(base), np.array(other))
    assert (found.gained, found.lost) == (3, 2)
    assert found.delta == close(sum(other) / 6 - sum(base) / 6)
    assert found.mcnemar_p == close(binomtest(2, 5).pvalue)
    back = compare(np.array(other), np.array(base))
    assert (back.gained, back.lost, back.delta) == (2, 3, -found.delta)


def test_a_model_compared_with_itself_shows_nothing():
    is_correct_N = np.array([True, False, True] * 20)
    found = compare(is_correct_N, is_correct_N)
    assert (found.delta, found.gained, found.lost) == (0, 0, 0)
    assert found.ci95[0] == -found.ci95[1] == close(-3.8415 / (60 + 3.8415), abs=1e-5)
    assert (found.mcnemar_p, found.smallest_effect) == (1.0, 3 / 60)


# Size


def tensors_on_disk(path: Path) -> dict[str, int]:
    counts = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                counts[name] = opened.get_tensor(name).numel()
    return counts


def test_size_agrees_with_a_count_by_hand(checkpoint: Checkpoints):
    expert = 3 * 32 * 16  # gate, up, down
    attention = 2 * 32 * 32 + 2 * 32 * 16 + 32 + 16  # q, o; k, v of 2 of 4 heads; their norms
    layer = attention + 2 * 32 + 8 * 32 + 8 * expert  # norms, router, experts
    whole = 2 * 290 * 32 + 2 * layer + 32  # embedding, head, last norm
    found = size(open_model(checkpoint("olmoe")))
    assert found.parameters == whole
    assert found.active_parameters == whole - 2 * 6 * expert  # 2 of 8 experts are used


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_size_agrees_with_the_tensors_on_disk(checkpoint: Checkpoints, family: str):
    path = checkpoint(family)
    found = size(open_model(path))
    counts = {
        name: n for name, n in tensors_on_disk(path).items() if "e_score_correction" not in name
    }
    in_experts = sum(n for name, n in counts.items() if ".experts." in name)
    assert found.parameters == sum(counts.values())
    assert found.active_parameters == found.parameters - in_experts * 6 // 8
    assert in_experts > 10_000


def test_tied_weights_count_once(checkpoint: Checkpoints):
    tied = size(open_model(checkpoint("olmoe", tie_word_embeddings=True)))
    assert tied.parameters == size(open_model(checkpoint("olmoe"))).parameters - 290 * 32


def test_bytes_are_those_of_all_safetensors_files(checkpoint: Checkpoints, tmp_path: Path):
    moe = open_model(checkpoint("olmoe"))
    moe.model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shutil.copy(checkpoint("olmoe") / "tokenizer.json", tmp_path / "sharded")
    files = [p for p in (tmp_path / "sharded").iterdir() if p.suffix == ".safetensors"]
    assert len(files) > 2
    found = size(open_model(tmp_path / "sharded"))
    assert found.size_bytes == sum(len(p.read_bytes()) for p in files)
    assert found.size_bytes > 4 * found.parameters
    assert found.parameters == size(moe).parameters


# results.json


def scoring(quiz_folder: Path) -> Scoring:
    quiz = load_quiz(Selection(str(quiz_folder), shots=1, limit=4))
    return Scoring(quiz, 4, LoadOptions(), MeasureOptions(batch_tokens=300))


def scored(paths: list[Path], how: Scoring, folder: Path) -> list[Scored]:
    found = []
    for source in find_models([str(path) for path in paths]):
        *steps, last = score(source, how, folder)
        assert isinstance(last, Scored)
        assert all(isinstance(step, Progress) for step in steps)
        found.append(last)
    return found


def plain_logprobs(path: Path, how: Scoring) -> np.ndarray:
    """One forward pass a question, no engine."""
    moe = open_model(path)
    letters = [moe.tokenizer(f"x {letter}")["input_ids"][-1] for letter in "ABCD"]
    rows = []
    for question in how.quiz:
        text = prompt(question, how.quiz.shots_by_subject[question.subject])
        with torch.no_grad():
            logits_V = moe.model(**moe.tokenizer(text, return_tensors="pt")).logits[0, -1]
        rows.append(logits_V.double().log_softmax(-1)[letters].numpy())
    return np.array(rows)


@pytest.fixture(scope="module")
def pair(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Path], Scoring, Results]:
    """Two random models of different size on twelve questions."""
    paths = [checkpoint("olmoe"), checkpoint("olmoe", seed=1, num_experts=6)]
    how = scoring(quiz_folder)
    return paths, how, results(how, scored(paths, how, tmp_path_factory.mktemp("pair")))


def test_results_agree_with_plain_forward_passes(pair: tuple[list[Path], Scoring, Results]):
    paths, how, found = pair
    logprobs = [plain_logprobs(path, how) for path in paths]
    answers = [q.answer for q in how.quiz]
    correct = [(rows.argmax(axis=1) == answers).tolist() for rows in logprobs]
    for path, right, model in zip(paths, correct, found.models, strict=True):
        assert model.path == str(path)
        assert (model.accuracy, model.questions) == (close(sum(right) / 12), 12)
        for i, subject in enumerate(SUBJECTS):
            its = right[4 * i : 4 * i + 4]
            assert model.subjects[subject].accuracy == close(sum(its) / 4)
            assert model.subjects[subject].questions == 4
    (comparison,) = found.comparisons
    gained = sum(b and not a for a, b in zip(*correct, strict=True))
    lost = sum(a and not b for a, b in zip(*correct, strict=True))
    assert (comparison.gained, comparison.lost) == (gained, lost)
    assert gained + lost > 0
    assert comparison.delta == close((gained - lost) / 12)
    gap_NC = np.abs(logprobs[0] - logprobs[1])
    assert comparison.max_abs_logprob_diff == close(gap_NC.max(), abs=1e-5)
    assert comparison.median_abs_logprob_diff == close(np.median(gap_NC), abs=1e-5)
    sizes = [size(open_model(path)) for path in paths]
    assert comparison.parameters_delta == sizes[1].parameters - sizes[0].parameters < 0
    assert comparison.bytes_delta == sizes[1].size_bytes - sizes[0].size_bytes < 0


def test_results_have_the_documented_keys(
    pair: tuple[list[Path], Scoring, Results], tmp_path: Path
):
    _, how, found = pair
    found.save(tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text()

    def never(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    shown = json.loads(text, parse_constant=never)
    extras = {"format", "revision", "limit", "content_hashes", "chance"}
    assert shown["chance"] == pytest.approx(np.mean([1 / len(q.choices) for q in how.quiz]))
    assert set(shown) == {"quiz", "split", "shots", "models", "comparisons"} | extras
    assert (shown["split"], shown["shots"], shown["limit"]) == ("test", 1, 4)
    assert shown["content_hashes"] == {s: how.quiz.content_hash(s) for s in SUBJECTS}
    for model in shown["models"]:
        assert set(model) == {
            *("path", "accuracy", "stderr", "ci95", "questions", "subjects", "parameters"),
            *("active_parameters", "bytes", "chosen_on", "revision", "fingerprint"),
        }
        assert all(set(its) == {"accuracy", "questions"} for its in model["subjects"].values())
        assert len(model["ci95"]) == 2
        assert model["chosen_on"] is None  # no plan made it
    (comparison,) = shown["comparisons"]
    assert set(comparison) == {
        *("base", "other", "delta", "ci95", "gained", "lost", "mcnemar_p"),
        *("max_abs_logprob_diff", "median_abs_logprob_diff", "parameters_delta", "bytes_delta"),
        "smallest_effect",
    }
    assert (comparison["base"], comparison["other"]) == (0, 1)
    assert load_results(tmp_path / "results.json") == found


def test_a_model_scored_twice_is_measured_once_and_equals_itself(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path: Path
):
    how, path = scoring(quiz_folder), checkpoint("olmoe")
    first, second = scored([path, path], how, tmp_path)
    assert np.array_equal(first.answers.logprob_NC, second.answers.logprob_NC)
    *_, last, _ = score(find_source(str(path)), how, tmp_path)
    assert isinstance(last, Progress)
    assert (last.done, last.total, last.measured) == (12, 12, 0)
    (comparison,) = results(how, [first, second]).comparisons
    assert (comparison.gained, comparison.lost, comparison.mcnemar_p) == (0, 0, 1.0)
    assert comparison.max_abs_logprob_diff == comparison.median_abs_logprob_diff == 0
    assert comparison.parameters_delta == comparison.bytes_delta == 0
    other = replace(how, quiz=load_quiz(Selection(str(quiz_folder), "val", shots=1, limit=4)))
    *_, last, _ = score(find_source(str(path)), other, tmp_path)
    assert isinstance(last, Progress)
    assert last.measured == 12  # other questions, other chunks


def planned(path: Path, folder: Path, used: set[str], fitted_split: str | None) -> Path:
    """A checkpoint that says that a plan made it from questions with these hashes."""
    shutil.copytree(path, folder)
    chosen = ChosenOn(
        quiz="birds",
        split="test",
        questions=len(used),
        fitted_split=fitted_split,
        sha256=hashes_sha256(used),
    )
    plan = PlanFile(
        model=PlanModel(id="tiny", revision=None, fingerprint="f"),
        action="prune --keep 8",
        criterion="activations",
        positions="answer",
        removal="reroute",
        layout="stock",
        chosen_on=chosen,
        blocks={"model.layers.0.mlp": BlockEdit(keep=(0, 1))},
    )
    save_plan(folder, plan, used)
    return folder


@pytest.mark.parametrize(
    ("n_used", "fitted_split", "split"),
    [(0, None, "test"), (5, None, "test"), (12, "val", "test+val"), (3, "test", "test")],
)
def test_questions_that_chose_a_model_and_score_it_are_counted(
    checkpoint: Checkpoints,
    quiz_folder: Path,
    tmp_path: Path,
    n_used: int,
    fitted_split: str | None,
    split: str,
):
    how = scoring(quiz_folder)
    used = {q.content_hash for q in list(how.quiz)[:n_used]} | {"0" * 16}  # one from elsewhere
    folder = planned(checkpoint("olmoe"), tmp_path / "planned", used, fitted_split)
    found = results(how, scored([folder], how, tmp_path / "chunks"))
    chosen_on = found.models[0].chosen_on
    assert chosen_on is not None
    assert (chosen_on.split, chosen_on.overlap) == (split, n_used)
    assert found.comparisons == []


def test_a_plan_without_its_list_of_questions_is_refused(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path: Path
):
    folder = planned(checkpoint("olmoe"), tmp_path / "planned", {"0" * 16}, None)
    (folder / "chosen_on.txt").write_text("")
    with pytest.raises(PlanError, match="is not the list"):
        scored([folder], scoring(quiz_folder), tmp_path / "chunks")


def test_a_wrong_name_is_found_before_anything_runs(checkpoint: Checkpoints, tmp_path: Path):
    assert [s.path for s in find_models([str(checkpoint("olmoe"))])] == [checkpoint("olmoe")]
    with pytest.raises(ModelError, match="no such model"):
        find_models([str(checkpoint("olmoe")), str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2),
        (("comment",), "by hand"),
        (("split",), None),
        (("models",), []),
        (("models",), {}),
        (("models", 0), 7),
        (("models", 0, "accuracy"), "good"),
        (("models", 0, "accuracy"), math.nan),
        (("models", 0, "accuracy"), None),
        (("models", 0, "ci95"), [0.1]),
        (("models", 1, "chosen_on"), "test"),
        (("models", 1, "score"), 1),
        (("comparisons", 0, "other"), 2),
        (("comparisons", 0, "base"), -1),
        (("comparisons", 0, "gained"), 1.5),
        (("comparisons", 0, "mcnemar_p"), math.inf),
    ],
)
def test_results_that_make_no_sense_are_refused(
    pair: tuple[list[Path], Scoring, Results], tmp_path: Path, path: tuple[Any, ...], value: object
):
    file = tmp_path / "results.json"
    pair[2].save(file)
    fields = json.loads(file.read_text())
    *parents, last = path
    inner = fields
    for key in parents:
        inner = inner[key]
    inner[last] = value
    file.write_text(json.dumps(fields))
    with pytest.raises(OutputError, match=r"results\.json holds no results: ") as refused:
        load_results(file)
    assert "\n" not in str(refused.value)


def test_a_file_that_holds_no_results_is_refused(tmp_path: Path):
    with pytest.raises(OutputError, match="cannot be read"):
        load_results(tmp_path / "results.json")
    for content in (b"", b"{}", b"[]", b"\xff", b'{"format": 1'):
        (tmp_path / "results.json").write_bytes(content)
        with pytest.raises(OutputError, match="holds no results"):
            load_results(tmp_path / "results.json")
