"""Freed memory stays with the process, or goes back to the kernel."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch

from stages.models.fast import heap


def resident_bytes() -> int:
    """Memory of this process that the kernel has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_can_be_kept_and_given_back() -> None:
    try:
        assert heap.return_freed_memory()
        before = resident_bytes()
        assert heap.keep_freed_memory()
        torch.ones(32 << 20)  # 128 MiB, freed at once
        assert resident_bytes() - before > 100 << 20
    finally:
        assert heap.return_freed_memory()
    assert resident_bytes() - before < 30 << 20
