"""A profile against brute force: one question at a time, no cache, no packing, hooks only."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from expertcut.data import Quiz, Selection, load_quiz, prompt
from expertcut.models.load import LoadOptions, MoeModel, find_source
from expertcut.profiling.findings import profile_json
from expertcut.profiling.measure import Measurement, MeasureOptions, measure
from expertcut.profiling.storage import Profile, load_profile
from expertcut.profiling.workers import Progress
from tests.conftest import (
    DENSE_FIRST,
    FAMILIES,
    LETTERS,
    SUBJECTS,
    open_model,
    slow_but,
    write_quiz,
)
from tests.support.hand_made import SUMS

Checkpoints = Callable[..., Path]
SHOTS = 2
SIGMOID_FAMILIES = ("deepseek_v3", "glm4_moe", "minimax_m2", "lfm2_moe")


def profiled(path: Path, quiz: Quiz, folder: Path, **options: object) -> Profile:
    measurement = Measurement(
        open_model(path),
        quiz,
        None,
        MeasureOptions(**{"batch_tokens": 200, **options}),  # type: ignore[arg-type]
    )
    list(measurement.run(folder))
    return load_profile(folder)


class BruteForce:
    """Every statistic of a profile, by full forward passes and hooks of this file alone."""

    def __init__(self, moe: MoeModel, quiz: Quiz, scoring: str) -> None:
        self.moe, self.scoring = moe, scoring
        self.logits: dict[int, torch.Tensor] = {}
        n_layers, n_experts = len(moe.blocks), moe.blocks[0].n_experts
        self.sums = {name: np.zeros((n_layers, n_experts)) for name in (*SUMS, "largest")}
        rows = list(self.run(quiz))
        self.alpha_NLE, self.chosen_NL, self.logprob_NC = map(np.array, zip(*rows, strict=True))

    def run(self, quiz: Quiz) -> Iterator[tuple[np.ndarray, list[list[list[int]]], np.ndarray]]:
        handles = [
            block.router.register_forward_hook(self.hook(block.layer)) for block in self.moe.blocks
        ]
        letters = [self.moe.tokenizer(f"x {letter}")["input_ids"][-1] for letter in LETTERS[:4]]
        for question in quiz:
            text = prompt(question, quiz.shots_by_subject[question.subject])
            ids = torch.tensor([self.moe.tokenizer(text)["input_ids"]])
            self.alpha, self.chosen = [], []
            with torch.no_grad():
                logits_V = self.moe.model(ids, use_cache=False).logits[0, -1]
            yield (
                np.array(self.alpha),
                [sorted(chosen) for chosen in self.chosen],
                logits_V.double().log_softmax(-1)[letters].numpy(),
            )
        for handle in handles:
            handle.remove()

    def hook(self, layer: int) -> Callable[..., None]:
        experts = self.moe.blocks[layer].experts

        def see(_module: object, args: tuple, output: tuple) -> None:
            logits_TE, weights_TK = (t.double() for t in output[:2])
            experts_TK = output[2]
            alpha_TE = logits_TE.sigmoid() if self.scoring == "sigmoid" else logits_TE.softmax(-1)
            self.alpha.append(alpha_TE[-1].tolist())
            self.chosen.append(experts_TK[-1].tolist())
            x_TD = args[0].reshape(-1, args[0].shape[-1])
            for rank in range(experts_TK.shape[1]):  # each token's own expert of that rank
                own_T1 = experts_TK[:, rank : rank + 1]
                f_TD = experts(x_TD, own_T1, torch.ones(len(x_TD), 1))
                norm_T = f_TD.double().norm(dim=-1)
                weight_T = weights_TK[:, rank]
                amounts = (torch.ones_like(norm_T), weight_T, norm_T, weight_T * norm_T)
                for name, amount_T in zip(SUMS, amounts, strict=True):
                    np.add.at(self.sums[name][layer], own_T1[:, 0].numpy(), amount_T.numpy())
                largest_T = f_TD.abs().amax(dim=-1).numpy()
                np.maximum.at(self.sums["largest"][layer], own_T1[:, 0].numpy(), largest_T)

        return see


@pytest.fixture(scope="module")
def small_quiz(tmp_path_factory: pytest.TempPathFactory) -> Quiz:
    folder = write_quiz(tmp_path_factory.mktemp("small"), {"dev": SHOTS, "test": 3}, seed=3)
    return load_quiz(Selection(str(folder), shots=SHOTS))


# Storage with and without biases, packed and padded ways, groups and a sigmoid, recurrent layers.
# All families: `test_matrix`.
QUICK = ("olmoe", "gpt_oss", "mixtral", "deepseek_v3", "jamba")


@pytest.mark.parametrize("family", slow_but(QUICK, FAMILIES))
def test_every_quantity_agrees_with_brute_force(
    checkpoint: Checkpoints, small_quiz: Quiz, tmp_path: Path, family: str
) -> None:
    changes = {"sliding_window": 16} if family == "mixtral" else {}  # packed and padded ways
    path = checkpoint(family, **changes)
    assert_agreement(path, small_quiz, tmp_path / "p", is_sigmoid=family in SIGMOID_FAMILIES)


@pytest.mark.parametrize("family", DENSE_FIRST)
def test_a_model_whose_first_layer_is_dense_agrees_with_brute_force(
    checkpoint: Checkpoints, small_quiz: Quiz, tmp_path: Path, family: str
) -> None:
    path = checkpoint(family, **{"num_hidden_layers": 3, **DENSE_FIRST[family]})
    is_sigmoid = family in SIGMOID_FAMILIES
    profile = assert_agreement(path, small_quiz, tmp_path / "p", is_sigmoid=is_sigmoid)
    layers = [block.name.split(".")[2] for block in profile.info.model.blocks]
    assert layers == (["1", "3"] if family == "jamba" else ["1", "2"])


def assert_agreement(path: Path, small_quiz: Quiz, folder: Path, *, is_sigmoid: bool) -> Profile:
    """Every quantity of a profile, within rounding; counts exactly."""
    profile = profiled(path, small_quiz, folder)
    brute = BruteForce(open_model(path), small_quiz, "sigmoid" if is_sigmoid else "softmax")

    np.testing.assert_allclose(profile.array("alpha_NLE"), brute.alpha_NLE, atol=1e-5)
    assert np.sort(profile.array("chosen_NLK"), axis=-1).tolist() == brute.chosen_NL.tolist()
    np.testing.assert_allclose(profile.array("choice_logprob_NC"), brute.logprob_NC, atol=1e-5)
    tokens = profile.token_sum("tokens")
    assert tokens is not None
    assert tokens.tolist() == brute.sums["tokens"].tolist()
    assert tokens.sum() > 1000  # shots and all
    for name in ("weight", "norm", "weighted_norm"):
        total = profile.token_sum(name)
        assert total is not None
        np.testing.assert_allclose(total, brute.sums[name], rtol=1e-5)
    largest = np.max(
        [c[f"{part}_largest_LE"] for c in profile.chunks for part in ("prefix", "question")], axis=0
    )
    np.testing.assert_allclose(largest, brute.sums["largest"], rtol=1e-5)
    return profile


def test_the_json_of_show_agrees_with_plain_arithmetic(
    checkpoint: Checkpoints, small_quiz: Quiz, tmp_path: Path
) -> None:
    path = checkpoint("olmoe")
    shown = profile_json(profiled(path, small_quiz, tmp_path / "p"))
    brute = BruteForce(open_model(path), small_quiz, "softmax")
    is_correct = [
        int(np.argmax(row)) == q.answer for row, q in zip(brute.logprob_NC, small_quiz, strict=True)
    ]
    assert shown["accuracy"] == pytest.approx(np.mean(is_correct))
    for layer, found in enumerate(shown["layers"]):
        shares = []
        for alpha, chosen in zip(brute.alpha_NLE[:, layer], brute.chosen_NL[:, layer], strict=True):
            total = sum(alpha[e] for e in chosen)
            shares.append({int(e): alpha[e] / total for e in chosen})
        top = [-sum(p * np.log(p) for p in share.values()) for share in shares]
        assert found["entropy_top_mean"] == pytest.approx(np.mean(top), abs=1e-5)
        assert found["entropy_top_std"] == pytest.approx(np.std(top), abs=1e-5)
        ranks = np.array([sorted(share.values(), reverse=True) for share in shares])
        assert found["rank_probability_mean"] == pytest.approx(ranks.mean(0).tolist(), abs=1e-5)
        assert found["activated"] == len(set().union(*shares))
        for row in found["expert"]:
            at = [i for i, share in enumerate(shares) if row["expert"] in share]
            assert row["appearances"] == len(at) / len(shares)
            if not at:
                assert row["accuracy"] is None
                continue
            assert row["accuracy"] == pytest.approx(np.mean([is_correct[i] for i in at]))
            alpha_n = [brute.alpha_NLE[i, layer, row["expert"]] for i in at]
            right = sum(a for a, i in zip(alpha_n, at, strict=True) if is_correct[i])
            assert row["weighted_accuracy"] == pytest.approx(right / sum(alpha_n), abs=1e-5)
            mean = 100 * np.mean([shares[i][row["expert"]] for i in at])
            assert row["contribution_pct"] == pytest.approx(mean, abs=1e-3)


def chunk_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "chunks").iterdir())}


@pytest.fixture(scope="module")
def long_quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than one chunk per subject."""
    return write_quiz(tmp_path_factory.mktemp("long"), {"dev": 1, "test": 270}, seed=5)


