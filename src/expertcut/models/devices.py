"""Devices: which one to run on, how much memory is free there, and out-of-memory errors."""

import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from expertcut.errors import SettingsError

# torch's allocator; what C++ throws; the system; oneDNN, which does not say why; cuBLAS.
_WORDS = (
    *("DefaultCPUAllocator", "bad_alloc", "Cannot allocate memory"),
    *("could not create a primitive", "CUBLAS_STATUS_ALLOC_FAILED"),
)
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
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


def free_bytes(device: torch.device) -> int:
    """What is free on a device; on a CPU also within cgroup limits and `ulimit -v`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = (psutil.virtual_memory().available, *_within_cgroups(), *_within_address_space())
    return max(0, min(limits))


def _within_address_space() -> Iterator[int]:
    if sys.platform == "win32":
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - psutil.Process().memory_info().vms


def _within_cgroups() -> Iterator[int]:
    """For each group that holds this process and has a limit: what is left, file cache included."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, cache = _CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, cache = _CGROUPS / "memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            with suppress(OSError, ValueError):  # not there, not readable, or "max"
                left = int((group / limit).read_text()) - int((group / usage).read_text())
                stat = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                yield left + int(stat.get(cache, 0))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says so, in one of their ways."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def give_back() -> None:
    """Lets go of a failed pass, and gives the system what the C library keeps of it for later.

    Addresses stay taken: where these are what ended, oneDNN, which asks the system itself, may find
    nothing for the smallest pass.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Gives the system what the C library keeps of freed memory for later."""
    with suppress(OSError, AttributeError, TypeError):  # another C library, or another system
        ctypes.CDLL(None).malloc_trim(0)
