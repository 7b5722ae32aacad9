"""How the libraries under a forward pass say that memory ended, and how to have some again."""

import ctypes
import gc
from contextlib import suppress

import torch

# torch's allocator; what C++ throws; the system; oneDNN, which does not say why.
_WORDS = (
    *("DefaultCPUAllocator", "bad_alloc", "Cannot allocate memory"),
    "could not create a primitive",
)


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
    with suppress(OSError, AttributeError, TypeError):  # another C library, or another system
        ctypes.CDLL(None).malloc_trim(0)
