"""The state object: learning rates, and moments restored in the layout of their weights."""

from __future__ import annotations

import torch
from torch import nn

from stages.models.gan import learning_rate_at, match_layout


def test_the_rate_is_constant_then_falls_to_zero() -> None:
    rates = [learning_rate_at(epoch, rate=1.0, epochs=2, decay_epochs=2) for epoch in (0, 2, 3, 4, 5)]
    assert rates == [1, 1, 0.5, 0, 0]
    assert learning_rate_at(99, rate=1.0, epochs=2, decay_epochs=0) == 1


def test_restored_moments_have_the_memory_layout_of_their_weights() -> None:
    """A fused optimizer pairs elements by address: in another layout, weights get one another's moments."""
    weight = nn.Parameter(torch.rand(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    optimizer = torch.optim.Adam([weight], fused=True)
    moments = torch.rand(4, 3, 2, 2)
    optimizer.state[weight] = {"step": torch.tensor(1.0), "exp_avg": moments, "exp_avg_sq": moments.clone()}
    match_layout(optimizer)
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert optimizer.state[weight]["exp_avg"].equal(moments)
