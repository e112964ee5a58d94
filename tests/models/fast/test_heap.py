"""Freed memory is kept by the process, or given back, where there is glibc."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import psutil
import pytest
import torch

from stages.models.fast import heap


def growths() -> tuple[bool, int, bool, int]:
    """What each setting says, and by how much it lets resident memory grow: 64 MiB filled and freed."""

    def growth() -> int:
        before = psutil.Process().memory_info().rss
        torch.ones(16 << 20)
        return int(psutil.Process().memory_info().rss - before)

    torch.ones(16)  # torch's own memory is there
    return heap.return_freed_memory(), growth(), heap.keep_freed_memory(), growth()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_or_given_back_as_asked() -> None:
    """In a process of its own: holes that other tests left could hold the block."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        returns, little, keeps, much = pool.submit(growths).result(timeout=120)
    assert returns
    assert keeps
    assert little < 8 << 20
    assert much > 56 << 20
