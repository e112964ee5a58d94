"""Frozen convolutions against the plain layers they replace."""

from __future__ import annotations

import pytest
import torch

from stages.models.fast import wide, winograd
from stages.models.fast.frozen import freeze
from stages.models.layers import Conv, TransposedConv


def uses_winograd(module: torch.nn.Module) -> bool:
    """Whether a layer has prepared sums of its weights."""
    return "_filter" in vars(module)


@pytest.mark.parametrize(
    ("layer", "expected_shape"),
    [
        (Conv(4, 6, 4, stride=2, padding=1, bias=False), (2, 6, 4, 3)),
        (Conv(4, 6, 3, padding=1, reflect=True, bias=False), (2, 6, 8, 6)),
        (TransposedConv(4, 6, 4, bias=False), (2, 6, 16, 12)),
        (TransposedConv(4, 6, 3, bias=False), (2, 6, 16, 12)),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_frozen_weights_are_packed_once(
    layer: Conv | TransposedConv, expected_shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide, "MIN_WEIGHTS", 1)
    x = torch.randn(2, 4, 8, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = layer(x)
        assert expected.shape == expected_shape
        frozen = freeze(layer, device="cpu", dtype=torch.float32)
        y = frozen(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert y.is_contiguous(memory_format=torch.channels_last)
        packed = vars(frozen)["_matrix"]
        frozen(x)
        assert vars(frozen)["_matrix"] is packed
        with torch.autocast("cpu", torch.bfloat16):
            assert frozen(x).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
def test_without_gradients_a_few_channels_are_computed_with_the_same_sums(*, bias: bool) -> None:
    torch.manual_seed(0)
    plain = TransposedConv(32, 3, 4, bias=bias).double()
    layer = freeze(plain, device="cpu", dtype=torch.float64)
    x = torch.randn(2, 32, 72, 60, dtype=torch.float64)
    expected = plain(x).detach()
    for layout in (torch.channels_last, torch.contiguous_format):
        with torch.no_grad():
            y = layer.to(memory_format=layout)(x.contiguous(memory_format=layout))
        assert y.is_contiguous(memory_format=torch.channels_last)  # not torch's own layer's result
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (Conv(4, 6, 3, padding=1, reflect=True), (9, 8)),
        (Conv(4, 6, 3, padding=1, bias=False), (8, 8)),
        (Conv(4, 6, 4, stride=2, padding=1), (8, 12)),
        (Conv(4, 6, 4, stride=2, padding=2), (9, 7)),
        (Conv(4, 6, 4, stride=1, padding=1), (8, 8)),
        (Conv(4, 6, 3, stride=2, padding=1), (8, 8)),
        (Conv(4, 6, 7, padding=3, reflect=True), (8, 8)),
        (TransposedConv(4, 6, 4), (7, 5)),
        (TransposedConv(4, 6, 3), (8, 6)),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_layers_of_kernel_3_and_stride_1_use_winograd(
    layer: Conv | TransposedConv, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1)
    monkeypatch.setattr(winograd, "MIN_OUTPUTS", 0)
    x = torch.randn(2, 4, *size).contiguous(memory_format=torch.channels_last)
    frozen = freeze(layer, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        y = frozen(x)
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    kind = layer.kernel_size[0], layer.stride[0], isinstance(layer, Conv)
    assert uses_winograd(frozen) == (kind == (3, 1, True))


def test_layers_of_few_channels_or_pixels_do_not_use_winograd() -> None:
    fewest = winograd.MIN_CHANNELS // 2
    layer, few = (
        freeze(Conv(channels, fewest, 3, padding=1), device="cpu", dtype=torch.float32)
        for channels in (fewest, fewest - 1)
    )
    with torch.no_grad():
        layer(torch.randn(1, fewest, 8, 15))
        few(torch.randn(1, fewest - 1, 16, 16))
        assert not uses_winograd(layer)
        assert not uses_winograd(few)
        layer(torch.randn(1, fewest, 8, 16))
    assert uses_winograd(layer)


def test_gradients_and_autocast_take_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1)
    monkeypatch.setattr(winograd, "MIN_OUTPUTS", 0)
    frozen = freeze(Conv(4, 6, 3, padding=1), device="cpu", dtype=torch.float32)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    frozen(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert frozen(x).dtype == torch.bfloat16
    assert not uses_winograd(frozen)
