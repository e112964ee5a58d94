"""Accelerated networks: the same names, weights and images, in faster modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stages.models.architecture import Architecture, InputSpec, Pix2Pix, Pix2PixHD
from stages.models.build import build_generator
from stages.models.fast import wide, winograd
from stages.models.fast.accelerate import ReflectingConv, _Reflect, accelerate
from stages.models.fast.frozen import FrozenConv, freeze
from stages.models.fast.norms import ChannelsLastBatchNorm, ChannelsLastInstanceNorm
from stages.models.fast.wide import WideConv, WideTransposedConv
from stages.models.layers import Conv, TransposedConv

ARCHITECTURES = [
    Pix2Pix(levels=4, width=4),
    Pix2Pix(levels=4, width=4, norm="instance", upsampling="resize", generator="encoder_decoder"),
    Pix2PixHD(enhancers=1, width=4, downsamplings=2, blocks=2),
]


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of any size take the faster ways."""
    monkeypatch.setattr(wide, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1)
    monkeypatch.setattr(winograd, "MIN_OUTPUTS", 0)


def image() -> torch.Tensor:
    return torch.rand(3, 3, 32, 48).contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("frozen", [None, torch.float32])
def test_images_names_and_weights_stay_the_same(arch: Architecture, frozen: torch.dtype | None) -> None:
    plain = build_generator(arch, InputSpec(channels=3)).eval()
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    network, x = accelerate(plain, device="cpu"), image()
    if frozen is not None:
        network = freeze(plain, device="cpu", dtype=frozen)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), plain(x), rtol=1e-3, atol=1e-4)
    assert list(network.state_dict()) == list(weights)
    for state in (network.state_dict(), plain.state_dict()):
        assert all(torch.equal(value, weights[name]) for name, value in state.items())
    assert not any(isinstance(module, WideConv | WideTransposedConv) for module in plain.modules())
    replaced = (WideConv, WideTransposedConv, ChannelsLastBatchNorm, ChannelsLastInstanceNorm)
    for module in network.modules():
        if isinstance(module, Conv | TransposedConv | nn.BatchNorm2d | nn.InstanceNorm2d):
            assert isinstance(module, replaced)
        assert isinstance(module, FrozenConv) == (frozen is not None and isinstance(module, Conv))


def test_a_network_to_train_has_the_very_parameters_and_a_frozen_one_their_memory() -> None:
    plain = build_generator(ARCHITECTURES[0], InputSpec(channels=3))
    trained = accelerate(plain, device="cpu")
    frozen = freeze(plain, device="cpu", dtype=torch.float32)
    for parameter, same, shared in zip(
        plain.parameters(), trained.parameters(), frozen.parameters(), strict=True
    ):
        assert parameter is same
        assert parameter.data_ptr() == shared.data_ptr()
        assert not shared.requires_grad


def test_other_devices_get_norms_only() -> None:
    network = accelerate(build_generator(ARCHITECTURES[0], InputSpec(channels=3)), device="cuda")
    assert any(isinstance(module, ChannelsLastBatchNorm) for module in network.modules())
    assert not any(isinstance(module, WideConv | WideTransposedConv) for module in network.modules())


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("arch", [ARCHITECTURES[0], ARCHITECTURES[2]])
def test_bf16_weights_are_cast_once_and_multiplied_as_they_are(arch: Architecture) -> None:
    """Sums of them would be too coarse: bf16 layers are packed only."""
    plain = build_generator(arch, InputSpec(channels=3)).eval()
    network, x = freeze(plain, device="cpu", dtype=torch.bfloat16), image()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        difference = (network(x) - plain(x)).abs()
    # Processors round bf16 products at different places: single pixels differ by a few of its steps.
    assert difference.mean() < 0.01
    assert difference.max() < 0.1
    convolutions = [m for m in network.modules() if isinstance(m, Conv | TransposedConv)]
    assert all(module.weight.dtype == torch.bfloat16 for module in convolutions)
    assert any("_matrix" in vars(module) for module in convolutions)
    assert not any("_filter" in vars(module) for module in convolutions)


# -- reflection padding that stays channels last --------------------------------


@pytest.mark.parametrize(("height", "width", "padding"), [(5, 7, 1), (4, 9, 3), (8, 8, 3), (2, 3, 1)])
def test_reflection_padding_and_its_gradient_are_torchs(height: int, width: int, padding: int) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    found, expected = _Reflect.apply(x, padding), F.pad(x, (padding,) * 4, mode="reflect")
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    up = torch.randn_like(expected)
    (gradient,), (wanted,) = torch.autograd.grad(found, x, up), torch.autograd.grad(expected, x, up)
    torch.testing.assert_close(gradient, wanted)


def test_a_network_for_a_gpu_reflects_by_it_and_gives_the_same_image() -> None:
    plain = build_generator(Pix2PixHD(enhancers=1, width=4, downsamplings=2, blocks=1), InputSpec(channels=3))
    network = accelerate(plain, device="cuda")  # its modules are replaced, its weights stay here
    assert any(isinstance(module, ReflectingConv) for module in network.modules())
    x = torch.rand(1, 3, 32, 64)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), plain(x), rtol=1e-4, atol=1e-5)
