"""The exponential moving average of a generator: a second set of weights that trails the trained one.

Averaged weights usually give better images (Yazici et al. 2018). Both are saved; the average is evaluated.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(slots=True, kw_only=True)
class Ema:
    """The averaged network (in evaluation mode, frozen), and the number of its updates."""

    network: nn.Module
    decay: float
    updates: int = 0

    @classmethod
    def of(cls, network: nn.Module, *, decay: float) -> Ema:
        """Start from a copy of the network."""
        average = copy.deepcopy(network).eval()
        average.requires_grad_(requires_grad=False)
        return cls(network=average, decay=decay)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """average += (1 - decay) * (network - average), for trained parameters; buffers are copied.

        Early on the decay is (1 + n) / (10 + n): the average forgets where it started.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = zip(self.network.parameters(), network.parameters(), strict=True)
        trained: list[tuple[Tensor, Tensor]] = [pair for pair in pairs if pair[1].requires_grad]
        if trained:
            averages, weights = zip(*trained, strict=True)
            torch._foreach_lerp_(averages, weights, 1 - decay)
        if buffers := list(network.buffers()):
            torch._foreach_copy_(list(self.network.buffers()), buffers)
        self.updates += 1
