"""Scores computed on a GPU are those of a CPU, also of several images at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics", reason="NOT RUN: it has SSIM")
pytest.importorskip("fsspec", reason="NOT RUN: weights are read by it")

from stages.scoring import metrics
from stages.scoring.lpips import Lpips

pytestmark = pytest.mark.gpu


def test_pixel_scores_are_those_of_a_cpu(device: torch.device) -> None:
    random = np.random.default_rng(0)
    generated, targets = ([random.integers(0, 256, (192, 200, 3), np.uint8) for _ in range(3)] for _ in "ab")
    expected = metrics.pixel_scores_of(generated, targets)
    got = metrics.pixel_scores_of(generated, targets, device.type)
    for one, other in zip(got, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_lpips_is_that_of_a_cpu(device: torch.device) -> None:
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    backbone = {}
    for index, (out, channels, kernel) in shapes.items():
        backbone[f"features.{index}.weight"] = torch.randn(out, channels, kernel, kernel) * 0.05
        backbone[f"features.{index}.bias"] = torch.zeros(out)
    widths = (64, 192, 384, 256, 256)
    linear = {f"lin{index}.model.1.weight": torch.ones(1, width, 1, 1) for index, width in enumerate(widths)}
    network = Lpips("alex", backbone, linear)
    images = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    expected = network(*images)
    got = network.to(device)(*images.to(device)).cpu()
    torch.testing.assert_close(got, expected, rtol=0.02, atol=1e-3)
