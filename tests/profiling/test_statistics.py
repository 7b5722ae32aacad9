"""The numbers of a profile against plain loops, and the promises of its files."""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from expertcut.errors import OutputError, ProfileError
from expertcut.files import write_atomically
from expertcut.profiling.findings import profile_json
from expertcut.profiling.recorder import Recorder
from expertcut.profiling.schema import ProfileInfo
from expertcut.profiling.statistics import (
    LayerStatistics,
    entropy,
)
from expertcut.profiling.storage import (
    Arrays,
    Profile,
    load_profile,
    newest_profile,
    read_chunk,
    write_chunk,
)
from tests.conftest import open_model
from tests.support.hand_made import (
    SUMS,
    block,
    profile_info,
    random_chunk,
    random_profile,
    write_profile,
)

close = pytest.approx
ANSWERS = ("choice_logprob_NC", "answer_N", "row_N")


# Sizes


@pytest.mark.parametrize(("shape", "most_mb"), [((16, 64, 8), 100), ((58, 256, 8), 1300)])
def test_the_sizes_in_the_docs_are_those_of_chunks(
    checkpoint: Callable[..., Path], tmp_path: Path, shape: tuple[int, int, int], most_mb: int
) -> None:
    n_layers, n_experts, top_k = shape
    tiny = open_model(checkpoint("olmoe")).blocks[0]
    blocks = [
        replace(tiny, layer=layer, n_experts=n_experts, top_k=top_k) for layer in range(n_layers)
    ]

    def size_bytes(n: int) -> int:
        answered = {k: v for k, v in random_chunk(0, n, [block(0)]).items() if k in ANSWERS}
        path = tmp_path / f"{n}.safetensors"
        write_chunk(path, {**Recorder(blocks, n, "all").arrays(), **answered})
        return path.stat().st_size

    small, large = size_bytes(100), size_bytes(256)
    per_question = (large - small) / 156
    per_chunk = small - 100 * per_question
    total_mb = (14_042 * per_question + 83 * per_chunk) / 1e6
    assert total_mb < most_mb
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    row = next(
        line for line in page.splitlines() if line.startswith(f"| {n_layers} × {n_experts},")
    )
    *_, found_question, found_chunk, found_mb, _ = row.replace(",", "").split("|")
    assert float(found_question) == close(per_question, rel=0.01)
    assert float(found_chunk) == close(per_chunk, rel=0.01)
    assert found_mb.strip() == f"{total_mb:.0f} MB"


# Statistics


class Naive:
    """The statistics of one layer: a loop over questions, plain floats."""

    def __init__(self, chunks: list[Arrays], layer: int, n_experts: int) -> None:
        self.n_experts = n_experts
        self.alpha: list[list[float]] = []
        self.chosen: list[list[int]] = []
        self.correct: list[bool] = []
        for chunk in chunks:
            for n in range(len(chunk["row_N"])):
                self.alpha.append(chunk["alpha_NLE"][n, layer].tolist()[:n_experts])
                self.chosen.append(chunk["chosen_NLK"][n, layer].tolist())
                scores = chunk["choice_logprob_NC"][n].tolist()
                self.correct.append(scores.index(max(scores)) == int(chunk["answer_N"][n]))
        self.n = len(self.alpha)

    def p(self, n: int) -> dict[int, float]:
        total = sum(self.alpha[n][e] for e in self.chosen[n])
        return {e: self.alpha[n][e] / total for e in self.chosen[n]}

    def questions_of(self, expert: int) -> list[int]:
        return [n for n in range(self.n) if expert in self.chosen[n]]

    def entropy_top(self) -> list[float]:
        return [-sum(p * math.log(p) for p in self.p(n).values()) for n in range(self.n)]

    def entropy_all(self) -> list[float]:
        return [-sum(a * math.log(a) for a in row if a > 0) for row in self.alpha]

    def rank(self, k: int) -> list[float]:
        return [sorted(self.p(n).values(), reverse=True)[k] for n in range(self.n)]

    def expert(self, expert: int) -> dict[str, Any]:
        its = self.questions_of(expert)
        right = [n for n in its if self.correct[n]]
        weight = sum(self.alpha[n][expert] for n in its)
        return {
            "expert": expert,
            "appearances": len(its) / self.n,
            "accuracy": len(right) / len(its) if its else None,
            "weighted_accuracy": (
                sum(self.alpha[n][expert] for n in right) / weight if its else None
            ),
            "contribution_pct": (
                100 * sum(self.p(n)[expert] for n in its) / len(its) if its else None
            ),
        }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def spread(values: list[float]) -> float:
    """The population standard deviation."""
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / len(values))