def test_equal_settings_give_equal_bytes_whatever_else_is_asked(
    checkpoint: Checkpoints, long_quiz: Path, tmp_path: Path
) -> None:
    path = checkpoint("olmoe")
    full = load_quiz(Selection(str(long_quiz), shots=1))
    few = load_quiz(Selection(str(long_quiz), shots=1, subjects=SUBJECTS[1:]))
    for name, quiz in (("a", full), ("b", full), ("few", few)):
        profiled(path, quiz, tmp_path / name, batch_tokens=2048)
    first = chunk_bytes(tmp_path / "a")
    assert len(first) == 2 * len(SUBJECTS)
    assert chunk_bytes(tmp_path / "b") == first
    some = chunk_bytes(tmp_path / "few")
    assert len(some) == 4
    assert some == {name: first[name] for name in some}


@pytest.mark.parametrize("change", [{"batch_tokens": 97}, {"threads": 2}], ids=["pack", "threads"])
def test_other_settings_change_no_count_but_listed_near_ties(
    checkpoint: Checkpoints, long_quiz: Path, tmp_path: Path, change: dict[str, int]
) -> None:
    source = find_source(str(checkpoint("olmoe")))
    quiz = load_quiz(Selection(str(long_quiz), shots=1, limit=40))
    profiles = []
    for name, options in (("one", {"threads": 1}), ("other", {"threads": 1, **change})):
        options = MeasureOptions(**{"batch_tokens": 2048, **options})
        list(measure(source, quiz, 40, LoadOptions(), options).run(tmp_path / name))
        profiles.append(load_profile(tmp_path / name))
    torch.set_num_threads(1)
    one, other = profiles
    assert one.info.settings != other.info.settings
    moved = np.abs(one.array("choice_logprob_NC") - other.array("choice_logprob_NC"))
    listed = {(tie["subject"], tie["row"]) for tie in one.near_ties()}
    names = list(zip(one.subjects(), one.array("row_N").tolist(), strict=True))
    is_listed_N = np.array([name in listed for name in names])
    assert not is_listed_N.all()
    assert moved[~is_listed_N].max() <= 1e-4
    chosen = [np.sort(p.array("chosen_NLK"), axis=-1) for p in profiles]
    changed_N = (chosen[0] != chosen[1]).any(axis=(1, 2))
    assert not (changed_N & ~is_listed_N).any()
    assert changed_N.mean() <= 0.005


