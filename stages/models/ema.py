"""The exponential moving average of a generator: a second set of weights that trails the trained one.

Averaged weights usually give better pictures (Yazici et al. 2018). They are evaluated and saved beside the
raw ones.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(slots=True, kw_only=True)
class Ema:
    """The averaged network (in evaluation mode, frozen), and how often it was updated."""

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
        """average += (1 - decay) * (network - average), for what the phase trains; buffers are copied.

        Early on the decay is (1 + n) / (10 + n): the average forgets where it started.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = zip(self.network.parameters(), network.parameters(), strict=True)
        trained: list[tuple[Tensor, Tensor]] = [(mine, new) for mine, new in pairs if new.requires_grad]
        if trained:
            torch._foreach_lerp_([mine for mine, _ in trained], [new for _, new in trained], 1 - decay)
        for mine, new in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(new)
        self.updates += 1