def tokens(chunks: list[Arrays], layer: int, expert: int, name: str = "tokens") -> float:
    """As if every prompt had run alone, so each with its own copy of the shots."""
    total = 0.0
    for chunk in chunks:
        for _ in range(len(chunk["row_N"])):
            total += float(chunk[f"prefix_{name}_LE"][layer, expert])
        total += float(chunk[f"question_{name}_LE"][layer, expert])
    return total


CASES = {
    "softmax": [block(0), block(1), block(2)],
    "sigmoid": [block(0, scoring="sigmoid", inflates=False), block(1, scoring="sigmoid")],
    "one expert a token": [block(0, experts=4, top_k=1)],
    "blocks of unequal size": [block(0, 6, 3), block(1, 11, 3)],
}


@pytest.fixture(params=CASES)
def profile(request: pytest.FixtureRequest, tmp_path: Path) -> Profile:
    """Random arrays; one subject fills more than one chunk."""
    info = profile_info(CASES[request.param], {"birds": 300, "clocks": 3, "trees": 41})
    assert [n for _, _, n in info.chunks()] == [256, 44, 3, 41]
    return random_profile(tmp_path / "profile", info)


def test_every_quantity_agrees_with_a_plain_loop(profile: Profile):
    layers = profile.layers
    assert len(layers) == len(profile.info.model.blocks)
    for layer, (found, its) in enumerate(zip(layers, profile.info.model.blocks, strict=True)):
        naive = Naive(profile.chunks, layer, its.experts)
        assert (found.layer, found.block) == (layer, its.name)
        assert (found.n_experts, found.top_k) == (its.experts, its.top_k)
        assert found.entropy_top_N.tolist() == close(naive.entropy_top())
        assert found.entropy_all_N.tolist() == close(naive.entropy_all())
        for k in range(its.top_k):
            assert found.rank_probability_NK[:, k].tolist() == close(naive.rank(k))
        active = [e for e in range(its.experts) if naive.questions_of(e)]
        assert found.n_activated == len(active) == its.experts - 2  # two are idle by design
        for e in range(its.experts):
            expected = naive.expert(e)
            assert found.appearances_E[e] == close(expected["appearances"])
            assert found.alpha_mean_E[e] == close(mean([row[e] for row in naive.alpha]))
            for name in ("accuracy", "weighted_accuracy", "contribution_pct"):
                value = expected[name]
                assert getattr(found, f"{name}_E")[e] == close(
                    math.nan if value is None else value, nan_ok=True
                )
            assert found.tokens_E is not None
            assert found.tokens_E[e] == tokens(profile.chunks, layer, e)


