"""Freed memory is kept where glibc listens."""

from __future__ import annotations

import sys

import pytest
import torch

from stages.models.fast import heap


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_can_be_kept_and_given_back() -> None:
    try:
        assert heap.keep_freed_memory()
        assert torch.ones(3 << 20).sum() == 3 << 20
    finally:
        assert heap.return_freed_memory()
