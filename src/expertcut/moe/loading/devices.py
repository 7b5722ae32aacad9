"""Where a model runs: on this process's own device, or spread over several and the CPU."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expertcut.errors import SettingsError

_DEVICE = re.compile(r"cpu|[0-9]{1,4}")
_SIZE = re.compile(r"[0-9]{1,18}|[0-9]{1,9}([.][0-9]{1,9})? ?[KMGT]i?B", re.I)


def find_device(name: str) -> torch.device:
    """The device of an option; of several CUDA devices each local process takes its own.

    Raises:
        SettingsError: it is not to be had.
    """
    try:
        device = torch.device(own_device(name))
        if device.type == "meta":
            raise SettingsError(f"--device {name} holds no weights: take cpu or cuda")
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"--device {name} is not to be had: {error}") from None
    return device


def own_device(name: str) -> str:
    """An option spelled out: `cuda` becomes the device of this process among those of its host."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    n_devices = torch.cuda.device_count() if kind == "cuda" else 0
    # A launcher may show each process its own device only, which is then number 0.
    return f"cuda:{_local_rank() % n_devices}" if n_devices else kind


def _local_rank() -> int:
    """Which of the processes on this host, as torchrun, accelerate or Slurm say it."""
    found = (os.environ.get(name) for name in ("LOCAL_RANK", "SLURM_LOCALID"))
    return int(next((rank for rank in found if rank), 0))


def spread(
    device: str, device_map: str | None, max_memory: str | None, offload: Path | None
) -> Any:
    """Arguments of `from_pretrained` that put a model on more than one device; none without a map.

    Raises:
        SettingsError: options that do not go together.
    """
    if device_map is None:
        if max_memory or offload:
            raise SettingsError("--max-memory and --offload say how to spread: add --device-map")
        return {}
    if device_map != "auto":
        raise SettingsError(f"--device-map {device_map} is unknown: it can be auto")
    if device != "auto":
        raise SettingsError(f"--device-map auto chooses devices: leave out --device {device}")
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise SettingsError(
            "--device-map auto gives one process all devices of its host: start one process a host"
        )
    limits = {} if max_memory is None else {"max_memory": _limits(max_memory)}
    folder = {} if offload is None else {"offload_folder": str(offload)}
    return {"device_map": "auto", **limits, **folder}


def _limits(text: str) -> dict[int | str, str | int]:
    """From `0=20GiB,cpu=60GiB`; what is not named is not used."""
    limits: dict[int | str, str | int] = {}
    for part in text.split(","):
        where, _, size = (piece.strip() for piece in part.partition("="))
        if not _DEVICE.fullmatch(where) or not _SIZE.fullmatch(size):
            raise SettingsError(f"--max-memory {text}: must be like 0=20GiB,cpu=60GiB")
        limits[where if where == "cpu" else int(where)] = int(size) if size.isdigit() else size
    return limits


def runs_on(module: nn.Module) -> torch.device:
    """Where a module computes, also if its weights come there only for that."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return torch.device(next(h.execution_device for h in hooks if hasattr(h, "execution_device")))


def is_on_several(model: Any) -> bool:
    """Whether it is spread over more than one place."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