def test_the_json_says_the_same_in_the_documented_words(profile: Profile):
    shown = profile_json(profile)
    text = json.dumps(shown, allow_nan=False)  # null, never NaN, which is no JSON
    shown = json.loads(text)
    assert set(shown) == {"questions", "accuracy", "near_ties", "layers"}
    naive = [Naive(profile.chunks, i, b.experts) for i, b in enumerate(profile.info.model.blocks)]
    assert shown["questions"] == 344
    assert shown["accuracy"] == close(sum(naive[0].correct) / 344)
    assert 0.1 < shown["accuracy"] < 0.9
    for layer, (found, its) in enumerate(zip(shown["layers"], naive, strict=True)):
        top_k = profile.info.model.blocks[layer].top_k
        ranks = [its.rank(k) for k in range(top_k)]
        expected = {
            "layer": layer,
            "block": f"model.layers.{layer}.mlp",
            "experts": its.n_experts,
            "top_k": top_k,
            "activated": its.n_experts - 2,
            "entropy_top_mean": close(mean(its.entropy_top())),
            "entropy_top_std": close(spread(its.entropy_top())),
            "entropy_all_mean": close(mean(its.entropy_all())),
            "entropy_all_std": close(spread(its.entropy_all())),
            "rank_probability_mean": close([mean(rank) for rank in ranks]),
            "rank_probability_std": close([spread(rank) for rank in ranks], abs=1e-12),
        }
        rows = found.pop("expert")
        assert found == expected
        for e, row in enumerate(rows):
            assert row.pop("tokens") == tokens(profile.chunks, layer, e)
            assert row == close(its.expert(e))
        assert rows[-1]["accuracy"] is None and rows[-1]["appearances"] == 0


def one_block(profile_folder: Path, **arrays: Any) -> Profile:
    """A profile of one block of four experts, top 2, with these arrays in place of random ones."""
    n = len(next(iter(arrays.values())))
    chunk = random_chunk(0, n, [block(0, 4)]) | arrays
    return write_profile(profile_folder, profile_info([block(0, 4)], {"birds": n}), [chunk])


def layer_of(profile: Profile) -> LayerStatistics:
    (layer,) = profile.layers
    return layer


def test_entropies_lie_between_zero_and_the_logarithm_of_the_count(tmp_path: Path):
    alpha_NE = np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]], dtype=np.float32)
    chosen_NK = np.array([[0, 1], [0, 1], [1, 0]], dtype=np.int16)
    layer = layer_of(
        one_block(tmp_path / "p", alpha_NLE=alpha_NE[:, None], chosen_NLK=chosen_NK[:, None])
    )
    assert layer.entropy_top_N.tolist() == close([math.log(2), 0, math.log(2)])
    assert layer.entropy_all_N.tolist() == close([math.log(4), 0, math.log(2)])
    assert str(entropy(np.array([[1.0, 0.0]]))[0]) in ("0.0", "-0.0")


def test_a_worked_example(tmp_path: Path):
    # Three questions: two right; expert 0 serves the first two, expert 3 only the second.
    alpha_NE = np.array(
        [[0.4, 0.2, 0.3, 0.1], [0.6, 0.05, 0.15, 0.2], [0.1, 0.45, 0.35, 0.1]], dtype=np.float32
    )
    chosen_NK = np.array([[0, 2], [0, 3], [1, 2]], dtype=np.int16)
    logprob_NC = np.array([[-1, -2], [-1, -2], [-2, -1]], dtype=np.float32)
    profile = one_block(
        tmp_path / "p",
        alpha_NLE=alpha_NE[:, None],
        chosen_NLK=chosen_NK[:, None],
        choice_logprob_NC=logprob_NC,
        answer_N=np.array([0, 1, 1], dtype=np.uint8),
    )
    rows = profile_json(profile)["layers"][0]["expert"]
    assert [row["appearances"] for row in rows] == close([2 / 3, 1 / 3, 2 / 3, 1 / 3])
    assert [row["accuracy"] for row in rows] == close([1 / 2, 1, 1, 0])
    assert [row["weighted_accuracy"] for row in rows] == close([0.4 / 1.0, 1, 1, 0])
    assert [row["contribution_pct"] for row in rows] == close(
        [100 * (4 / 7 + 3 / 4) / 2, 100 * 9 / 16, 100 * (3 / 7 + 7 / 16) / 2, 100 * 1 / 4]
    )


def test_ties_go_to_the_first_choice(tmp_path: Path):
    logprob_NC = np.array([[-1, -1, -2], [-2, -1, -1], [-3, -3, -3]], dtype=np.float32)
    for answer, expected in ((0, [True, False, True]), (1, [False, True, False])):
        profile = one_block(
            tmp_path / str(answer),
            choice_logprob_NC=logprob_NC,
            answer_N=np.full(3, answer, dtype=np.uint8),
        )
        assert profile.answers.is_correct_N.tolist() == expected


