"""The load of a GPU is in the curves."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("ray", reason="NOT RUN: the train stage needs it")

from stages.train import machine_metrics

pytestmark = pytest.mark.gpu


def test_the_load_of_a_gpu_is_measured(cuda: torch.device) -> None:
    assert machine_metrics(cuda)["system/gpu_0_memory_usage_megabytes"] > 0
