"""Small cut checkpoints to be healed, and short runs on them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expertcut.checkpoints.build import BuildOptions, build
from expertcut.data.sources import Weighted
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.selection import choose
from expertcut.healing.adapters import Lora
from expertcut.healing.heal_settings import Data, Healing, Place, Training
from expertcut.healing.recovery import Healed, Options, heal
from expertcut.models.load import LoadOptions
from tests.support.merged_models import measured

UNASKED = BuildOptions(LoadOptions(), is_verified=False)
SHORT = Training(steps=4, batch=4, check_every=2, learning_rate=1e-2)
SIX = dataclasses.replace(SHORT, steps=6, micro_batch=2)
SMALL = Lora(2, 2, ("attention", "experts"))


def cut(model: Path, quiz_folder: Path, folder: Path, layout: Any = "stock") -> Path:
    """The model with five of its eight experts."""
    profile = measured(model, quiz_folder, folder / "profile")
    pruning = choose(profile, CutSettings(keep=5, layout=layout))
    build(profile, pruning.draft, folder / "cut", UNASKED)
    return folder / "cut"


def asked_for(quiz_folder: Path, **changes: Any) -> Healing:
    """A run of four steps on val, at one shot."""
    data = Data((Weighted(str(quiz_folder)),), shots=1)
    return dataclasses.replace(Healing(data, lora=SMALL, training=SHORT), **changes)


def healed(checkpoint: Path, asked: Healing, folder: Path, **options: Any) -> Healed:
    """What became of it, asked no question unless told to."""
    given = {"load_as": LoadOptions(), "threads": 1, "is_verified": False, **options}
    found = heal(str(checkpoint), asked, Place(folder), Options(**given))
    assert found is not None
    return found


class Stop(Exception):
    """In place of a power cut."""


def stopped_after(n_steps: int) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if done == n_steps:
            raise Stop

    return report
