"""Every test here runs on a GPU, and is skipped, which it says, where there is none."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def device() -> torch.device:
    """The first GPU."""
    if not torch.cuda.is_available():
        pytest.skip("NOT RUN: needs a GPU")
    return torch.device("cuda", 0)
