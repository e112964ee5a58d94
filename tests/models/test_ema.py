"""The moving average of a generator."""

from __future__ import annotations

import torch
from torch import nn

from stages.models.ema import Ema


def test_it_trails_the_network_and_forgets_its_start() -> None:
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


def test_frozen_weights_are_left_alone_and_buffers_copied() -> None:
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
