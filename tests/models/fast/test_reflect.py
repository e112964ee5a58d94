"""Reflection padding that stays channels last: torch's values, its gradient, and the layout both ways."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stages.models.architecture import InputSpec, Pix2PixHD
from stages.models.build import build_generator
from stages.models.fast.accelerate import accelerate
from stages.models.fast.reflect import ReflectingConv, _Reflect


@pytest.mark.parametrize(("height", "width", "padding"), [(5, 7, 1), (4, 9, 3), (8, 8, 3), (2, 3, 1)])
def test_padding_and_its_gradient_are_torchs(height: int, width: int, padding: int) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    found, expected = _Reflect.apply(x, padding), F.pad(x, (padding,) * 4, mode="reflect")
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    up = torch.randn_like(expected)
    (gradient,), (wanted,) = torch.autograd.grad(found, x, up), torch.autograd.grad(expected, x, up)
    torch.testing.assert_close(gradient, wanted)


def test_a_network_for_a_gpu_has_it_and_gives_the_same_image() -> None:
    plain = build_generator(Pix2PixHD(enhancers=1, width=4, downsamplings=2, blocks=1), InputSpec(channels=3))
    network = accelerate(plain, device="cuda")  # its modules are replaced, its weights stay here
    assert any(isinstance(module, ReflectingConv) for module in network.modules())
    x = torch.rand(1, 3, 32, 64)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), plain(x), rtol=1e-4, atol=1e-5)
