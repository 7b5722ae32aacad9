"""What a run that was stopped was asked for, so that only the same goes on."""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from expertcut.data import Quiz
from expertcut.documents import Record
from expertcut.evaluation.results import begun, check_same, save_outcome
from expertcut.healing.asking import Healing
from expertcut.healing.data.sources import Read
from expertcut.models.load import MoeModel, Source

_ASKED_FILE = "asked.json"
_OF_MEMORY = ("micro_batch", "saves_memory")  # how a step is computed, not what it gives


class Begun(Record):
    """All that the losses of a run depend on, and what it is judged by."""

    checkpoint: str
    dtype: str
    teacher: str | None
    objective: str
    rows_hash: str
    scored_hash: str
    likeliest: int
    data: dict[str, Any]
    lora: dict[str, Any]
    training: dict[str, Any]

    @classmethod
    def of(
        cls, moe: MoeModel, base: Source | None, objective: str, asked: Healing, read: Read
    ) -> Self:
        """Models and questions by what they hold."""
        whole = plain(asked)
        whole["training"] = _without_memory(whole["training"])
        return cls(
            checkpoint=moe.source.fingerprint,
            dtype=str(moe.dtype),
            teacher=None if base is None else base.fingerprint,
            objective=objective,
            rows_hash=_hash(_rows(read)),
            scored_hash=_hash(_scored(read)),
            **{key: whole[key] for key in ("likeliest", "data", "lora", "training")},
        )


def _rows(read: Read) -> Iterator[object]:
    """Those held out, and those trained on once: how they go on follows from the seed."""
    yield from read.held_out
    for part in read.parts:
        yield from part.shuffled(random.Random(0))


def _scored(read: Read) -> Iterator[object]:
    """What may judge the result, and what was kept out for that."""
    for quiz in (read.scored, read.held_out_quiz):
        yield None if quiz is None else _questions(quiz)
    yield from (read.dropped, sorted(line.split()[0] for line in read.hashes))


def _questions(quiz: Quiz) -> list[tuple[str, str]]:
    return [(subject, quiz.content_hash(subject)) for subject in quiz.questions]


def _hash(parts: Iterator[object]) -> str:
    """Over how they are written out: all are dataclasses, words and numbers."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part!r}\n".encode())
    return digest.hexdigest()[:16]


def go_on(folder: Path, asked: Begun) -> None:
    """That what lies in a working folder was begun by the same run, or nothing does.

    Another --micro-batch and --save-memory are the same run.

    Raises:
        OutputError: it is another's.
    """
    file = folder / _ASKED_FILE
    before = begun(file, Begun)
    if before is None:
        save_outcome(file, asked)
    else:
        training = _without_memory(before.training)  # older files have all of it
        check_same(folder, before.model_copy(update={"training": training}), asked, "healing")


def _without_memory(training: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in training.items() if key not in _OF_MEMORY}


def plain(asked: Healing) -> dict[str, Any]:
    """As JSON has it."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(asked), default=str))
    return found
