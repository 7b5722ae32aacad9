"""What a run that was stopped was asked for, so that only the same goes on."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from expertcut.documents.records import Record
from expertcut.evaluation.folders import begun, check_same, save_outcome
from expertcut.healing.asking import Healing
from expertcut.moe.loading import Source

_ASKED_FILE = "asked.json"


class Begun(Record):
    """All that the losses of a run depend on."""

    checkpoint: str
    teacher: str | None
    objective: str
    likeliest: int
    data: dict[str, Any]
    lora: dict[str, Any]
    training: dict[str, Any]

    @classmethod
    def of(cls, source: Source, base: Source | None, objective: str, asked: Healing) -> Self:
        """Models by their bytes."""
        whole = plain(asked)
        return cls(
            checkpoint=source.fingerprint,
            teacher=None if base is None else base.fingerprint,
            objective=objective,
            **{key: whole[key] for key in ("likeliest", "data", "lora", "training")},
        )


def go_on(folder: Path, asked: Begun) -> None:
    """That what lies in a working folder was begun by the same run, or nothing does.

    Raises:
        OutputError: it is another's.
    """
    file = folder / _ASKED_FILE
    before = begun(file, Begun)
    if before is None:
        save_outcome(file, asked)
    else:
        check_same(folder, before, asked, "healing")


def plain(asked: Healing) -> dict[str, Any]:
    """As JSON has it."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(asked), default=str))
    return found
