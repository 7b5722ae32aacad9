"""One model asked again and again: the same bits as whole runs, from whichever layer they start."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from expertcut.checkpoints.build import engine_as_profiled, profiled_source
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits.reweight_select import QuestionOutcomes
from expertcut.edits.router_edits import RouterEdit
from expertcut.evaluation.reweight_search import CachedScorer
from expertcut.models.load import LoadOptions, MoeModel
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import Profile, load_profile
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.router_bias import ApplyAt, Tilts, tilted
from tests.conftest import open_model


@pytest.fixture
def quiz(quiz_folder: Path) -> Quiz:
    return load_quiz(Selection(str(quiz_folder), split="val", shots=1, limit=3))


def whole_run(moe: MoeModel, quiz: Quiz, shifts: tuple[RouterEdit, ...], at: ApplyAt) -> np.ndarray:
    biases = {s.layer: torch.zeros(moe.blocks[s.layer].n_experts) for s in shifts}
    for shift in shifts:
        biases[shift.layer][shift.expert] = shift.bias
    with tilted(moe.blocks, Tilts(biases, apply_at=at)) as begin:
        return ask(Engine(moe, 2048), quiz, begin).numpy()


def test_a_run_that_starts_at_the_first_tilt_has_the_bits_of_a_whole_one(
    different_moe: MoeModel, quiz: Quiz
) -> None:
    rescorer = CachedScorer(Engine(different_moe, 2048), quiz)
    assert rescorer.replay.starts, "nothing would be tested"
    assert np.array_equal(
        rescorer.records.logprob_NC, ask(Engine(different_moe, 2048), quiz).numpy()
    )
    layers = rescorer.records.layers
    used = [int(layer.appearances_E.argmax()) for layer in layers]
    last = RouterEdit(len(layers) - 1, used[-1], -8.0)
    for shifts in ((last,), (RouterEdit(0, used[0], -8.0), last)):
        for at in ("all", "answer"):
            found_NC = rescorer.ask(shifts, at)
            assert np.array_equal(found_NC, whole_run(different_moe, quiz, shifts, at))
            moved_NC = np.abs(found_NC - rescorer.records.logprob_NC)
            assert np.nanmax(moved_NC) > 1e-4


def test_without_room_every_layer_runs(checkpoint: Callable[..., Path], quiz: Quiz) -> None:
    moe = open_model(checkpoint("olmoe"))
    rescorer = CachedScorer(Engine(moe, 2048), quiz, kept_bytes=0)
    assert rescorer.replay.starts == ()
    shifts = (RouterEdit(len(moe.blocks) - 1, 1, 3.0),)
    assert np.array_equal(rescorer.ask(shifts), whole_run(moe, quiz, shifts, "all"))


def test_what_was_asked_once_is_remembered(checkpoint: Callable[..., Path], quiz: Quiz) -> None:
    rescorer = CachedScorer(Engine(open_model(checkpoint("olmoe")), 2048), quiz)
    first = rescorer.ask((RouterEdit(0, 1, 1.0), RouterEdit(1, 2, -1.0)))
    assert rescorer.ask((RouterEdit(1, 2, -1.0), RouterEdit(0, 1, 1.0))) is first
    assert len(rescorer.known) == 1
    assert rescorer.ask(()) is rescorer.records.logprob_NC
    rescorer.ask((RouterEdit(0, 1, 1.0),))
    assert len(rescorer.known) == 2


def test_outputs_that_do_not_repeat_are_not_used(
    checkpoint: Callable[..., Path],
    quiz: Quiz,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(CachedScorer, "_replays_exactly", lambda *_: False)
    moe = open_model(checkpoint("olmoe"))
    rescorer = CachedScorer(Engine(moe, 2048), quiz)
    assert "every run starts at layer 0" in caplog.text
    shifts = (RouterEdit(1, 1, 3.0),)
    assert np.array_equal(rescorer.ask(shifts), whole_run(moe, quiz, shifts, "all"))


def test_records_are_those_of_a_profile(
    checkpoint: Callable[..., Path], quiz: Quiz, tmp_path: Path
) -> None:
    moe = open_model(checkpoint("olmoe"))
    list(Measurement(moe, quiz, None, MeasureOptions("answer")).run(tmp_path / "p"))
    of_profile = QuestionOutcomes.of(load_profile(tmp_path / "p"), quiz)
    of_run = CachedScorer(Engine(moe, 2048), quiz).records
    for name in ("subject_N", "hash_N", "answer_N", "chosen_NLK"):
        assert np.array_equal(getattr(of_profile, name), getattr(of_run, name)), name
    # A profile computes the last block's answers apart, which is another product.
    for name in ("logprob_NC", "alpha_NLE"):
        assert np.allclose(getattr(of_profile, name), getattr(of_run, name), atol=1e-5), name
    assert of_profile.blocks == of_run.blocks
    some = of_profile.part(np.arange(3))
    assert len(some) == 3 and len(some.layers) == len(moe.blocks)
    assert len(of_profile.less(some.hash_N.tolist())) == len(of_profile) - 3


def test_a_model_runs_with_the_attention_that_it_was_profiled_with(
    checkpoint: Callable[..., Path], quiz: Quiz, tmp_path: Path
) -> None:
    measurement = Measurement(open_model(checkpoint("olmoe")), quiz, None, MeasureOptions("answer"))
    list(measurement.run(tmp_path / "p"))
    profile = load_profile(tmp_path / "p")
    assert profile.info.settings.attention == measurement.engine.attention == "split"
    source = profiled_source(profile)
    assert engine_as_profiled(profile, source, LoadOptions()).attention == "split"
    settings = profile.info.settings.model_copy(update={"attention": "sdpa"})
    masked = Profile(profile.path, profile.info.model_copy(update={"settings": settings}))
    assert engine_as_profiled(masked, source, LoadOptions()).attention == "masked"