def test_questions_with_fewer_choices_are_never_answered_by_one_they_lack(tmp_path: Path):
    blocks = [block(0)]
    few, many = random_chunk(0, 3, blocks), random_chunk(1, 2, blocks)
    few["choice_logprob_NC"] = few["choice_logprob_NC"][:, :2] - 20
    few["answer_N"] = np.array([0, 1, 1], dtype=np.uint8)
    info = profile_info(blocks, {"birds": 3, "clocks": 2})
    found = write_profile(tmp_path / "p", info, [few, many]).answers
    assert found.logprob_NC.shape == (5, 4)
    assert np.isneginf(found.logprob_NC[:3, 2:]).all()
    assert found.logprob_NC[:, :2].tolist() == [
        *few["choice_logprob_NC"].tolist(),
        *many["choice_logprob_NC"][:, :2].tolist(),
    ]
    assert found.logprob_NC.argmax(axis=1).max() > 1


def test_token_sums_count_the_shots_once_for_every_question(tmp_path: Path):
    info = profile_info([block(0), block(1)], {"birds": 300, "clocks": 5})
    profile = random_profile(tmp_path / "p", info)
    for name in SUMS:
        sums_LE = profile.token_sum(name)
        assert sums_LE is not None and sums_LE.dtype == np.float64
        for layer in range(2):
            for e in range(8):
                assert sums_LE[layer, e] == tokens(profile.chunks, layer, e, name)


def test_without_all_token_sums_tokens_are_unknown_not_zero(tmp_path: Path):
    chunk = random_chunk(0, 4, [block(0)])
    kept = {k: v for k, v in chunk.items() if not k.startswith(("prefix_", "question_"))}
    kept["prefix_gap"] = chunk["prefix_gap"]
    info = profile_info([block(0)], {"birds": 4})
    profile = write_profile(tmp_path / "p", info, [kept])
    assert profile.token_sum("tokens") is None
    assert layer_of(profile).tokens_E is None
    assert {row["tokens"] for row in profile_json(profile)["layers"][0]["expert"]} == {None}


def test_a_near_tie_is_listed_and_said_to_be_its_own_or_in_its_shots(tmp_path: Path):
    blocks = [block(0)]
    own, shared = random_chunk(0, 3, blocks), random_chunk(1, 2, blocks)
    own["gap_N"] = np.array([1.1e-5, 0.9e-5, 0.5], dtype=np.float32)
    shared["gap_N"] = np.array([0, 0.5], dtype=np.float32)
    shared["prefix_gap"] = np.array([1e-6], dtype=np.float32)
    shared["row_N"] = np.array([4, 7], dtype=np.int32)
    info = profile_info(blocks, {"birds": 3, "clocks": 2})
    profile = write_profile(tmp_path / "p", info, [own, shared])
    expected = [
        {"subject": "birds", "row": 1, "in_shots": False},
        {"subject": "clocks", "row": 4, "in_shots": False},
        {"subject": "clocks", "row": 7, "in_shots": True},
    ]
    assert profile.near_ties() == expected
    assert profile_json(profile)["near_ties"] == {"questions": 3, "listed": expected}


def test_a_profile_that_kept_answers_alone_says_so(tmp_path: Path):
    chunk = random_chunk(0, 4, [block(0)])
    kept = {k: chunk[k] for k in ("choice_logprob_NC", "answer_N", "row_N")}
    info = profile_info([block(0)], {"birds": 4})
    info = info.model_copy(update={"settings": info.settings.model_copy(update={"stats": "none"})})
    profile = write_profile(tmp_path / "p", info, [kept])
    assert len(profile.answers.is_correct_N) == 4
    for ask in (profile_json, lambda profile: profile.layers):
        with pytest.raises(ProfileError, match="answers alone"):
            ask(profile)


# Files


