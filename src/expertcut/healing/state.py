"""States of a training run: what is saved, which are kept, and who may go on from one.

The states that a training run leaves: which are kept, and from which it goes on. Each is a folder
`checkpoint-<step>`. What is the best, and how long a run has gone without a better one, is read
from the losses that a state holds, so that a stop loses none of it.
"""

import hashlib
import json
import logging
import random
import re
import shutil
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from expertcut.data import Quiz
from expertcut.documents import Record, load_record
from expertcut.errors import OutputError
from expertcut.evaluation.results import begun, check_same, save_outcome
from expertcut.healing.adapters import load_weights
from expertcut.healing.data import TrainingData
from expertcut.healing.heal_settings import HealSettings
from expertcut.models.load import MoeModel, Source

OPTIMIZER, STEPS, RANDOM = "optimizer.safetensors", "optimizer.json", "random-{rank}.safetensors"
ADAPTERS, ADAPTERS_ASKED = "adapter_model.safetensors", "adapter_config.json"  # as peft has them
logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-([1-9][0-9]*)")
_KEPT = 2  # the best and the last, or the last two
_ASKED_FILE = "asked.json"
_OF_MEMORY = ("micro_batch", "saves_memory")  # how a step is computed, not what it gives


class _Numbers(Record):
    """Of the optimizer and the schedule, what is no tensor; `numbers` by parameter and name."""

    groups: tuple[dict[str, Any], ...]
    numbers: dict[str, dict[str, float]]
    schedule: dict[str, Any]


def save_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Moments as tensors named `<parameter>.<moment>`; groups and the schedule as JSON."""
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
    schedule = _plain(scheduler.state_dict())
    content = {"groups": groups, "numbers": numbers, "schedule": schedule}
    (folder / STEPS).write_text(json.dumps(content, indent=1))


def is_whole(folder: Path) -> bool:
    """Whether all that was saved, and the adapters beside it, can be read."""
    try:
        _numbers(folder)
        json.loads((folder / ADAPTERS_ASKED).read_bytes())
        files = {folder / OPTIMIZER, folder / ADAPTERS, *folder.glob("*.safetensors")}
        return all(load_file(file) for file in files)
    except (OSError, OutputError, SafetensorError, ValueError):
        return False


def _numbers(folder: Path) -> _Numbers:
    return load_record(folder / STEPS, _Numbers, OutputError, "is no state of an optimizer")


def load_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Puts both back to where they were."""
    content = _numbers(folder)
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in load_file(folder / OPTIMIZER).items():
        parameter, name = key.split(".", 1)
        state.setdefault(int(parameter), {})[name] = tensor
    for parameter, numbers in content.numbers.items():
        state.setdefault(int(parameter), {}).update(numbers)
    groups = [
        {**now, **saved}
        for now, saved in zip(optimizer.state_dict()["param_groups"], content.groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict({**scheduler.state_dict(), **content.schedule})


def random_states() -> dict[str, Tensor]:
    """The generators that forward passes may use: torch's of the CPU and of CUDA devices."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Puts the generators back, those that are there."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state, device)


def save_random(folder: Path, rank: int) -> None:
    """The generators of a process."""
    save_file(random_states(), folder / RANDOM.format(rank=rank))


def load_random(folder: Path, rank: int) -> None:
    """Puts the generators back, if they were saved."""
    file = folder / RANDOM.format(rank=rank)
    if file.is_file():
        set_random_states(load_file(file))


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold: numbers, words and lists of them."""
    kinds = (int, float, str, bool, list, tuple, type(None))
    return {key: value for key, value in state.items() if isinstance(value, kinds)}


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


def evaluations_since_best(state: TrainerState) -> int:
    """How often held-out rows were looked at in vain, as EarlyStoppingCallback counts."""
    losses = [loss for _, loss in held_out_losses(state)]
    return len(losses) - 1 - losses.index(min(losses))


def is_over(state: TrainerState, settings: HealSettings) -> bool:
    """Whether all steps are done, or patience is at its end."""
    return state.global_step >= settings.steps or evaluations_since_best(state) >= settings.patience


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


class RunIdentity(Record):
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
        cls,
        moe: MoeModel,
        base: Source | None,
        objective: str,
        asked: HealSettings,
        read: TrainingData,
    ) -> Self:
        """Models and questions by what they hold."""
        whole = asked.recorded()
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


def _rows(read: TrainingData) -> Iterator[object]:
    """Those held out, and those trained on once: how they go on follows from the seed."""
    yield from read.held_out
    for part in read.parts:
        yield from part.shuffled(random.Random(0))


def _scored(read: TrainingData) -> Iterator[object]:
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


def check_resumable(folder: Path, asked: RunIdentity) -> None:
    """That what lies in a working folder was begun by the same run, or nothing does.

    Another --micro-batch and --save-memory are the same run.

    Raises:
        OutputError: it is another's.
    """
    file = folder / _ASKED_FILE
    before = begun(file, RunIdentity)
    if before is None:
        save_outcome(file, asked)
    else:
        training = _without_memory(before.training)  # older files have all of it
        check_same(folder, before.model_copy(update={"training": training}), asked, "healing")


def _without_memory(training: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in training.items() if key not in _OF_MEMORY}
