"""The engine's ways of scoring agree, whatever the family."""

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expertcut.data import Quiz, Selection, load_quiz
from expertcut.models import checkpoint_dir
from expertcut.models.checkpoint_dir import fingerprint_of
from expertcut.models.load import MoeModel
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import Encoded, encode
from tests.conftest import PADDED_FAMILIES, SUBJECTS, open_model

Checkpoints = Callable[..., Path]


def encoded(moe: MoeModel, quiz_folder: Path, shots: int = 2) -> Encoded:
    quiz = load_quiz(Selection(str(quiz_folder), shots=shots))
    subject = SUBJECTS[0]
    return encode(moe.tokenizer, quiz.questions[subject], quiz.shots_by_subject[subject])


def one_by_one(moe: MoeModel, chunk: Encoded) -> torch.Tensor:
    """log p by the plainest code there is: a full forward pass per prompt."""
    rows = []
    for ids, choices in zip(chunk.prompts, chunk.choice_ids, strict=True):
        with torch.inference_mode():
            logits_V = moe.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        rows.append(logits_V.log_softmax(-1)[list(choices)])
    return torch.stack(rows)


@pytest.mark.parametrize("shots", [0, 2])
def test_each_family_takes_its_way_and_equals_one_prompt_at_a_time(
    tiny_moe: MoeModel, quiz_folder: Path, shots: int
) -> None:
    chunk = encoded(tiny_moe, quiz_folder, shots)
    is_padded = tiny_moe.model.config.model_type in PADDED_FAMILIES
    engine = Engine(tiny_moe, batch_tokens=3 * chunk.longest if is_padded else 200)
    engine.check(chunk)
    assert engine.is_trusted
    assert engine.mode(chunk) == ("padded" if is_padded else "packed")
    together_NC, plain_NC = engine.score(chunk), one_by_one(tiny_moe, chunk)
    assert (together_NC - plain_NC).abs().max() < 1e-5
    assert plain_NC.std(dim=0).min() > 0.01  # else any answer would do


def test_a_sliding_window_pads_and_equals_one_prompt_at_a_time(
    checkpoint: Checkpoints, quiz_folder: Path
) -> None:
    moe = open_model(checkpoint("mixtral", sliding_window=16))
    chunk = encoded(moe, quiz_folder)
    assert len({len(ids) for ids in chunk.prompts}) > 1  # else nothing would be padded
    engine = Engine(moe, batch_tokens=3 * chunk.longest)
    assert engine.mode(chunk) == "padded"
    assert (engine.score(chunk) - one_by_one(moe, chunk)).abs().max() < 1e-5


def test_a_window_wider_than_the_prompts_packs(checkpoint: Checkpoints, quiz_folder: Path) -> None:
    types = ["sliding_attention", "full_attention"]
    moe = open_model(checkpoint("gpt_oss", layer_types=types, sliding_window=2000))
    chunk = encoded(moe, quiz_folder)
    engine = Engine(moe, batch_tokens=300)
    assert engine.mode(chunk) == "packed"
    assert (engine.score(chunk) - one_by_one(moe, chunk)).abs().max() < 1e-5
    narrow = open_model(checkpoint("gpt_oss", layer_types=types, sliding_window=20))
    assert Engine(narrow, 300).mode(chunk) == "padded"


