"""Prepacked matrices against plain products."""

from __future__ import annotations

import pytest
import torch

from stages.models.fast.products import ROWS, PackedMatrix


@pytest.mark.parametrize("rows", [1, 7, 64, ROWS, ROWS + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_times_a_packed_matrix(rows: int, dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(rows)
    x, matrix, plus = (
        torch.randn(shape, generator=source, dtype=torch.float64)
        for shape in [(rows, 33), (33, 20), (rows, 20)]
    )
    packed, summand = PackedMatrix(matrix.to(dtype)), plus.to(dtype)
    within = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(packed.product(x.to(dtype)).double(), x @ matrix, **within)
    torch.testing.assert_close(
        packed.product(x.to(dtype), plus=summand).double(), x @ matrix + plus, **within
    )
    torch.testing.assert_close(summand.double(), plus, **within)  # only read


def test_bf16_rows_times_a_packed_matrix() -> None:
    x, matrix, plus = (torch.randn(shape).bfloat16() for shape in [(70, 33), (33, 20), (70, 20)])
    packed, exact = PackedMatrix(matrix), x.float() @ matrix.float()
    assert packed.packed == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert packed.product(x).dtype == torch.bfloat16
    within = {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(packed.product(x).float(), exact, **within)
    torch.testing.assert_close(packed.product(x, plus=plus).float(), exact + plus.float(), **within)


def test_it_takes_a_matrix_that_is_a_view() -> None:
    matrix = torch.randn(20, 33).T
    x = torch.randn(5, 33)
    torch.testing.assert_close(PackedMatrix(matrix).product(x), x @ matrix, rtol=1e-4, atol=1e-5)


def test_it_does_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    x, matrix, plus = torch.randn(5, 33), torch.randn(33, 20), torch.randn(5, 20)
    packed = PackedMatrix(matrix)
    assert not packed.packed
    torch.testing.assert_close(packed.product(x), x @ matrix)
    torch.testing.assert_close(packed.product(x, plus=plus), x @ matrix + plus)