@pytest.mark.parametrize("stats", ["none", "answer"])
def test_leaving_statistics_out_changes_no_bit_of_the_answers(
    checkpoint: Checkpoints, small_quiz: Quiz, tmp_path: Path, stats: str
) -> None:
    path = checkpoint("olmoe")
    whole = profiled(path, small_quiz, tmp_path / "all")
    less = profiled(path, small_quiz, tmp_path / stats, stats=stats)
    assert set(less.chunks[0]) < set(whole.chunks[0])
    for chunk, smaller in zip(whole.chunks, less.chunks, strict=True):
        for name, array in smaller.items():
            np.testing.assert_array_equal(array, chunk[name])


def test_a_run_that_starts_again_does_only_what_is_missing_or_damaged(
    checkpoint: Checkpoints, small_quiz: Quiz, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measurement = Measurement(open_model(checkpoint("olmoe")), small_quiz, None, MeasureOptions())
    run = measurement.run(tmp_path / "p")
    assert next(run) == Progress(done=3, total=9, measured=3)
    run.close()
    assert len(load_profile(tmp_path / "p").missing) == len(SUBJECTS) - 1
    assert load_profile(tmp_path / "p").finished_at is None
    assert [step.measured for step in measurement.run(tmp_path / "p")] == [0, 3, 6]
    undisturbed = chunk_bytes(tmp_path / "p")
    file = tmp_path / "p" / "chunks" / f"{SUBJECTS[0]}-0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert [step.measured for step in measurement.run(tmp_path / "p")] == [0, 0, 3]
    assert caplog.text.count("damaged") == 1
    assert chunk_bytes(tmp_path / "p") == undisturbed
    finished = load_profile(tmp_path / "p").finished_at
    assert [step.measured for step in measurement.run(tmp_path / "p")] == [0, 0, 0]
    assert load_profile(tmp_path / "p").finished_at == finished
