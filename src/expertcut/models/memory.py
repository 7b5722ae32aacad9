"""How much memory is free, how libraries say that it ended, and how to have some again."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

# torch's allocator; what C++ throws; the system; oneDNN, which does not say why; cuBLAS.
_WORDS = (
    *("DefaultCPUAllocator", "bad_alloc", "Cannot allocate memory"),
    *("could not create a primitive", "CUBLAS_STATUS_ALLOC_FAILED"),
)
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


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
