"""Norms of channels-last images: torch's numbers, in the layout of the input."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stages.models.fast.norms import ChannelsLastBatchNorm, ChannelsLastInstanceNorm, _SmallInstanceNorm


def test_instance_norm_is_the_same_in_both_layouts_and_for_any_batch() -> None:
    x = torch.randn(3, 4, 5, 6)
    expected = F.instance_norm(x)
    for batch in (x, x[:1]):
        for layout in (torch.contiguous_format, torch.channels_last):
            y = ChannelsLastInstanceNorm(4)(batch.contiguous(memory_format=layout))
            torch.testing.assert_close(y, expected[: len(batch)])
            assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("size", [(5, 7), (256, 512)])
def test_channels_last_instance_norm_is_exact_with_its_gradient(size: tuple[int, int]) -> None:
    source = torch.Generator().manual_seed(0)
    far_from_zero = 20 * torch.randn(1, 8, 1, 1, generator=source)
    x = torch.randn(1, 8, *size, generator=source) + far_from_zero
    weight = torch.randn(1, 8, *size, generator=source)
    results = []
    for picture in (x.double(), x.contiguous(memory_format=torch.channels_last)):
        leaf = picture.clone(memory_format=torch.preserve_format).requires_grad_()
        y = F.instance_norm(leaf) if leaf.dtype == torch.float64 else ChannelsLastInstanceNorm(8)(leaf)
        (gradient,) = torch.autograd.grad((y * weight).sum(), leaf)
        results.append((y.detach().double(), gradient.double()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=2e-5)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_at_inference_batch_norm_takes_each_samples_own_statistics(layout: torch.memory_format) -> None:
    norm, x = ChannelsLastBatchNorm(4), torch.randn(3, 4, 5, 6).to(memory_format=layout).requires_grad_()
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.uniform_(-1, 1)
    of_y = torch.randn(3, 4, 5, 6).to(memory_format=layout)
    results = []
    for y in (torch.cat([norm.train()(sample) for sample in x.split(1)]), norm.eval()(x)):
        results.append((y, *torch.autograd.grad((y * of_y).sum(), (x, norm.weight, norm.bias))))
    assert results[1][0].is_contiguous(memory_format=layout)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("affine", [False, True])
def test_the_norm_of_all_samples_together_is_torchs_with_its_gradient(affine: bool) -> None:
    """The way of small samples on a GPU, on a CPU."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, 7, generator=source, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    leaves = [
        x,
        *(torch.randn(4, generator=source, dtype=x.dtype).requires_grad_() for _ in range(2 * affine)),
    ]
    weight, bias = leaves[1:] or (None, None)
    up = torch.randn(3, 4, 5, 7, generator=source, dtype=x.dtype)
    expected = F.instance_norm(x, weight=weight, bias=bias, eps=1e-5)
    found = _SmallInstanceNorm.apply(x, weight, bias, 1e-5)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    wanted = torch.autograd.grad(expected, leaves, up)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, up), wanted)
