"""Whether freed memory stays with this process: settings of glibc's allocator, for speed; no result changes.

Without torch, so that processes that only move images can use it.
"""

from __future__ import annotations

import ctypes
import sys

ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""Environment for processes that compute in a thread other than the first, as Ray's do, set at their start.

glibc gives such threads heaps of 64 MiB at most, which it maps and unmaps all the time: 25,000 pages for
eight images through a U-Net.
"""

# mallopt's parameters, from glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next allocation. Returns whether it accepted.

    By default large blocks go back to the kernel when freed, and their pages are mapped and zeroed again at
    the next allocation. Torch frees and allocates every activation and gradient in each step: 16 ms for 40 MB
    measured here, against 1 ms to fill memory that the process still has.
    """
    return _mallopt({_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1})  # no mmap; trim above the largest int


def return_freed_memory(threshold: int = 32 << 20) -> bool:
    """Have glibc return blocks above `threshold` bytes to the kernel when freed. Returns whether it accepted.

    32 MiB is glibc's own threshold once large blocks were freed (man mallopt: dynamic threshold). A smaller
    one leaves fewer holes between the blocks in use: less memory, and more time for mapping pages.
    """
    accepted = _mallopt({_MMAP_MAX: 65536, _MMAP_THRESHOLD: threshold, _TRIM_THRESHOLD: 2 * threshold})
    if accepted:
        ctypes.CDLL(None).malloc_trim(0)
    return accepted


def _mallopt(values: dict[int, int]) -> bool:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        return False
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in values.items())
