"""From what a pair holds to what the networks see: values, one-hot labels, edges, padding, augmentation.

Everything here is vectorised and stays on the device of its arguments; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.base import Kind
from stages.models.architecture import DiffAugmentKind, InputSpec, Pix2Pix, Pix2PixHD, uses_edges
from stages.models.layers import Noise


def unit_range(image: Tensor, dtype: torch.dtype = torch.float32, *, kind: Kind = "rgb") -> Tensor:
    """Stored integer amounts (N, C, H, W) of a kind -> [-1, 1], as `stages.images.kinds.normalise` on arrays.

    Floating images are in that range already.
    """
    values = image.to(dtype)
    if image.is_floating_point():
        return values
    match kind:
        case "grey16":
            return values / 32767.5 - 1
        case "lab_ab":
            return (values - 128) / 110
        case _:
            return values / 127.5 - 1


def make_condition(
    source: Tensor,
    instance: Tensor | None,
    *,
    arch: Pix2Pix | Pix2PixHD,
    inputs: InputSpec,
    dtype: torch.dtype = torch.float32,
    kind: Kind = "rgb",
) -> Tensor:
    """The condition (N, condition_channels, H, W) of a source: the image, or one-hot labels; then edges.

    source     (N, C, H, W) image of a kind, or (N, 1, H, W) integer class ids
    instance   (N, 1, H, W) integer ids, where the architecture uses their edges
    """
    if inputs.source == "labels":
        assert inputs.classes is not None
        condition = one_hot(source, inputs.classes, dtype)
    else:
        condition = unit_range(source, dtype, kind=kind)
    if uses_edges(arch, inputs):
        assert instance is not None, "the input spec says that pairs carry instances"
        condition = torch.cat([condition, instance_edges(instance, dtype)], 1)
    return condition


def translate(
    generator: nn.Module, condition: Tensor, style: Tensor | None = None, noise: Noise | None = None
) -> Tensor:
    """Condition (N, C, H, W) and style features (N, F, H, W) -> generated images (N, C_out, H, W) in [-1, 1].

    `noise`: one random source per sample for dropout, in any mode; None: dropout in training mode only.
    """
    image: Tensor = generator(condition if style is None else torch.cat([condition, style], 1), noise)
    return image


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class ids (N, 1, H, W), any integer dtype -> (N, classes, H, W) of zeros and ones.

    Ids outside [0, classes) become all zeros: no device-side assertion. (The shard stage refuses them.)
    """
    ids = torch.arange(classes, device=labels.device, dtype=torch.int32).view(1, classes, 1, 1)
    return (labels.to(torch.int32) == ids).to(dtype)


def instance_edges(instance: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ids (N, 1, H, W) -> (N, 1, H, W): 1 where any 4-neighbour has another id."""
    edges = torch.zeros(instance.shape, dtype=torch.bool, device=instance.device)
    across = instance[..., 1:] != instance[..., :-1]
    edges[..., 1:] |= across
    edges[..., :-1] |= across
    below = instance[..., 1:, :] != instance[..., :-1, :]
    edges[..., 1:, :] |= below
    edges[..., :-1, :] |= below
    return edges.to(dtype)


def padded_size(size: int, *, multiple: int, minimum: int) -> int:
    """The smallest side the generator takes that is not below `size`."""
    return max(-(-size // multiple) * multiple, minimum)


def reflect_to(x: Tensor, height: int, width: int) -> Tensor:
    """(N, C, h, w) -> (N, C, height, width) by reflecting the lower and right border, as often as it takes.

    Unlike `F.pad(mode="reflect")` it takes any integer dtype and any amount, down to images of one pixel.
    """
    for dim, side in ((2, height), (3, width)):
        if x.shape[dim] != side:
            x = x.index_select(dim, reflected(torch.arange(side, device=x.device), x.shape[dim]))
    return x


def reflected(index: Tensor, side: int) -> Tensor:
    """The places, on a side of so many pixels, of the pixels that reflection puts at these places."""
    period = max(2 * (side - 1), 1)
    index = index % period
    return torch.minimum(index, period - index)


# -- differentiable augmentation of what a discriminator sees (Zhao et al. 2020)

TRANSLATION, CUTOUT = 0.125, 0.5
"""The paper's shares of a side."""


@dataclass(frozen=True, slots=True)
class DiffAugment:
    """What is drawn for the N pairs of a micro-batch; None: not augmented so.

    colour        brightness, saturation and contrast of the image, not of its condition: that may be classes
    translation   up to an eighth of each side, 0 behind
    cutout        a square of half of each side becomes 0

    A pair is moved and cut as one. Real and generated image of a pair are augmented alike, so that their
    features can be compared.
    """

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
