"""The states that a training run leaves: which are kept, and from which it goes on.

Each is a folder `checkpoint-<step>`. What is the best, and how long a run has gone without a better
one, is read from the losses that a state holds, so that a stop loses none of it.
"""

import logging
import re
import shutil
from math import isfinite
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from expertcut.errors import OutputError
from expertcut.healing.asking import Training
from expertcut.healing.training.adapters import load_weights
from expertcut.healing.training.saved import is_whole

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-([1-9][0-9]*)")
_KEPT = 2  # the best and the last, or the last two


def train_losses(state: TrainerState) -> tuple[float, ...]:
    """Of every step."""
    return tuple(float(entry["loss"]) for entry in state.log_history if "loss" in entry)


def held_out_losses(state: TrainerState) -> tuple[tuple[int, float], ...]:
    """By step."""
    looks = (entry for entry in state.log_history if "eval_loss" in entry)
    return tuple((int(look["step"]), float(look["eval_loss"])) for look in looks)


def best_step(state: TrainerState) -> int:
    """The first of those with the lowest held-out loss."""
    return min(held_out_losses(state), key=lambda look: look[1])[0]


def looks_since_best(state: TrainerState) -> int:
    """How often held-out rows were looked at in vain, as EarlyStoppingCallback counts."""
    losses = [loss for _, loss in held_out_losses(state)]
    return len(losses) - 1 - losses.index(min(losses))


def is_over(state: TrainerState, how: Training) -> bool:
    """Whether all steps are done, or patience is at its end."""
    return state.global_step >= how.steps or looks_since_best(state) >= how.patience


def last_usable(folder: Path) -> TrainerState | None:
    """The last state that is whole, as the best before it is; None where there is none.

    What is later, or damaged, is removed, so that the run goes on as if it had not been.
    """
    found = {step: _whole(path) for step, path in _states(folder).items()}
    whole = {step: state for step, state in found.items() if state is not None}
    last = max((step for step in whole if best_step(whole[step]) in whole), default=0)
    for step, path in _states(folder).items():
        if step > last or step not in whole:
            logger.warning("%s is not whole, or not the best before it: it is left out", path)
            shutil.rmtree(path)
    return whole.get(last)


def state_folder(folder: Path, step: int) -> Path:
    """Where the state after a step lies."""
    return folder / f"checkpoint-{step}"


def keep_best_and_last(folder: Path, best: int) -> None:
    """Removes other states, told by their steps: clocks may have been set back."""
    states = _states(folder)
    kept = {best, *list(states)[-1:]}
    others = [path for step, path in states.items() if step not in kept]
    for path in others[: len(others) - (_KEPT - len(kept))]:
        shutil.rmtree(path, ignore_errors=True)


def load_best(model: Any, folder: Path, best: int) -> None:
    """Puts the best adapters of a run on its model.

    Raises:
        OutputError: they are not there, or damaged.
    """
    place = state_folder(folder, best)
    if not is_whole(place):
        raise OutputError(
            f"{place}, the best state, is damaged or gone: run the same command again, and what is "
            "missing is trained again"
        )
    load_weights(model, place)


def _states(folder: Path) -> dict[int, Path]:
    """By step, in their order; what has another name is not ours."""
    named = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("checkpoint-*"))
    return dict(sorted((int(name[1]), path) for path, name in named if name and path.is_dir()))


def _whole(checkpoint: Path) -> TrainerState | None:
    """Trainer writes its state last; a kill may leave half of that, a power cut half of all."""
    try:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        losses = [*train_losses(state), *(loss for _, loss in held_out_losses(state))]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    is_sound = state_folder(checkpoint.parent, state.global_step) == checkpoint and (
        bool(held_out_losses(state)) and all(map(isfinite, losses))
    )
    return state if is_sound and is_whole(checkpoint) else None
