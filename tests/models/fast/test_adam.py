"""Adam inside the backward pass is Adam."""

from __future__ import annotations

import copy

import torch
from torch import nn

from stages.models.fast.adam import Adam


def adam(network: nn.Module, *, in_backward: bool = True, lr: float = 1e-2) -> Adam:
    return Adam(network.parameters(), lr=lr, betas=(0.5, 0.999), in_backward=in_backward)


def train(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(4):
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        loss = network(x).square().mean()
        if isinstance(optimizer, Adam):
            with optimizer.stepping():
                loss.backward()
            assert all(p.grad is None for p in network.parameters())
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_stepping_in_the_backward_pass_and_after_it_give_the_same_bits() -> None:
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3))
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    outside, inside = adam(first, in_backward=False), adam(second)
    train(first, outside)
    train(second, inside)
    train(third, torch.optim.Adam(third.parameters(), lr=1e-2, betas=(0.5, 0.999)))
    for a, b, c in zip(first.parameters(), second.parameters(), third.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
    assert outside.state_dict()["state"].keys() == inside.state_dict()["state"].keys()


def test_its_state_moves_to_another_one() -> None:
    first = nn.Conv2d(3, 1, 3)
    optimizer = adam(first)
    train(first, optimizer)
    second = copy.deepcopy(first)
    resumed = adam(second, lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(first, optimizer)
    train(second, resumed)
    assert torch.equal(first.weight, second.weight)


def test_restored_moments_have_the_memory_layout_of_their_weights() -> None:
    """A fused optimizer pairs elements by address: in another layout, weights get one another's moments."""
    first = nn.Conv2d(3, 4, 2)
    optimizer = adam(first)
    train(first, optimizer)
    second = copy.deepcopy(first).to(memory_format=torch.channels_last)
    resumed = adam(second)
    resumed.load_state_dict(optimizer.state_dict())
    moments, expected = resumed.state[second.weight], optimizer.state[first.weight]
    assert moments["exp_avg"].stride() == second.weight.stride() != first.weight.stride()
    assert moments["exp_avg"].equal(expected["exp_avg"])


def test_a_rate_that_is_set_holds_from_the_next_update_on() -> None:
    first = nn.Conv2d(3, 1, 3)
    second = copy.deepcopy(first)
    one, other = adam(first, lr=1e-3), adam(second, lr=1.0)
    other.set_rate(1e-3)
    train(first, one)
    train(second, other)
    assert torch.equal(first.weight, second.weight)
    assert one.state_dict()["param_groups"] == other.state_dict()["param_groups"]
