"""Devices: which one to run on, how much memory is free there, and out-of-memory errors."""

import ctypes
import gc
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from torch import nn

from expertcut.errors import SettingsError

T = TypeVar("T")
# torch's allocator, C++, the system, oneDNN (which gives no reason), cuBLAS.
_OUT_OF_MEMORY = re.compile(
    "DefaultCPUAllocator|bad_alloc|Cannot allocate memory|"
    "could not create a primitive|CUBLAS_STATUS_ALLOC_FAILED"
)
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_SIZE = re.compile(r"[0-9]{1,18}|[0-9]{1,9}([.][0-9]{1,9})? ?[KMGT]i?B", re.I)


def find_device(name: str) -> torch.device:
    """The device of `--device`; each local process takes its own CUDA device."""
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
    """The full name of a device: `cuda` becomes that of this process on its host."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    n_devices = torch.cuda.device_count() if kind == "cuda" else 0
    # Of torchrun and accelerate, or Slurm; they may show a process only its own device, number 0.
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0
    return f"cuda:{int(rank) % n_devices}" if n_devices else kind


def spread(
    device: str, device_map: Literal["auto"] | None, max_memory: str | None, offload: Path | None
) -> Any:
    """Arguments of `from_pretrained` that spread a model over devices; none without a map."""
    if device_map is None:
        if max_memory or offload:
            raise SettingsError("--max-memory and --offload say how to spread: add --device-map")
        return {}
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
    """Parses `0=20GiB,cpu=60GiB`; other devices are not used."""
    limits: dict[int | str, str | int] = {}
    for part in text.split(","):
        where, _, size = (piece.strip() for piece in part.partition("="))
        if not re.fullmatch("cpu|[0-9]{1,4}", where) or not _SIZE.fullmatch(size):
            raise SettingsError(f"--max-memory {text}: must be like 0=20GiB,cpu=60GiB")
        limits[where if where == "cpu" else int(where)] = int(size) if size.isdigit() else size
    return limits


def runs_on(module: nn.Module) -> torch.device:
    """The device that a module runs on, also if its weights are offloaded (layerwise: the CPU)."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    devices = (h.execution_device for h in hooks if hasattr(h, "execution_device"))
    return torch.device(next(devices, "cpu"))


def free_bytes(device: torch.device) -> int:
    """Free memory of a device; on a CPU within cgroup limits and `ulimit -v`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [psutil.virtual_memory().available, *_within_cgroups()]
    if sys.platform != "win32":
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            limits.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(limits))


def _within_cgroups() -> Iterator[int]:
    """The free memory of each limited cgroup of this process, file cache included."""
    for line in _OWN_CGROUPS.read_text().splitlines() if _OWN_CGROUPS.exists() else ():
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
            with suppress(OSError, ValueError):  # missing, unreadable, or "max"
                left = int((group / limit).read_text()) - int((group / usage).read_text())
                stat = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                yield left + int(stat.get(cache, 0))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory, in torch, C++, oneDNN or CUDA."""
    is_told = isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
    return is_told or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def unless_out_of_memory(work: Callable[[], T]) -> T | None:
    """The result of the work; None if memory ran out, whose traceback is gone by then."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None


def give_back() -> None:
    """Frees the memory of a failed pass, also what the C library keeps for later."""
    # The address space stays allocated: under `ulimit -v`, oneDNN may fail on the smallest pass.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Returns freed memory that the C library keeps to the system."""
    with suppress(OSError, AttributeError, TypeError):  # another C library or system
        ctypes.CDLL(None).malloc_trim(0)
