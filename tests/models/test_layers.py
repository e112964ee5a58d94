"""Operators: norms, noise, upsampling."""

from __future__ import annotations

import torch
from torch import nn

from stages.models.layers import (
    BatchNorm,
    Conv,
    Dropout,
    ResizeConv,
    SynchronisedBatchNorm,
    half_resolution,
    noise_sources,
    synchronise_batch_norms,
    up_conv,
)


def test_at_inference_batch_norm_takes_each_samples_own_statistics() -> None:
    norm, x = BatchNorm(4), torch.randn(3, 4, 5, 6)
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.uniform_(-1, 1)
    alone = torch.cat([norm.train()(sample) for sample in x.split(1)])
    torch.testing.assert_close(norm.eval()(x), alone, rtol=1e-5, atol=1e-5)


def test_synchronised_batch_norms_have_the_parameters_of_those_they_replace() -> None:
    network, x = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm(4)), torch.randn(2, 3, 5, 6)
    before = dict(network.named_parameters())
    expected = network(x)
    statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}
    for buffer, start in zip(network.buffers(), BatchNorm(4).buffers(), strict=True):
        buffer.copy_(start)
    synchronise_batch_norms(network, lambda sums: sums)  # one worker
    assert isinstance(network[1], SynchronisedBatchNorm)
    assert all(parameter is before[name] for name, parameter in network.named_parameters())
    torch.testing.assert_close(network(x), expected)
    torch.testing.assert_close(dict(network.named_buffers()), statistics)


def test_in_bf16_a_synchronised_batch_norm_is_as_exact_as_torchs() -> None:
    network, x = nn.Sequential(BatchNorm(4)), torch.randn(4, 4, 16, 16) + 20
    exact, own = network(x), network(x.bfloat16())
    synchronise_batch_norms(network, lambda sums: sums)
    worst, worst_of_torch = ((y.float() - exact).abs().max() for y in (network(x.bfloat16()), own))
    assert worst < 1.5 * worst_of_torch


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
    conv = Conv(2, 3, 3, padding=1, bias="inert")
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


def test_a_resize_convolution_makes_no_checkerboard_of_a_flat_picture() -> None:
    conv = ResizeConv(2, 1)
    y = conv(torch.full((1, 2, 4, 4), 0.7))
    assert (y.max() - y.min()).item() < 1e-5


def test_pooling_does_not_count_the_padding() -> None:
    assert torch.equal(half_resolution(torch.ones(1, 1, 5, 7)), torch.ones(1, 1, 3, 4))
