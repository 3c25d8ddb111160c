"""What glibc's malloc does with blocks that are freed; other systems do as they please."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Lets malloc keep freed blocks for the next tensor.

    Left alone it gives each large block back to Linux, and every step on a CPU pays for clearing the pages
    anew. Changes no result. (mallopt(3).)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest it takes: up to 32 MiB blocks come from the heap
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)  # of which it gives nothing back under 1 GiB


def give_back() -> None:
    """Returns to Linux what malloc keeps of freed blocks, against `keep_freed_memory`: for when work is done
    whose blocks the next does not need, as encoding before training.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
