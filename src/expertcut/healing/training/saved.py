"""The state of a training run as safetensors and JSON; transformers' own is pickled."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertcut.documents import Record, load_record
from expertcut.errors import OutputError

OPTIMIZER, STEPS, RANDOM = "optimizer.safetensors", "optimizer.json", "random-{rank}.safetensors"
ADAPTERS, ADAPTERS_ASKED = "adapter_model.safetensors", "adapter_config.json"  # as peft has them


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
