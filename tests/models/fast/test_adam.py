"""Adam inside the backward pass is Adam."""

from __future__ import annotations

import copy

import torch
from torch import nn

from stages.models.fast.adam import Adam


def train(network: nn.Module, optimizer: torch.optim.Optimizer, *, inside: bool) -> None:
    for step in range(4):
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        loss = network(x).square().mean()
        if inside:
            assert isinstance(optimizer, Adam)
            with optimizer.stepping_in_backward():
                loss.backward()
        else:
            loss.backward()
            optimizer.step()
        assert all(p.grad is None for p in network.parameters()) or not inside
        optimizer.zero_grad()


def test_stepping_in_the_backward_pass_gives_the_same_bits() -> None:
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3))
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    outside = Adam(first.parameters(), lr=1e-2, betas=(0.5, 0.999))
    inside = Adam(second.parameters(), lr=1e-2, betas=(0.5, 0.999))
    train(first, outside, inside=False)
    train(second, inside, inside=True)
    train(third, torch.optim.Adam(third.parameters(), lr=1e-2, betas=(0.5, 0.999)), inside=False)
    for a, b, c in zip(first.parameters(), second.parameters(), third.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
    assert outside.state_dict()["state"].keys() == inside.state_dict()["state"].keys()


def test_its_state_moves_to_another_one() -> None:
    first = nn.Conv2d(3, 1, 3)
    optimizer = Adam(first.parameters(), lr=1e-2, betas=(0.5, 0.999))
    train(first, optimizer, inside=True)
    second = copy.deepcopy(first)
    resumed = Adam(second.parameters(), lr=1.0, betas=(0.0, 0.0))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(first, optimizer, inside=True)
    train(second, resumed, inside=True)
    assert torch.equal(first.weight, second.weight)
