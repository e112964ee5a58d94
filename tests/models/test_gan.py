"""The state object: learning rates, and the moving average of weights."""

from __future__ import annotations

import torch
from torch import nn

from stages.models.gan import Ema, learning_rate_at


def test_the_rate_is_constant_then_falls_to_zero() -> None:
    rates = [learning_rate_at(epoch, rate=1.0, epochs=2, decay_epochs=2) for epoch in (0, 2, 3, 4, 5)]
    assert rates == [1, 1, 0.5, 0, 0]
    assert learning_rate_at(99, rate=1.0, epochs=2, decay_epochs=0) == 1


def test_the_average_trails_the_network_and_forgets_its_start() -> None:
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0)
    ema = Ema.of(network, decay=0.9)
    network.weight.data.fill_(1)
    ema.update(network)
    assert ema.network.weight.item() == torch.tensor(0.9)  # the first decay is 1/10
    for _ in range(200):
        ema.update(network)
    assert abs(ema.network.weight.item() - 1) < 1e-6
    assert ema.updates == 201


def test_the_average_leaves_frozen_weights_alone_and_copies_buffers() -> None:
    network = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    network[0].requires_grad_(False)
    ema = Ema.of(network, decay=0.5)
    before = ema.network[0].weight.clone()
    network[0].weight.data.add_(1)
    network[1].running_mean.fill_(7)
    ema.update(network)
    assert torch.equal(ema.network[0].weight, before)
    assert ema.network[1].running_mean.item() == 7
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())
    assert not ema.network.training
