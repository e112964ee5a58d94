"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020): condition and image.

colour        brightness, saturation and contrast of the image; a condition may be classes, without colours
translation   up to an eighth of each side, 0 behind
cutout        a square of half of each side becomes 0

A pair is moved and cut as one. Real and generated image of a pair are augmented alike, so that their features
can be compared. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.models.architecture import DiffAugmentKind

TRANSLATION, CUTOUT = 0.125, 0.5
"""The paper's shares of a side."""


@dataclass(frozen=True, slots=True)
class DiffAugment:
    """What is drawn for the N pairs of a micro-batch; None: not augmented so."""

    factors: Tensor | None
    """(3, N, 1, 1, 1) in [0, 1): brightness, saturation, contrast."""
    shifts: Tensor | None
    """(2, N) pixels: down, right."""
    holes: Tensor | None
    """(2, N): first row, first column."""

    @classmethod
    def draw(cls, kinds: Sequence[DiffAugmentKind], images: Tensor) -> DiffAugment:
        """For images (N, C, H, W), from the default generator of their device."""
        count, device, sides = len(images), images.device, images.shape[2:]

        def integers(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (count,), device=device)

        factors = shifts = holes = None
        if "colour" in kinds:
            factors = torch.rand(3, count, 1, 1, 1, device=device, dtype=images.dtype)
        if "translation" in kinds:
            most = [int(side * TRANSLATION + 0.5) for side in sides]
            shifts = torch.stack([integers(-reach, reach + 1) for reach in most])
        if "cutout" in kinds:
            cuts = [int(side * CUTOUT + 0.5) for side in sides]
            middles = [integers(0, side + 1 - cut % 2) for side, cut in zip(sides, cuts, strict=True)]
            holes = torch.stack([middle - cut // 2 for middle, cut in zip(middles, cuts, strict=True)])
        return cls(factors, shifts, holes)

    def image(self, x: Tensor) -> Tensor:
        """An image (N, C, H, W), its colours first."""
        if self.factors is not None:
            brightness, saturation, contrast = self.factors
            x = x + (brightness - 0.5)
            grey = x.mean(1, keepdim=True)
            x = (x - grey) * (2 * saturation) + grey
            mean = x.mean((1, 2, 3), keepdim=True)
            x = (x - mean) * (contrast + 0.5) + mean
        return self.condition(x)

    def condition(self, x: Tensor) -> Tensor:
        """A condition (N, C, H, W): moved and cut as its image."""
        inside: list[Tensor] = []
        for axis, side in enumerate(x.shape[2:]):
            shape = (-1, 1, side, 1) if axis == 0 else (-1, 1, 1, side)
            place = torch.arange(side, device=x.device)
            if self.shifts is not None:
                origin = (place - self.shifts[axis, :, None]).view(shape)
                x = x.gather(2 + axis, origin.clamp(0, side - 1).expand_as(x))
                x = x * ((origin >= 0) & (origin < side))
            if self.holes is not None:
                row = place - self.holes[axis, :, None]
                inside.append(((row >= 0) & (row < int(side * CUTOUT + 0.5))).view(shape))
        return x * ~(inside[0] & inside[1]) if inside else x
