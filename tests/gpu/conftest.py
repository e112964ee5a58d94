"""Every test here runs on a GPU, and is skipped, which it says, where there is none."""

from __future__ import annotations

import os

import pytest
import torch

from stages.models.fast.process import gpu_environment

os.environ.update(gpu_environment())  # before CUDA starts


@pytest.fixture(autouse=True)
def device() -> torch.device:
    """The first GPU."""
    if not torch.cuda.is_available():
        pytest.skip("NOT RUN: needs a GPU")
    return torch.device("cuda", 0)
