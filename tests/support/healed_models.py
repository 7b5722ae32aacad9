"""Small cut checkpoints to be healed, and short runs on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from expertcut.checkpoints.build import BuildOptions, build
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.selection import choose
from expertcut.healing.heal_settings import HealSettings
from expertcut.healing.recovery import Healed, Options, heal
from expertcut.models.load import LoadOptions
from tests.support.merged_models import measured

UNASKED = BuildOptions(LoadOptions(), is_verified=False)
SMALL = HealSettings(rank=2)
SHORT: dict[str, Any] = {"steps": 4, "batch": 4, "check_every": 2, "learning_rate": 1e-2}
SIX = {**SHORT, "steps": 6, "micro_batch": 2}


class Sudden(HealSettings):
    """Training that begins with the highest rate."""

    warmup: ClassVar[float] = 0.0


def cut(model: Path, quiz_folder: Path, folder: Path, layout: Any = "stock") -> Path:
    """The model with five of its eight experts."""
    profile = measured(model, quiz_folder, folder / "profile")
    pruning = choose(profile, CutSettings(keep=5, layout=layout))
    build(profile, pruning.draft, folder / "cut", UNASKED)
    return folder / "cut"


def settings_for(
    quiz_folder: Path, kind: type[HealSettings] = HealSettings, **changes: Any
) -> HealSettings:
    """A run of four steps on val, at one shot, that scores nothing afterwards."""
    short: dict[str, Any] = {"quiz": str(quiz_folder), "shots": 1, "rank": 2, "verify": False}
    return kind(**{**short, **SHORT, **changes})


def changed(settings: HealSettings, **changes: Any) -> HealSettings:
    """The settings with other values."""
    return settings.model_copy(update=changes)


def healed(checkpoint: Path, settings: HealSettings, folder: Path, **options: Any) -> Healed:
    """The result of a run."""
    given = {"load_as": LoadOptions(), "threads": 1, **options}
    found = heal(str(checkpoint), settings, folder, Options(**given))
    assert found is not None
    return found


class Stop(Exception):
    """In place of a power cut."""


def stopped_after(n_steps: int) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if done == n_steps:
            raise Stop

    return report
