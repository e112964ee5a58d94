"""Operators: norms, noise, upsampling."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stages.models.layers import (
    BatchNorm,
    Conv,
    Dropout,
    InstanceNorm,
    ResizeConv,
    TransposedConv,
    half_resolution,
    noise_sources,
    up_conv,
    use_running_statistics,
)


def test_instance_norm_is_the_same_in_both_layouts_and_for_any_batch() -> None:
    x = torch.randn(3, 4, 5, 6)
    expected = F.instance_norm(x)
    for batch in (x, x[:1]):
        for layout in (torch.contiguous_format, torch.channels_last):
            y = InstanceNorm(4)(batch.contiguous(memory_format=layout))
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
        y = F.instance_norm(leaf) if leaf.dtype == torch.float64 else InstanceNorm(8)(leaf)
        (gradient,) = torch.autograd.grad((y * weight).sum(), leaf)
        results.append((y.detach().double(), gradient.double()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=2e-5)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_at_inference_batch_norm_takes_each_samples_own_statistics(layout: torch.memory_format) -> None:
    norm, x = BatchNorm(4), torch.randn(3, 4, 5, 6).to(memory_format=layout).requires_grad_()
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.uniform_(-1, 1)
    of_y = torch.randn(3, 4, 5, 6).to(memory_format=layout)
    results = []
    for y in (torch.cat([norm.train()(sample) for sample in x.split(1)]), norm.eval()(x)):
        results.append((y, *torch.autograd.grad((y * of_y).sum(), (x, norm.weight, norm.bias))))
    assert results[1][0].is_contiguous(memory_format=layout)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_running_averages_can_be_chosen_instead() -> None:
    norm, x = BatchNorm(4).eval(), torch.randn(3, 4, 5, 6)
    use_running_statistics(norm, running=True)
    torch.testing.assert_close(norm(x), x / (1 + norm.eps) ** 0.5)
    use_running_statistics(norm, running=False)
    assert not torch.allclose(norm(x), x)


def test_seeded_dropout_is_a_function_of_each_samples_seed() -> None:
    x = torch.ones(3, 8, 4, 4)
    dropout = Dropout().eval()
    together = dropout(x, noise_sources([5, 6, 7]))
    alone = dropout(x[:1], noise_sources([6]))
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])
    assert set(together.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropout(x), x)


def test_an_inert_bias_changes_nothing() -> None:
    conv = Conv(2, 3, 3, padding=1, inert_bias=True)
    x = torch.randn(1, 2, 5, 5)
    before = conv(x)
    conv.bias.data.fill_(100)
    assert torch.equal(conv(x), before)
    assert not conv.bias.requires_grad


def test_both_upsamplings_double_the_size() -> None:
    x = torch.randn(1, 4, 3, 5)
    for kernel in (3, 4):
        for upsampling in ("transpose", "resize"):
            y = up_conv(4, 2, kernel, upsampling=upsampling)(x)  # type: ignore[arg-type]
            assert y.shape == (1, 2, 6, 10)


@pytest.mark.parametrize("bias", [True, False])
def test_without_gradients_a_few_channels_are_made_with_the_same_sums(*, bias: bool) -> None:
    torch.manual_seed(0)
    layer = TransposedConv(32, 3, 4, bias=bias).double()
    x = torch.randn(2, 32, 72, 60, dtype=torch.float64)
    expected = layer(x).detach()
    for layout in (torch.channels_last, torch.contiguous_format):
        with torch.no_grad():
            made = layer.to(memory_format=layout)(x.contiguous(memory_format=layout))
        assert made.is_contiguous(memory_format=torch.channels_last)  # not torch's own layer's answer
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)


def test_a_resize_convolution_makes_no_checkerboard_of_a_flat_picture() -> None:
    conv = ResizeConv(2, 1)
    y = conv(torch.full((1, 2, 4, 4), 0.7))
    assert (y.max() - y.min()).item() < 1e-5


def test_pooling_does_not_count_the_padding() -> None:
    assert torch.equal(half_resolution(torch.ones(1, 1, 5, 7)), torch.ones(1, 1, 3, 4))
