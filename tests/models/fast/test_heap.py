"""Freed memory is kept by the process, or given back, where there is glibc."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch

from stages.models.fast import heap


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_or_given_back_as_asked() -> None:
    """Resident memory after a block of 64 MiB was filled and freed."""

    def growth() -> int:
        before = psutil.Process().memory_info().rss
        torch.ones(16 << 20)
        return int(psutil.Process().memory_info().rss - before)

    assert heap.return_freed_memory()
    assert growth() < 8 << 20
    try:
        assert heap.keep_freed_memory()
        assert growth() > 56 << 20
    finally:
        before = psutil.Process().memory_info().rss
        assert heap.return_freed_memory()
    assert before - psutil.Process().memory_info().rss > 56 << 20
