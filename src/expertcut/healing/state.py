"""States of a training run: saving, choosing and resuming them.

Each state is a folder `checkpoint-<step>`. The best step and the patience that is left are computed
from the losses in a state, so that an interruption loses neither.
"""

import hashlib
import json
import logging
import random
import re
import shutil
from collections.abc import Iterable
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from expertcut.documents import Record
from expertcut.errors import OutputError
from expertcut.evaluation.results import check_same, load_unfinished
from expertcut.healing.adapters import ADAPTER, without_warning
from expertcut.healing.data import TrainingData
from expertcut.healing.heal_settings import HealSettings
from expertcut.models.load import MoeModel, Source

OPTIMIZER, STEPS = "optimizer.safetensors", "optimizer.json"
ADAPTERS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft has them
logger = logging.getLogger(__name__)

_OF_MEMORY = ("micro_batch", "saves_memory")  # they change how a step is computed, not its result


class _Numbers(Record):
    """Non-tensor state of optimizer and schedule; `numbers` by parameter and name."""

    groups: tuple[dict[str, Any], ...]
    numbers: dict[str, dict[str, float]]
    schedule: dict[str, Any]


def save_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Saves moments as tensors `<parameter>.<moment>`, groups and schedule as JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    for parameter, moments in state["state"].items():
        for name, value in moments.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{name}"] = value.detach().cpu().contiguous()
            else:
                numbers.setdefault(str(parameter), {})[name] = value
    save_file(tensors, folder / OPTIMIZER)
    groups = [_plain(group) for group in state["param_groups"]]
    content = {"groups": groups, "numbers": numbers, "schedule": _plain(scheduler.state_dict())}
    (folder / STEPS).write_text(json.dumps(content, indent=1))


def _is_whole(folder: Path) -> bool:
    """Whether the optimizer's state and the adapters can be read."""
    try:
        _Numbers.load(folder / STEPS, OutputError, "is damaged")
        json.loads((folder / ADAPTER_CONFIG).read_bytes())
        files = {folder / OPTIMIZER, folder / ADAPTERS, *folder.glob("*.safetensors")}
        return all(load_file(file) for file in files)
    except (OSError, OutputError, SafetensorError, ValueError):
        return False


def load_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Restores optimizer and schedule."""
    content = _Numbers.load(folder / STEPS, OutputError, "is not a state of an optimizer")
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in load_file(folder / OPTIMIZER).items():
        parameter, name = key.split(".", 1)
        state.setdefault(int(parameter), {})[name] = tensor
    for parameter, numbers in content.numbers.items():
        state.setdefault(int(parameter), {}).update(numbers)
    both = zip(optimizer.state_dict()["param_groups"], content.groups, strict=True)
    groups = [{**now, **saved} for now, saved in both]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict({**scheduler.state_dict(), **content.schedule})


def random_states() -> dict[str, Tensor]:
    """Torch's random generators of the CPU and of CUDA devices."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Restores the generators of available devices."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state, device)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """The entries that JSON can hold."""
    kinds = (int, float, str, bool, list, tuple, type(None))
    return {key: value for key, value in state.items() if isinstance(value, kinds)}


def train_losses(state: TrainerState) -> tuple[float, ...]:
    """Training loss of every step."""
    return tuple(float(entry["loss"]) for entry in state.log_history if "loss" in entry)


def held_out_losses(state: TrainerState) -> tuple[tuple[int, float], ...]:
    """Held-out losses by step."""
    looks = (entry for entry in state.log_history if "eval_loss" in entry)
    return tuple((int(look["step"]), float(look["eval_loss"])) for look in looks)


def best_step(state: TrainerState) -> int:
    """The first step with the lowest held-out loss."""
    return min(held_out_losses(state), key=lambda look: look[1])[0]


def evaluations_since_best(state: TrainerState) -> int:
    """Evaluations without a better loss, counted as EarlyStoppingCallback does."""
    losses = [loss for _, loss in held_out_losses(state)]
    return len(losses) - 1 - losses.index(min(losses))


