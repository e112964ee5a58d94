"""A training step as the loop takes it, without the loop."""

from __future__ import annotations

from typing import Any

from stages.models.gan import GanState
from stages.models.step import Batch, Losses, update


def step(gan: GanState, batch: Batch, **options: Any) -> Losses:
    """`update` both networks, then the moving average of the generator's weights."""
    losses = update(gan, batch, **options)
    if gan.ema is not None:
        gan.ema.update(gan.generator)
    return losses