def test_a_description_survives_the_trip_to_disk(tmp_path: Path):
    info = profile_info([block(0), block(1, 9, groups=3)], {"bïrds": 300, "a/b": 1}, limit=7)
    profile = random_profile(tmp_path / "p", info)
    assert load_profile(profile.path).info == info
    assert load_profile(profile.path).info.short_hash == info.short_hash
    assert not profile.missing
    assert profile.subjects() == ["bïrds"] * 300 + ["a/b"]


def test_the_short_hash_is_of_everything():
    info = profile_info([block(0)], {"birds": 3})
    others = [
        info.model_copy(update={"model": info.model.model_copy(update={"fingerprint": "0"})}),
        info.model_copy(update={"quiz": info.quiz.model_copy(update={"shots": 0})}),
        info.model_copy(update={"settings": info.settings.model_copy(update={"threads": 2})}),
        profile_info([block(0)], {"birds": 4}),
    ]
    assert len({other.short_hash for other in [info, *others]}) == 5
    assert ProfileInfo.model_validate(info.model_dump()).short_hash == info.short_hash


@pytest.mark.parametrize("subject", ["../../evil", "..", "a/b", "a\\b", "a\nb", "ä %2F", "C:x"])
def test_no_subject_leads_out_of_the_folder(tmp_path: Path, subject: str):
    info = profile_info([block(0)], {subject: 3, "birds": 2})
    profile = random_profile(tmp_path / "p", info)
    names = sorted(path.name for path in (tmp_path / "p" / "chunks").iterdir())
    assert names == sorted(name for name, _, _ in info.chunks())
    assert len(names) == 2 and profile.missing == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p"]


def damages(content: bytes) -> Iterator[bytes]:
    """The file cut short at many places, and altered at every byte."""
    yield b""
    yield from (content[:n] for n in range(1, len(content), 41))
    yield content + b"\0"
    for i in range(len(content)):
        yield content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :]
        yield content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]


def test_a_damaged_chunk_is_never_read(tmp_path: Path):
    arrays = {"alpha_NLE": np.arange(6, dtype=np.float32).reshape(1, 2, 3), "row_N": np.arange(3)}
    path = tmp_path / "c.safetensors"
    write_chunk(path, arrays)
    content = path.read_bytes()
    n_damaged = 0
    for damaged in damages(content):
        path.write_bytes(damaged)
        try:
            read = read_chunk(path)
        except ProfileError as error:
            assert str(path) in str(error) and "profile again" in str(error)
            assert "\n" not in str(error)
            n_damaged += 1
        else:  # a change of the header that says the same, as a space that becomes a line break
            assert {k: v.tolist() for k, v in read.items()} == {
                k: v.tolist() for k, v in arrays.items()
            }
    assert n_damaged > 2 * len(content)
    path.write_bytes(content)
    assert read_chunk(path).keys() == arrays.keys()


@pytest.mark.parametrize(
    ("before", "after"),
    [(b'"F32"', b'"I32"'), (b"[1,2,3]", b"[1,3,2]"), (b'"alpha_NLE"', b'"omega_NLE"')],
)
def test_the_same_bytes_under_another_name_shape_or_type_are_refused(
    tmp_path: Path, before: bytes, after: bytes
):
    path = tmp_path / "c.safetensors"
    write_chunk(path, {"alpha_NLE": np.ones((1, 2, 3), dtype=np.float32)})
    content = path.read_bytes()
    assert content.count(before) == 1 and len(before) == len(after)
    path.write_bytes(content.replace(before, after))
    with pytest.raises(ProfileError, match="its checksum does not hold"):
        read_chunk(path)


def test_a_file_of_something_else_is_no_chunk(tmp_path: Path):
    save_file({"row_N": np.arange(3)}, tmp_path / "bare.safetensors")
    save_file({"row_N": np.arange(3)}, tmp_path / "other.safetensors", {"expertcut": "[]"})
    (tmp_path / "text.safetensors").write_text("not a chunk at all")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("bare", "other", "text", "folder", "missing"):
        with pytest.raises(ProfileError, match=f"{name}.safetensors is damaged"):
            read_chunk(tmp_path / f"{name}.safetensors")