def is_over(state: TrainerState, settings: HealSettings) -> bool:
    """Whether all steps are done or patience has run out."""
    return state.global_step >= settings.steps or evaluations_since_best(state) >= settings.patience


def last_usable(folder: Path) -> TrainerState | None:
    """The last sound state whose best state is sound; later and damaged states are removed."""
    paths = _states(folder)
    whole = {step: state for step, path in paths.items() if (state := _sound_state(path))}
    last = max((step for step in whole if best_step(whole[step]) in whole), default=0)
    for step, path in paths.items():
        if step > last or step not in whole:
            logger.warning("%s is damaged, or the best state before it is: it is ignored", path)
            shutil.rmtree(path)
    return whole.get(last)


def state_folder(folder: Path, step: int) -> Path:
    """Folder of the state after a step."""
    return folder / f"checkpoint-{step}"


def keep_best_and_last(folder: Path, best: int) -> None:
    """Removes other states, by step number: clocks may have been set back."""
    states = _states(folder)
    kept = {best, *list(states)[-1:]}
    others = [path for step, path in states.items() if step not in kept]
    for path in others[: len(others) - (2 - len(kept))]:  # two stay
        shutil.rmtree(path, ignore_errors=True)


def load_best(model: Any, folder: Path, best: int) -> None:
    """Loads the best adapters of a run into its model."""
    place = state_folder(folder, best)
    if not _is_whole(place):
        raise OutputError(
            f"{place}, the best state, is damaged or missing: run the same command again to train "
            "the missing steps again"
        )
    with without_warning():
        model.load_adapter(str(place), ADAPTER)


def _states(folder: Path) -> dict[int, Path]:
    """States by step, in order; folders with other names are ignored."""
    pattern = re.compile(r"checkpoint-([1-9][0-9]*)")
    named = ((path, pattern.fullmatch(path.name)) for path in folder.glob("checkpoint-*"))
    return dict(sorted((int(name[1]), path) for path, name in named if name and path.is_dir()))


def _sound_state(checkpoint: Path) -> TrainerState | None:
    """The state of an undamaged checkpoint; Trainer writes it last."""
    try:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        losses = [*train_losses(state), *(loss for _, loss in held_out_losses(state))]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    is_here = state_folder(checkpoint.parent, state.global_step) == checkpoint
    is_sound = is_here and bool(held_out_losses(state)) and all(map(isfinite, losses))
    return state if is_sound and _is_whole(checkpoint) else None


class RunIdentity(Record):
    """Everything that the losses and the scores of a run depend on."""

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
        cls,
        moe: MoeModel,
        base: Source | None,
        objective: str,
        settings: HealSettings,
        data: TrainingData,
    ) -> Self:
        """Models and questions are identified by content."""
        whole = settings.recorded()
        whole["training"] = _without_memory(whole["training"])
        rows = (part.shuffled(random.Random(0)) for part in data.parts)  # one epoch
        used = sorted(line.split()[0] for line in data.hashes)
        scored = [
            None if quiz is None else [(s, quiz.content_hash(s)) for s in quiz.questions]
            for quiz in (data.scored, data.held_out_quiz)
        ]
        return cls(
            checkpoint=moe.source.fingerprint,
            dtype=str(moe.dtype),
            teacher=None if base is None else base.fingerprint,
            objective=objective,
            rows_hash=_hash(chain(data.held_out, *rows)),
            scored_hash=_hash([*scored, data.dropped, used]),
            **{key: whole[key] for key in ("likeliest", "data", "lora", "training")},
        )


def _hash(parts: Iterable[object]) -> str:
    """Hash of the reprs; all parts are dataclasses, strings and numbers."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part!r}\n".encode())
    return digest.hexdigest()[:16]


def check_resumable(folder: Path, own: RunIdentity) -> None:
    """Checks that a working folder is new or of the same run, whatever its use of memory."""
    file = folder / "asked.json"
    before = load_unfinished(file, RunIdentity)
    if before is None:
        own.save(file)
    else:
        training = _without_memory(before.training)  # older files have all of it
        check_same(folder, before.model_copy(update={"training": training}), own, "healing")


def _without_memory(training: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in training.items() if key not in _OF_MEMORY}
