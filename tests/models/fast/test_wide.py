"""Matrix-product convolutions against torch's own, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.models.fast import wide
from stages.models.fast.accelerate import accelerate
from stages.models.fast.wide import PACKED_FOR_ROWS, PackedMatrix, wide_conv, wide_transposed_conv
from stages.models.layers import Conv

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def double(*shape: int) -> Tensor:
    source = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=source).requires_grad_()


def assert_same(ours: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, expected, **EXACT)
    gradient = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(ours, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient),
        strict=True,
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "size"), [(3, 1, (4, 6)), (3, 1, (2, 2)), (4, 2, (8, 6)), (3, 2, (5, 7))]
)
def test_a_convolution(samples: int, kernel: int, stride: int, size: tuple[int, int]) -> None:
    x, weight = double(samples, 3, *size), double(5, 3, kernel, kernel)
    ours = wide_conv(x, weight, stride=stride, padding=1, reflect=False)
    assert_same(ours, F.conv2d(x, weight, stride=stride, padding=1), (x, weight))
    ours = wide_conv(x, weight, stride=stride, padding=1, reflect=True)
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight, stride=stride)
    assert_same(ours, expected, (x, weight))


@pytest.mark.parametrize(("samples", "kernel", "size"), [(2, 3, (4, 6)), (1, 4, (1, 1)), (2, 4, (3, 2))])
def test_a_transposed_convolution(samples: int, kernel: int, size: tuple[int, int]) -> None:
    x, weight = double(samples, 3, *size), double(3, 5, kernel, kernel)
    expected = F.conv_transpose2d(x, weight, None, 2, 1, kernel % 2)
    assert_same(wide_transposed_conv(x, weight), expected, (x, weight))


def test_its_result_may_be_changed_in_place() -> None:
    x, weight = double(1, 3, 4, 4), double(5, 3, 3, 3)
    y = F.relu(wide_conv(x, weight, stride=1, padding=1, reflect=True), inplace=True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert weight.grad is not None


def test_layers_with_many_channels_and_few_pixels_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, x = Conv(4, 4, 3, padding=1, reflect=True), torch.randn(1, 4, 8, 8)
    expected, conv = plain(x), accelerate(plain, device="cpu")
    monkeypatch.setattr(wide, "MIN_WEIGHTS", 1)
    torch.testing.assert_close(conv(x), expected)
    assert "Add" in str(conv(x).grad_fn)
    monkeypatch.setattr(wide, "MAX_ROWS", 63)
    assert "Convolution" in str(conv(x).grad_fn)


def test_it_follows_autocast() -> None:
    x, weight = torch.randn(1, 4, 4, 4), torch.randn(4, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = wide_conv(x, weight, stride=1, padding=1, reflect=True)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


# -- prepacked matrices against plain products --------------------------------


@pytest.mark.parametrize("rows", [1, 7, 64, PACKED_FOR_ROWS, PACKED_FOR_ROWS + 3])
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
