"""Every test here runs on a GPU, and is skipped, which it says, where there is none.

`PIXLOOM_PRETENDED_GPU=1` runs them on a pretended GPU that holds data (tests/support/pretended_memory.py),
but for those that ask for `cuda`: what only CUDA has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from stages.models.fast.process import gpu_environment
from tests.support import pretended_memory

os.environ.update(gpu_environment())  # before CUDA starts
PRETENDED = pretended_memory.VARIABLE in os.environ
if PRETENDED:
    from tests.support.pretended_gpu import autocast  # needs more packages than the tests do

    KEPT = [*pretended_memory.register(), *autocast()]


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """The first GPU. Whether the host may wait for it does not outlive a test."""
    if not PRETENDED and not torch.cuda.is_available():
        pytest.skip("NOT RUN: needs a GPU")
    yield torch.device(pretended_memory.DEVICE if PRETENDED else "cuda:0")
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The first GPU, for a test of what only CUDA has."""
    if device.type != "cuda":
        pytest.skip("NOT RUN: needs CUDA")
    return device