def test_a_rope_that_depends_on_length_goes_one_by_one(
    checkpoint: Checkpoints, quiz_folder: Path
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    moe = open_model(checkpoint("olmoe", rope_parameters=rope, max_position_embeddings=64))
    chunk = encoded(moe, quiz_folder)
    assert chunk.longest > 64  # else the frequencies would never change
    engine = Engine(moe, batch_tokens=300)
    assert engine.mode(chunk) == "single"
    alone = []
    for i in range(len(chunk)):  # a fresh model for each prompt has no memory of longer ones
        fresh = open_model(checkpoint("olmoe", rope_parameters=rope, max_position_embeddings=64))
        alone.append(one_by_one(fresh, Encoded(chunk.prompts[i : i + 1], chunk.choice_ids[:1])))
    assert (engine.score(chunk) - torch.cat(alone)).abs().max() < 1e-5


def test_a_model_that_packs_wrongly_is_scored_one_by_one(
    checkpoint: Checkpoints, quiz_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moe = open_model(checkpoint("olmoe"))
    chunk = encoded(moe, quiz_folder)
    engine = Engine(moe, batch_tokens=300)
    engine.check(chunk)
    assert engine.is_trusted
    layer = moe.model.get_input_embeddings()
    # Every token takes from the one before it in its row, whosever that is.
    handle = layer.register_forward_hook(lambda _module, _args, out: out + out.roll(1, dims=1))
    engine.check(chunk)
    handle.remove()
    assert not engine.is_trusted
    assert engine.mode(chunk) == "single"
    assert "one prompt at a time" in caplog.text


def test_half_precision_is_checked_with_its_own_tolerance(
    checkpoint: Checkpoints, quiz_folder: Path
) -> None:
    moe = open_model(checkpoint("olmoe"), dtype="bfloat16")
    engine = Engine(moe, batch_tokens=300)
    engine.check(encoded(moe, quiz_folder))
    assert moe.dtype == torch.bfloat16
    assert engine.is_trusted


def test_no_token_of_the_shared_prefix_runs_twice_and_no_pad_runs(
    checkpoint: Checkpoints, quiz_folder: Path
) -> None:
    moe = open_model(checkpoint("olmoe"))
    chunk = encoded(moe, quiz_folder)
    n_prefix = chunk.shared_prefix()
    seen: list[int] = []
    embedding = moe.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    Engine(moe, batch_tokens=150).score(chunk)
    handle.remove()
    assert n_prefix > 100  # the shots
    assert len(seen) > 2  # several packs
    assert sum(seen) == n_prefix + sum(len(ids) - n_prefix for ids in chunk.prompts)


def test_the_vocabulary_is_projected_at_answer_positions_only(
    checkpoint: Checkpoints, quiz_folder: Path
) -> None:
    moe = open_model(checkpoint("olmoe"))
    chunk = encoded(moe, quiz_folder)
    rows: list[int] = []
    head = moe.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, a, out: rows.append(out[..., 0].numel()))
    Engine(moe, batch_tokens=150).score(chunk)
    handle.remove()
    assert sum(rows) == len(chunk)


def test_what_was_checked_is_checked_once_for_the_same_model_prompts_and_settings(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTCUT_CACHE", str(tmp_path / "cache"))
    moe = open_model(checkpoint("olmoe"))
    quiz = load_quiz(Selection(str(quiz_folder), shots=2))
    checked: list[Encoded] = []
    passes = Engine.check

    def check(engine: Engine, chunk: Encoded) -> None:
        checked.append(chunk)
        passes(engine, chunk)

    def n_checked(quiz: Quiz = quiz, batch_tokens: int = 300) -> int:
        checked.clear()
        Measurement(moe, quiz, None, MeasureOptions("none", batch_tokens))
        return len(checked)

    monkeypatch.setattr(Engine, "check", check)
    assert n_checked() > 0
    assert n_checked() == 0
    assert n_checked(batch_tokens=301) > 0
    assert n_checked(load_quiz(Selection(str(quiz_folder), shots=1))) > 0
    monkeypatch.setattr("expertcut.profiling.measure.__version__", "0")
    monkeypatch.setattr(Engine, "check", lambda engine, _: setattr(engine, "is_trusted", False))
    n_checked()
    monkeypatch.setattr(Engine, "check", check)
    assert n_checked() > 0  # what failed is not remembered
    assert n_checked() == 0


def test_a_fingerprint_is_remembered_until_a_file_changes(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTCUT_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "m"))
    weights = folder / "model.safetensors"

    def n_hashed(seconds_later: float) -> int:
        checkpoint_dir._fingerprints.clear()  # as a new process
        now = time.time() + seconds_later
        n_before = len(hashed)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_dir.time, "time", lambda: now)
            found.append(fingerprint_of(folder))
        return len(hashed) - n_before

    hashed: list[object] = []
    found: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda f, n: hashed.append(f) or digest(f, n))
    assert [n_hashed(1), n_hashed(1)] == [1, 1]  # a fresh file may change unseen
    assert [n_hashed(60), n_hashed(60)] == [1, 0]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert n_hashed(60) == 1
    assert len(set(found[:-1])) == 1
    assert found[-1] != found[0]
