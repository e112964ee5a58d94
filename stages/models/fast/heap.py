"""Whether freed memory stays with this process: settings of glibc's allocator, which change speed, no result.

Without torch, so that processes that only move images can have them too.
"""

from __future__ import annotations

import ctypes
import sys

ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""For processes that compute in a thread other than the first, as Ray's do, from their start on.

glibc gives such threads heaps of 64 MiB at most, which it maps and unmaps all the time: 25,000 pages for
eight pictures through a U-Net.
"""

# mallopt's parameters, from glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next allocation. Returns whether it listened.

    By default large blocks go back to the kernel when freed, and their pages are made and zeroed anew at the
    next allocation. Torch frees and allocates every activation and gradient in each step: 16 ms for 40 MB
    measured here, against 1 ms to fill memory that was kept.
    """
    return _mallopt({_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1})


def return_freed_memory(threshold: int = 32 << 20) -> bool:
    """Have blocks above `threshold` bytes given back to the kernel as soon as they are freed.

    32 MiB is where glibc by itself ends up once large blocks were freed (man mallopt: dynamic threshold). A
    smaller one leaves fewer holes between the blocks that stay: less memory, and more time spent on pages.
    """
    done = _mallopt({_MMAP_MAX: 65536, _MMAP_THRESHOLD: threshold, _TRIM_THRESHOLD: 2 * threshold})
    if done:
        ctypes.CDLL(None).malloc_trim(0)
    return done


def _mallopt(values: dict[int, int]) -> bool:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        return False
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in values.items())