def test_equal_arrays_give_equal_bytes(tmp_path: Path):
    arrays = random_chunk(0, 5, [block(0), block(1)])
    shuffled = dict(sorted(arrays.items(), reverse=True))
    assert list(shuffled) != list(arrays)
    strided = {name: np.asfortranarray(array) for name, array in arrays.items()}
    assert not strided["alpha_NLE"].flags.c_contiguous
    contents = []
    for i, variant in enumerate((arrays, shuffled, strided, arrays)):
        write_chunk(tmp_path / f"{i}.safetensors", variant)
        contents.append((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(set(contents)) == 1
    read = read_chunk(tmp_path / "2.safetensors")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        assert np.array_equal(read[name], array)
    write_chunk(tmp_path / "other.safetensors", {**arrays, "row_N": arrays["row_N"] + 1})
    assert (tmp_path / "other.safetensors").read_bytes() != contents[0]


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "new" / "file.bin"
    write_atomically(path, b"first")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"file\.bin cannot be written: No space left"):
        write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_an_unfinished_profile_cannot_be_read(tmp_path: Path):
    info = profile_info([block(0)], {"birds": 300, "clocks": 5})
    profile = random_profile(tmp_path / "p", info)
    (profile.path / "chunks" / "birds-1.safetensors").unlink()
    again = load_profile(profile.path)
    assert again.missing == ["birds-1.safetensors"]
    with pytest.raises(ProfileError, match=r"1 of 3 chunks are missing.*run the same"):
        _ = again.layers


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("format", 2, "format"),
        ("extra", 1, "extra"),
        ("model", None, "model"),
        ("quiz", {"id": "birds"}, "quiz.revision"),
        ("settings", {"dtype": "float32"}, "settings.device_type"),
    ],
)
def test_a_description_that_does_not_hold_is_refused(
    tmp_path: Path, key: str, value: object, reason: str
):
    info = profile_info([block(0)], {"birds": 3})
    fields = json.loads(info.model_dump_json())
    (tmp_path / "profile.json").write_text(json.dumps(fields))
    assert load_profile(tmp_path).info == info
    (tmp_path / "profile.json").write_text(json.dumps({**fields, key: value}))
    with pytest.raises(ProfileError, match=rf"profile\.json is not a valid profile: {reason}"):
        load_profile(tmp_path)


def test_no_profile_is_not_an_empty_one(tmp_path: Path):
    with pytest.raises(ProfileError, match=r"no profile in .* no profile\.json"):
        load_profile(tmp_path)
    (tmp_path / "profile.json").write_bytes(b"\xff{")
    with pytest.raises(ProfileError, match="is not a valid profile"):
        load_profile(tmp_path)


def finish(profile: Profile, at: object) -> None:
    (profile.path / "run.json").write_text(json.dumps({"finished": at}))


def test_the_newest_profile_is_the_one_finished_last(tmp_path: Path):
    info = profile_info([block(0)], {"birds": 3})
    root = tmp_path / "profiles"
    with pytest.raises(ProfileError, match="holds no profile"):
        newest_profile(root)
    names = ("c_first", "a_last", "b_middle", "d_begun", "e_incomplete", "f_broken")
    found = {name: random_profile(root / name, info) for name in names}
    with pytest.raises(ProfileError, match="holds 6 unfinished profile"):
        newest_profile(root)
    for at, name in enumerate(("c_first", "b_middle", "a_last")):
        finish(found[name], 1e9 + at)
        assert newest_profile(root).path == root / name
    finish(found["e_incomplete"], 2e9)
    (found["e_incomplete"].path / "chunks" / "birds-0.safetensors").unlink()
    finish(found["f_broken"], "yesterday")
    assert newest_profile(root).path == root / "a_last"
    os.utime(root / "c_first" / "profile.json", (3e9, 3e9))  # a copy is not newer
    assert newest_profile(root).path == root / "a_last"
