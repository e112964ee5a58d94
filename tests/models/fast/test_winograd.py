"""Convolutions with fewer multiplications against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.models.fast import winograd
from stages.models.fast.winograd import Filter

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SIZES = [(8, 6), (5, 7), (3, 4), (12, 16), (9, 10)]


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("band", [1, 5, 12, 1000])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_it_computes_convolutions(
    size: tuple[int, int], samples: int, band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "BAND", band)
    x, weight = double(samples, 3, *size), double(5, 3, 3, 3)
    ours = Filter(weight)(x, padding=1)
    torch.testing.assert_close(ours, F.conv2d(x, weight, padding=1), **EXACT)
    ours = Filter(weight)(x, padding=1, reflect=True)
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight)
    torch.testing.assert_close(ours, expected, **EXACT)
