"""Attention that picks the tokens it reads by an index: neither packed nor padded beyond that."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertcut.data import Quiz, Selection, load_quiz
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.scoring import passes
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import encode
from tests.conftest import open_model

Checkpoints = Callable[..., Path]
INDEX_TOPK = 64


def uneven(folder: Path) -> Quiz:
    """A quiz whose first subject has short prompts and whose last has long ones."""
    quiz = load_quiz(Selection(str(folder), split="test", shots=0))
    *_, last = quiz.questions
    long = tuple(replace(q, text=f"{q.text} " + 40 * "heron ") for q in quiz.questions[last])
    return replace(quiz, questions={**quiz.questions, last: long})


@pytest.mark.parametrize("family", ["deepseek_v32", "deepseek_v4"])
def test_prompts_beyond_the_index_are_asked_one_by_one(
    checkpoint: Checkpoints, quiz_folder: Path, family: str
) -> None:
    moe = open_model(checkpoint(family, index_topk=INDEX_TOPK))
    quiz, engine = uneven(quiz_folder), Engine(moe, 2048)
    lengths = {}
    for subject, questions in quiz.questions.items():
        encoded = encode(moe.tokenizer, questions, ())
        lengths[subject] = encoded.longest, engine.mode(encoded)
        found_NC = engine.score(encoded)
        engine.is_trusted = False
        assert torch.allclose(found_NC, engine.score(encoded), atol=1e-5)
        engine.is_trusted = True
    assert {way == "single" for longest, way in lengths.values() if longest > INDEX_TOPK} == {True}


def test_what_only_long_prompts_show_is_found_before_the_first_chunk(
    checkpoint: Checkpoints, quiz_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "_attention_is_sparse", lambda *_: False)  # as if nobody knew it
    moe, quiz = open_model(checkpoint("deepseek_v32", index_topk=200)), uneven(quiz_folder)
    first = next(iter(quiz.questions))
    short = replace(quiz, questions={first: quiz.questions[first]})
    assert Measurement(moe, short, None, MeasureOptions()).engine.is_trusted
    assert not Measurement(moe, quiz, None, MeasureOptions()).engine.is_trusted
