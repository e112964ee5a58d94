"""Convolutions with fewer multiplications against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.models.architecture import Architecture, InputSpec, Pix2Pix, Pix2PixHD
from stages.models.build import build_generator
from stages.models.fast import wide, winograd
from stages.models.fast.winograd import Filter
from stages.models.layers import Conv, TransposedConv, fix_weights, interleaved, over_pixels

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SIZES = [(8, 6), (5, 7), (3, 4), (12, 16), (9, 10)]


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of any size take it, in bands of a few tiles."""
    monkeypatch.setattr(winograd, "MIN_CHANNELS", {2: 1, 3: 1})
    monkeypatch.setattr(winograd, "MIN_OUTPUTS", 0)
    monkeypatch.setattr(winograd, "BAND", 12)


def took_it(module: nn.Module) -> bool:
    """Whether a layer has sums of its weights."""
    return "_filter" in vars(module)


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

    x, weight = double(samples, 3, 2 * size[0], 2 * size[1]), double(5, 3, 4, 4)
    ours = Filter(weight, stride=2)(x, padding=1)
    torch.testing.assert_close(ours, F.conv2d(x, weight, stride=2, padding=1), **EXACT)

    x, weight = double(samples, 3, *size), double(3, 5, 4, 4)
    ours = interleaved(Filter(over_pixels(weight))(x, padding=1))
    torch.testing.assert_close(ours, F.conv_transpose2d(x, weight, None, 2, 1), **EXACT)


LAYERS = [
    (Conv(4, 6, 3, padding=1, reflect=True), (9, 8)),
    (Conv(4, 6, 3, padding=1, bias=False), (8, 8)),
    (Conv(4, 6, 4, stride=2, padding=1), (8, 12)),
    (Conv(4, 6, 4, stride=2, padding=2), (8, 12)),
    (Conv(4, 6, 4, stride=2, padding=1), (9, 7)),
    (Conv(4, 6, 4, stride=1, padding=1), (8, 8)),
    (Conv(4, 6, 3, stride=2, padding=1), (8, 8)),
    (Conv(4, 6, 7, padding=3, reflect=True), (8, 8)),
    (TransposedConv(4, 6, 4), (8, 6)),
    (TransposedConv(4, 6, 4), (7, 5)),
    (TransposedConv(4, 6, 3), (8, 6)),
]


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(("layer", "size"), LAYERS, ids=lambda value: str(value).replace(" ", ""))
def test_layers_of_fixed_weights_give_what_they_gave(
    layer: Conv | TransposedConv, size: tuple[int, int]
) -> None:
    x = torch.randn(2, 4, *size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = layer(x)
        fix_weights(layer)
        y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    strides = (layer.kernel_size[0], layer.stride[0], isinstance(layer, TransposedConv))
    assert took_it(layer) == (strides in {(3, 1, False), (4, 2, False), (4, 2, True)})


@pytest.mark.usefixtures("anywhere")
def test_gradients_and_autocast_are_the_usual_ones() -> None:
    layer, x = Conv(4, 6, 3, padding=1), torch.randn(1, 4, 8, 8)
    fix_weights(layer)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not took_it(layer)


def test_layers_of_few_channels_or_pixels_are_left_as_they_are() -> None:
    fewest = winograd.MIN_CHANNELS[3] // 2
    layer, few = Conv(fewest, fewest, 3, padding=1), Conv(fewest - 1, fewest, 3, padding=1)
    fix_weights(layer)
    fix_weights(few)
    with torch.no_grad():
        layer(torch.randn(1, fewest, 8, 15))
        few(torch.randn(1, fewest - 1, 16, 16))
        assert not took_it(layer)
        assert not took_it(few)
        layer(torch.randn(1, fewest, 8, 16))
    assert took_it(layer)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    "arch",
    [
        Pix2Pix(levels=4, width=4),
        Pix2Pix(levels=4, width=4, norm="instance", upsampling="resize", generator="encoder_decoder"),
        Pix2PixHD(enhancers=1, width=4, downsamplings=2, blocks=2),
    ],
)
def test_a_picture_is_the_same_with_weights_fixed(arch: Architecture) -> None:
    inputs = InputSpec(channels=3)
    network = build_generator(arch, inputs).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(3, 3, 32, 48).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = network(x)
        fix_weights(network)
        torch.testing.assert_close(network(x), expected, rtol=1e-3, atol=1e-4)
    assert any(map(took_it, network.modules()))


@pytest.mark.parametrize(
    "arch",
    [Pix2Pix(levels=4, width=4), Pix2PixHD(enhancers=1, width=4, downsamplings=2, blocks=2)],
)
def test_bf16_weights_are_cast_once_and_multiplied_as_they_are(
    arch: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of them would be too coarse: bf16 layers take no shortcut but the layout."""
    monkeypatch.setattr(wide, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(winograd, "MIN_CHANNELS", {2: 1, 3: 1})
    network = build_generator(arch, InputSpec(channels=3)).eval()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(3, 3, 32, 48).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = network(x)
        fix_weights(network, torch.bfloat16)
        torch.testing.assert_close(network(x), expected, rtol=0, atol=0.03)
    convolutions = [m for m in network.modules() if isinstance(m, Conv | TransposedConv)]
    assert all(module.weight.dtype == torch.bfloat16 for module in convolutions)
    assert any("_matrix" in vars(module) for module in convolutions)
    assert not any(map(took_it, convolutions))
